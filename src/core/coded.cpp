#include "coded.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "error.h"

namespace pliant {

namespace {

// The number of the level (its plies, most significant first) that a byte of collected bits stands
// for.
int level_number(int depth, int byte) {
    const int nibble = byte & 15, upper = byte >> 4;
    switch (depth) {
        case 5:
            return nibble << 1 | (upper & 1);
        case 6:
            return nibble << 2 | (upper & 3);
        case 7:
            return nibble << 3 | upper >> 1;
        case 8:
            return nibble << 4 | upper;
        default:
            return nibble >> (4 - depth);
    }
}

constexpr float kMostStep = 0x1p64f;

// Rounded to 22 bits: 1.5 · 2^23 times it is then exact, on which kernels build.
float with_22_bits(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return std::bit_cast<float>((bits + 1 + (bits >> 2 & 1)) & ~3u);
}

const float* make_kv_scales() {
    static float scales[256];
    for (int code = 0; code < 256; ++code)  // octaves are the same but for their exponent
        scales[code] =
            std::ldexp(std::exp2(static_cast<float>(code % 8) / 8.0f), code / 8 - 160 / 8);
    return scales;
}

}  // namespace

const float* const kKvScales = make_kv_scales();

void LevelTables::build(const float* levels, const float* scale_steps) {
    for (int i = 0; i < 16; ++i) {
        if (!(scale_steps[i] > 0.0f && scale_steps[i] <= kMostStep))
            throw FormatError("scale step " + std::to_string(i) + " is " +
                              std::to_string(scale_steps[i]) + ", not above 0 and at most 2^64");
        steps[i] = with_22_bits(scale_steps[i]);
    }
    for (int depth = 1; depth <= kMaxDepth; ++depth) {
        const int count = 1 << depth;
        const float* level = levels + count - 2;
        for (int i = 0; i < count / 2; ++i)
            if (!(level[i] == -level[count - 1 - i]))
                throw FormatError("the levels of depth " + std::to_string(depth) +
                                  " are not symmetric");
        float peak = 0.0f;
        for (int i = 0; i < count; ++i) peak = std::fmax(peak, std::fabs(level[i]));
        scale[depth] = peak / 127.0f;
        for (int byte = 0; byte < 256; ++byte) {
            const float share = peak > 0.0f ? level[level_number(depth, byte)] / peak : 0.0f;
            if (depth < kWideDepth) {
                hi[depth][byte] = static_cast<int8_t>(std::lrintf(share * 127.0f));
            } else {
                const int value = static_cast<int>(std::lrintf(std::fabs(share) * 32512.0f));
                const int high = (value + 128) >> 8, sign = share < 0.0f ? -1 : 1;
                // Not -128, which has no counterpart for the kernels that negate it.
                const int low = std::max(value - high * 256, -127);
                hi[depth][byte] = static_cast<int8_t>(sign * high);
                lo[depth][byte] = static_cast<int8_t>(sign * low);
            }
        }
    }
}

void CodedBlock::update_runs() {
    runs.clear();
    for (int g = 0; g < groups; ++g) {
        const int d = depth[static_cast<size_t>(g)];
        if (d == 0) continue;
        if (!runs.empty() && runs.back().depth == d && runs.back().first + runs.back().count == g)
            ++runs.back().count;
        else
            runs.push_back({g, 1, d});
    }
}

}  // namespace pliant
