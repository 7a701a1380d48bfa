// CRC-32 with the polynomial 0xEDB88320, as in zlib.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pliant {

uint32_t crc32(const uint8_t* data, size_t bytes);

}  // namespace pliant
