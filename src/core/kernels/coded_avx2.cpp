// Products with coded matrices for AVX2.
#include "coded_256.h"
#include "ops.h"

namespace pliant::avx2 {

namespace {

// Sums of some vectors with the rows of a unit of a page, 8 rows at a time.
template <int N>
void page_depth(const PlyProduct& p, const Table<N>& table, int page) {
    fetch(p.ahead[page]);
    const int8_t* x = p.x + static_cast<size_t>(page) * p.x_stride;
    int32_t* out = p.out + page * p.vectors * kHalf;
    const uint8_t* planes[N];
    for (int i = 0; i < N; ++i) planes[i] = p.plies[page] + i * kUnitPly;
    for (int first = 0; first < kHalf; first += kPart) {
        __m256i sums[kMaxQueries];
        for (int v = 0; v < p.vectors; ++v) sums[v] = _mm256_setzero_si256();
        const Bits<N> bits(planes, static_cast<size_t>(4 * first));
        repeat<8>([&]<int j>() PLIANT_LAMBDA {
            const __m256i w = table.template look_up<j>(bits);
            for (int v = 0; v < p.vectors; ++v)
                Signed::add(sums[v], w, broadcast(x + v * kHalf + 4 * j));
        });
        for (int v = 0; v < p.vectors; ++v)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v * kHalf + first), sums[v]);
    }
}

}  // namespace

void page_product(const PlyProduct& p) {
    with_depth(p.depth, [&]<int N>() {
        const Table<N> table(p.levels->hi[N], Signed::kFlip);
        for (int page = 0; page < p.pages; ++page) page_depth<N>(p, table, page);
    });
}

void coded_product(const CodedProduct& p) { multiply_strips<Signed>(p); }

}  // namespace pliant::avx2
