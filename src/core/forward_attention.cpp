// The attention of a chunk: who attends to what, and in which order it is added up.
#include <algorithm>
#include <utility>

#include "forward.h"

namespace pliant {

namespace {

constexpr int kFirstCoded = 6, kFirstExact = 2;  // pages that are fetched before a task needs them

}  // namespace

void Forward::plan_attention() {
    for (int t = 0; t < tokens_; ++t) {
        const ChunkToken& token = at(chunk_, t);
        if (t > 0 && token.sequence == at(chunk_, t - 1).sequence &&
            token.position % kPageTokens != 0)
            ++new_.back().count;
        else
            new_.push_back({t, 1});
    }
    const bool coded = e_.kv.ladder.present();
    for (int t = 0; coded && t < tokens_; ++t) {
        const ChunkToken& token = at(chunk_, t);
        if ((token.position + 1) % kPageTokens == 0)
            full_.push_back({token.sequence, token.position / kPageTokens});
        // What is seen of pages is the same for all layers and heads, and for the tokens of a page.
        const int newest = token.position / kPageTokens;
        if (t > 0 && token.sequence == at(chunk_, t - 1).sequence &&
            newest == at(chunk_, t - 1).position / kPageTokens) {
            first_slot_.push_back(first_slot_.back());
            continue;
        }
        first_slot_.push_back(slots_.size());
        const std::vector<int>& pages = e_.kv.pages(token.sequence);
        for (int i = 0; i <= newest; ++i) {
            const int page = at(pages, i), there = e_.kv.rungs(page);
            slots_.push_back(e_.kv.slot(page));
            maps_.push_back(e_.kv.ladder.map(there, std::min(there, e_.kv.seen(i, newest))));
        }
    }
    singles_ = group_ <= kMaxQueries;
    for (int t = 1; t < tokens_; ++t)
        if (at(chunk_, t).sequence == at(chunk_, t - 1).sequence) singles_ = false;
    if (alone_) {
        // Threads share the positions. The heads of a part come one after the other: in a page they
        // lie beside each other.
        const int parts = part_of(at(chunk_, 0).position / kPageTokens) + 1;
        for (int part = 0; part < parts; ++part)
            for (int h = 0; h < m_.kv_heads; ++h)
                for (int q = 0; q < group_; q += kMaxQueries)
                    tasks_.push_back({h, q, std::min(q + kMaxQueries, group_), part});
        return;
    }
    // As many queries in a task as possible, fewer if there are few.
    int most = coded ? kMaxQueries : kExactQueries;
    while (!singles_ && most > 1 &&
           m_.kv_heads * ((tokens_ * group_ + most - 1) / most) < 2 * threads_)
        most = (most + 1) / 2;
    for (int t = 0; t < tokens_;) {
        // Tokens of this sequence; with coded pages, of one page, which is exact for them alone.
        int end = t;
        const ChunkToken& first = at(chunk_, t);
        while (end < tokens_ && at(chunk_, end).sequence == first.sequence &&
               (!coded || at(chunk_, end).position / kPageTokens == first.position / kPageTokens))
            ++end;
        for (int h = 0; h < m_.kv_heads; ++h)
            for (int q = t * group_; q < end * group_; q += most)
                tasks_.push_back({h, q, std::min(q + most, end * group_), -1});
        t = end;
    }
    // Late tokens see more: in each share they come first, so that no thread is left with a long
    // task at the end.
    std::reverse(tasks_.begin(), tasks_.end());
    const auto share = [&](const AttentionTask& task) {
        return task.first / group_ * shares_ / tokens_;
    };
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [&](const auto& a, const auto& b) { return share(a) < share(b); });
}

// Keys are normed and rotated; keys and values go to their page, which is the same for `count`
// tokens.
void Forward::append(int l, int first, int count, int kv_head) {
    const Layer& layer = at(e_.layers_, l);
    const ChunkToken& token = at(chunk_, first);
    const size_t rope = static_cast<size_t>(at(m_.layer_rope, l));
    const int page = token.position / kPageTokens, slot = token.position % kPageTokens;
    float* k = b_.k.row(first) + kv_head * m_.head_dim;
    const float* v = b_.v.row(first) + kv_head * m_.head_dim;
    for (int i = 0; i < count; ++i) {
        float* key = k + static_cast<size_t>(i) * b_.k.stride;
        if (i + 1 < count) {  // what other threads have written
            fetch(key + b_.k.stride, m_.head_dim);
            fetch(v + static_cast<size_t>(i) * b_.v.stride, m_.head_dim);
        }
        if (!layer.k_norm.empty())
            kernels_.rms_norm(key, layer.k_norm.data(), m_.head_dim, m_.norm_eps, key);
        kernels_.rope(key, b_.cosine_row(rope, first + i), b_.sine_row(rope, first + i),
                      m_.head_dim);
    }
    kernels_.to_keys(k, b_.k.stride, count, m_.head_dim,
                     e_.kv.keys(token.sequence, page, l, kv_head), slot);
    const size_t stride = static_cast<size_t>(e_.kv.value_stride());
    kernels_.to_values(
        v, b_.v.stride, count, m_.head_dim,
        e_.kv.values(token.sequence, page, l, kv_head) + static_cast<size_t>(slot) * stride,
        stride);
}

// A query, normed, rotated and scaled.
void Forward::load_query(int l, int t, int head, float* to) const {
    const Layer& layer = at(e_.layers_, l);
    const size_t rope = static_cast<size_t>(at(m_.layer_rope, l));
    const float* q = b_.q.row(t) + head * m_.head_dim;
    if (layer.q_norm.empty())
        std::copy_n(q, m_.head_dim, to);
    else
        kernels_.rms_norm(q, layer.q_norm.data(), m_.head_dim, m_.norm_eps, to);
    kernels_.rope(to, b_.cosine_row(rope, t), b_.sine_row(rope, t), m_.head_dim);
    for (int i = 0; i < m_.head_dim; ++i) to[i] *= m_.attn_scale;
}

// The queries of a task, as they are and for coded pages. Those of a single token are kept for
// other positions.
const QueryRoom& Forward::load_queries(Worker& w, int l, const AttentionTask& task) {
    const QueryRoom* room = &at(b_.attention, w.self).queries;
    if (task.part >= 0) {
        const int index = task.kv_head * query_blocks(m_) + task.first / kMaxQueries;
        room = &at(b_.own_queries, w.self * m_.kv_heads * query_blocks(m_) + index);
        if (std::exchange(at(w.made, index), l) == l) return *room;
    }
    const KvLadder& ladder = e_.kv.ladder;
    for (int q = task.first; q < task.last; ++q)  // what other threads have written
        fetch(b_.q.row(q / group_) + (task.kv_head * group_ + q % group_) * m_.head_dim,
              m_.head_dim);
    for (int q = task.first; q < task.last; ++q) {
        const int slot = q - task.first;
        load_query(l, q / group_, task.kv_head * group_ + q % group_, room->query(slot));
        if (ladder.present())
            kernels_.turn_query(ladder.turn(l, task.kv_head, false), m_.head_dim, ladder.groups(),
                                room->query(slot), slot, room->coded());
    }
    return *room;
}

void Forward::attend(Worker& w, int l, const AttentionTask& task) {
    AttentionRoom& room = at(b_.attention, w.self);
    const KvLadder& ladder = e_.kv.ladder;
    const bool coded = ladder.present(), alone = task.part >= 0;
    if (alone) fetch_first(l, task);
    const QueryRoom& room_of_queries = load_queries(w, l, task);
    const float* queries[kExactQueries];
    int positions[kExactQueries];
    int latest = 0;
    const int sequence = at(chunk_, task.first / group_).sequence;
    for (int q = task.first; q < task.last; ++q) {
        const int slot = q - task.first;
        queries[slot] = room_of_queries.query(slot);
        positions[slot] = at(chunk_, q / group_).position;
        latest = std::max(latest, positions[slot]);
    }
    const int window = at(m_.layer_window, l), count = task.last - task.first;
    const int newest_part = part_of(latest / kPageTokens);
    const int last_part = alone ? task.part : newest_part;
    const int seen = window > 0 ? std::max(0, positions[0] - window + 1) : 0;
    const int first_part = alone ? task.part : part_of(seen / kPageTokens);
    const bool newest = last_part == newest_part;
    if (newest && singles_) append(l, task.first / group_, 1, task.kv_head);

    // With a ladder all pages before the newest are coded, and added up as they are, turned.
    const int pages = coded ? coded_pages(sequence, latest) : latest / kPageTokens + 1;
    const int dims = coded ? ladder.groups() * kGroup : m_.head_dim;
    const Pages of{l,         task.kv_head, sequence, task.first / group_, count, queries,
                   positions, window,       alone,    &room_of_queries};
    const auto head = [&](int slot) {
        return task.kv_head * group_ + (task.first + slot) % group_;
    };
    Attended drawn[kExactQueries];
    for (int part = first_part; part <= last_part; ++part) {
        for (int slot = 0; slot < count; ++slot)
            drawn[slot] = alone                ? b_.part(head(slot), part)
                          : part == first_part ? room.sum(slot)
                                               : room.more(slot);
        const int begin = part_begin(part);
        const int end = std::max(begin, std::min(pages, part_begin(part + 1)));
        coded ? attend_coded(w, of, begin, end, drawn) : attend_exact(w, of, begin, end, drawn);
        if (part > first_part)
            for (int slot = 0; slot < count; ++slot)
                kernels_.attend_more(room.more(slot), dims, room.sum(slot));
    }
    if (coded && newest) {
        for (int slot = 0; slot < count; ++slot)
            drawn[slot] = alone ? b_.newest(head(slot)) : room.more(slot);
        attend_exact(w, of, pages, latest / kPageTokens + 1, drawn);
        for (const FullPage& full : full_)
            if (singles_ && full.sequence == sequence) code_page(l, task.kv_head, full);
    }
    if (alone) return end_part(l, task, newest_part + 1);
    for (int slot = 0; slot < count; ++slot) {
        if (coded) with_newest(l, task.kv_head, room.sum(slot), room.more(slot));
        kernels_.attend_mean(room.sum(slot), m_.head_dim,
                             b_.x.row((task.first + slot) / group_) + head(slot) * m_.head_dim);
    }
}

// The first pages that a task looks at come while its queries are made, and so does the newest one,
// which is exact.
void Forward::fetch_first(int l, const AttentionTask& task) const {
    const KvLadder& ladder = e_.kv.ladder;
    const int sequence = at(chunk_, 0).sequence, position = at(chunk_, 0).position;
    const int newest = position / kPageTokens;
    int page = part_begin(task.part), end = part_begin(task.part + 1);
    if (ladder.present()) {
        const int keys = ladder.unit(l, task.kv_head, false);
        const int values = ladder.unit(l, task.kv_head, true);
        const int coded = coded_pages(sequence, position);
        for (int i = page; i < std::min({page + kFirstCoded, end, coded}); ++i) {
            const SlotMap& map = maps_[static_cast<size_t>(i)];
            fetch_early(slots_[static_cast<size_t>(i)] + map.codes[keys / 2],
                        map.plies[values] - map.codes[keys / 2]);
        }
        page = std::max(page, coded);
    }
    for (int i = page; i < std::min({page + kFirstExact, end, newest + 1}); ++i)
        fetch_early(e_.kv.keys(sequence, i, l, task.kv_head),
                    static_cast<size_t>(m_.head_dim * kPageTokens) * sizeof(uint16_t));
}

// How many pages a token sees coded.
int Forward::coded_pages(int sequence, int position) const {
    const int newest = position / kPageTokens;
    const bool all =
        e_.kv.code_newest && !singles_ && (newest + 1) * kPageTokens <= e_.kv.length(sequence);
    return newest + (all ? 1 : 0);
}

void Forward::attend_coded(Worker& w, const Pages& of, int begin, int end, const Attended* drawn) {
    const KvLadder& ladder = e_.kv.ladder;
    const size_t first = at(first_slot_, of.token) + static_cast<size_t>(begin);
    const CodedQueries queries = of.room->coded();
    CodedAttention a{ladder.groups(),
                     of.queries,
                     &queries,
                     of.positions,
                     of.window,
                     begin,
                     end - begin,
                     slots_.data() + first,
                     maps_.data() + first,
                     ladder.unit(of.layer, of.kv_head, false),
                     ladder.unit(of.layer, of.kv_head, true),
                     &e_.weights.levels,
                     m_.attn_softcap,
                     drawn,
                     kernels_.page_product};
    if (of.alone) expect(w, of, a);
    kernels_.attend_coded(a);
}

// What the next task of this thread will read first, if nobody takes it before. A wrong guess costs
// a few reads.
void Forward::expect(const Worker& w, const Pages& of, CodedAttention& a) const {
    const int all = static_cast<int>(tasks_.size());
    const int next = at(e_.phases_, static_cast<int>(w.phase) - 1)
                         .next(all, attention_shares_, w.self * attention_shares_ / threads_);
    if (next >= all || of.window > 0) return;
    const AttentionTask& task = at(tasks_, next);
    const int begin = part_begin(task.part), pages = coded_pages(of.sequence, of.positions[0]);
    const size_t first = at(first_slot_, of.token) + static_cast<size_t>(begin);
    a.then_pages = std::max(pages - begin, 0);
    a.then_keys = e_.kv.ladder.unit(of.layer, task.kv_head, false);
    a.then_slot = slots_.data() + first;
    a.then_map = maps_.data() + first;
}

void Forward::attend_exact(Worker& w, const Pages& of, int begin, int end, const Attended* drawn) {
    w.keys.clear();
    w.values.clear();
    for (int page = begin; page < end; ++page) {
        w.keys.push_back(e_.kv.keys(of.sequence, page, of.layer, of.kv_head));
        w.values.push_back(e_.kv.values(of.sequence, page, of.layer, of.kv_head));
    }
    kernels_.attend({m_.head_dim, of.queries, of.q, of.positions, of.window, begin, end - begin,
                     w.keys.data(), w.values.data(), m_.attn_softcap, drawn});
}

// Turns back what was drawn from all coded pages, and adds what was drawn from the exact one.
void Forward::with_newest(int l, int kv_head, const Attended& sum, const Attended& newest) const {
    const KvLadder& ladder = e_.kv.ladder;
    kernels_.turn_back(ladder.turn(l, kv_head, true), m_.head_dim, ladder.groups(), sum);
    kernels_.attend_more(newest, m_.head_dim, sum);
}

void Forward::code_page(int l, int kv_head, const FullPage& full) {
    const KvLadder& ladder = e_.kv.ladder;
    const int page = at(e_.kv.pages(full.sequence), full.page);
    kernels_.code_page({m_.head_dim, ladder.groups(),
                        e_.kv.keys(full.sequence, full.page, l, kv_head),
                        e_.kv.values(full.sequence, full.page, l, kv_head),
                        ladder.turn(l, kv_head, false), ladder.turn(l, kv_head, true),
                        ladder.thresholds(), e_.kv.slot(page), ladder.map(e_.kv.rungs(page)),
                        ladder.unit(l, kv_head, false), ladder.unit(l, kv_head, true)});
}

// A part of the only token is done. Whoever does the last one of these heads adds them up, in
// order.
void Forward::end_part(int l, const AttentionTask& task, int parts) {
    std::atomic<int>& done = b_.parts_done[task.kv_head * group_ + task.first];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < parts) return;
    done.store(0, std::memory_order_relaxed);  // the next layer comes after this phase
    const bool coded = e_.kv.ladder.present();
    const int dims = coded ? e_.kv.ladder.groups() * kGroup : m_.head_dim;
    for (int head = task.kv_head * group_ + task.first; head < task.kv_head * group_ + task.last;
         ++head) {
        const Attended sum = b_.part(head, 0);
        for (int part = 1; part < parts; ++part)
            kernels_.attend_more(b_.part(head, part), dims, sum);
        if (coded) with_newest(l, task.kv_head, sum, b_.newest(head));
        kernels_.attend_mean(sum, m_.head_dim, b_.x.row(0) + head * m_.head_dim);
    }
}

}  // namespace pliant
