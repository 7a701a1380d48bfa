#include "kv.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"

namespace pliant {

namespace {
constexpr int kMaxSequences = 4096;
int pages_of(int tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }
}  // namespace

KvCache::KvCache(const ModelSpec& model)
    : layers_(model.layers),
      kv_heads_(model.kv_heads),
      head_dim_(model.head_dim),
      value_stride_((model.head_dim + 15) / 16 * 16) {
    key_halves_ = static_cast<size_t>(head_dim_) * kPageTokens;
    head_halves_ = key_halves_ + static_cast<size_t>(value_stride_) * kPageTokens;
    const uint64_t bytes = static_cast<uint64_t>(layers_) * static_cast<uint64_t>(kv_heads_) *
                           head_halves_ * sizeof(uint16_t);
    page_bytes_ = (bytes + 4095) / 4096 * 4096;
}

void KvCache::reserve(int pages) {
    if (pages < 0) throw UsageError("a negative number of KV pages");
    if (pages_free() != pages_) throw EngineError("the KV pool cannot be resized while in use");
    arena_ = Arena(page_bytes_ * static_cast<uint64_t>(pages));
    pages_ = pages;
    touched_.assign(static_cast<size_t>(pages), false);
    users_.assign(static_cast<size_t>(pages), 0);
    free_.resize(static_cast<size_t>(pages));
    for (int i = 0; i < pages; ++i) free_[static_cast<size_t>(i)] = pages - 1 - i;  // lowest on top
}

int KvCache::open() {
    for (size_t i = 0; i < sequences_.size(); ++i)
        if (!sequences_[i].open) {
            sequences_[i] = {true, 0, {}};
            return static_cast<int>(i);
        }
    if (sequences_.size() >= kMaxSequences)
        throw EngineError("more than " + std::to_string(kMaxSequences) +
                          " sequences are open; close some");
    sequences_.push_back({true, 0, {}});
    return static_cast<int>(sequences_.size()) - 1;
}

const KvCache::Sequence& KvCache::get(int sequence) const {
    if (sequence < 0 || sequence >= static_cast<int>(sequences_.size()) ||
        !sequences_[static_cast<size_t>(sequence)].open)
        throw EngineError("there is no open sequence " + std::to_string(sequence));
    return sequences_[static_cast<size_t>(sequence)];
}

int KvCache::take() {
    const int page = free_.back();
    free_.pop_back();
    users_[static_cast<size_t>(page)] = 1;
    touched_[static_cast<size_t>(page)] = true;
    return page;
}

void KvCache::release(int page) {
    if (--users_[static_cast<size_t>(page)] == 0) free_.push_back(page);
}

void KvCache::check_used(const std::vector<int>& pages) const {
    for (int page : pages)
        if (page < 0 || page >= pages_ || users_[static_cast<size_t>(page)] == 0)
            throw EngineError("page " + std::to_string(page) + " of the KV cache is not in use");
}

void KvCache::hold(const std::vector<int>& pages) {
    check_used(pages);
    for (int page : pages) ++users_[static_cast<size_t>(page)];
}

void KvCache::drop(const std::vector<int>& pages) {
    for (int page : pages) {
        check_used({page});  // one by one: a page may be named twice
        release(page);
    }
}

void KvCache::adopt(int sequence, const std::vector<int>& pages) {
    if (!get(sequence).pages.empty())
        throw UsageError("only an empty sequence can begin with pages of another");
    hold(pages);
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    s.pages = pages;
    s.length = static_cast<int>(pages.size()) * kPageTokens;
}

// Whether the next token goes into a page that others use too.
bool KvCache::copies(const Sequence& s) const {
    return s.length % kPageTokens != 0 && users_[static_cast<size_t>(s.pages.back())] > 1;
}

void KvCache::close(int sequence) {
    get(sequence);
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    for (auto page = s.pages.rbegin(); page != s.pages.rend(); ++page) release(*page);
    s = {};
}

void KvCache::truncate(int sequence, int length) {
    if (length < 0 || length > get(sequence).length)
        throw UsageError("cannot truncate sequence " + std::to_string(sequence) + " of " +
                         std::to_string(get(sequence).length) + " tokens to " +
                         std::to_string(length));
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    s.length = length;
    while (static_cast<int>(s.pages.size()) > pages_of(length)) {
        release(s.pages.back());
        s.pages.pop_back();
    }
}

int KvCache::pages_needed(int sequence, int tokens) const {
    const Sequence& s = get(sequence);
    const int copy = tokens > 0 && copies(s) ? 1 : 0;
    return pages_of(s.length + tokens) - static_cast<int>(s.pages.size()) + copy;
}

void KvCache::extend(int sequence, int tokens) {
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    if (tokens > 0 && copies(s)) {
        const int page = take();
        std::memcpy(arena_.data() + page_bytes_ * static_cast<uint64_t>(page),
                    arena_.data() + page_bytes_ * static_cast<uint64_t>(s.pages.back()),
                    page_bytes_);
        release(s.pages.back());
        s.pages.back() = page;
    }
    s.length += tokens;
    while (static_cast<int>(s.pages.size()) < pages_of(s.length)) s.pages.push_back(take());
}

uint16_t* KvCache::keys(int sequence, int page, int layer, int head) const {
    const Sequence& s = sequences_[static_cast<size_t>(sequence)];
    const size_t at = static_cast<size_t>(layer * kv_heads_ + head) * head_halves_;
    uint8_t* base =
        arena_.data() + page_bytes_ * static_cast<uint64_t>(s.pages[static_cast<size_t>(page)]);
    return reinterpret_cast<uint16_t*>(base) + at;
}

uint8_t* KvCache::page(int sequence, int page) const {
    const Sequence& s = get(sequence);
    if (page < 0 || page >= static_cast<int>(s.pages.size()))
        throw UsageError("sequence " + std::to_string(sequence) + " has " +
                         std::to_string(s.pages.size()) + " pages and no page " +
                         std::to_string(page));
    return arena_.data() + page_bytes_ * static_cast<uint64_t>(s.pages[static_cast<size_t>(page)]);
}

uint16_t* KvCache::values(int sequence, int page, int layer, int head) const {
    return keys(sequence, page, layer, head) + key_halves_;
}

uint64_t KvCache::touched_bytes() const {
    return page_bytes_ * static_cast<uint64_t>(std::count(touched_.begin(), touched_.end(), true));
}

uint64_t KvCache::trim() {
    uint64_t bytes = 0;
    for (int page : free_)
        if (touched_[static_cast<size_t>(page)]) {
            const uint64_t begin = page_bytes_ * static_cast<uint64_t>(page);
            arena_.release(begin, begin + page_bytes_);
            touched_[static_cast<size_t>(page)] = false;
            bytes += page_bytes_;
        }
    return bytes;
}

}  // namespace pliant
