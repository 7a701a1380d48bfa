#include "crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pliant {

namespace {

constexpr int kSlices = 16;

using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? 0xEDB88320u : 0u);
        tables[0][i] = value;
    }
    for (int slice = 1; slice < kSlices; ++slice)
        for (uint32_t i = 0; i < 256; ++i) {
            const uint32_t before = tables[slice - 1][i];
            tables[slice][i] = (before >> 8) ^ tables[0][before & 255];
        }
    return tables;
}

constexpr Tables kTables = make_tables();

// Goes on with a checksum, sixteen bytes at a time through sixteen tables ("slicing", Kounavis and
// Berry 2005).
uint32_t by_tables(uint32_t crc, const uint8_t* data, size_t bytes) {
    for (; bytes >= kSlices; bytes -= kSlices, data += kSlices) {
        uint32_t word[4];
        std::memcpy(word, data, sizeof word);
        word[0] ^= crc;
        crc = 0;
        for (int w = 0; w < 4; ++w)
            for (int b = 0; b < 4; ++b) crc ^= kTables[15 - 4 * w - b][(word[w] >> (8 * b)) & 255];
    }
    for (; bytes > 0; --bytes, ++data) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 255];
    return crc;
}

#if defined(__x86_64__)

// x^power modulo the polynomial, its bits reflected as the instruction wants them.
constexpr long long folding_key(size_t power) {
    uint32_t value = 0x80000000u;
    for (size_t i = 0; i < power; ++i) value = (value >> 1) ^ ((value & 1) ? 0xEDB88320u : 0u);
    return static_cast<long long>(value) << 1;
}

// To move a value on by the bytes of a fold, halves of 16 bytes each.
constexpr size_t kFold = 64, kWideFold = 256;
constexpr long long kNear[] = {folding_key(128 + 32), folding_key(128 - 32)};
constexpr long long kFar[] = {folding_key(8 * kFold + 32), folding_key(8 * kFold - 32)};
constexpr long long kWide[] = {folding_key(8 * kWideFold + 32), folding_key(8 * kWideFold - 32)};
static_assert(kNear[0] == 0x1751997d0 && kNear[1] == 0x0ccaa009e &&  // as published
              kFar[0] == 0x154442bd4 && kFar[1] == 0x1c6e41596);

// The attributes of functions that use carry-less multiplication of 16 and of 32 bytes.
#define PLIANT_FOLDS __attribute__((target("pclmul,sse4.1")))
#define PLIANT_WIDE_FOLDS __attribute__((target("vpclmulqdq,avx2,pclmul,sse4.1")))

// `value` moved on by as many bits as `key` stands for, and `next` added. Both are polynomials over
// the field of two elements, modulo that of the checksum.
PLIANT_FOLDS inline __m128i fold(__m128i value, __m128i key, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(value, key, 0x00);
    const __m128i high = _mm_clmulepi64_si128(value, key, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}
PLIANT_WIDE_FOLDS inline __m256i fold(__m256i value, __m256i key, __m256i next) {
    const __m256i low = _mm256_clmulepi64_epi128(value, key, 0x00);
    const __m256i high = _mm256_clmulepi64_epi128(value, key, 0x11);
    return _mm256_xor_si256(_mm256_xor_si256(low, high), next);
}

PLIANT_FOLDS inline __m128i load(const uint8_t* data) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}
PLIANT_WIDE_FOLDS inline __m256i load_wide(const uint8_t* data) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}

// The same for at least kFold bytes, with carry-less multiplication: sixteen bytes stay, which have
// the checksum of all (Gopal and others, "Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ", 2009).
PLIANT_FOLDS uint32_t by_folding(uint32_t crc, const uint8_t* data, size_t bytes) {
    const __m128i far = _mm_set_epi64x(kFar[1], kFar[0]);
    const __m128i near = _mm_set_epi64x(kNear[1], kNear[0]);
    __m128i sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = load(data + 16 * i);
    sum[0] = _mm_xor_si128(sum[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
    for (data += kFold, bytes -= kFold; bytes >= kFold; data += kFold, bytes -= kFold)
        for (int i = 0; i < 4; ++i) sum[i] = fold(sum[i], far, load(data + 16 * i));
    for (int i = 1; i < 4; ++i) sum[0] = fold(sum[0], near, sum[i]);
    uint8_t rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), sum[0]);
    return by_tables(by_tables(0, rest, sizeof rest), data, bytes);
}

// The same for at least kWideFold bytes: as many stay, for which narrow folds are enough.
PLIANT_WIDE_FOLDS uint32_t by_wide_folding(uint32_t crc, const uint8_t* data, size_t bytes) {
    const __m256i far = _mm256_broadcastsi128_si256(_mm_set_epi64x(kWide[1], kWide[0]));
    __m256i sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = load_wide(data + 32 * i);
    sum[0] =
        _mm256_xor_si256(sum[0], _mm256_zextsi128_si256(_mm_cvtsi32_si128(static_cast<int>(crc))));
    for (data += kWideFold, bytes -= kWideFold; bytes >= kWideFold;
         data += kWideFold, bytes -= kWideFold)
        for (int i = 0; i < 8; ++i) sum[i] = fold(sum[i], far, load_wide(data + 32 * i));
    uint8_t rest[kWideFold];
    for (int i = 0; i < 8; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest + 32 * i), sum[i]);
    crc = by_folding(0, rest, sizeof rest);
    return bytes >= kFold ? by_folding(crc, data, bytes) : by_tables(crc, data, bytes);
}

bool can_fold() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }
bool can_fold_wide() {
    return can_fold() && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx2");
}

#endif

}  // namespace

uint32_t crc32(const uint8_t* data, size_t bytes, uint32_t before) {
#if defined(__x86_64__)
    static const bool wide = can_fold_wide(), folding = can_fold();
    if (wide && bytes >= kWideFold) return ~by_wide_folding(~before, data, bytes);
    if (folding && bytes >= kFold) return ~by_folding(~before, data, bytes);
#endif
    return ~by_tables(~before, data, bytes);
}

}  // namespace pliant
