// Pages of the KV cache in plies: how keys and values are turned, which plies a rung has, and where
// they are in a slot. docs/kv.md.
//
// A unit is the keys, or the values, of one layer, one KV head and 32 channels, of the 32 tokens of
// a page. Two neighbours are a group, and share a scale for each token. In the slot of a page come
// first the codes of the scales of all groups, then rung after rung, each from a multiple of 4096
// on. So a page loses its last rung in place.
#pragma once

#include <cstdint>
#include <vector>

#include "coded.h"
#include "model.h"

namespace pliant {

class KvLadder {
  public:
    explicit KvLadder(const ModelSpec& model);

    // `units`: the unit that each ply belongs to, in the order in which they are worth keeping;
    // `plies`: how many of them each rung has; `thresholds` [255]: those of the tree, rising.
    // FormatError unless every rung is whole and no unit gets more than kMaxDepth.
    void set(const std::vector<uint32_t>& units, const std::vector<uint32_t>& plies,
             const float* thresholds);
    // How the keys (`value` false) or values of a head are turned: [head_dim] each. FormatError
    // unless scales are positive and the order is a permutation.
    void set_turn(int layer, int head, bool value, const float* mean, const float* scale,
                  const uint16_t* order);
    bool present() const { return !ends_.empty(); }
    void finish() const;  // FormatError if a turn is missing

    int groups() const { return groups_; }
    int units() const { return units_; }
    // The first unit of a head.
    int unit(int layer, int head, bool value) const {
        return ((layer * kv_heads_ + head) * 2 + (value ? 1 : 0)) * groups_ * 2;
    }
    int rungs() const { return static_cast<int>(ends_.size()) - 1; }
    // Where a slot of so many rungs ends; 0: its scale codes alone.
    uint64_t bytes(int rungs) const { return ends_[static_cast<size_t>(rungs)]; }
    // Depth of each unit with so many rungs.
    const uint8_t* depths(int rungs) const {
        return depths_.data() + static_cast<size_t>(rungs) * static_cast<size_t>(units_);
    }
    // Offsets of the planes in a slot: [units][kMaxDepth].
    const uint32_t* places() const { return places_.data(); }
    const float* thresholds() const { return thresholds_.data(); }
    Turn turn(int layer, int head, bool value) const;
    uint64_t table_bytes() const;

  private:
    size_t turn_at(int layer, int head, bool value) const {
        return (static_cast<size_t>(layer * kv_heads_ + head) * 2 + (value ? 1 : 0)) *
               static_cast<size_t>(head_dim_);
    }
    int layers_, kv_heads_, head_dim_, groups_, units_;
    std::vector<uint64_t> ends_;
    std::vector<uint8_t> depths_;
    std::vector<uint32_t> places_;
    std::vector<float> thresholds_;  // [256]: as a heap, 1 its root
    std::vector<float> mean_, scale_, inverse_;
    std::vector<uint16_t> order_;
    std::vector<bool> turned_;
};

}  // namespace pliant
