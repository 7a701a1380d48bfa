// Products with coded matrices for AVX2 with AVX-VNNI.
#include "coded_shuffle.h"
#include "pages_shuffle.h"

namespace pliant::avxvnni {

void coded_product(const CodedProduct& p) { bytes32::multiply_strips<bytes32::Unsigned>(p); }

void page_product(const PlyProduct& p) { bytes32::multiply_pages<bytes32::Unsigned>(p); }

}  // namespace pliant::avxvnni
