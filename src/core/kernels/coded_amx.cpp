// Products with coded matrices and many tokens for AMX: a decoded group of a supertile is already
// in the order that its tiles want, so one instruction multiplies 16 rows × 64 columns with up to
// 16 tokens. Few tokens are left to AVX-512.
//
// The instructions are written out, since those of GCC 12 do not say which memory they read.
#include "ops.h"
#include "plies_avx512.h"

namespace pliant::amx {

namespace {

using namespace avx512;

constexpr int kTileRows = 16;
constexpr int kFewTokens = 4;

// Tiles 0, 1: levels of the two tiles of rows; 2, 3: their low parts; 4, 5: inputs and their low
// parts; 6, 7: sums.
struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    explicit Config(int tokens) {
        for (int tile = 0; tile < 8; ++tile) {
            bytes[tile] = 64;
            rows[tile] = static_cast<uint8_t>(tile < 4 ? kTileRows : tokens);
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

struct Room {
    alignas(64) int32_t top[2][kTileRows][16], middle[2][kTileRows][16];
};

// Adds the sums of tokens [begin, end), which lie in the room from row `skip` on.
template <bool Wide>
PLIANT_INLINE void finish(const Room& room, int skip, int begin, int end, const float* factors,
                          const __m512* step, float* sums) {
    for (int t = begin, row = skip; t < end; ++t, ++row) {
        const __m512 factor = _mm512_set1_ps(factors[t]);
        for (int half = 0; half < 2; ++half) {
            const __m512 value = to_float<Wide>(_mm512_load_si512(room.top[half][row]),
                                                _mm512_load_si512(room.middle[half][row]));
            float* sum = sums + t * kSupertile + 16 * half;
            _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_mul_ps(value, step[half]), factor,
                                                 _mm512_load_ps(sum)));
        }
    }
}

template <int N>
void run_tokens(const CodedProduct& p, const Run& run, const Tiling& tiling, int s, uint8_t* wh,
                uint8_t* wl, float* sums, Room& room) {
    constexpr bool kWide = N >= kWideDepth;
    const CodedBlock& block = *p.block;
    const __m512 steps = _mm512_load_ps(p.levels->steps);
    const Table<N> hi(p.levels->hi[N], 0), lo(p.levels->lo[N], 0);
    const size_t supertile = static_cast<size_t>(s);
    for (int g = run.first; g < run.first + run.count; ++g) {
        const uint8_t* planes[N];
        for (int i = 0; i < N; ++i)
            planes[i] = block.planes[static_cast<size_t>(g * kMaxDepth + i)] + supertile * 256;
        decode<N>(planes, hi, lo, wh, wl);
        load<0>(wh, 128);
        load<1>(wh + 64, 128);
        if constexpr (kWide) {
            load<2>(wl, 128);
            load<3>(wl + 64, 128);
        }
        __m512 step[2];
        row_steps(block.codes[static_cast<size_t>(g)], supertile, steps, step);
        alignas(64) float factors[kMaxTokens];
        for (int t = 0; t < p.tokens; ++t) factors[t] = factor_of(p, t, g, N);
        for (int tile = 0; tile < tiling.count; ++tile) {
            const int first = tiling.first(tile), begin = tile * kTileRows;
            const size_t at = p.x->at(g, first) * kGroup;
            load<4>(p.x->hi + at, kGroup);
            clear<6>();
            clear<7>();
            add_product<6, 4, 0>();
            add_product<7, 4, 1>();
            store<6>(room.top[0]);
            store<7>(room.top[1]);
            if constexpr (kWide) {
                load<5>(p.x->lo + at, kGroup);
                clear<6>();
                clear<7>();
                add_product<6, 5, 0>();
                add_product<7, 5, 1>();
                add_product<6, 4, 2>();
                add_product<7, 4, 3>();
                store<6>(room.middle[0]);
                store<7>(room.middle[1]);
            }
            finish<kWide>(room, begin - first, begin, first + tiling.rows, factors, step, sums);
        }
    }
}

}  // namespace

void coded_product(const CodedProduct& p) {
    if (p.tokens < kFewTokens) return avx512::coded_product(p);
    const CodedBlock& block = *p.block;
    const Tiling tiling(p.tokens);
    configure(Config(tiling.rows));
    uint8_t* wh = p.scratch;
    uint8_t* wl = wh + kSupertile * kGroup;
    float* sums = reinterpret_cast<float*>(wl + kSupertile * kGroup);
    Room room;
    for (int s = p.first; s < p.last; ++s) {
        for (int i = 0; i < p.tokens * kSupertile; i += 16)
            _mm512_store_ps(sums + i, _mm512_setzero_ps());
        for (const Run& run : block.runs)
            with_depth(run.depth,
                       [&]<int N>() { run_tokens<N>(p, run, tiling, s, wh, wl, sums, room); });
        scale_rows(p, s, sums);
    }
    release();
}

}  // namespace pliant::amx
