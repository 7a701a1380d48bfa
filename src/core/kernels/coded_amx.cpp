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
constexpr int kFewTokens = 6;

// So few are soon done: plies are fetched before anything else then, otherwise between tiles.
constexpr int kAtOnce = 2 * kTileRows;

constexpr int kBatch = 3;  // groups whose products are added up together

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

// Neighbouring groups of one supertile that are all deep or all shallow, decoded.
struct Batch {
    alignas(64) uint8_t high[kBatch][kSupertile * kGroup], low[kBatch][kSupertile * kGroup];
    alignas(64) float factors[kBatch][kMaxTokens];
    __m512 step[kBatch][2];
    int group[kBatch];
    // What the batch that is decoded next has of its plies: four lines each.
    const uint8_t* next[kBatch * kMaxDepth];
    int nexts, fetched;

    void fetch_until(int count) {
        for (; fetched < count; ++fetched)
            for (int line = 0; line < 4; ++line) fetch(next[fetched] + 64 * line);
    }
};

// The batches of a product in their order: a strip of supertiles, as many as their sums have room
// for, goes through the groups together, so that plies are read as streams.
class Cursor {
  public:
    explicit Cursor(const CodedProduct& p)
        : block_(p.block), size_(std::max(1, kMaxTokens / p.tokens)), end_(p.last) {
        begin(p.first);
    }
    bool ended() const { return strip_ == end_; }
    void next() {
        if (++supertile < std::min(strip_ + size_, end_)) return;
        supertile = strip_;
        first = false;
        for (; count > 0; --count)
            if (++at_ == block_->runs[run_].count) ++run_, at_ = 0;
        run_ < block_->runs.size() ? share() : begin(std::min(strip_ + size_, end_));
    }
    // Calls f(i, group, depth) for the groups.
    template <typename F>
    PLIANT_INLINE void each(F&& f) const {
        size_t r = run_;
        for (int i = 0, at = at_; i < count; ++i) {
            const Run& run = block_->runs[r];
            f(i, run.first + at, run.depth);
            if (++at == run.count) ++r, at = 0;
        }
    }
    int place() const { return supertile - strip_; }  // in the strip

    int supertile = 0, count = 0;
    bool wide = false, first = false, last = false;  // of the groups of a supertile

  private:
    void begin(int strip) {
        strip_ = supertile = strip;
        run_ = 0, at_ = 0;
        first = true;
        share();
    }
    // The groups up to the next change between deep and shallow ones, in batches of one size.
    void share() {
        wide = block_->runs[run_].depth >= kWideDepth;
        int left = -at_;
        size_t r = run_;
        for (; r < block_->runs.size() && (block_->runs[r].depth >= kWideDepth) == wide; ++r)
            left += block_->runs[r].count;
        const int batches = (left + kBatch - 1) / kBatch;
        count = (left + batches - 1) / batches;
        last = batches == 1 && r == block_->runs.size();
    }

    const CodedBlock* block_;
    int size_, end_, strip_ = 0;
    size_t run_ = 0;
    int at_ = 0;  // in the run
};

// Decodes the groups at a place, and fetches what will be decoded later.
void decode(const CodedProduct& p, const Cursor& cursor, const Cursor& later, Batch& batch) {
    const CodedBlock& block = *p.block;
    batch.nexts = batch.fetched = 0;
    if (!later.ended())
        later.each([&](int, int g, int depth) {
            const uint8_t* const* planes = &block.planes[static_cast<size_t>(g * kMaxDepth)];
            for (int ply = 0; ply < depth; ++ply)
                batch.next[batch.nexts++] = planes[ply] + later.supertile * 256;
            fetch(block.codes[static_cast<size_t>(g)] + later.supertile * 16);
        });
    if (p.tokens <= kAtOnce) batch.fetch_until(batch.nexts);
    const size_t tile = static_cast<size_t>(cursor.supertile);
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    cursor.each([&](int i, int g, int depth) {
        const size_t group = static_cast<size_t>(g);
        batch.group[i] = g;
        row_steps(block.codes[group], tile, steps, batch.step[i]);
        factors_of(p, g, depth, 0, p.tokens, batch.factors[i]);
        with_depth(depth, [&]<int N>() {
            const Table<N> hi(p.levels->hi[N], 0), lo(p.levels->lo[N], 0);
            const uint8_t* planes[N];
            planes_of<N>(block, g, cursor.supertile, planes);
            decode<N>(planes, hi, lo, batch.high[i], batch.low[i]);
        });
    });
}

// Products of the tokens of a tile with the groups of a batch.
struct Room {
    alignas(64) int32_t top[kBatch][2][kTileRows][16], middle[kBatch][2][kTileRows][16];
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
        constexpr float kBoth = kMagic + kMagic / 256.0f;
        const __m512 high = _mm512_sub_ps(shifted(top), _mm512_set1_ps(kBoth));
        return _mm512_mul_ps(_mm512_fmadd_ps(shifted(middle), _mm512_set1_ps(1.0f / 256.0f), high),
                             step);
    }
};

// The products of a tile of tokens, from `first` on, with the groups of a batch.
template <bool Wide, int Count>
PLIANT_INLINE void make_products(const Prepared& x, int first, const Batch& batch, Room& room) {
    repeat<Count>([&]<int i>() PLIANT_LAMBDA {
        constexpr int kPair = Wide ? 4 : i % 2 * 2 + 4;
        const size_t at = x.at(batch.group[i], first) * kGroup;
        load<2>(x.hi + at, kGroup);
        load<0>(batch.high[i], 128);
        load<1>(batch.high[i] + 64, 128);
        clear<kPair>();
        clear<kPair + 1>();
        add_product<kPair, 2, 0>();
        add_product<kPair + 1, 2, 1>();
        if constexpr (Wide) {
            load<3>(x.lo + at, kGroup);
            clear<6>();
            clear<7>();
            add_product<6, 3, 0>();
            add_product<7, 3, 1>();
            load<0>(batch.low[i], 128);
            load<1>(batch.low[i] + 64, 128);
            add_product<6, 2, 0>();
            add_product<7, 2, 1>();
        }
        store<kPair>(room.top[i][0]);
        store<kPair + 1>(room.top[i][1]);
        if constexpr (Wide) {
            store<6>(room.middle[i][0]);
            store<7>(room.middle[i][1]);
        }
    });
}

// The products of a batch with all tokens are added to sums[token][32].
template <bool Wide, int Count>
void multiply(const CodedProduct& p, const Tiling& tiling, const Cursor& cursor, Batch& batch,
              float* sums) {
    Steps steps0[Count], steps1[Count];
    repeat<Count>([&]<int i>() PLIANT_LAMBDA {
        steps0[i] = Steps(batch.step[i][0]);
        steps1[i] = Steps(batch.step[i][1]);
    });
    const float* scale = p.block->row_scale + cursor.supertile * kSupertile;
    float* out = p.out + (cursor.supertile - p.first) * kSupertile;
    const bool begin = cursor.first, end = cursor.last;
    Room room;
    for (int tile = 0; tile < tiling.count; ++tile) {
        const int first = tiling.first(tile);
        batch.fetch_until(batch.nexts * (tile + 1) / tiling.count);
        make_products<Wide, Count>(*p.x, first, batch, room);
        for (int t = tile * kTileRows, row = t - first; row < tiling.rows; ++t, ++row) {
            float* sum = sums + t * kSupertile;
            __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
            if (!begin) {
                a = _mm512_load_ps(sum);
                b = _mm512_load_ps(sum + 16);
            }
            repeat<Count>([&]<int i>() PLIANT_LAMBDA {
                const __m512 factor = _mm512_set1_ps(batch.factors[i][t]);
                a = _mm512_fmadd_ps(steps0[i].template operator()<Wide>(room.top[i][0][row],
                                                                        room.middle[i][0][row]),
                                    factor, a);
                b = _mm512_fmadd_ps(steps1[i].template operator()<Wide>(room.top[i][1][row],
                                                                        room.middle[i][1][row]),
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
void multiply(const CodedProduct& p, const Tiling& tiling, const Cursor& cursor, Batch& batch,
              float* sums) {
    switch (cursor.count) {
        case 1:
            return multiply<Wide, 1>(p, tiling, cursor, batch, sums);
        case 2:
            return multiply<Wide, 2>(p, tiling, cursor, batch, sums);
        default:
            return multiply<Wide, 3>(p, tiling, cursor, batch, sums);
    }
}

}  // namespace

void coded_product(const CodedProduct& p) {
    if (p.tokens < kFewTokens || p.block->runs.empty()) return avx512::coded_product(p);
    fetch_pointers(*p.block, p.first, p.last);
    const Tiling tiling(p.tokens);
    configure(Config(tiling.rows));
    Batch batch;
    for (Cursor cursor(p), later(p); !cursor.ended(); cursor = later) {
        later.next();
        decode(p, cursor, later, batch);
        float* sums = reinterpret_cast<float*>(p.scratch) + cursor.place() * p.tokens * kSupertile;
        cursor.wide ? multiply<true>(p, tiling, cursor, batch, sums)
                    : multiply<false>(p, tiling, cursor, batch, sums);
    }
    release();
}

}  // namespace pliant::amx
