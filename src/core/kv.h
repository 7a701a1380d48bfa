// The KV cache: pages of kPageTokens tokens, each for all layers, and the sequences that use them.
//
// A page is counted: sequences that begin with the same tokens use the same pages, and whoever
// keeps prefixes for later holds them without any sequence. A page with one user may be written; of
// a page with more, a sequence that goes on inside it takes a copy first.
//
// Without a ladder pages are exact: half precision. With one they are exact until they are full;
// then they are coded into their slot, and the exact half is given up. How many rungs of a page a
// token sees depends on the age of the page alone: how many pages later the token is. So a sequence
// needs ever fewer of them. What none needs any more is given up when memory is short, and comes
// back only from where it was stored.
//
// Layers with a window, the local ones, see only pages up to an age. Older ones are whole at first;
// when memory is short they give up what they have of these layers, exact or coded.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "kv_ladder.h"
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
    void check_used(const std::vector<int>& pages) const;  // EngineError unless all are
    int length(int sequence) const { return get(sequence).length; }
    // Forgets the tokens from `length` on; inside a coded page, all of that page; and all but what
    // is `usable`. Returns how many are left.
    int truncate(int sequence, int length);
    // The same in the middle of a step, at a length where the sequence was when it began.
    void cut(int sequence, int length);
    // How many of these pages, from the first on, a sequence can go on after: they have all the
    // rungs and local layers that it would see.
    int usable(const std::vector<int>& pages) const;
    // Pages that must be taken before `tokens` tokens can be appended: new ones, and the copy of a
    // shared one.
    int pages_needed(int sequence, int tokens) const;
    // EngineError if a page has given up local layers that the next token would see.
    void check_seen(int sequence) const;
    // Makes room for `tokens` more tokens; the caller has checked pages_needed against pages_free.
    void extend(int sequence, int tokens);

    KvLadder ladder;
    // To measure the worst case: tokens of a prompt see also the page that they are in coded, if
    // their chunk fills it.
    bool code_newest = false;
    // With a ladder: how many rungs of a page are seen, and how many are kept when memory is short,
    // for each age: of the page before that of a token it is 1. Index 0 is for the first page of a
    // sequence, which always draws much attention, and for pages as they are coded. The last entry
    // is for all that are older. Without a ladder all are 0. `whole`: up to which age pages keep
    // their local layers; -1: always. UsageError unless both fall, and more is kept than seen.
    void set_ages(std::vector<uint8_t> seen, std::vector<uint8_t> kept, int whole);
    // The largest age at which local layers see a page; 0 if there are no local layers.
    int local_age() const { return window_ == 0 ? 0 : (window_ + kPageTokens - 2) / kPageTokens; }
    int seen(int number, int newest) const { return of_age(seen_, number, newest); }
    // Bytes that pages may take, as far as giving up what nobody needs is enough; 0: any.
    void set_limit(uint64_t bytes) { limit_ = bytes; }
    // Gives up what no sequence needs, and what no page uses, if the limit is exceeded. Returns
    // whether a page has lost something.
    bool fit();
    // How many full pages of each age sequences would have with so many tokens, each page counted
    // once, and how many pages that are partly filled.
    struct Ages {
        std::vector<int> full;
        int partial;
    };
    Ages ages(const std::vector<int>& sequences, const std::vector<int>& tokens) const;
    bool coded(int page) const { return rungs_[static_cast<size_t>(page)] > 0; }
    // How many rungs a page has, or will have once it is full.
    int rungs(int page) const { return coded(page) ? rungs_[static_cast<size_t>(page)] : level(); }
    bool whole(int page) const { return whole_[static_cast<size_t>(page)]; }
    // Takes rungs from a coded page that is in use, until it has no more than `rungs`; at least one
    // is left. Unless it is to be `whole`, its local layers go too. Returns the bytes that the
    // kernel got back.
    uint64_t shallow(int page, int rungs, bool whole);
    uint8_t* slot(int page) const;
    // All tokens of a sequence are computed. With a ladder its full pages are coded: from page
    // `first` on they give up their exact halves.
    void seal(int sequence, int first);

    // The halves of a page of one layer and KV head: K is [head_dim][kPageTokens], V
    // [kPageTokens][value_stride].
    uint16_t* keys(int sequence, int page, int layer, int head) const;
    uint16_t* values(int sequence, int page, int layer, int head) const;
    // Bytes of a page as it is stored and brought back: with so many rungs, or exact (0).
    uint64_t stored_bytes(int rungs, bool whole) const {
        return rungs > 0 ? ladder.split_bytes(rungs, whole) : page_bytes(whole);
    }
    // Writes a page that is in use as it is stored.
    void store(int page, uint8_t* out) const;
    // Appends a page of `tokens` tokens that was stored to a sequence that ends with a full one.
    void append(int sequence, int tokens, int rungs, bool whole, const uint8_t* stored);
    // Adds the rungs up to `rungs` to a coded page with one user, as far as the level allows;
    // `stored` is what they have of it, `from_whole` if its local layers are among that.
    void deepen(int page, int rungs, const uint8_t* stored, bool from_whole);
    int value_stride() const { return value_stride_; }

    int pages_total() const { return pages_; }
    int pages_free() const { return pages_ - pages_used(); }
    // These two from any thread, also while a step runs.
    int pages_used() const { return taken_.load(std::memory_order_relaxed); }
    uint64_t used_bytes() const { return used_.load(std::memory_order_relaxed); }
    // Of an exact page, and of one without its local layers.
    uint64_t page_bytes(bool whole = true) const { return whole ? page_bytes_ : global_bytes_; }
    // Bytes of a page in use: its slot, or its exact half.
    uint64_t bytes(int page) const;
    uint64_t touched_bytes() const;
    // Gives the memory of pages that nobody uses back to the kernel; returns the bytes.
    uint64_t trim();

  private:
    struct Sequence {
        bool open = false;
        int length = 0;
        int computed = 0;  // of these tokens; the others are those of a chunk in progress
        std::vector<int> pages;
    };
    const Sequence& get(int sequence) const;
    bool copies(const Sequence& s) const;
    int take();
    void release(int page);
    int level() const { return seen_.empty() ? 0 : seen_[0]; }
    // Of page `number` of a sequence for the tokens of page `newest`.
    static int age_of(int number, int newest) { return number == 0 ? 0 : newest - number; }
    static int of_age(const std::vector<uint8_t>& ages, int number, int newest) {
        return ages[std::min(static_cast<size_t>(age_of(number, newest)), ages.size() - 1)];
    }
    void settle();

    // Calls f(page, age) for each page of a sequence whose next token is number `next`.
    template <typename F>
    void by_age(const Sequence& s, int next, F&& f) const {
        for (size_t i = 0; i < s.pages.size(); ++i)
            f(s.pages[i], std::max(age_of(static_cast<int>(i), next / kPageTokens), 0));
    }

    int kv_heads_, head_dim_, value_stride_, window_;
    std::vector<int> place_;           // of each layer in a page
    size_t key_halves_, head_halves_;  // of one layer and head: K, K and V
    uint64_t page_bytes_, global_bytes_;
    uint8_t* exact(int page) const {
        return arena_.data() +
               page_bytes_ * static_cast<uint64_t>(exact_[static_cast<size_t>(page)]);
    }
    void drop_exact(int page);
    // A page that is exact is in this form from now on; coded, it gives up its exact half.
    void become(int page, int rungs, bool whole);
    int pages_ = 0;
    std::vector<uint8_t> seen_, kept_;  // by age
    int kept_whole_ = -1;
    uint64_t limit_ = 0;
    std::atomic<uint64_t> used_{0};  // bytes of all pages in use
    std::atomic<int> taken_{0};      // how many they are
    Arena arena_, slots_;            // exact pages, and coded ones
    std::vector<int> free_;          // pages
    std::vector<int> halves_;        // free exact halves
    std::vector<int> users_;         // of each page
    std::vector<int> exact_;         // of each page: its exact half, or -1
    std::vector<int> rungs_;         // of each page: 0 unless coded
    std::vector<bool> whole_;        // of each page: whether it has its local layers
    // Of each exact half, and of each slot: bytes that hold memory.
    std::vector<uint64_t> touched_, slot_touched_;
    std::vector<Sequence> sequences_;
};

}  // namespace pliant
