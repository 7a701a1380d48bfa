#include "coded.h"

#include <algorithm>
#include <array>
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

void DeepLevels::build(const float* levels, int depth) {
    constexpr int kMost = 127 * kSixteen, kMostPlies = kMaxDepth - kWideDepth + 1;
    const int plies = depth - kWideDepth + 1, count = 1 << plies;
    const double peak = levels[16 * count - 1];
    const auto is_set = [&](int level, int ply) { return (level >> (plies - 1 - ply) & 1) != 0; };
    for (int a = 0; a < 16; ++a) {
        std::array<double, 1 << kMostPlies> want{};  // in sixteenths
        for (int i = 0; i < count; ++i)
            want[i] = peak > 0.0 ? levels[a * count + i] / peak * kMost : 0.0;
        const auto rounded = [](double x) { return static_cast<int>(std::lround(x)); };
        std::array<int, kMostPlies> step{};
        const bool last = a == 15 && plies > 1;
        if (!last)  // the steps that are nearest to the levels
            for (int ply = 0; ply < plies; ++ply) {
                double sum = 0.0;
                for (int i = 0; i < count; ++i) sum += is_set(i, ply) ? want[i] : -want[i];
                step[ply] = rounded(sum * 2 / count);
            }
        const auto steps_of = [&](int i) {
            int sum = 0;
            for (int ply = 0; ply < plies; ++ply) sum += is_set(i, ply) * step[ply];
            return sum;
        };
        double rest = 0.0;
        for (int i = 0; i < count; ++i) rest += want[i] - steps_of(i);
        const int low = last ? rounded(want[0] / kSixteen) * kSixteen : rounded(rest / count);
        const int high = low + step[0];
        bool near = high >= 0 && step[1] >= 0 && step[2] >= 0 &&
                    kSixteen - 1 + step[1] + step[2] <= kMostLow;
        for (int i = 0; i < count; ++i) {
            const int more = last ? rounded((want[i] - low) / kSixteen) : 0;
            const int level = low + steps_of(i) + more * kSixteen;
            near =
                near && level >= 0 && level <= kMost && std::fabs(level - want[i]) <= kSixteen / 2;
            if (a == 15 && near)
                std::fill_n(last_hi + 8 + (i << (kMostPlies - plies)), 1 << (kMostPlies - plies),
                            static_cast<int8_t>(more));
        }
        if (!near)
            throw FormatError("the levels of depth " + std::to_string(depth) +
                              " are not near to sums of steps (docs/format.md, section 4)");
        hi[0][a] = static_cast<int8_t>(low / kSixteen);
        hi[1][a] = static_cast<int8_t>(high / kSixteen - low / kSixteen);
        lo[0][a] = static_cast<int8_t>(low % kSixteen);
        lo[1][a] = static_cast<int8_t>(high % kSixteen - low % kSixteen);
        lo[2][a] = static_cast<int8_t>(step[1]);
        lo[3][a] = static_cast<int8_t>(step[2]);
    }
}

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
        scale[depth] = peak / static_cast<float>(kPeak[depth]);
        if (depth >= kWideDepth) deep[depth].build(level + count / 2, depth);
        for (int byte = 0; byte < 256; ++byte) {
            const int number = level_number(depth, byte);
            const float share = peak > 0.0f ? level[number] / peak : 0.0f;
            rounded[depth][byte] =
                static_cast<int8_t>(std::lrintf(share * static_cast<float>(kPeak[depth])));
            hi[depth][byte] = rounded[depth][byte];
            if (depth < kWideDepth) continue;
            const int sign = number < count / 2 ? -1 : 1;
            const int positive = sign < 0 ? count / 2 - 1 - number : number - count / 2;
            const int plies = depth - 5, a = positive >> plies;
            const int rest = positive << (3 - plies) & 7;  // plies 6-8
            const DeepLevels& d = deep[depth];
            const int high =
                d.hi[0][a] + (rest >> 2) * d.hi[1][a] + (a == 15) * d.last_hi[8 | rest];
            const int low = d.lo[0][a] + (rest >> 2) * d.lo[1][a] + (rest >> 1 & 1) * d.lo[2][a] +
                            (rest & 1) * d.lo[3][a];
            hi[depth][byte] = static_cast<int8_t>(sign * high);
            lo[depth][byte] = static_cast<int8_t>(sign * low);
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
