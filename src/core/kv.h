// The KV cache: pages of kPageTokens tokens, each for all layers, and the sequences that use them.
//
// A page is counted: sequences that begin with the same tokens use the same pages, and whoever
// keeps prefixes for later holds them without any sequence. A page with one user may be written; of
// a page with more, a sequence that goes on inside it takes a copy first.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "model.h"

namespace pliant {

class KvCache {
  public:
    explicit KvCache(const ModelSpec& model);

    // Sets the size of the pool. Sequences must all be closed.
    void reserve(int pages);

    int open();
    void close(int sequence);
    // The pages of a sequence in order; the last may be partly filled.
    const std::vector<int>& pages(int sequence) const { return get(sequence).pages; }
    // Lets an empty sequence begin with whole pages that are in use already.
    void adopt(int sequence, const std::vector<int>& pages);
    // Counts one user more, or one less, for pages that are in use.
    void hold(const std::vector<int>& pages);
    void drop(const std::vector<int>& pages);
    int length(int sequence) const { return get(sequence).length; }
    // Forgets the tokens from `length` on.
    void truncate(int sequence, int length);
    // Pages that must be taken before `tokens` tokens can be appended: new ones, and the copy of a
    // shared one.
    int pages_needed(int sequence, int tokens) const;
    // Makes room for `tokens` more tokens; the caller has checked pages_needed against pages_free.
    void extend(int sequence, int tokens);

    // The halves of a page of one layer and KV head: K is [head_dim][kPageTokens], V
    // [kPageTokens][value_stride].
    uint16_t* keys(int sequence, int page, int layer, int head) const;
    uint16_t* values(int sequence, int page, int layer, int head) const;
    // All of a page of a sequence, page_bytes() long, to be stored and brought back.
    uint8_t* page(int sequence, int page) const;
    int value_stride() const { return value_stride_; }

    int pages_total() const { return pages_; }
    int pages_free() const { return static_cast<int>(free_.size()); }
    uint64_t page_bytes() const { return page_bytes_; }
    uint64_t touched_bytes() const;
    // Gives the memory of pages that nobody uses back to the kernel; returns the bytes.
    uint64_t trim();

  private:
    struct Sequence {
        bool open = false;
        int length = 0;
        std::vector<int> pages;
    };
    const Sequence& get(int sequence) const;
    bool copies(const Sequence& s) const;
    void check_used(const std::vector<int>& pages) const;
    int take();
    void release(int page);

    int layers_, kv_heads_, head_dim_, value_stride_;
    size_t key_halves_, head_halves_;  // of one layer and head: K, K and V
    uint64_t page_bytes_;
    int pages_ = 0;
    Arena arena_;
    std::vector<int> free_;
    std::vector<int> users_;  // of each page
    std::vector<bool> touched_;
    std::vector<Sequence> sequences_;
};

}  // namespace pliant
