// Products with coded matrices for AVX2 with AVX-VNNI.
#include "coded_256.h"
#include "pages_256.h"

namespace pliant::avxvnni {

void coded_product(const CodedProduct& p) { avx2::multiply_strips<avx2::Unsigned>(p); }

void page_product(const PlyProduct& p) { avx2::multiply_pages<avx2::Unsigned>(p); }

}  // namespace pliant::avxvnni
