#include "kv.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "error.h"

namespace pliant {

namespace {
constexpr int kMaxSequences = 4096;
int pages_of(int tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }
// The least age of a page among its users; -1: it has none so far.
void note_age(int& youngest, int age) { youngest = youngest < 0 ? age : std::min(youngest, age); }
}  // namespace

KvCache::KvCache(const ModelSpec& model)
    : ladder(model),
      kv_heads_(model.kv_heads),
      head_dim_(model.head_dim),
      value_stride_((model.head_dim + 15) / 16 * 16),
      place_(static_cast<size_t>(model.layers)) {
    key_halves_ = static_cast<size_t>(head_dim_) * kPageTokens;
    head_halves_ = key_halves_ + static_cast<size_t>(value_stride_) * kPageTokens;
    const KvLayers layers(model);
    window_ = layers.window;
    for (int i = 0; i < model.layers; ++i)
        place_[static_cast<size_t>(layers.order[static_cast<size_t>(i)])] = i;
    const auto bytes = [&](int count) {
        const uint64_t exact = static_cast<uint64_t>(count) * static_cast<uint64_t>(kv_heads_) *
                               head_halves_ * sizeof(uint16_t);
        return (exact + 4095) / 4096 * 4096;
    };
    page_bytes_ = bytes(model.layers);
    global_bytes_ = bytes(layers.global);
}

void KvCache::reserve(int pages) {
    if (pages < 0) throw UsageError("a negative number of KV pages");
    if (pages_used() != 0) throw EngineError("the KV pool cannot be resized while in use");
    arena_ = Arena(page_bytes_ * static_cast<uint64_t>(pages));
    slots_ = ladder.present() ? Arena(ladder.bytes(ladder.rungs()) * static_cast<uint64_t>(pages))
                              : Arena();
    pages_ = pages;
    const size_t count = static_cast<size_t>(pages);
    touched_.assign(count, 0);
    slot_touched_.assign(count, 0);
    users_.assign(count, 0);
    exact_.assign(count, -1);
    rungs_.assign(count, 0);
    whole_.assign(count, true);
    free_.resize(count);
    for (int i = 0; i < pages; ++i) free_[static_cast<size_t>(i)] = pages - 1 - i;  // lowest on top
    halves_ = free_;
    used_ = 0;
    if (seen_.empty())
        seen_ = kept_ = {static_cast<uint8_t>(ladder.present() ? ladder.rungs() : 0)};
}

void KvCache::set_ages(std::vector<uint8_t> seen, std::vector<uint8_t> kept, int whole) {
    if (seen.empty() || seen.size() != kept.size() || seen[0] != kept[0])
        throw UsageError("the rungs that are seen and kept are not for the same ages");
    const int least = ladder.present() ? 1 : 0, most = ladder.present() ? ladder.rungs() : 0;
    for (size_t i = 0; i < seen.size(); ++i)
        if (seen[i] < least || seen[i] > kept[i] || kept[i] > most ||
            (i > 0 && (seen[i] > seen[i - 1] || kept[i] > kept[i - 1])))
            throw UsageError("a KV page has " + std::to_string(least) + " to " +
                             std::to_string(most) + " rungs, and never more when it is older");
    if (whole < -1 || (whole >= 0 && whole < local_age()))
        throw UsageError("local layers see pages up to the age " + std::to_string(local_age()) +
                         ", and not " + std::to_string(whole));
    seen_ = std::move(seen);
    kept_ = std::move(kept);
    kept_whole_ = window_ > 0 ? whole : -1;
    settle();
}

bool KvCache::fit() {
    if (limit_ == 0) return false;
    const uint64_t before = used_;
    if (used_ > limit_) settle();
    if (touched_bytes() > limit_) trim();
    return used_ < before;
}

void KvCache::settle() {
    std::vector<int> youngest(static_cast<size_t>(pages_), -1);
    for (const Sequence& s : sequences_)
        by_age(s, s.computed,
               [&](int page, int age) { note_age(youngest[static_cast<size_t>(page)], age); });
    for (int page = 0; page < pages_; ++page) {
        const int age = youngest[static_cast<size_t>(page)];
        // With a ladder only coded pages lose something: a step that is given up leaves exact ones.
        if (age < 0 || coded(page) != ladder.present()) continue;
        shallow(page, kept_[std::min(static_cast<size_t>(age), kept_.size() - 1)],
                kept_whole_ < 0 || age <= kept_whole_);
    }
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
            note_age(youngest[static_cast<size_t>(s.pages[static_cast<size_t>(page)])], age);
        }
    }
    for (const int age : youngest)
        if (age >= 0) count(age);
    return found;
}

int KvCache::open() {
    for (size_t i = 0; i < sequences_.size(); ++i)
        if (!sequences_[i].open) {
            sequences_[i] = {true, 0, 0, {}};
            return static_cast<int>(i);
        }
    if (sequences_.size() >= kMaxSequences)
        throw EngineError("more than " + std::to_string(kMaxSequences) +
                          " sequences are open; close some");
    sequences_.push_back({true, 0, 0, {}});
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
    whole_[at] = true;
    exact_[at] = halves_.back();
    halves_.pop_back();
    touched_[static_cast<size_t>(exact_[at])] = page_bytes_;
    used_ += page_bytes_;
    ++taken_;
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
    --taken_;
}

uint8_t* KvCache::slot(int page) const {
    return slots_.data() + ladder.bytes(ladder.rungs()) * static_cast<uint64_t>(page);
}

uint64_t KvCache::shallow(int page, int rungs, bool whole) {
    check_used({page});
    const size_t at = static_cast<size_t>(page);
    const bool is_coded = coded(page);
    if (rungs < 1 && is_coded) throw UsageError("a KV page keeps at least one rung");
    const uint64_t before = bytes(page);
    if (!whole && window_ > 0) whole_[at] = false;
    if (rungs_[at] > rungs) {
        ladder.shrink(slot(page), whole_[at], rungs_[at], rungs);
        rungs_[at] = rungs;
    }
    const uint64_t after = bytes(page);
    used_ -= before - after;
    uint64_t& touched = is_coded ? slot_touched_[at] : touched_[static_cast<size_t>(exact_[at])];
    if (touched <= after) return 0;
    Arena& arena = is_coded ? slots_ : arena_;
    const uint64_t base =
        static_cast<uint64_t>((is_coded ? slot(page) : exact(page)) - arena.data());
    arena.release(base + after, base + touched);
    const uint64_t given = touched - after;
    touched = after;
    return given;
}

void KvCache::seal(int sequence, int first) {
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    s.computed = s.length;
    if (!ladder.present()) return;
    for (int i = first; i < s.length / kPageTokens; ++i) {
        const int page = s.pages[static_cast<size_t>(i)];
        if (!coded(page)) become(page, level(), true);
    }
}

void KvCache::become(int page, int rungs, bool whole) {
    const size_t at = static_cast<size_t>(page);
    used_ -= bytes(page);
    rungs_[at] = rungs;
    whole_[at] = whole;
    used_ += bytes(page);
    if (rungs > 0) {
        slot_touched_[at] = std::max(slot_touched_[at], bytes(page));
        drop_exact(page);
    }
    shallow(page, rungs, whole);
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
    s.length = s.computed = static_cast<int>(pages.size()) * kPageTokens;
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
    s.computed = std::min(s.computed, length);
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
            if (!whole(page) && age_of(i, count) <= local_age()) return false;
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
    if (length % kPageTokens != 0) {
        const int page = s.pages[static_cast<size_t>(full)];
        if (coded(page) || !whole(page)) length = full * kPageTokens;
    }
    full = usable({s.pages.begin(), s.pages.begin() + full});
    if (full < length / kPageTokens) length = full * kPageTokens;
    cut(sequence, length);
    return length;
}

void KvCache::check_seen(int sequence) const {
    const Sequence& s = get(sequence);
    if (window_ == 0) return;
    by_age(s, s.length, [&](int page, int age) {
        if (!whole(page) && age <= local_age())
            throw EngineError("sequence " + std::to_string(sequence) +
                              " begins with a page that has given up what local layers see of it: "
                              "truncate the sequence");
    });
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
    const size_t at =
        static_cast<size_t>(place_[static_cast<size_t>(layer)] * kv_heads_ + head) * head_halves_;
    return reinterpret_cast<uint16_t*>(exact(s.pages[static_cast<size_t>(page)])) + at;
}

void KvCache::store(int page, uint8_t* out) const {
    check_used({page});
    if (coded(page))
        ladder.split(slot(page), whole(page), rungs(page), out);
    else
        std::memcpy(out, exact(page), bytes(page));
}

void KvCache::append(int sequence, int tokens, int rungs, bool whole, const uint8_t* stored) {
    const int before = get(sequence).length;
    if (tokens < 1 || tokens > kPageTokens || before % kPageTokens != 0 ||
        (tokens == kPageTokens && ladder.present() ? rungs < 1 || rungs > ladder.rungs()
                                                   : rungs != 0) ||
        (!whole && (tokens < kPageTokens || window_ == 0)))
        throw UsageError("a page of " + std::to_string(tokens) + " tokens and " +
                         std::to_string(rungs) + " rungs cannot follow " + std::to_string(before) +
                         " tokens");
    if (pages_free() < 1) throw EngineError("the KV cache has no free page");
    extend(sequence, tokens);
    Sequence& s = sequences_[static_cast<size_t>(sequence)];
    s.computed = s.length;
    const int page = s.pages.back();
    become(page, rungs, whole);
    if (rungs > 0)
        ladder.join(slot(page), whole, 0, rungs, stored, whole);
    else
        std::memcpy(exact(page), stored, bytes(page));
}

void KvCache::deepen(int page, int rungs, const uint8_t* stored, bool from_whole) {
    check_used({page});
    const size_t at = static_cast<size_t>(page);
    if (!coded(page) || rungs <= rungs_[at] || rungs > level() || users_[at] != 1 ||
        (whole_[at] && !from_whole))
        throw UsageError("a page of " + std::to_string(rungs_[at]) + " rungs and " +
                         std::to_string(users_[at]) + " users cannot get " + std::to_string(rungs) +
                         " where the level is " + std::to_string(level()));
    ladder.join(slot(page), whole_[at], rungs_[at], rungs, stored, from_whole);
    used_ -= bytes(page);
    rungs_[at] = rungs;
    used_ += bytes(page);
    slot_touched_[at] = std::max(slot_touched_[at], bytes(page));
}

uint16_t* KvCache::values(int sequence, int page, int layer, int head) const {
    return keys(sequence, page, layer, head) + key_halves_;
}

uint64_t KvCache::bytes(int page) const {
    return coded(page) ? ladder.bytes(rungs_[static_cast<size_t>(page)], whole(page))
                       : page_bytes(whole(page));
}

uint64_t KvCache::touched_bytes() const {
    return std::accumulate(slot_touched_.begin(), slot_touched_.end(),
                           std::accumulate(touched_.begin(), touched_.end(), uint64_t{0}));
}

uint64_t KvCache::trim() {
    uint64_t given = 0;
    const auto release = [&](Arena& arena, const std::vector<int>& unused, uint64_t size,
                             std::vector<uint64_t>& touched) {
        for (const int number : unused) {
            uint64_t& bytes = touched[static_cast<size_t>(number)];
            if (bytes == 0) continue;
            const uint64_t begin = size * static_cast<uint64_t>(number);
            arena.release(begin, begin + bytes);
            given += bytes;
            bytes = 0;
        }
    };
    release(arena_, halves_, page_bytes_, touched_);
    if (ladder.present()) release(slots_, free_, ladder.bytes(ladder.rungs()), slot_touched_);
    return given;
}

}  // namespace pliant
