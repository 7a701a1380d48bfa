#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "error.h"

namespace pliant {

namespace {

constexpr size_t kClasses = 4096;
constexpr float kRange = 40;  // in nats below the likeliest token; what lies deeper is never drawn
constexpr size_t kBlock = 512;  // tokens looked at together, so that the compiler can use vectors

// e^-d for d from 0 to 80 with a relative error below 5e-6: 2^x by its Taylor series around the
// nearest whole exponent.
inline float exp_minus(float d) {
    const float x = d * -1.44269504f;
    const auto whole = static_cast<int32_t>(x - 0.5f);
    const float f = (x - static_cast<float>(whole)) * 0.69314718f;
    const float sum =
        1 + f * (1 + f * (1 / 2.f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f / 720.f)))));
    return sum * std::bit_cast<float>((whole + 127) << 23);
}

// How far tokens are below the likeliest, in nats, and which class that makes. The same for a block
// and for one.
struct Distance {
    float best, per_nat, range, scale;

    // At most 80, so that what follows cannot overflow; also for logits that are not a number.
    float of(float logit) const {
        const float d = (best - logit) * per_nat;
        return d < 80 ? d : 80;
    }
    int32_t class_of(float d) const { return static_cast<int32_t>(d * scale); }
};

// The largest and the smallest number among the logits; the logits that are no number are passed
// over.
std::pair<float, float> extremes(std::span<const float> logits) {
    constexpr float kEnd = std::numeric_limits<float>::infinity();
    constexpr size_t kLanes = 16;
    float high[kLanes], low[kLanes];
    std::fill_n(high, kLanes, -kEnd);
    std::fill_n(low, kLanes, kEnd);
    size_t i = 0;
    for (; i + kLanes <= logits.size(); i += kLanes) {
        for (size_t j = 0; j < kLanes; ++j) {
            const float x = logits[i + j];
            high[j] = x > high[j] ? x : high[j];
            low[j] = x < low[j] ? x : low[j];
        }
    }
    for (; i < logits.size(); ++i) {
        high[0] = logits[i] > high[0] ? logits[i] : high[0];
        low[0] = logits[i] < low[0] ? logits[i] : low[0];
    }
    return {*std::max_element(high, high + kLanes), *std::min_element(low, low + kLanes)};
}

uint64_t splitmix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

void check(const SamplerOptions& o) {
    auto need = [](bool ok, const char* what, double value) {
        if (!ok) throw UsageError(std::string(what) + ", and not " + std::to_string(value));
    };
    need(o.temperature >= 0 && std::isfinite(o.temperature),
         "temperature must be finite and at least 0", o.temperature);
    need(o.top_k >= 0, "top_k must be at least 0", o.top_k);
    need(o.top_p > 0 && o.top_p <= 1, "top_p must be above 0 and at most 1", o.top_p);
    need(o.min_p >= 0 && o.min_p <= 1, "min_p must be from 0 to 1", o.min_p);
    need(o.repetition > 0 && std::isfinite(o.repetition),
         "repetition_penalty must be finite and above 0", o.repetition);
    need(std::isfinite(o.presence), "presence_penalty must be finite", o.presence);
    need(std::isfinite(o.frequency), "frequency_penalty must be finite", o.frequency);
}

size_t in_vocabulary(int32_t id, size_t vocabulary) {
    if (id < 0 || static_cast<size_t>(id) >= vocabulary)
        throw UsageError("token " + std::to_string(id) + " is not one of the " +
                         std::to_string(vocabulary) + " tokens of the vocabulary");
    return static_cast<size_t>(id);
}

// Changes single logits and puts the old values back at the end, in reverse order.
class Overlay {
  public:
    explicit Overlay(std::span<float> logits) : logits_(logits) {}
    ~Overlay() {
        for (size_t i = saved_.size(); i-- > 0;) logits_[saved_[i].first] = saved_[i].second;
    }
    Overlay(const Overlay&) = delete;
    Overlay& operator=(const Overlay&) = delete;

    void set(size_t id, float value) {
        saved_.emplace_back(id, logits_[id]);
        logits_[id] = value;
    }

  private:
    std::span<float> logits_;
    std::vector<std::pair<size_t, float>> saved_;
};

void penalise(Overlay& overlay, std::span<const float> logits, const SamplerOptions& o,
              const SamplerContext& context) {
    if (o.repetition == 1 && o.presence == 0 && o.frequency == 0) return;
    // Every id once, with how often the answer has it: sorted copies of what was said.
    std::vector<int32_t> all(context.history.begin(), context.history.end());
    const size_t prompt = std::min(context.prompt, all.size());
    std::vector<int32_t> answer(all.begin() + static_cast<ptrdiff_t>(prompt), all.end());
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    std::sort(answer.begin(), answer.end());
    for (const int32_t token : all) {
        const size_t id = in_vocabulary(token, logits.size());
        const auto [first, last] = std::equal_range(answer.begin(), answer.end(), token);
        const auto count = static_cast<float>(last - first);
        float value = logits[id];
        value = value > 0 ? value / o.repetition : value * o.repetition;
        if (count > 0) value -= o.presence + o.frequency * count;
        overlay.set(id, value);
    }
}

}  // namespace

double uniform(uint64_t seed, uint64_t position) {
    return static_cast<double>(splitmix(splitmix(seed) ^ splitmix(~position)) >> 11) * 0x1p-53;
}

int32_t Sampler::sample(std::span<float> logits, const SamplerOptions& options,
                        const SamplerContext& context, uint64_t seed, uint64_t position) {
    check(options);
    Overlay overlay(logits);
    for (const auto& [token, add] : context.bias) {
        const size_t id = in_vocabulary(token, logits.size());
        if (std::isnan(add))
            throw UsageError("the bias of token " + std::to_string(token) + " is not a number");
        overlay.set(id, logits[id] + add);
    }
    penalise(overlay, logits, options, context);
    return draw(logits, options, seed, position);
}

int32_t Sampler::draw(std::span<const float> logits, const SamplerOptions& options, uint64_t seed,
                      uint64_t position) {
    const auto [best, lowest] = extremes(logits);
    if (!(best > -std::numeric_limits<float>::infinity()))
        throw EngineError("no token can be drawn: no logit is a number");
    if (options.temperature == 0 || options.top_k == 1 || std::isinf(best))
        return static_cast<int32_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());

    Distance distance{best, 1 / std::max(options.temperature, 1e-6f), kRange, 0};
    if (options.min_p > 0) distance.range = std::min(kRange, -std::log(options.min_p));
    const float widest = std::min(distance.of(lowest), distance.range);
    // The last class takes in what rounding puts at its end.
    if (widest > 0) distance.scale = static_cast<float>(kClasses - 1) / widest;

    // Tokens fall into classes by their distance. Classes are read in order, and only the few in
    // which something is decided are opened and sorted.
    classes_.assign(kClasses, {});
    float d[kBlock], mass[kBlock];
    int32_t index_of[kBlock];
    auto for_blocks = [&](auto&& use) {
        for (size_t start = 0; start < logits.size(); start += kBlock) {
            const size_t count = std::min(kBlock, logits.size() - start);
            for (size_t j = 0; j < count; ++j) {
                d[j] = distance.of(logits[start + j]);
                index_of[j] = distance.class_of(d[j]);
            }
            use(start, count);
        }
    };
    const bool all = options.top_k == 0;
    for_blocks([&](size_t, size_t count) {
        if (all)
            for (size_t j = 0; j < count; ++j) mass[j] = exp_minus(d[j]);
        for (size_t j = 0; j < count; ++j) {
            if (!(d[j] <= distance.range)) continue;
            Class& c = classes_[static_cast<size_t>(index_of[j])];
            ++c.count;
            if (all) c.mass += static_cast<double>(mass[j]);
        }
    });
    // What is kept: all classes before `end`, and the first `part` tokens of class `end`, at least
    // one.
    size_t end = kClasses - 1;
    while (classes_[end].count == 0) --end;
    size_t part = classes_[end].count;
    if (options.top_k > 0) {
        auto room = static_cast<size_t>(options.top_k);
        size_t index = 0;
        while (index < end && classes_[index].count < room) room -= classes_[index++].count;
        end = index;  // not empty: the count is at least the room, or it is the last one
        part = std::min(room, classes_[index].count);
    }
    if (!all) {  // masses only of what is left
        for_blocks([&](size_t, size_t count) {
            for (size_t j = 0; j < count; ++j) {
                if (d[j] <= distance.range && index_of[j] <= static_cast<int32_t>(end))
                    classes_[static_cast<size_t>(index_of[j])].mass +=
                        static_cast<double>(exp_minus(d[j]));
            }
        });
    }

    // The tokens of a class from the likeliest on, equals by id.
    auto open = [&](size_t index) {
        members_.clear();
        for_blocks([&](size_t start, size_t count) {
            for (size_t j = 0; j < count; ++j) {
                if (index_of[j] == static_cast<int32_t>(index) && d[j] <= distance.range)
                    members_.push_back(static_cast<int32_t>(start + j));
            }
        });
        std::sort(members_.begin(), members_.end(), [&](int32_t a, int32_t b) {
            const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
            return x > y || (x == y && a < b);
        });
    };
    auto mass_of = [&](int32_t id) {
        return static_cast<double>(exp_minus(distance.of(logits[static_cast<size_t>(id)])));
    };
    double total = 0;
    for (size_t index = 0; index < end; ++index) total += classes_[index].mass;
    if (part == classes_[end].count) {
        total += classes_[end].mass;
    } else {
        open(end);
        for (size_t i = 0; i < part; ++i) total += mass_of(members_[i]);
    }
    // Where the sum of the masses in order first reaches `target`: a class, which is left open, and
    // a place in it. By rounding the target may lie beyond the end; then it is the last token kept.
    struct Place {
        size_t index, member;
        double sum;  // with the token itself
    };
    auto reach = [&](double target) {
        double sum = 0;
        size_t index = 0;
        while (index < end && (classes_[index].count == 0 || sum + classes_[index].mass < target))
            sum += classes_[index++].mass;
        open(index);
        const size_t count = index == end ? part : members_.size();
        for (size_t i = 0;; ++i) {
            sum += mass_of(members_[i]);
            if (sum >= target || i + 1 == count) return Place{index, i, sum};
        }
    };
    if (options.top_p < 1) {
        const Place cut = reach(static_cast<double>(options.top_p) * total);
        end = cut.index;
        part = cut.member + 1;
        total = cut.sum;
    }
    return members_[reach(uniform(seed, position) * total).member];
}

}  // namespace pliant
