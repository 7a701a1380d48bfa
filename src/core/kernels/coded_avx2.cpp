// Products with coded matrices for AVX2.
#include "coded_256.h"
#include "pages_256.h"

namespace pliant::avx2 {

void coded_product(const CodedProduct& p) { multiply_strips<Signed>(p); }

void page_product(const PlyProduct& p) { multiply_pages<Signed>(p); }

}  // namespace pliant::avx2
