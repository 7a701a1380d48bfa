// What each instruction set provides; kernels.cpp puts the tables together.
#pragma once

#include "kernels.h"
#include "unroll.h"

namespace pliant {

// A whole number n from -2^22 to 2^22, added to the bits of this float, gives those of kMagic + n.
constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23

// Into the second cache: the first has too few places for lines on their way.
PLIANT_INLINE void fetch(const Ahead& ahead) {
    for (int i = 0; i < ahead.bytes; i += 64) __builtin_prefetch(ahead.from + i, 0, 1);
}

namespace plain {
void fill_ops(Kernels& kernels);
void fill_inputs(Kernels& kernels);
void fill_attention(Kernels& kernels);
void fill_coding(Kernels& kernels);
void fill_logits(Kernels& kernels);
void attend_coded(const CodedAttention& attention);
void page_product(const PlyProduct& product);
void coded_product(const CodedProduct& product);
void coded_row(const CodedBlock& block, const LevelTables& levels, int row, const uint16_t* order,
               int columns, float* out);
}  // namespace plain

namespace avx2 {
void fill_ops(Kernels& kernels);
void fill_inputs(Kernels& kernels);
void fill_attention(Kernels& kernels);
void fill_coding(Kernels& kernels);
void fill_logits(Kernels& kernels);
void attend_coded(const CodedAttention& attention);
void page_product(const PlyProduct& product);
void coded_product(const CodedProduct& product);
}  // namespace avx2

namespace avxvnni {
void page_product(const PlyProduct& product);
void coded_product(const CodedProduct& product);
}  // namespace avxvnni

namespace avx512bw {
void page_product(const PlyProduct& product);
void coded_product(const CodedProduct& product);
}  // namespace avx512bw

namespace avx512vnni {
void page_product(const PlyProduct& product);
void coded_product(const CodedProduct& product);
}  // namespace avx512vnni

namespace avx512 {
void fill_ops(Kernels& kernels);
void fill_inputs(Kernels& kernels);
void fill_attention(Kernels& kernels);
void fill_coding(Kernels& kernels);
void fill_logits(Kernels& kernels);
void attend_coded(const CodedAttention& attention);
void page_product(const PlyProduct& product);
void coded_product(const CodedProduct& product);
}  // namespace avx512

namespace amx {
void coded_product(const CodedProduct& product);
}

}  // namespace pliant
