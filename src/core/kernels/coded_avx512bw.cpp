// Products with coded matrices for AVX-512 without VNNI.
#include "coded_shuffle.h"
#include "pages_shuffle.h"

namespace pliant::avx512bw {

void coded_product(const CodedProduct& p) { bytes64::multiply_strips<bytes64::Signed>(p); }

void page_product(const PlyProduct& p) { bytes64::multiply_pages<bytes64::Signed>(p); }

}  // namespace pliant::avx512bw
