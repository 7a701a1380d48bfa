// Python: pliant._core.sample.

#include "../core/sampler.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace pliant {
namespace {

using Logits = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int32_t sample(const Logits& logits, float temperature, int32_t top_k, float top_p, float min_p,
               uint64_t seed, uint64_t position, float repetition, float presence, float frequency,
               const nb::typed<nb::object, Ids>& history, size_t prompt,
               const std::vector<std::pair<int32_t, float>>& bias, const std::string& isa) {
    SamplerOptions options{temperature, top_k, top_p, min_p, repetition, presence, frequency};
    SamplerContext context;
    Ids ids;
    if (!history.is_none()) {
        ids = nb::cast<Ids>(history);
        context.history = {ids.data(), ids.size()};
    }
    context.prompt = prompt;
    context.bias = bias;
    const std::span<float> values(logits.data(), logits.size());
    nb::gil_scoped_release free;
    if (isa != "auto") return Sampler(isa).sample(values, options, context, seed, position);
    thread_local Sampler sampler(isa);
    return sampler.sample(values, options, context, seed, position);
}

}  // namespace

void init_sampler(nb::module_& m) {
    m.def(
        "sample", &sample, "logits"_a.noconvert(), nb::kw_only(), "temperature"_a = 0.0f,
        "top_k"_a = 0, "top_p"_a = 1.0f, "min_p"_a = 0.0f, "seed"_a = 0, "position"_a = 0,
        "repetition"_a = 1.0f, "presence"_a = 0.0f, "frequency"_a = 0.0f, "history"_a = nb::none(),
        "prompt"_a = 0, "bias"_a = std::vector<std::pair<int32_t, float>>(), "isa"_a = "auto",
        "Draw a token id from float32 [vocabulary], which must be writable: penalties are applied\n"
        "in place and taken back. `history` is int32 [tokens] of prompt and answer, the answer\n"
        "from `prompt` on; `bias` pairs of id and addition.");
}

}  // namespace pliant
