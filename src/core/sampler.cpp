#include "sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <string>

#include "error.h"

namespace pliant {

namespace {

// Distances in nats below the likeliest token. First comes the mass of all tokens up to each of
// these; only the tokens between two of them are then looked at one by one. What lies beyond the
// last one is never drawn.
using Edges = std::array<float, kLogitEdges>;
constexpr Edges kEdges = {3, 5, 7, 9, 11, 13, 16, 40};

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

// How many of the likeliest tokens have a mass, and what they have together.
struct Reached {
    size_t count;
    double sum;
};

// Tokens from the likeliest on, equals by id.
struct Likeliest {
    const LogitDistances& of;

    bool operator()(int32_t a, int32_t b) const {
        return of.logits[a] > of.logits[b] || (of.logits[a] == of.logits[b] && a < b);
    }

    double mass(std::span<const int32_t> ids) const {
        double sum = 0;
        for (const int32_t id : ids)
            sum += static_cast<double>(exp_minus((of.best - of.logits[id]) * of.per_nat));
        return sum;
    }

    // Brings the likeliest to the front of `ids`, not empty, until their masses first add up to
    // `target`, or to all of them. Halves what is left again and again: O(n).
    Reached reach(std::span<int32_t> ids, double target) const {
        constexpr size_t kFew = 16;
        double sum = 0;
        std::span<int32_t> open = ids;  // among these is the last one
        while (open.size() > kFew) {
            const size_t half = open.size() / 2;
            std::nth_element(open.begin(), open.begin() + static_cast<ptrdiff_t>(half), open.end(),
                             *this);
            const double likelier = mass(open.first(half));
            if (sum + likelier >= target) {
                open = open.first(half);
            } else {
                open = open.subspan(half);
                sum += likelier;
            }
        }
        std::sort(open.begin(), open.end(), *this);
        for (size_t i = 0;; ++i) {
            sum += mass(open.subspan(i, 1));
            if (sum >= target || i + 1 == open.size())
                return {static_cast<size_t>(open.data() - ids.data()) + i + 1, sum};
        }
    }
};

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
    const auto count = static_cast<int>(logits.size());
    const LogitPeak peak = kernels_.peak(logits.data(), count);
    if (peak.index < 0) throw EngineError("no token can be drawn: no logit is a number");
    if (options.temperature == 0 || options.top_k == 1 || std::isinf(peak.logit)) return peak.index;

    const LogitDistances distances{logits.data(), count, peak.logit,
                                   1 / std::max(options.temperature, 1e-6f)};
    Edges edges = kEdges;
    if (options.min_p > 0) {  // a token with just this part is kept, the best one in any case
        const float range =
            std::max(std::nextafter(-std::log(options.min_p), kEdges.back()), 1e-30f);
        for (float& edge : edges) edge = std::min(edge, range);
    }
    const double u = uniform(seed, position);
    const Likeliest order{distances};

    if (options.top_k > 0) {
        const auto k = static_cast<size_t>(options.top_k);
        std::span<int32_t> kept;
        for (const float edge : edges)  // as few as there can be
            if (kept = within(distances, 0, edge); kept.size() >= k) break;
        if (kept.size() > k) {
            std::nth_element(kept.begin(), kept.begin() + options.top_k, kept.end(), order);
            kept = kept.first(k);
        }
        double total = order.mass(kept);
        if (options.top_p < 1) {
            const Reached cut = order.reach(kept, static_cast<double>(options.top_p) * total);
            kept = kept.first(cut.count);
            total = cut.sum;
        }
        return kept[order.reach(kept, u * total).count - 1];
    }

    std::array<double, kLogitEdges> sums;
    kernels_.mass_within(distances, edges.data(), sums.data());
    // Where the masses, from the likeliest on, reach `target`: the tokens between two edges, what
    // those before have, and how many of these it takes.
    struct Place {
        double before;
        std::span<int32_t> ids;
        Reached reached;
    };
    const auto find = [&](double target) {
        // By rounding the target may lie beyond the end.
        const auto reached =
            std::lower_bound(sums.begin(), sums.end(), std::min(target, sums.back()));
        const auto band = static_cast<size_t>(reached - sums.begin());
        const double before = band == 0 ? 0 : sums[band - 1];
        const std::span<int32_t> ids =
            within(distances, band == 0 ? 0 : edges[band - 1], edges[band]);
        return Place{before, ids, order.reach(ids, target - before)};
    };
    double target = u * sums.back();
    if (options.top_p < 1) {
        const Place cut = find(static_cast<double>(options.top_p) * sums.back());
        target = u * (cut.before + cut.reached.sum);
        if (target > cut.before) {
            const std::span<int32_t> kept = cut.ids.first(cut.reached.count);
            return kept[order.reach(kept, target - cut.before).count - 1];
        }
    }
    const Place drawn = find(target);
    return drawn.ids[drawn.reached.count - 1];
}

std::span<int32_t> Sampler::within(const LogitDistances& distances, float from, float to) {
    const auto most = static_cast<size_t>(distances.count);
    if (ids_size_ < most) {
        ids_ = std::make_unique_for_overwrite<int32_t[]>(most);
        ids_size_ = most;
    }
    const int found = kernels_.places_within(distances, from, to, ids_.get());
    return {ids_.get(), static_cast<size_t>(found)};
}

}  // namespace pliant
