// Products with coded matrices for AVX2.
#include "coded_shuffle.h"
#include "pages_shuffle.h"

namespace pliant::avx2 {

void coded_product(const CodedProduct& p) { bytes32::multiply_strips<bytes32::Signed>(p); }

void page_product(const PlyProduct& p) { bytes32::multiply_pages<bytes32::Signed>(p); }

}  // namespace pliant::avx2
