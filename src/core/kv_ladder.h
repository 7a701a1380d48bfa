// Pages of the KV cache in plies: how keys and values are turned, which plies a rung has, and where
// they are in a slot. docs/kv.md.
//
// A unit is the keys, or the values, of one layer, one KV head and 32 channels, of the 32 tokens of
// a page. Two neighbours are a group, and share a scale for each token. In the slot of a page lies
// together what a head has: the codes of the scales of its keys and of its values, then unit after
// unit, ply after ply. With fewer rungs everything moves together: a rung is given up by copying
// what stays to its new place, which is never behind the old one, and added the other way round.
// Heads of global layers come first: a slot without its local ones is the beginning of it.
//
// On its way to disk and back a page is in rungs instead (docs/parking.md): the codes of all
// scales, then the plies in the order of the ladder. So its first bytes are the same page with
// fewer rungs. Without its local layers, what belongs to them is left out.
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
    // Size of a slot of so many rungs, `whole` or without its local layers; 0: its scale codes
    // alone.
    uint64_t bytes(int rungs, bool whole = true) const {
        return (whole ? ends_ : global_ends_)[static_cast<size_t>(rungs)];
    }
    SlotMap map(int rungs) const {
        const size_t at = static_cast<size_t>(rungs) * static_cast<size_t>(units_);
        return {depths_.data() + at, plies_.data() + at, codes_.data() + at / 2};
    }
    // The first `seen` rungs of a slot that has `there` of them.
    SlotMap map(int there, int seen) const {
        SlotMap found = map(there);
        found.depths = map(seen).depths;
        return found;
    }
    // Takes the last rungs of a slot: from `before` to `after`. The end of the slot is free then.
    void shrink(uint8_t* slot, bool whole, int before, int after) const;
    // Bytes of a page in rungs, with the first `rungs` of them.
    uint64_t split_bytes(int rungs, bool whole) const;
    // Writes all of a slot of so many rungs in rungs: split_bytes(rungs, whole).
    void split(const uint8_t* slot, bool whole, int rungs, uint8_t* out) const;
    // Adds rungs to a slot that has `before`, of which it may have none, and has `after` then: from
    // what they have of a page in rungs, which may be whole where the slot is not.
    void join(uint8_t* slot, bool whole, int before, int after, const uint8_t* bytes,
              bool from_whole) const;
    const float* thresholds() const { return thresholds_.data(); }
    Turn turn(int layer, int head, bool value) const;
    uint64_t table_bytes() const;

  private:
    // How many of the heads, in the order of the slot, and of the units.
    size_t heads(bool whole) const {
        return whole ? heads_.size() : static_cast<size_t>(global_ * kv_heads_);
    }
    bool local(uint32_t unit) const {
        return local_[unit / static_cast<uint32_t>(kv_heads_ * 4 * groups_)];
    }
    size_t turn_at(int layer, int head, bool value) const {
        return (static_cast<size_t>(layer * kv_heads_ + head) * 2 + (value ? 1 : 0)) *
               static_cast<size_t>(head_dim_);
    }
    int layers_, kv_heads_, head_dim_, groups_, units_;
    int global_;               // layers
    std::vector<bool> local_;  // of each layer
    std::vector<int> heads_;   // their first units, in the order of the slot
    std::vector<uint64_t> ends_, global_ends_;
    std::vector<uint8_t> depths_;
    std::vector<uint32_t> plies_, codes_;  // of each number of rungs, see SlotMap
    struct Ply {
        uint32_t unit, before;  // how many plies of the unit come before it
    };
    std::vector<Ply> order_of_plies_;  // in ladder order
    // Of each number of rungs: where its plies end in that order, and how many are global.
    std::vector<uint32_t> plies_end_, global_plies_;
    std::vector<float> thresholds_;  // [256]: as a heap, 1 its root
    std::vector<float> mean_, scale_, inverse_;
    std::vector<uint16_t> order_;
    std::vector<bool> turned_;
};

}  // namespace pliant
