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

constexpr int kMostDeep = 127 * kSixteen;

int rounded(double x) { return static_cast<int>(std::lround(x)); }

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
    const int count = 1 << (depth - 5);
    const double peak = levels[16 * count - 1];
    for (int block = 0; block < 16; ++block) {
        std::array<double, 8> want{};  // in sixteenths
        bool near = true;
        for (int i = 0; i < count; ++i) {
            want[i] = peak > 0.0 ? levels[block * count + i] / peak * kMostDeep : 0.0;
            near = near && want[i] >= 0.0 && want[i] <= kMostDeep;
        }
        if (near && depth == 8)
            near = put_sums(want, block);
        else if (near)  // without plies 6 and 7, with 6, with 7, with both
            put({rounded(want[0]), rounded(want[count / 2]), rounded(want[depth == 7 ? 1 : 0]),
                 rounded(want[depth == 7 ? 3 : 1])},
                block);
        if (!near)
            throw FormatError("the levels of depth " + std::to_string(depth) +
                              " are not near to sums of steps (docs/format.md, section 4)");
    }
}

void DeepLevels::put(const std::array<int, 4>& level, int block) {
    const auto fill = [&](int8_t (&to)[4][16], const auto& part) {
        const int none = part(level[0]), six = part(level[1]), seven = part(level[2]);
        to[0][block] = static_cast<int8_t>(none);
        to[1][block] = static_cast<int8_t>(six - none);
        to[2][block] = static_cast<int8_t>(seven - none);
        to[3][block] = static_cast<int8_t>(part(level[3]) - seven - six + none);
    };
    fill(hi, [](int x) { return x / kSixteen; });
    fill(lo, [](int x) { return x % kSixteen; });
}

bool DeepLevels::put_sums(const std::array<double, 8>& want, int block) {
    const bool last = block == 15;
    std::array<int, 3> step{};  // what plies 6, 7, 8 add
    const auto steps_of = [&](int i) {
        return (i >> 2) * step[0] + (i >> 1 & 1) * step[1] + (i & 1) * step[2];
    };
    for (int ply = 0; ply < 3 && !last; ++ply) {
        double sum = 0.0;
        for (int i = 0; i < 8; ++i) sum += (i >> (2 - ply) & 1) != 0 ? want[i] : -want[i];
        step[ply] = rounded(sum / 4);
    }
    double rest = 0.0;
    for (int i = 0; i < 8; ++i) rest += want[i] - steps_of(i);
    const int low = last ? rounded(want[0] / kSixteen) * kSixteen : rounded(rest / 8);
    const int high = low + step[0];
    if (high < 0 || step[1] < 0 || step[2] < 0 || kSixteen - 1 + step[1] + step[2] > kMostLow)
        return false;
    for (int i = 0; i < 8; ++i) {
        const int more = last ? rounded((want[i] - low) / kSixteen) : 0;
        const int level = low + steps_of(i) + more * kSixteen;
        if (level < 0 || level > kMostDeep || std::fabs(level - want[i]) > kSixteen / 2)
            return false;
        if (last) last_hi[8 + i] = static_cast<int8_t>(more);
    }
    put({low, high, low, high}, block);
    lo[2][block] = static_cast<int8_t>(step[1]);
    eight[block] = static_cast<int8_t>(step[2]);
    return true;
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
        unit[depth] = scale[depth] * (depth < kWideDepth ? kNarrowUnit : 1);
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
            const int block = positive >> (depth - 5);
            const int plies = positive << (8 - depth) & 7;  // 6-8
            const int six = plies >> 2, seven = plies >> 1 & 1, eight = plies & 1;
            const DeepLevels& d = deep[depth];
            const auto sum = [&](const int8_t (&adds)[4][16]) {
                return adds[0][block] + six * adds[1][block] + seven * adds[2][block] +
                       (six & seven) * adds[3][block];
            };
            const int high = sum(d.hi) + (block == 15 ? d.last_hi[8 | plies] : 0);
            const int low = sum(d.lo) + eight * d.eight[block];
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
