#include "kv_ladder.h"

#include <cmath>
#include <cstring>
#include <string>

#include "error.h"

namespace pliant {

namespace {
uint64_t whole_pages(uint64_t bytes) { return (bytes + 4095) / 4096 * 4096; }
}  // namespace

KvLadder::KvLadder(const ModelSpec& model)
    : layers_(model.layers),
      kv_heads_(model.kv_heads),
      head_dim_(model.head_dim),
      groups_((model.head_dim + kGroup - 1) / kGroup),
      units_(model.layers * model.kv_heads * 2 * groups_ * 2) {}

void KvLadder::set(const std::vector<uint32_t>& units, const std::vector<uint32_t>& plies,
                   const float* thresholds) {
    const size_t count = static_cast<size_t>(units_);
    std::vector<uint64_t> ends;
    std::vector<uint8_t> depth(count, 0), depths;
    std::vector<uint32_t> starts, codes, plies_end{0};
    std::vector<Ply> order_of_plies;
    const size_t of_head = static_cast<size_t>(4 * groups_);
    const auto lay_out = [&] {
        uint64_t place = 0;
        for (size_t first = 0; first < count; first += of_head) {
            for (size_t i = 0; i < of_head / 2; ++i, place += kPageTokens)
                codes.push_back(static_cast<uint32_t>(place));
            place = (place + 63) / 64 * 64;
            for (size_t i = first; i < first + of_head; ++i) {
                starts.push_back(static_cast<uint32_t>(place));
                place += static_cast<uint64_t>(depth[i]) * kUnitPly;
            }
            if (place > INT32_MAX) throw FormatError("a page of KV is too large");
        }
        ends.push_back(whole_pages(place));
        depths.insert(depths.end(), depth.begin(), depth.end());
    };
    lay_out();
    size_t at = 0;
    for (uint32_t rung : plies) {
        if (rung == 0 || rung > units.size() - at)
            throw FormatError("the rungs of the KV ladder do not match its plies");
        for (uint32_t i = 0; i < rung; ++i, ++at) {
            const uint32_t unit = units[at];
            if (unit >= count || depth[unit] >= kMaxDepth)
                throw FormatError("the KV ladder has a unit that does not exist or is too deep");
            order_of_plies.push_back({unit, depth[unit]++});
        }
        plies_end.push_back(static_cast<uint32_t>(at));
        lay_out();
    }
    if (at != units.size() || plies.empty())
        throw FormatError("the rungs of the KV ladder do not match its plies");
    thresholds_.assign(256, 0.0f);
    for (int bit = 0; bit < kMaxDepth; ++bit)
        for (int i = 0; i < 1 << bit; ++i) {
            const int cell = 1 << (kMaxDepth - bit);  // leaves below this node
            const float value = thresholds[i * cell + cell / 2 - 1];
            if (!std::isfinite(value)) throw FormatError("a threshold of the tree is not finite");
            thresholds_[static_cast<size_t>((1 << bit) + i)] = value;
        }
    const size_t channels = static_cast<size_t>(layers_ * kv_heads_ * 2 * head_dim_);
    mean_.assign(channels, 0.0f);
    scale_.assign(channels, 1.0f);
    inverse_.assign(channels, 1.0f);
    order_.assign(channels, 0);
    turned_.assign(static_cast<size_t>(layers_ * kv_heads_ * 2), false);
    ends_ = std::move(ends);
    depths_ = std::move(depths);
    plies_ = std::move(starts);
    codes_ = std::move(codes);
    order_of_plies_ = std::move(order_of_plies);
    plies_end_ = std::move(plies_end);
}

void KvLadder::shrink(uint8_t* slot, int before, int after) const {
    const SlotMap from = map(before), to = map(after);
    const auto move = [&](uint32_t begin, uint32_t end, int size) {
        std::memmove(slot + end, slot + begin, static_cast<size_t>(size));
    };
    const int of_head = 4 * groups_;
    for (int first = 0; first < units_; first += of_head) {
        move(from.codes[first / 2], to.codes[first / 2], 2 * groups_ * kPageTokens);
        for (int unit = first; unit < first + of_head; ++unit)
            move(from.plies[unit], to.plies[unit], to.depths[unit] * kUnitPly);
    }
}

uint64_t KvLadder::code_bytes() const { return static_cast<uint64_t>(units_ / 2) * kPageTokens; }

uint64_t KvLadder::split_bytes(int rungs) const {
    if (rungs == 0) return 0;
    return code_bytes() + static_cast<uint64_t>(plies_end_[static_cast<size_t>(rungs)]) * kUnitPly;
}

void KvLadder::split(const uint8_t* slot, int rungs, uint8_t* out) const {
    const SlotMap from = map(rungs);
    const auto take = [&](uint32_t begin, int size) {
        std::memcpy(out, slot + begin, static_cast<size_t>(size));
        out += size;
    };
    for (int first = 0; first < units_; first += 4 * groups_)
        take(from.codes[first / 2], 2 * groups_ * kPageTokens);
    for (size_t i = 0; i < plies_end_[static_cast<size_t>(rungs)]; ++i) {
        const Ply ply = order_of_plies_[i];
        take(from.plies[ply.unit] + ply.before * kUnitPly, kUnitPly);
    }
}

void KvLadder::join(uint8_t* slot, int before, int after, const uint8_t* bytes) const {
    const SlotMap from = map(before), to = map(after);
    const int of_head = 4 * groups_, codes = 2 * groups_ * kPageTokens;
    const auto put = [&](uint32_t begin, int size) {
        std::memcpy(slot + begin, bytes, static_cast<size_t>(size));
        bytes += size;
    };
    // From the end, since everything moves towards it.
    for (int first = units_ - of_head; before > 0 && first >= 0; first -= of_head) {
        for (int unit = first + of_head - 1; unit >= first; --unit)
            std::memmove(slot + to.plies[unit], slot + from.plies[unit],
                         static_cast<size_t>(from.depths[unit]) * kUnitPly);
        std::memmove(slot + to.codes[first / 2], slot + from.codes[first / 2],
                     static_cast<size_t>(codes));
    }
    for (int first = 0; before == 0 && first < units_; first += of_head)
        put(to.codes[first / 2], codes);
    for (size_t i = plies_end_[static_cast<size_t>(before)];
         i < plies_end_[static_cast<size_t>(after)]; ++i) {
        const Ply ply = order_of_plies_[i];
        put(to.plies[ply.unit] + ply.before * kUnitPly, kUnitPly);
    }
}

void KvLadder::set_turn(int layer, int head, bool value, const float* mean, const float* scale,
                        const uint16_t* order) {
    if (!present() || layer < 0 || layer >= layers_ || head < 0 || head >= kv_heads_)
        throw FormatError("a turn of keys or values belongs to no head of the model");
    const size_t at = turn_at(layer, head, value);
    std::vector<bool> seen(static_cast<size_t>(head_dim_), false);
    for (size_t i = 0; i < seen.size(); ++i) {
        if (order[i] >= head_dim_ || seen[order[i]])
            throw FormatError("a channel order of keys or values is no permutation");
        seen[order[i]] = true;
        const float inverse = 1.0f / scale[i];
        if (!std::isfinite(mean[i]) || !(scale[i] > 0.0f) || !std::isfinite(scale[i]) ||
            !std::isfinite(inverse))
            throw FormatError("a mean or a scale of keys or values is out of range");
        mean_[at + i] = mean[i];
        scale_[at + i] = scale[i];
        inverse_[at + i] = inverse;
        order_[at + i] = order[i];
    }
    turned_[at / static_cast<size_t>(head_dim_)] = true;
}

void KvLadder::finish() const {
    for (const bool turned : turned_)
        if (!turned) throw FormatError("a head of the KV ladder has no turn");
}

Turn KvLadder::turn(int layer, int head, bool value) const {
    const size_t at = turn_at(layer, head, value);
    return {mean_.data() + at, scale_.data() + at, inverse_.data() + at, order_.data() + at};
}

uint64_t KvLadder::table_bytes() const {
    return ends_.capacity() * 8 + depths_.capacity() + (plies_.capacity() + codes_.capacity()) * 4 +
           order_of_plies_.capacity() * sizeof(Ply) + plies_end_.capacity() * 4 +
           thresholds_.capacity() * 4 +
           (mean_.capacity() + scale_.capacity() + inverse_.capacity()) * 4 + order_.capacity() * 2;
}

}  // namespace pliant
