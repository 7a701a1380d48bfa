// Products with coded matrices for AVX-512 with VNNI and without VBMI.
#include "coded_shuffle.h"
#include "pages_shuffle.h"

namespace pliant::avx512vnni {

void coded_product(const CodedProduct& p) { bytes64::multiply_strips<bytes64::Unsigned>(p); }

void page_product(const PlyProduct& p) { bytes64::multiply_pages<bytes64::Unsigned>(p); }

}  // namespace pliant::avx512vnni
