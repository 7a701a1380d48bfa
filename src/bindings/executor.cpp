#include "../core/executor.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <cmath>
#include <memory>
#include <new>
#include <optional>

#include "../core/error.h"
#include "bindings.h"

namespace nb = nanobind;

namespace pliant {
namespace {

template <typename T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
T get(const nb::dict& dict, const char* key) {
    if (!dict.contains(key))
        throw FormatError(std::string("model: the key '") + key + "' is missing");
    T value{};
    if (!nb::try_cast<T>(dict[key], value))
        throw FormatError(std::string("model: '") + key + "' is not of the right type");
    return value;
}

float get_cap(const nb::dict& dict, const char* key) {
    if (!dict.contains(key) || dict[key].is_none()) return 0.0f;
    return get<float>(dict, key);
}

ModelSpec model_from(const nb::dict& d) {
    ModelSpec m;
    m.hidden = get<int>(d, "hidden");
    m.layers = get<int>(d, "layers");
    m.heads = get<int>(d, "heads");
    m.kv_heads = get<int>(d, "kv_heads");
    m.head_dim = get<int>(d, "head_dim");
    m.ffn = get<int>(d, "ffn");
    m.vocab = get<int>(d, "vocab");
    m.context = get<int>(d, "context");
    m.norm_eps = get<float>(d, "norm_eps");
    m.tied = get<bool>(d, "tied");
    m.embed_scale = get<float>(d, "embed_scale");
    m.attn_scale = get<float>(d, "attn_scale");
    m.attn_softcap = get_cap(d, "attn_softcap");
    m.logit_softcap = get_cap(d, "logit_softcap");
    const std::string activation = get<std::string>(d, "activation");
    if (activation == "silu")
        m.activation = Activation::kSilu;
    else if (activation == "gelu_tanh")
        m.activation = Activation::kGeluTanh;
    else if (activation == "gelu")
        m.activation = Activation::kGelu;
    else
        throw ModelError("the activation '" + activation + "' is not supported");
    for (nb::handle item : get<nb::sequence>(d, "ropes")) {
        const nb::dict rope = nb::cast<nb::dict>(item);
        m.ropes.push_back({get<std::vector<float>>(rope, "inv_freq"), get<float>(rope, "scale")});
    }
    m.layer_rope = get<std::vector<int>>(d, "layer_rope");
    m.layer_window = get<std::vector<int>>(d, "layer_window");
    return m;
}

// IEEE half to float, for the scales of rows.
float from_half(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float value = exponent == 0
                            ? std::ldexp(static_cast<float>(mantissa), -24)
                            : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return h & 0x8000 ? -value : value;
}

// A result as a NumPy array [rows][columns], which owns it.
// Results of many rows are mapped, so that they go back to the kernel when they are dropped: what
// malloc keeps of them would belong to nobody. Those of few rows come again with the next step.
struct Drop {
    size_t mapped = 0;
    void operator()(float* values) const {
        if (mapped > 0)
            munmap(values, mapped);
        else
            delete[] values;
    }
};
using Values = std::unique_ptr<float[], Drop>;

Values room(size_t rows, int columns) {
    constexpr size_t kFewRows = 32;
    const size_t count = std::max<size_t>(rows * static_cast<size_t>(columns), 1);
    if (rows <= kFewRows) return Values(new float[count]);
    const size_t bytes = count * sizeof(float);
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    return Values(static_cast<float*>(data), Drop{bytes});
}

nb::object as_array(Values values, size_t rows, size_t columns) {
    float* data = values.get();
    nb::capsule owner(new Values(std::move(values)),
                      [](void* p) noexcept { delete static_cast<Values*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, {rows, columns}, owner));
}

std::vector<Piece> pieces_from(const std::vector<int>& sequences, const std::vector<int>& counts,
                               const std::vector<int>& want, const Array1<int32_t>& tokens) {
    if (sequences.size() != counts.size() || counts.size() != want.size())
        throw UsageError("step: seqs, counts and want must have one length");
    std::vector<Piece> pieces;
    size_t total = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
        if (counts[i] < 1 || want[i] < 0 || want[i] > 2)
            throw UsageError("step: a count must be positive and a want 0, 1 or 2");
        pieces.push_back({sequences[i], counts[i], static_cast<Want>(want[i])});
        total += static_cast<size_t>(counts[i]);
    }
    if (tokens.shape(0) != total)
        throw UsageError("step: " + std::to_string(tokens.shape(0)) +
                         " tokens, but the counts add up to " + std::to_string(total));
    return pieces;
}

nb::object step_logits(Executor& self, const std::vector<int>& sequences,
                       const std::vector<int>& counts, const Array1<int32_t>& tokens,
                       const std::vector<int>& want, bool whole) {
    const std::vector<Piece> pieces = pieces_from(sequences, counts, want, tokens);
    const size_t rows = Executor::logit_rows(pieces);
    Values logits = room(rows > 0 ? rows + 1 : 0, self.model().vocab);
    bool ended;
    {
        nb::gil_scoped_release release;
        ended = self.step(pieces, tokens.data(), logits.get(), nullptr, whole);
    }
    if (!ended) return nb::none();
    return as_array(std::move(logits), rows, static_cast<size_t>(self.model().vocab));
}

nb::object step_states(Executor& self, const std::vector<int>& sequences,
                       const std::vector<int>& counts, const Array1<int32_t>& tokens, bool whole) {
    std::vector<Piece> pieces =
        pieces_from(sequences, counts, std::vector<int>(counts.size(), 0), tokens);
    for (Piece& piece : pieces) piece.want = Want::kStates;
    const size_t rows = tokens.shape(0);
    Values states = room(rows, self.model().hidden);
    bool ended;
    {
        nb::gil_scoped_release release;
        ended = self.step(pieces, tokens.data(), nullptr, states.get(), whole);
    }
    if (!ended) return nb::none();
    return as_array(std::move(states), rows, static_cast<size_t>(self.model().hidden));
}

// UsageError unless `bytes` is what a stored page has of the rungs behind `before`, up to `rungs`.
void check_stored(const Executor& self, int rungs, bool whole, int before, size_t bytes) {
    const KvCache& kv = self.kv;
    if (rungs < 0 || rungs > std::max(kv.ladder.rungs(), 0) || (before > 0 && rungs <= before))
        throw UsageError("there is no KV page of " + std::to_string(rungs) + " rungs");
    const uint64_t due =
        kv.stored_bytes(rungs, whole) - (before > 0 ? kv.stored_bytes(before, whole) : 0);
    if (bytes != due) throw UsageError("this takes " + std::to_string(due) + " bytes of a KV page");
}

}  // namespace

void init_executor(nb::module_& module) {
    using Locations = std::vector<std::tuple<int, uint64_t, uint64_t, uint32_t>>;
    nb::class_<Executor>(module, "Executor", "The decoder; see src/core/executor.h.")
        .def(
            "__init__",
            [](Executor* self, const nb::dict& model, int threads, const std::string& isa,
               int chunk) { new (self) Executor(model_from(model), threads, isa, chunk); },
            nb::arg("model"), nb::kw_only(), nb::arg("threads"), nb::arg("isa") = "auto",
            nb::arg("chunk") = 128)
        .def("set_vector",
             [](Executor& self, const std::string& name, const Array1<float>& values) {
                 self.set_vector(name, values.data(), values.shape(0));
             })
        .def("set_plain",
             [](Executor& self, const std::string& name, const Array2<float>& w) {
                 self.set_plain(name, w.data(), false, static_cast<int>(w.shape(0)),
                                static_cast<int>(w.shape(1)));
             })
        .def("set_plain",
             [](Executor& self, const std::string& name, const Array2<uint16_t>& w) {
                 self.set_plain(name, w.data(), true, static_cast<int>(w.shape(0)),
                                static_cast<int>(w.shape(1)));
             })
        .def("set_tree",
             [](Executor& self, const Array1<float>& levels, const Array1<float>& steps) {
                 if (levels.shape(0) != 510 || steps.shape(0) != 16)
                     throw FormatError("a tree has 510 levels and 16 scale steps");
                 self.weights.levels.build(levels.data(), steps.data());
             })
        .def(
            "add_coded",
            [](Executor& self, const std::string& name, int rows, int columns,
               const std::vector<int>& blocks, const Array1<uint16_t>& order,
               const std::optional<Array1<uint32_t>>& row_order, const Array1<uint16_t>& row_scale,
               const Array2<float>& group_scale) {
                const size_t groups = (static_cast<size_t>(columns) + 63) / 64;
                if (rows < 1 || columns < 1 || row_scale.shape(0) != static_cast<size_t>(rows) ||
                    (row_order && row_order->shape(0) != static_cast<size_t>(rows)) ||
                    group_scale.shape(0) != blocks.size() || group_scale.shape(1) != groups)
                    throw FormatError("'" + name + "': scales or orders of a wrong shape");
                std::vector<float> scale(static_cast<size_t>(rows));
                for (size_t r = 0; r < scale.size(); ++r) scale[r] = from_half(row_scale.data()[r]);
                self.add_coded(name, rows, columns, blocks,
                               std::vector<uint16_t>(order.data(), order.data() + order.shape(0)),
                               row_order ? row_order->data() : nullptr, scale.data(),
                               group_scale.data());
            },
            nb::arg("name"), nb::arg("rows"), nb::arg("columns"), nb::arg("blocks"),
            nb::arg("order"), nb::arg("row_order").none(), nb::arg("row_scale"),
            nb::arg("group_scale"))
        .def("set_ladder",
             [](Executor& self, const Array1<uint32_t>& units, const std::vector<uint32_t>& plies,
                const std::vector<uint64_t>& bytes) {
                 self.weights.set_ladder({units.data(), units.data() + units.shape(0)}, plies,
                                         bytes);
             })
        .def("set_kv_ladder",
             [](Executor& self, const Array1<uint32_t>& units, const std::vector<uint32_t>& plies,
                const Array1<float>& thresholds) {
                 if (thresholds.shape(0) != 255) throw FormatError("a tree has 255 thresholds");
                 self.kv.ladder.set({units.data(), units.data() + units.shape(0)}, plies,
                                    thresholds.data());
             })
        .def("set_kv_turn",
             [](Executor& self, int layer, int head, bool value, const Array1<float>& mean,
                const Array1<float>& scale, const Array1<uint16_t>& order) {
                 const size_t count = static_cast<size_t>(self.model().head_dim);
                 if (mean.shape(0) != count || scale.shape(0) != count || order.shape(0) != count)
                     throw FormatError("a turn of keys or values is not of the head's channels");
                 self.kv.ladder.set_turn(layer, head, value, mean.data(), scale.data(),
                                         order.data());
             })
        .def("finish", &Executor::finish)
        .def_prop_ro("rungs", [](const Executor& self) { return self.weights.rungs(); })
        .def_prop_ro("read_rungs_count",
                     [](const Executor& self) { return self.weights.read_rungs(); })
        .def_prop_ro("resident_rungs",
                     [](const Executor& self) { return self.weights.published_rungs(); })
        .def_prop_ro("arena_bytes", [](const Executor& self) { return self.weights.arena_bytes(); })
        .def("overtake", [](Executor& self, uint64_t ticket) { self.weights.overtake(ticket); })
        .def(
            "read_rungs",
            [](Executor& self, const Locations& locations, std::optional<int> first, int goal,
               uint64_t ticket, std::optional<int> threads, bool direct, double share) {
                std::vector<RungSource> sources;
                for (const auto& [fd, offset, bytes, crc] : locations)
                    sources.push_back({fd, offset, bytes, crc});
                if (!(share > 0.0)) throw UsageError("a share of the processors must be above 0");
                if (share < 1.0) self.duty().allow(share);
                const Reading how{ticket, goal, threads.value_or(self.threads()), direct,
                                  share < 1.0 ? &self.duty() : nullptr};
                nb::gil_scoped_release release;
                return self.weights.read(first.value_or(self.weights.read_rungs()), sources, how);
            },
            nb::arg("locations"), nb::kw_only(), nb::arg("first") = nb::none(), nb::arg("goal") = 0,
            nb::arg("ticket") = UINT64_MAX, nb::arg("threads") = nb::none(),
            nb::arg("direct") = false, nb::arg("share") = 1.0)
        .def(
            "discard", [](Executor& self, int rungs) { self.weights.discard(rungs); },
            nb::arg("rungs"), nb::call_guard<nb::gil_scoped_release>())
        .def(
            "publish", [](Executor& self, int rungs) { self.weights.publish(rungs); },
            nb::arg("rungs"), nb::call_guard<nb::gil_scoped_release>())
        .def("depths",
             [](const Executor& self) {
                 const std::vector<uint8_t> depths = self.weights.depths();
                 uint8_t* data = new uint8_t[std::max<size_t>(depths.size(), 1)];
                 std::copy(depths.begin(), depths.end(), data);
                 nb::capsule owner(data,
                                   [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
                 return nb::cast(
                     nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(data, {depths.size()}, owner));
             })
        .def_prop_ro("kv_page_tokens", [](const Executor&) { return kPageTokens; })
        .def_prop_ro("kv_page_bytes", [](const Executor& self) { return self.kv.page_bytes(); })
        .def_prop_ro("kv_local_age", [](const Executor& self) { return self.kv.local_age(); })
        .def_prop_ro("kv_global_bytes",
                     [](const Executor& self) {
                         std::vector<uint64_t> bytes{self.kv.page_bytes(false)};
                         for (int i = 1; i <= self.kv.ladder.rungs(); ++i)
                             bytes.push_back(self.kv.ladder.bytes(i, false));
                         return bytes;
                     })
        .def_prop_ro("kv_pages_total", [](const Executor& self) { return self.kv.pages_total(); })
        .def_prop_ro("kv_pages_used", [](const Executor& self) { return self.kv.pages_used(); })
        .def_prop_ro("kv_used_bytes", [](const Executor& self) { return self.kv.used_bytes(); })
        .def_prop_ro("kv_rung_bytes",
                     [](const Executor& self) {
                         std::vector<uint64_t> bytes;
                         for (int i = 0; i <= self.kv.ladder.rungs(); ++i)
                             bytes.push_back(self.kv.ladder.bytes(i));
                         return bytes;
                     })
        .def(
            "set_kv_ages",
            [](Executor& self, const std::vector<uint8_t>& seen, const std::vector<uint8_t>& kept,
               std::optional<int> whole) { self.kv.set_ages(seen, kept, whole.value_or(-1)); },
            nb::arg("seen"), nb::arg("kept"), nb::arg("whole") = nb::none(),
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "limit_kv",
            [](Executor& self, uint64_t bytes) {
                self.kv.set_limit(bytes);
                self.kv.fit();
            },
            nb::arg("size"), nb::call_guard<nb::gil_scoped_release>())
        .def(
            "kv_ages",
            [](const Executor& self, const std::vector<int>& seqs, const std::vector<int>& tokens) {
                if (seqs.size() != tokens.size())
                    throw UsageError("each sequence needs a number of tokens");
                const KvCache::Ages ages = self.kv.ages(seqs, tokens);
                return std::make_tuple(ages.full, ages.partial);
            },
            nb::arg("seqs"), nb::arg("tokens"))
        .def(
            "kv_usable",
            [](const Executor& self, const std::vector<int>& pages) {
                return self.kv.usable(pages);
            },
            nb::arg("pages"))
        .def(
            "kv_bytes",
            [](const Executor& self, const std::vector<int>& pages) {
                self.kv.check_used(pages);
                uint64_t total = 0;
                for (int page : pages) total += self.kv.bytes(page);
                return total;
            },
            nb::arg("pages"))
        .def(
            "code_newest", [](Executor& self, bool on) { self.kv.code_newest = on; }, nb::arg("on"))
        .def(
            "page_rungs",
            [](const Executor& self, const std::vector<int>& pages) {
                self.kv.check_used(pages);
                std::vector<int> rungs;
                for (int page : pages)
                    rungs.push_back(self.kv.coded(page) ? self.kv.rungs(page) : 0);
                return rungs;
            },
            nb::arg("pages"))
        .def(
            "page_whole",
            [](const Executor& self, const std::vector<int>& pages) {
                self.kv.check_used(pages);
                std::vector<bool> whole;
                for (int page : pages) whole.push_back(self.kv.whole(page));
                return whole;
            },
            nb::arg("pages"))
        .def(
            "shallow",
            [](Executor& self, int page, int rungs, bool whole) {
                return self.kv.shallow(page, rungs, whole);
            },
            nb::arg("page"), nb::arg("rungs"), nb::arg("whole") = true)
        .def(
            "reserve_kv", [](Executor& self, int pages) { self.kv.reserve(pages); },
            nb::arg("pages"))
        .def("open_sequence", [](Executor& self) { return self.kv.open(); })
        .def(
            "close_sequence", [](Executor& self, int seq) { self.kv.close(seq); }, nb::arg("seq"))
        .def(
            "length", [](const Executor& self, int seq) { return self.kv.length(seq); },
            nb::arg("seq"))
        .def(
            "truncate",
            [](Executor& self, int seq, int length) { return self.kv.truncate(seq, length); },
            nb::arg("seq"), nb::arg("length"))
        .def(
            "pages", [](const Executor& self, int seq) { return self.kv.pages(seq); },
            nb::arg("seq"))
        .def(
            "adopt_pages",
            [](Executor& self, int seq, const std::vector<int>& pages) {
                self.kv.adopt(seq, pages);
            },
            nb::arg("seq"), nb::arg("pages"))
        .def(
            "hold_pages",
            [](Executor& self, const std::vector<int>& pages) { self.kv.hold(pages); },
            nb::arg("pages"))
        .def(
            "drop_pages",
            [](Executor& self, const std::vector<int>& pages) { self.kv.drop(pages); },
            nb::arg("pages"))
        .def(
            "trim_kv", [](Executor& self) { return self.kv.trim(); },
            nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("kv_stored_bytes",
                     [](const Executor& self) {
                         std::vector<std::vector<uint64_t>> bytes(2);
                         for (const bool whole : {false, true})
                             for (int i = 0; i <= std::max(self.kv.ladder.rungs(), 0); ++i)
                                 bytes[whole].push_back(self.kv.stored_bytes(i, whole));
                         return bytes;
                     })
        .def(
            "take_page",
            [](const Executor& self, int page,
               nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& into) {
                self.kv.check_used({page});
                check_stored(self, self.kv.coded(page) ? self.kv.rungs(page) : 0,
                             self.kv.whole(page), 0, into.shape(0));
                self.kv.store(page, into.data());
            },
            nb::arg("page"), nb::arg("into"))
        .def(
            "put_page",
            [](Executor& self, int sequence, int tokens, const Array1<uint8_t>& from, int rungs,
               bool whole) {
                check_stored(self, rungs, whole, 0, from.shape(0));
                self.kv.append(sequence, tokens, rungs, whole, from.data());
            },
            nb::arg("seq"), nb::arg("tokens"), nb::arg("from_"), nb::arg("rungs") = 0,
            nb::arg("whole") = true)
        .def(
            "deepen_page",
            [](Executor& self, int page, const Array1<uint8_t>& from, int rungs, bool whole) {
                self.kv.check_used({page});
                check_stored(self, rungs, whole, self.kv.coded(page) ? self.kv.rungs(page) : 0,
                             from.shape(0));
                self.kv.deepen(page, rungs, from.data(), whole);
            },
            nb::arg("page"), nb::arg("from_"), nb::arg("rungs"), nb::arg("whole") = true)
        .def("step", &step_logits, nb::arg("seqs"), nb::arg("counts"), nb::arg("tokens"),
             nb::arg("want"), nb::kw_only(), nb::arg("whole") = true)
        .def("states", &step_states, nb::arg("seqs"), nb::arg("counts"), nb::arg("tokens"),
             nb::kw_only(), nb::arg("whole") = true)
        .def("hurry", &Executor::hurry, nb::arg("on"))
        .def_prop_ro("isa", &Executor::isa)
        .def_prop_ro("threads", &Executor::threads)
        .def("memory", [](const Executor& self) {
            return std::map<std::string, uint64_t>{{"weights", self.weights.arena_bytes()},
                                                   {"kv", self.kv.touched_bytes()},
                                                   {"activations", self.activation_bytes()},
                                                   {"base", self.base_bytes()}};
        });
}

}  // namespace pliant
