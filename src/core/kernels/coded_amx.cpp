// Products with coded matrices and many tokens for AMX: a decoded group of a supertile is already
// in the order that its tiles want, so one instruction multiplies 16 rows × 64 columns with up to
// 16 tokens. Few tokens are left to AVX-512.
//
// The instructions are written out, since those of GCC 12 do not say which memory they read.
#include "ops.h"
#include "plies_avx512.h"
#include "scout.h"

namespace pliant::amx {

namespace {

using namespace avx512;

constexpr int kTileRows = 16;
constexpr int kFewTokens = 4;

// So few are soon done: plies are fetched before anything else then, otherwise between tiles.
constexpr int kAtOnce = 2 * kTileRows;

// Of so few, half a tile of sums is left over: it takes the products of the next group.
constexpr int kHalf = kTileRows / 2;

constexpr int kBatch = 4;      // groups whose products are added up together, at most
constexpr int kFullBatch = 3;  // where each fills a tile

// Tiles 0, 1: levels of the two tiles of rows; 2, 3: inputs and their low parts; 4 to 7: sums.
struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    explicit Config(int tokens) {
        for (int tile = 0; tile < 8; ++tile) {
            bytes[tile] = 64;
            rows[tile] = static_cast<uint8_t>(tile < 2 ? kTileRows : tokens);
        }
    }
};
static_assert(sizeof(Config) == 64);

void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
void release() { asm volatile("tilerelease" ::: "memory"); }

template <int Tile>
PLIANT_INLINE void load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
PLIANT_INLINE void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(64L), "i"(Tile) : "memory");
}
template <int Tile>
PLIANT_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Sum, int Inputs, int Levels>
PLIANT_INLINE void add_product() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Inputs), "i"(Levels));
}

// The tokens in tiles of 16, or of all if there are fewer. The last tile overlaps the one before;
// what is there twice is added once.
struct Tiling {
    int tokens, count, rows;
    explicit Tiling(int n)
        : tokens(n), count((n + kTileRows - 1) / kTileRows), rows(std::min(n, kTileRows)) {}
    int first(int tile) const { return std::min(tile * rows, tokens - rows); }
};

// Neighbouring groups that are all deep or all shallow, whose products are added up together, and a
// strip of supertiles that they go through, one after the other: so plies are read as streams, and
// what belongs to groups is looked up once for all of them.
struct Groups {
    int count = 0;           // none: the end
    bool wide, first, last;  // deep; of the groups of a supertile
    int begin, end;          // of the supertiles
    int group[kBatch], depth[kBatch];
    const uint8_t* codes[kBatch];
    const uint8_t* plies[kBatch * kMaxDepth];  // of all of the groups, one after the other
    int ply_count;
    alignas(64) float factors[kBatch][kMaxTokens];
    // With few tokens: their inputs between as many rows of zeros.
    alignas(64) int8_t hi[kBatch][3 * kHalf * kGroup], lo[kBatch][3 * kHalf * kGroup];
};

// The groups of a product in their order. A strip has as many supertiles as there is room for the
// sums of.
class Walk {
  public:
    explicit Walk(const CodedProduct& p)
        : p_(p), size_(p.tokens <= kAtOnce ? kSums / p.tokens : 1), strip_(p.first) {}

    void read(Groups& to) {
        const std::vector<Run>& runs = p_.block->runs;
        if (run_ == runs.size()) {
            strip_ = std::min(strip_ + size_, p_.last);
            run_ = 0;
        }
        to.count = 0;
        if (strip_ == p_.last) return;
        to.begin = strip_;
        to.end = std::min(strip_ + size_, p_.last);
        to.first = run_ == 0 && at_ == 0;
        to.wide = runs[run_].depth >= kWideDepth;
        // The groups up to the next change between deep and shallow ones: by two pairs, or in
        // batches of one size.
        int left = -at_;
        for (size_t r = run_; r < runs.size() && (runs[r].depth >= kWideDepth) == to.wide; ++r)
            left += runs[r].count;
        const int batches = (left + kFullBatch - 1) / kFullBatch;
        const int count =
            p_.tokens <= kHalf ? std::min(left, kBatch) : (left + batches - 1) / batches;
        to.ply_count = 0;
        while (to.count < count) add(to);
        to.last = run_ == runs.size();
    }

  private:
    void add(Groups& to) {
        const Run& run = p_.block->runs[run_];
        const int i = to.count++, g = run.first + at_;
        to.group[i] = g;
        to.depth[i] = run.depth;
        to.codes[i] = p_.block->codes[static_cast<size_t>(g)];
        const uint8_t* const* planes = &p_.block->planes[static_cast<size_t>(g * kMaxDepth)];
        for (int ply = 0; ply < run.depth; ++ply) to.plies[to.ply_count++] = planes[ply];
        factors_of(p_, g, run.depth, 0, p_.tokens, to.factors[i]);
        if (p_.tokens <= kHalf) {
            const size_t from = p_.x->at(g, 0) * kGroup;
            between_zeros(p_.x->top(to.wide) + from, to.hi[i]);
            if (to.wide) between_zeros(p_.x->lo + from, to.lo[i]);
        }
        if (++at_ == run.count) ++run_, at_ = 0;
    }

    void between_zeros(const int8_t* from, int8_t* to) const {
        for (int row = 0; row < 3 * p_.tokens; ++row) {
            const bool inside = row >= p_.tokens && row < 2 * p_.tokens;
            const __m512i x = inside ? _mm512_loadu_si512(from + (row - p_.tokens) * kGroup)
                                     : _mm512_setzero_si512();
            _mm512_store_si512(to + row * kGroup, x);
        }
    }

    const CodedProduct& p_;
    int size_, strip_;
    size_t run_ = 0;
    int at_ = 0;  // in the run
};

// The plies of a supertile that is decoded later, four lines each. They are asked for bit by bit:
// a processor that waits for more lines than it can keep in mind does nothing else.
class Ahead {
  public:
    Ahead(const Groups& groups, int supertile) : groups_(groups), supertile_(supertile) {
        if (groups.count == 0) return;
        count_ = groups.ply_count;
        for (int i = 0; i < groups.count; ++i) fetch(groups.codes[i] + supertile * 16);
    }
    void fetch_part(int part, int parts) {
        for (const int end = count_ * part / parts; done_ < end; ++done_) {
            const uint8_t* ply = groups_.plies[done_] + supertile_ * 256;
            for (int line = 0; line < 4; ++line) fetch(ply + 64 * line);
        }
    }

  private:
    const Groups& groups_;
    int supertile_, count_ = 0, done_ = 0;
};

// The groups of a supertile, decoded. Without the gap the two parts of a level would want the same
// set of the cache.
struct Batch {
    alignas(64) uint8_t high[kBatch][kSupertile * kGroup], gap[kSupertile * kGroup];
    alignas(64) uint8_t low[kBatch][kSupertile * kGroup];
    __m512 step[kBatch][2];
};

void decode(const CodedProduct& p, const Groups& groups, int supertile, Ahead& ahead,
            Batch& batch) {
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const uint8_t* const* plies = groups.plies;
    for (int i = 0; i < groups.count; ++i) {
        const int depth = groups.depth[i];
        row_steps(groups.codes[i], static_cast<size_t>(supertile), steps, batch.step[i]);
        with_depth(depth, [&]<int N>() {
            const Table<N> hi(p.levels->hi[N], 0), lo(p.levels->lo[N], 0);
            const uint8_t* planes[N];
            for (int ply = 0; ply < N; ++ply) planes[ply] = plies[ply] + supertile * 256;
            decode<N>(planes, hi, lo, batch.high[i], batch.low[i]);
        });
        plies += depth;
        if (p.tokens <= kAtOnce) ahead.fetch_part(i + 1, groups.count);
    }
}

// Products of the tokens of a tile with the groups of a batch; with few tokens of two groups, one
// after the other.
template <int Count>
struct Room {
    alignas(64) int32_t top[Count][2][kTileRows][16], middle[Count][2][kTileRows][16];
};

// A whole number below 2^22 as the float kMagic + n, without a conversion.
PLIANT_INLINE __m512 shifted(const int32_t* from) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_load_si512(from), _mm512_castps_si512(_mm512_set1_ps(kMagic))));
}

// While tiles are at work, the processor adds and multiplies floats at half of its speed, so there
// are as few of these operations as can be. The results are those of conversion and product: the
// sum less kMagic is exact, and so is kMagic · step (LevelTables::build).
struct Steps {
    __m512 step, shift;
    explicit Steps(__m512 s) : step(s), shift(_mm512_mul_ps(s, _mm512_set1_ps(-kMagic))) {}
    Steps() = default;
    template <bool Wide>
    PLIANT_INLINE __m512 operator()(const int32_t* top, const int32_t* middle) const {
        if constexpr (!Wide) return _mm512_fmadd_ps(shifted(top), step, shift);
        constexpr float kBoth = kMagic + kMagic / kSixteen;
        const __m512 high = _mm512_sub_ps(shifted(top), _mm512_set1_ps(kBoth));
        return _mm512_mul_ps(
            _mm512_fmadd_ps(shifted(middle), _mm512_set1_ps(1.0f / kSixteen), high), step);
    }
};

// The products of a tile of tokens, from `first` on, with the groups of a batch. To store a tile
// takes longer than to multiply, so two groups share one if there are few tokens: to the first
// belong inputs before zeros, to the second inputs after zeros.
template <bool Wide, int Count, bool Few>
PLIANT_INLINE void make_products(const Prepared& x, int first, int tokens, const Groups& groups,
                                 const Batch& batch, Room<Count>& room) {
    repeat<Count>([&]<int i>() PLIANT_LAMBDA {
        constexpr int kTogether = Few ? 2 : 1, kAt = i / kTogether;
        constexpr int kSum = Wide ? 4 : kAt % 2 * 2 + 4;
        constexpr bool kBegin = i % kTogether == 0;
        const size_t at = Few ? static_cast<size_t>((kBegin ? tokens : 0) * kGroup)
                              : x.at(groups.group[i], first) * kGroup;
        load<2>((Few ? groups.hi[i] : x.top(Wide)) + at, kGroup);
        load<0>(batch.high[i], 128);
        load<1>(batch.high[i] + 64, 128);
        if constexpr (kBegin) {
            clear<kSum>();
            clear<kSum + 1>();
        }
        add_product<kSum, 2, 0>();
        add_product<kSum + 1, 2, 1>();
        if constexpr (Wide) {
            load<3>((Few ? groups.lo[i] : x.lo) + at, kGroup);
            if constexpr (kBegin) {
                clear<6>();
                clear<7>();
            }
            add_product<6, 3, 0>();
            add_product<7, 3, 1>();
            load<0>(batch.low[i], 128);
            load<1>(batch.low[i] + 64, 128);
            add_product<6, 2, 0>();
            add_product<7, 2, 1>();
        }
        if constexpr (i % kTogether + 1 == kTogether || i + 1 == Count) {
            store<kSum>(room.top[kAt][0]);
            store<kSum + 1>(room.top[kAt][1]);
            if constexpr (Wide) {
                store<6>(room.middle[kAt][0]);
                store<7>(room.middle[kAt][1]);
            }
        }
    });
}

// The products of a batch with all tokens are added to sums[token][32].
template <bool Wide, int Count, bool Few>
void multiply(const CodedProduct& p, const Tiling& tiling, const Groups& groups, int supertile,
              const Batch& batch, Ahead& ahead, float* sums) {
    Steps steps0[Count], steps1[Count];
    repeat<Count>([&]<int i>() PLIANT_LAMBDA {
        steps0[i] = Steps(batch.step[i][0]);
        steps1[i] = Steps(batch.step[i][1]);
    });
    const float* scale = p.block->row_scale + supertile * kSupertile;
    float* out = p.out + (supertile - p.first) * kSupertile;
    const bool begin = groups.first, end = groups.last;
    Room<Count> room;
    for (int tile = 0; tile < tiling.count; ++tile) {
        const int first = tiling.first(tile);
        ahead.fetch_part(tile + 1, tiling.count);
        make_products<Wide, Count, Few>(*p.x, first, p.tokens, groups, batch, room);
        for (int t = tile * kTileRows, row = t - first; row < tiling.rows; ++t, ++row) {
            float* sum = sums + t * kSupertile;
            __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
            if (!begin) {
                a = _mm512_load_ps(sum);
                b = _mm512_load_ps(sum + 16);
            }
            repeat<Count>([&]<int i>() PLIANT_LAMBDA {
                const auto& [top, middle] = room;
                constexpr int kAt = Few ? i / 2 : i;
                const int at = Few ? i % 2 * p.tokens + row : row;
                const __m512 factor = _mm512_set1_ps(groups.factors[i][t]);
                a = _mm512_fmadd_ps(
                    steps0[i].template operator()<Wide>(top[kAt][0][at], middle[kAt][0][at]),
                    factor, a);
                b = _mm512_fmadd_ps(
                    steps1[i].template operator()<Wide>(top[kAt][1][at], middle[kAt][1][at]),
                    factor, b);
            });
            if (end) {
                float* to = out + static_cast<size_t>(t) * p.stride;
                _mm512_storeu_ps(to, _mm512_mul_ps(a, _mm512_loadu_ps(scale)));
                _mm512_storeu_ps(to + 16, _mm512_mul_ps(b, _mm512_loadu_ps(scale + 16)));
            } else {
                _mm512_store_ps(sum, a);
                _mm512_store_ps(sum + 16, b);
            }
        }
    }
}

template <bool Wide>
void multiply(const CodedProduct& p, const Tiling& tiling, const Groups& groups, int supertile,
              const Batch& batch, Ahead& ahead, float* sums) {
    const auto with = [&]<int Count>() {
        if (p.tokens <= kHalf)
            multiply<Wide, Count, true>(p, tiling, groups, supertile, batch, ahead, sums);
        else if constexpr (Count <= kFullBatch)
            multiply<Wide, Count, false>(p, tiling, groups, supertile, batch, ahead, sums);
    };
    switch (groups.count) {
        case 1:
            return with.template operator()<1>();
        case 2:
            return with.template operator()<2>();
        case 3:
            return with.template operator()<3>();
        default:
            return with.template operator()<4>();
    }
}

}  // namespace

void coded_product(const CodedProduct& p) {
    if (p.tokens < kFewTokens || p.block->runs.empty()) return avx512::coded_product(p);
    fetch_pointers(*p.block, p.first, p.last);
    const Tiling tiling(p.tokens);
    configure(Config(p.tokens <= kHalf ? 2 * p.tokens : tiling.rows));
    Walk walk(p);
    Groups room[2], *now = &room[0], *next = &room[1];
    Batch batch;
    for (walk.read(*now); now->count > 0; std::swap(now, next)) {
        walk.read(*next);
        for (int s = now->begin; s < now->end; ++s) {
            Ahead ahead = s + 1 < now->end ? Ahead(*now, s + 1) : Ahead(*next, next->begin);
            decode(p, *now, s, ahead, batch);
            float* sums =
                reinterpret_cast<float*>(p.scratch) + (s - now->begin) * p.tokens * kSupertile;
            now->wide ? multiply<true>(p, tiling, *now, s, batch, ahead, sums)
                      : multiply<false>(p, tiling, *now, s, batch, ahead, sums);
        }
    }
    release();
}

}  // namespace pliant::amx
