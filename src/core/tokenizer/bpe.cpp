#include "bpe.h"

#include <algorithm>
#include <array>
#include <functional>
#include <queue>

#include "unicode.h"

namespace pliant::tok {
namespace {

// Up to this length looking at all pairs for the best one is faster than keeping a heap.
constexpr size_t kShort = 40;

constexpr uint32_t kLowLine = 0x2581;  // ▁, which stands for a space

uint8_t char_joint_class(uint32_t code_point) {
    if (code_point < 128) return static_cast<uint8_t>(code_point);
    if (code_point == kLowLine) return 128;
    return static_cast<uint8_t>(129 + code_point % 127);
}

}  // namespace

void Bpe::encode(std::string_view word, std::vector<uint32_t>& out) {
    if (word.empty()) return;
    const bool bytes = file_.header().atoms == static_cast<uint32_t>(Atoms::kBytes);
    if (file_.model_bit(kIgnoreMerges)) {
        const uint32_t id =
            file_.find_token(word, kInModel | kMapped, bytes ? kInModel | kMapped : kInModel);
        if (id != kNone) {
            out.push_back(id);
            return;
        }
    }
    if (bytes) {
        for (const char c : word) {
            const auto byte = static_cast<uint8_t>(c);
            const uint32_t id = file_.byte_id(byte);
            if (id == kNone) {
                add_unknown(out);
            } else {
                end_unknown(out);
                add_atom(id, byte, out);
            }
        }
    } else {
        for (size_t at = 0; at < word.size();) {
            const size_t begin = at;
            const uint32_t code_point = next_char(word, at);
            const uint32_t id = file_.find_char(code_point);
            if (id != kNone) {
                end_unknown(out);
                add_atom(id, char_joint_class(code_point), out);
                continue;
            }
            const std::string_view parts = word.substr(begin, at - begin);
            const auto has_id = [&](char c) {
                return file_.byte_id(static_cast<uint8_t>(c)) != kNone;
            };
            if (file_.model_bit(kUseByteFallback) &&
                std::all_of(parts.begin(), parts.end(), has_id)) {
                // An unknown token keeps waiting here, and so may come behind these bytes: this
                // is what the reference does.
                for (char c : parts) add_unmergeable(file_.byte_id(static_cast<uint8_t>(c)), out);
            } else {
                add_unknown(out);
            }
        }
    }
    end_unknown(out);
    end_run(out);
}

void Bpe::add_atom(uint32_t id, uint8_t joint_class, std::vector<uint32_t>& out) {
    if (!run_.empty() && !file_.model_bit(kAnyAtomMerges) &&
        !file_.joins(last_class_, joint_class)) {
        end_run(out);
    }
    run_.push_back(id);
    last_class_ = joint_class;
}

void Bpe::add_unmergeable(uint32_t id, std::vector<uint32_t>& out) {
    if (file_.model_bit(kAnyAtomMerges)) {
        run_.push_back(id);
    } else {
        end_run(out);
        out.push_back(id);
    }
}

void Bpe::add_unknown(std::vector<uint32_t>& out) {
    if (file_.header().unknown_id == kNone) return;  // dropped, as the reference does
    if (unknown_ && !file_.model_bit(kFuseUnknown)) end_unknown(out);
    unknown_ = true;
}

void Bpe::end_unknown(std::vector<uint32_t>& out) {
    if (!unknown_) return;
    unknown_ = false;
    add_unmergeable(file_.header().unknown_id, out);
}

void Bpe::end_run(std::vector<uint32_t>& out) {
    if (run_.size() <= 1) {
        out.insert(out.end(), run_.begin(), run_.end());
    } else if (run_.size() <= kShort) {
        merge_short(out);
    } else {
        merge_long(out);
    }
    run_.clear();
}

void Bpe::merge_short(std::vector<uint32_t>& out) {
    size_t n = run_.size();
    std::array<uint32_t, kShort> ranks;  // of the pair (i, i + 1)
    for (size_t i = 0; i + 1 < n; ++i) ranks[i] = file_.merge_rank(run_[i], run_[i + 1]);
    while (n > 1) {
        const auto* best = std::min_element(ranks.data(), ranks.data() + n - 1);
        if (*best == kNone) break;
        const auto i = static_cast<size_t>(best - ranks.data());
        run_[i] = file_.merged_token(*best);
        std::copy(run_.begin() + i + 2, run_.begin() + n, run_.begin() + i + 1);
        if (i + 2 < n) std::copy(&ranks[i + 1], ranks.data() + n - 1, &ranks[i]);
        --n;
        if (i > 0) ranks[i - 1] = file_.merge_rank(run_[i - 1], run_[i]);
        if (i + 1 < n) ranks[i] = file_.merge_rank(run_[i], run_[i + 1]);
    }
    out.insert(out.end(), run_.begin(), run_.begin() + n);
}

void Bpe::merge_long(std::vector<uint32_t>& out) {
    // A doubly linked list of the tokens, and a heap of the pairs that merge, lowest rank first
    // and the leftmost of equal ones. An entry counts only while its pair still has that rank.
    struct Node {
        uint32_t id, previous, next, rank;
    };
    const auto n = static_cast<uint32_t>(run_.size());
    std::vector<Node> nodes(n);
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> pairs;
    const auto offer = [&](uint32_t i) {
        Node& node = nodes[i];
        node.rank = node.next == kNone ? kNone : file_.merge_rank(node.id, nodes[node.next].id);
        if (node.rank != kNone) pairs.push(uint64_t{node.rank} << 32 | i);
    };
    for (uint32_t i = 0; i < n; ++i) {
        nodes[i] = {run_[i], i ? i - 1 : kNone, i + 1 < n ? i + 1 : kNone, kNone};
    }
    for (uint32_t i = 0; i < n; ++i) offer(i);
    while (!pairs.empty()) {
        const auto i = static_cast<uint32_t>(pairs.top());
        const auto rank = static_cast<uint32_t>(pairs.top() >> 32);
        pairs.pop();
        if (nodes[i].rank != rank) continue;
        Node& left = nodes[i];
        Node& right = nodes[left.next];
        left.id = file_.merged_token(rank);
        left.next = right.next;
        right.rank = kNone;
        if (left.next != kNone) nodes[left.next].previous = i;
        offer(i);
        if (left.previous != kNone) offer(left.previous);
    }
    for (uint32_t i = 0; i != kNone; i = nodes[i].next) out.push_back(nodes[i].id);
}

}  // namespace pliant::tok
