#include "unicode.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <tuple>
#include <utility>
#include <vector>

namespace pliant::tok {
namespace {

// One canonical step: `code` becomes `first`, and `second` unless that is 0.
struct Decomposition {
    uint32_t code, first, second;
};
struct Composition {
    uint32_t first, second, code;
};

#include "unicode_data.inc"

constexpr size_t kBlocks = 0x110000 >> 8;

// For every block of 256 code points, the last run that starts at or before it.
template <size_t N>
constexpr std::array<uint16_t, kBlocks + 1> index_runs(const uint32_t (&runs)[N]) {
    std::array<uint16_t, kBlocks + 1> index{};
    size_t run = 0;
    for (size_t block = 0; block < kBlocks; ++block) {
        while (run + 1 < N && (runs[run + 1] >> 8) <= (block << 8)) ++run;
        index[block] = static_cast<uint16_t>(run);
    }
    index[kBlocks] = static_cast<uint16_t>(N - 1);
    return index;
}

constexpr auto kClassIndex = index_runs(kClassRuns);
constexpr auto kCombiningIndex = index_runs(kCombiningRuns);

constexpr std::array<uint8_t, 128> ascii_classes() {
    std::array<uint8_t, 128> classes{};
    size_t run = 0;
    for (uint32_t c = 0; c < 128; ++c) {
        while ((kClassRuns[run + 1] >> 8) <= c) ++run;
        classes[c] = static_cast<uint8_t>(kClassRuns[run] & 0xFF);
    }
    return classes;
}
constexpr auto kAscii = ascii_classes();

template <size_t N>
uint8_t look_up(const uint32_t (&runs)[N], const std::array<uint16_t, kBlocks + 1>& index,
                uint32_t code_point) {
    if (code_point > 0x10FFFF) return 0;
    size_t low = index[code_point >> 8], high = index[(code_point >> 8) + 1];
    while (low < high) {  // the last run with start <= code_point
        const size_t middle = (low + high + 1) / 2;
        if ((runs[middle] >> 8) <= code_point) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return static_cast<uint8_t>(runs[low] & 0xFF);
}

// Hangul syllables are composed by arithmetic (The Unicode Standard, section 3.12).
constexpr uint32_t kSyllables = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTrail = 0x11A7;
constexpr uint32_t kLeads = 19, kVowels = 21, kTrails = 28;

void decompose(uint32_t c, std::vector<uint32_t>& out) {
    if (c >= kSyllables && c < kSyllables + kLeads * kVowels * kTrails) {
        const uint32_t s = c - kSyllables;
        out.push_back(kLead + s / (kVowels * kTrails));
        out.push_back(kVowel + s / kTrails % kVowels);
        if (s % kTrails) out.push_back(kTrail + s % kTrails);
        return;
    }
    const auto* end = std::end(kDecompositions);
    const auto* step =
        std::lower_bound(std::begin(kDecompositions), end, c,
                         [](const Decomposition& d, uint32_t code) { return d.code < code; });
    if (step == end || step->code != c) {
        out.push_back(c);
        return;
    }
    decompose(step->first, out);
    if (step->second) decompose(step->second, out);
}

// The character that two make together, or 0.
uint32_t compose(uint32_t a, uint32_t b) {
    if (a >= kLead && a < kLead + kLeads && b >= kVowel && b < kVowel + kVowels)
        return kSyllables + ((a - kLead) * kVowels + (b - kVowel)) * kTrails;
    if (a >= kSyllables && a < kSyllables + kLeads * kVowels * kTrails &&
        (a - kSyllables) % kTrails == 0 && b > kTrail && b < kTrail + kTrails)
        return a + (b - kTrail);
    const auto* end = std::end(kCompositions);
    const auto* pair = std::lower_bound(std::begin(kCompositions), end, std::pair(a, b),
                                        [](const Composition& c, std::pair<uint32_t, uint32_t> p) {
                                            return std::pair(c.first, c.second) < p;
                                        });
    return pair != end && pair->first == a && pair->second == b ? pair->code : 0;
}

uint8_t combining_class(uint32_t c) { return look_up(kCombiningRuns, kCombiningIndex, c); }

// Normal form C of `chars`, in place (The Unicode Standard, section 3.11).
void normalise(std::vector<uint32_t>& chars) {
    std::vector<uint32_t> parts;
    parts.reserve(chars.size());
    for (uint32_t c : chars) decompose(c, parts);
    std::vector<uint8_t> classes(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) classes[i] = combining_class(parts[i]);

    // Marks between two characters of class 0 are sorted by class; equal ones keep their order.
    for (size_t i = 0; i < parts.size();) {
        if (!classes[i]) {
            ++i;
            continue;
        }
        size_t end = i;
        while (end < parts.size() && classes[end]) ++end;
        std::vector<std::pair<uint8_t, uint32_t>> marks;
        for (size_t k = i; k < end; ++k) marks.emplace_back(classes[k], parts[k]);
        std::stable_sort(marks.begin(), marks.end(),
                         [](const auto& a, const auto& b) { return a.first < b.first; });
        for (size_t k = i; k < end; ++k) std::tie(classes[k], parts[k]) = marks[k - i];
        i = end;
    }

    chars.clear();
    size_t starter = SIZE_MAX;  // where the last character of class 0 went
    uint8_t last = 0;           // class of the last character kept behind it
    for (size_t i = 0; i < parts.size(); ++i) {
        const bool adjacent = starter != SIZE_MAX && starter + 1 == chars.size();
        if (starter != SIZE_MAX && (adjacent || last < classes[i])) {
            if (const uint32_t whole = compose(chars[starter], parts[i])) {
                chars[starter] = whole;
                continue;
            }
        }
        if (!classes[i]) starter = chars.size();
        last = classes[i];
        chars.push_back(parts[i]);
    }
}

bool is_tail(char c) { return (static_cast<uint8_t>(c) & 0xC0) == 0x80; }

}  // namespace

uint8_t char_class(uint32_t c) { return c < 128 ? kAscii[c] : look_up(kClassRuns, kClassIndex, c); }

Utf8Part utf8_part(std::string_view s, size_t at) {
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(s[at + i]); };
    const size_t left = s.size() - at;
    const uint8_t lead = byte(0);
    if (lead < 0x80) return {Utf8::kCharacter, 1};
    if (lead < 0xC2 || lead > 0xF4) return {Utf8::kBroken, 1};
    const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    // The second byte excludes overlong forms, surrogates and what lies over U+10FFFF.
    const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (left < 2) return {Utf8::kIncomplete, 1};
    if (byte(1) < low || byte(1) > high) return {Utf8::kBroken, 1};
    for (size_t i = 2; i < length; ++i) {
        if (i >= left) return {Utf8::kIncomplete, i};
        if (!is_tail(s[at + i])) return {Utf8::kBroken, i};
    }
    return {Utf8::kCharacter, length};
}

bool is_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        uint64_t word;
        if (text.size() - at >= 8) {
            std::memcpy(&word, text.data() + at, 8);
            if (!(word & 0x8080808080808080u)) {
                at += 8;
                continue;
            }
        }
        const Utf8Part part = utf8_part(text, at);
        if (part.kind != Utf8::kCharacter) return false;
        at += part.bytes;
    }
    return true;
}

uint32_t next_char(std::string_view text, size_t& at) {
    const auto byte = [&](size_t i) {
        return static_cast<uint32_t>(static_cast<uint8_t>(text[i]));
    };
    const uint32_t lead = byte(at);
    if (lead < 0x80) {
        at += 1;
        return lead;
    }
    if (lead < 0xE0) {
        at += 2;
        return (lead & 0x1F) << 6 | (byte(at - 1) & 0x3F);
    }
    if (lead < 0xF0) {
        at += 3;
        return (lead & 0x0F) << 12 | (byte(at - 2) & 0x3F) << 6 | (byte(at - 1) & 0x3F);
    }
    at += 4;
    return (lead & 0x07) << 18 | (byte(at - 3) & 0x3F) << 12 | (byte(at - 2) & 0x3F) << 6 |
           (byte(at - 1) & 0x3F);
}

size_t previous_char(std::string_view text, size_t at) {
    do {
        --at;
    } while (at > 0 && is_tail(text[at]));
    return at;
}

void append_utf8(std::string& out, uint32_t c) {
    const auto push = [&](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
    if (c < 0x80) {
        push(c);
    } else if (c < 0x800) {
        push(0xC0 | c >> 6);
        push(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        push(0xE0 | c >> 12);
        push(0x80 | (c >> 6 & 0x3F));
        push(0x80 | (c & 0x3F));
    } else {
        push(0xF0 | c >> 18);
        push(0x80 | (c >> 12 & 0x3F));
        push(0x80 | (c >> 6 & 0x3F));
        push(0x80 | (c & 0x3F));
    }
}

std::string to_nfc(std::string_view text, bool& changed) {
    changed = false;
    std::string out;
    size_t copied = 0;  // everything before it is in `out`
    std::vector<uint32_t> chars;
    for (size_t at = 0; at < text.size();) {
        if (static_cast<uint8_t>(text[at]) < 0xC0) {  // nothing below U+00C0 is unstable
            ++at;
            continue;
        }
        const size_t here = at;
        if (!(char_class(next_char(text, at)) & kUnstable)) continue;
        // Only the stable character before a run of unstable ones takes part in it.
        const size_t begin = here > copied ? previous_char(text, here) : here;
        size_t end = at;
        while (end < text.size()) {
            size_t next = end;
            if (!(char_class(next_char(text, next)) & kUnstable)) break;
            end = next;
        }
        chars.clear();
        for (size_t i = begin; i < end;) chars.push_back(next_char(text, i));
        normalise(chars);
        if (!changed) out.reserve(text.size());
        changed = true;
        out.append(text, copied, begin - copied);
        for (uint32_t c : chars) append_utf8(out, c);
        copied = at = end;
    }
    if (changed) out.append(text, copied);
    return out;
}

}  // namespace pliant::tok
