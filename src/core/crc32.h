// CRC-32 with the polynomial 0xEDB88320, as in zlib.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pliant {

// `before`: the checksum of what comes before, if the data comes in pieces.
uint32_t crc32(const uint8_t* data, size_t bytes, uint32_t before = 0);

}  // namespace pliant
