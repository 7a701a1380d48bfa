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
    : ladder(model),
      layers_(model.layers),
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
    slots_ = ladder.present() ? Arena(ladder.bytes(ladder.rungs()) * static_cast<uint64_t>(pages))
                              : Arena();
    pages_ = pages;
    const size_t count = static_cast<size_t>(pages);
    touched_.assign(count, false);
    touched_rungs_.assign(count, -1);
    users_.assign(count, 0);
    exact_.assign(count, -1);
    rungs_.assign(count, 0);
    free_.resize(count);
    for (int i = 0; i < pages; ++i) free_[static_cast<size_t>(i)] = pages - 1 - i;  // lowest on top
    halves_ = free_;
    used_ = 0;
    if (seen_.empty() && ladder.present()) seen_ = kept_ = {static_cast<uint8_t>(ladder.rungs())};
}

void KvCache::set_ages(std::vector<uint8_t> seen, std::vector<uint8_t> kept) {
    if (!ladder.present()) throw UsageError("this model keeps its KV cache exact");
    if (seen.empty() || seen.size() != kept.size() || seen[0] != kept[0])
        throw UsageError("the rungs that are seen and kept are not for the same ages");
    for (size_t i = 0; i < seen.size(); ++i)
        if (seen[i] < 1 || seen[i] > kept[i] || kept[i] > ladder.rungs() ||
            (i > 0 && (seen[i] > seen[i - 1] || kept[i] > kept[i - 1])))
            throw UsageError("a KV page has 1 to " + std::to_string(ladder.rungs()) +
                             " rungs, and never more when it is older");
    seen_ = std::move(seen);
    kept_ = std::move(kept);
    settle();
}

void KvCache::fit() {
    if (limit_ == 0) return;
    if (used_ > limit_) settle();
    if (touched_bytes() > limit_) trim();
}

void KvCache::settle() {
    std::vector<uint8_t> needed(static_cast<size_t>(pages_), 0);
    for (const Sequence& s : sequences_) {
        const int newest = s.length / kPageTokens;
        for (int i = 0; i < newest; ++i) {
            uint8_t& most = needed[static_cast<size_t>(s.pages[static_cast<size_t>(i)])];
            most = std::max(most, static_cast<uint8_t>(of_age(kept_, i, newest)));
        }
    }
    for (int page = 0; page < pages_; ++page)
        if (const int most = needed[static_cast<size_t>(page)]; most > 0 && coded(page))
            shallow(page, most);
}

KvCache::Ages KvCache::ages(const std::vector<int>& sequences,
                            const std::vector<int>& tokens) const {
    Ages found{{}, 0};
    const auto count = [&](int age) {
        if (static_cast<size_t>(age) >= found.full.size())
            found.full.resize(static_cast<size_t>(age) + 1, 0);
        ++found.full[static_cast<size_t>(age)];
    };
    std::vector<int> youngest(static_cast<size_t>(pages_), -1);
    for (size_t i = 0; i < sequences.size(); ++i) {
        const Sequence& s = get(sequences[i]);
        const int newest = tokens[i] / kPageTokens, there = static_cast<int>(s.pages.size());
        if (tokens[i] % kPageTokens != 0) ++found.partial;
        for (int page = 0; page < newest; ++page) {
            const int age = age_of(page, newest);
            if (page >= there) {
                count(age);
                continue;
            }
            int& least = youngest[static_cast<size_t>(s.pages[static_cast<size_t>(page)])];
            least = least < 0 ? age : std::min(least, age);
        }
    }
    for (const int age : youngest)
        if (age >= 0) count(age);
    return found;
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
    const size_t at = static_cast<size_t>(page);
    free_.pop_back();
    users_[at] = 1;
    rungs_[at] = 0;
    exact_[at] = halves_.back();
    halves_.pop_back();
    touched_[static_cast<size_t>(exact_[at])] = true;
    used_ += page_bytes_;
    return page;
}

void KvCache::drop_exact(int page) {
    const size_t at = static_cast<size_t>(page);
    if (exact_[at] >= 0) halves_.push_back(exact_[at]);
    exact_[at] = -1;
}

void KvCache::release(int page) {
    if (--users_[static_cast<size_t>(page)] > 0) return;
    used_ -= bytes(page);
    drop_exact(page);
    free_.push_back(page);
}

uint8_t* KvCache::slot(int page) const {
    return slots_.data() + ladder.bytes(ladder.rungs()) * static_cast<uint64_t>(page);
}

uint64_t KvCache::shallow(int page, int rungs) {
    check_used({page});
    const size_t at = static_cast<size_t>(page);
    if (rungs < 1) throw UsageError("a KV page keeps at least one rung");
    if (rungs_[at] > rungs) {
        ladder.shrink(slot(page), rungs_[at], rungs);
        used_ -= ladder.bytes(rungs_[at]) - ladder.bytes(rungs);
        rungs_[at] = rungs;
    }
    if (rungs_[at] == 0 || touched_rungs_[at] <= rungs_[at]) return 0;
    const uint64_t begin = ladder.bytes(rungs_[at]), end = ladder.bytes(touched_rungs_[at]);
    const uint64_t base = static_cast<uint64_t>(slot(page) - slots_.data());
    slots_.release(base + begin, base + end);
    touched_rungs_[at] = rungs_[at];
    return end - begin;
}

void KvCache::seal(int sequence, int first) {
    if (!ladder.present()) return;
    const Sequence& s = sequences_[static_cast<size_t>(sequence)];
    for (int i = first; i < s.length / kPageTokens; ++i) {
        const int page = s.pages[static_cast<size_t>(i)];
        if (!coded(page)) become_coded(page, level());
    }
}

void KvCache::become_coded(int page, int rungs) {
    const size_t at = static_cast<size_t>(page);
    rungs_[at] = rungs;
    used_ -= page_bytes_ - ladder.bytes(rungs);
    touched_rungs_[at] = std::max(touched_rungs_[at], rungs);
    shallow(page, rungs);
    drop_exact(page);
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

void KvCache::cut(int sequence, int length) {
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    s.length = length;
    while (static_cast<int>(s.pages.size()) > pages_of(length)) {
        release(s.pages.back());
        s.pages.pop_back();
    }
}

int KvCache::usable(const std::vector<int>& pages) const {
    check_used(pages);
    const auto deep = [&](int count) {
        for (int i = 0; i < count; ++i) {
            const int page = pages[static_cast<size_t>(i)];
            if (coded(page) && rungs(page) < seen(i, count)) return false;
        }
        return true;
    };
    int count = static_cast<int>(pages.size());
    while (!deep(count)) --count;
    return count;
}

int KvCache::truncate(int sequence, int length) {
    if (length < 0 || length > get(sequence).length)
        throw UsageError("cannot truncate sequence " + std::to_string(sequence) + " of " +
                         std::to_string(get(sequence).length) + " tokens to " +
                         std::to_string(length));
    const Sequence& s = sequences_[static_cast<size_t>(sequence)];
    if (length == s.length) return length;
    int full = length / kPageTokens;
    if (length % kPageTokens != 0 && coded(s.pages[static_cast<size_t>(full)]))
        length = full * kPageTokens;
    full = usable({s.pages.begin(), s.pages.begin() + full});
    if (full < length / kPageTokens) length = full * kPageTokens;
    cut(sequence, length);
    return length;
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
        std::memcpy(exact(page), exact(s.pages.back()), page_bytes_);
        release(s.pages.back());
        s.pages.back() = page;
    }
    s.length += tokens;
    while (static_cast<int>(s.pages.size()) < pages_of(s.length)) s.pages.push_back(take());
}

uint16_t* KvCache::keys(int sequence, int page, int layer, int head) const {
    const Sequence& s = sequences_[static_cast<size_t>(sequence)];
    const size_t at = static_cast<size_t>(layer * kv_heads_ + head) * head_halves_;
    return reinterpret_cast<uint16_t*>(exact(s.pages[static_cast<size_t>(page)])) + at;
}

void KvCache::store(int page, uint8_t* out) const {
    check_used({page});
    if (coded(page))
        ladder.split(slot(page), rungs(page), out);
    else
        std::memcpy(out, exact(page), page_bytes_);
}

void KvCache::append(int sequence, int tokens, int rungs, const uint8_t* stored) {
    const int before = get(sequence).length;
    if (tokens < 1 || tokens > kPageTokens || before % kPageTokens != 0 ||
        (tokens == kPageTokens && ladder.present() ? rungs < 1 || rungs > ladder.rungs()
                                                   : rungs != 0))
        throw UsageError("a page of " + std::to_string(tokens) + " tokens and " +
                         std::to_string(rungs) + " rungs cannot follow " + std::to_string(before) +
                         " tokens");
    if (pages_free() < 1) throw EngineError("the KV cache has no free page");
    extend(sequence, tokens);
    const int page = sequences_[static_cast<size_t>(sequence)].pages.back();
    if (rungs == 0) {
        std::memcpy(exact(page), stored, page_bytes_);
        return;
    }
    become_coded(page, rungs);
    ladder.join(slot(page), 0, rungs, stored);
}

void KvCache::deepen(int page, int rungs, const uint8_t* stored) {
    check_used({page});
    const size_t at = static_cast<size_t>(page);
    if (!coded(page) || rungs <= rungs_[at] || rungs > level() || users_[at] != 1)
        throw UsageError("a page of " + std::to_string(rungs_[at]) + " rungs and " +
                         std::to_string(users_[at]) + " users cannot get " + std::to_string(rungs) +
                         " where the level is " + std::to_string(level()));
    ladder.join(slot(page), rungs_[at], rungs, stored);
    used_ += ladder.bytes(rungs) - ladder.bytes(rungs_[at]);
    rungs_[at] = rungs;
    touched_rungs_[at] = std::max(touched_rungs_[at], rungs);
}

uint16_t* KvCache::values(int sequence, int page, int layer, int head) const {
    return keys(sequence, page, layer, head) + key_halves_;
}

uint64_t KvCache::bytes(int page) const {
    return coded(page) ? ladder.bytes(rungs_[static_cast<size_t>(page)]) : page_bytes_;
}

uint64_t KvCache::touched_bytes() const {
    uint64_t total =
        page_bytes_ * static_cast<uint64_t>(std::count(touched_.begin(), touched_.end(), true));
    for (int rungs : touched_rungs_)
        if (rungs >= 0) total += ladder.bytes(rungs);
    return total;
}

uint64_t KvCache::trim() {
    uint64_t bytes = 0;
    for (int half : halves_)
        if (touched_[static_cast<size_t>(half)]) {
            const uint64_t begin = page_bytes_ * static_cast<uint64_t>(half);
            arena_.release(begin, begin + page_bytes_);
            touched_[static_cast<size_t>(half)] = false;
            bytes += page_bytes_;
        }
    for (int page : free_) {
        int& rungs = touched_rungs_[static_cast<size_t>(page)];
        if (rungs < 0) continue;
        const uint64_t begin = static_cast<uint64_t>(slot(page) - slots_.data());
        slots_.release(begin, begin + ladder.bytes(rungs));
        bytes += ladder.bytes(rungs);
        rungs = -1;
    }
    return bytes;
}

}  // namespace pliant
