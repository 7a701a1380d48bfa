// Products with coded matrices for AVX2 with AVX-VNNI.
#include "coded_256.h"
#include "ops.h"

namespace pliant::avxvnni {

void coded_product(const CodedProduct& p) { avx2::multiply_strips<avx2::Unsigned>(p); }

}  // namespace pliant::avxvnni
