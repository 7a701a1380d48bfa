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
      units_(model.layers * model.kv_heads * 2 * groups_ * 2),
      local_(static_cast<size_t>(model.layers), true) {
    const KvLayers layers(model);
    global_ = layers.global;
    for (int i = 0; i < layers_; ++i) {
        const int layer = layers.order[static_cast<size_t>(i)];
        if (i < global_) local_[static_cast<size_t>(layer)] = false;
        for (int head = 0; head < kv_heads_; ++head) heads_.push_back(unit(layer, head, false));
    }
}

void KvLadder::set(const std::vector<uint32_t>& units, const std::vector<uint32_t>& plies,
                   const float* thresholds) {
    const size_t count = static_cast<size_t>(units_);
    std::vector<uint64_t> ends, global_ends;
    std::vector<uint8_t> depth(count, 0), depths;
    std::vector<uint32_t> starts, codes, plies_end{0}, global_plies{0};
    std::vector<Ply> order_of_plies;
    const size_t of_head = static_cast<size_t>(4 * groups_);
    const auto lay_out = [&] {
        const size_t before = depths.size();
        starts.resize(before + count);
        codes.resize((before + count) / 2);
        uint64_t place = 0;
        for (size_t head = 0; head < heads_.size(); ++head) {
            if (head == heads(false)) global_ends.push_back(whole_pages(place));
            const size_t first = static_cast<size_t>(heads_[head]);
            for (size_t i = 0; i < of_head / 2; ++i, place += kPageTokens)
                codes[(before + first) / 2 + i] = static_cast<uint32_t>(place);
            place = (place + 63) / 64 * 64;
            for (size_t i = first; i < first + of_head; ++i) {
                starts[before + i] = static_cast<uint32_t>(place);
                place += static_cast<uint64_t>(depth[i]) * kUnitPly;
            }
            if (place > INT32_MAX) throw FormatError("a page of KV is too large");
        }
        ends.push_back(whole_pages(place));
        if (heads(false) == heads_.size()) global_ends.push_back(ends.back());
        depths.insert(depths.end(), depth.begin(), depth.end());
    };
    lay_out();
    size_t at = 0;
    for (uint32_t rung : plies) {
        if (rung == 0 || rung > units.size() - at)
            throw FormatError("the rungs of the KV ladder do not match its plies");
        uint32_t global = global_plies.back();
        for (uint32_t i = 0; i < rung; ++i, ++at) {
            const uint32_t unit = units[at];
            if (unit >= count || depth[unit] >= kMaxDepth)
                throw FormatError("the KV ladder has a unit that does not exist or is too deep");
            order_of_plies.push_back({unit, depth[unit]++});
            global += local(unit) ? 0 : 1;
        }
        plies_end.push_back(static_cast<uint32_t>(at));
        global_plies.push_back(global);
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
    global_ends_ = std::move(global_ends);
    depths_ = std::move(depths);
    plies_ = std::move(starts);
    codes_ = std::move(codes);
    order_of_plies_ = std::move(order_of_plies);
    plies_end_ = std::move(plies_end);
    global_plies_ = std::move(global_plies);
}

void KvLadder::shrink(uint8_t* slot, bool whole, int before, int after) const {
    const SlotMap from = map(before), to = map(after);
    const auto move = [&](uint32_t begin, uint32_t end, int size) {
        std::memmove(slot + end, slot + begin, static_cast<size_t>(size));
    };
    for (size_t head = 0; head < heads(whole); ++head) {
        const int first = heads_[head];
        move(from.codes[first / 2], to.codes[first / 2], 2 * groups_ * kPageTokens);
        for (int unit = first; unit < first + 4 * groups_; ++unit)
            move(from.plies[unit], to.plies[unit], to.depths[unit] * kUnitPly);
    }
}

uint64_t KvLadder::split_bytes(int rungs, bool whole) const {
    if (rungs == 0) return 0;
    const uint32_t plies = (whole ? plies_end_ : global_plies_)[static_cast<size_t>(rungs)];
    return heads(whole) * static_cast<uint64_t>(2 * groups_ * kPageTokens) +
           static_cast<uint64_t>(plies) * kUnitPly;
}

void KvLadder::split(const uint8_t* slot, bool whole, int rungs, uint8_t* out) const {
    const SlotMap from = map(rungs);
    const auto take = [&](uint32_t begin, int size) {
        std::memcpy(out, slot + begin, static_cast<size_t>(size));
        out += size;
    };
    const int of_head = 4 * groups_;
    for (int first = 0; first < units_; first += of_head)
        if (whole || !local(static_cast<uint32_t>(first)))
            take(from.codes[first / 2], 2 * groups_ * kPageTokens);
    for (size_t i = 0; i < plies_end_[static_cast<size_t>(rungs)]; ++i) {
        const Ply ply = order_of_plies_[i];
        if (whole || !local(ply.unit)) take(from.plies[ply.unit] + ply.before * kUnitPly, kUnitPly);
    }
}

void KvLadder::join(uint8_t* slot, bool whole, int before, int after, const uint8_t* bytes,
                    bool from_whole) const {
    const SlotMap from = map(before), to = map(after);
    const int of_head = 4 * groups_, codes = 2 * groups_ * kPageTokens;
    const auto put = [&](uint32_t unit, uint32_t begin, int size) {
        const bool is_local = local(unit);
        if (is_local && !from_whole) return;
        if (whole || !is_local) std::memcpy(slot + begin, bytes, static_cast<size_t>(size));
        bytes += size;
    };
    // From the end, since everything moves towards it.
    for (size_t head = before > 0 ? heads(whole) : 0; head-- > 0;) {
        const int first = heads_[head];
        for (int unit = first + of_head - 1; unit >= first; --unit)
            std::memmove(slot + to.plies[unit], slot + from.plies[unit],
                         static_cast<size_t>(from.depths[unit]) * kUnitPly);
        std::memmove(slot + to.codes[first / 2], slot + from.codes[first / 2],
                     static_cast<size_t>(codes));
    }
    for (int first = 0; before == 0 && first < units_; first += of_head)
        put(static_cast<uint32_t>(first), to.codes[first / 2], codes);
    for (size_t i = plies_end_[static_cast<size_t>(before)];
         i < plies_end_[static_cast<size_t>(after)]; ++i) {
        const Ply ply = order_of_plies_[i];
        put(ply.unit, to.plies[ply.unit] + ply.before * kUnitPly, kUnitPly);
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
    return (ends_.capacity() + global_ends_.capacity()) * 8 + depths_.capacity() +
           (plies_.capacity() + codes_.capacity()) * 4 + order_of_plies_.capacity() * sizeof(Ply) +
           (plies_end_.capacity() + global_plies_.capacity()) * 4 + heads_.capacity() * 4 +
           thresholds_.capacity() * 4 +
           (mean_.capacity() + scale_.capacity() + inverse_.capacity()) * 4 + order_.capacity() * 2;
}

}  // namespace pliant
