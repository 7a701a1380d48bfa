#include "crc32.h"

#include <array>
#include <cstring>

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

}  // namespace

// Sixteen bytes at a time through sixteen tables ("slicing", Kounavis and Berry 2005).
uint32_t crc32(const uint8_t* data, size_t bytes) {
    uint32_t crc = ~0u;
    for (; bytes >= kSlices; bytes -= kSlices, data += kSlices) {
        uint32_t word[4];
        std::memcpy(word, data, sizeof word);
        word[0] ^= crc;
        crc = 0;
        for (int w = 0; w < 4; ++w)
            for (int b = 0; b < 4; ++b) crc ^= kTables[15 - 4 * w - b][(word[w] >> (8 * b)) & 255];
    }
    for (; bytes > 0; --bytes, ++data) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 255];
    return ~crc;
}

}  // namespace pliant
