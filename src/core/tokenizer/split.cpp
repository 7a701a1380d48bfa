#include "split.h"

#include "unicode.h"

namespace pliant::tok {
namespace {

constexpr uint8_t kNotOther = kSpace | kLetter | kNumber;

// A character: its code point, its classes and where it ends. Behind the end of the text the
// classes are 0 and `code` is kEnd.
constexpr uint32_t kEnd = 0xFFFFFFFF;
struct Char {
    uint32_t code = kEnd;
    uint8_t classes = 0;
    size_t end = 0;

    Char(std::string_view text, size_t at) : end(at) {
        if (at >= text.size()) return;
        code = next_char(text, end);
        classes = char_class(code);
    }
    bool is(uint8_t mask) const { return classes & mask; }
    bool other(uint8_t mask) const { return code != kEnd && !(classes & mask); }
    bool newline() const { return code == '\r' || code == '\n'; }
};

size_t run_of(std::string_view text, size_t at, uint8_t mask) {
    for (Char c(text, at); c.is(mask); c = Char(text, at)) at = c.end;
    return at;
}

size_t run_of_other(std::string_view text, size_t at, uint8_t mask) {
    for (Char c(text, at); c.other(mask); c = Char(text, at)) at = c.end;
    return at;
}

// 's 't 're 've 'm 'll 'd behind the apostrophe before `at`; returns `at` if there is none.
size_t contraction_end(std::string_view text, size_t at, bool any_case) {
    const auto letter = [&](size_t& i) -> uint32_t {
        if (i >= text.size()) return kEnd;
        const uint32_t c = next_char(text, i);
        if (!any_case) return c;
        // The long s is the one character beyond ASCII that equals one of these without case.
        if (c == 0x17F) return 's';
        return c >= 'A' && c <= 'Z' ? c + 32 : c;
    };
    size_t i = at;
    const uint32_t first = letter(i);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return i;
    const uint32_t second = letter(i);
    if ((first == 'r' || first == 'v') && second == 'e') return i;
    if (first == 'l' && second == 'l') return i;
    return at;
}

// \s+(?!\S)|\s+ : a run of white space, without its last character if something follows.
size_t space_end(std::string_view text, size_t at) {
    const size_t end = run_of(text, at, kSpace);
    if (end == text.size()) return end;
    const size_t last = previous_char(text, end);
    return last > at ? last : end;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t gpt2_end(std::string_view text, size_t at) {
    Char c(text, at);
    if (c.code == '\'') {
        const size_t end = contraction_end(text, c.end, false);
        if (end != c.end) return end;
    }
    if (c.code == ' ') {
        const Char next(text, c.end);
        if (next.code == kEnd || next.is(kSpace)) return space_end(text, at);
        c = next;
    }
    if (c.is(kLetter)) return run_of(text, c.end, kLetter);
    if (c.is(kNumber)) return run_of(text, c.end, kNumber);
    if (c.other(kNotOther)) return run_of_other(text, c.end, kNotOther);
    return space_end(text, at);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?L+|\p{N}{1,digits}| ?[^\s L \p{N}]+[\r\n]*
// |\s*[\r\n]+|\s+(?!\S)|\s+      where L is \p{L}, or [\p{L}\p{M}]
size_t llama3_end(std::string_view text, size_t at, uint8_t letters, int digits) {
    const Char c(text, at);
    if (c.code == '\'') {
        const size_t end = contraction_end(text, c.end, true);
        if (end != c.end) return end;
    }
    // The leading character may itself be a mark, which counts as a letter for some.
    if (!c.newline() && !c.is(kLetter | kNumber)) {
        const Char next(text, c.end);
        if (next.is(letters)) return run_of(text, next.end, letters);
    }
    if (c.is(letters)) return run_of(text, c.end, letters);
    if (c.is(kNumber)) {
        size_t end = c.end;
        for (int i = 1; i < digits; ++i) {
            const Char next(text, end);
            if (!next.is(kNumber)) break;
            end = next.end;
        }
        return end;
    }
    const uint8_t not_other = kSpace | kNumber | letters;
    const Char behind(text, c.end);
    size_t end = at;
    if (c.other(not_other)) {
        end = run_of_other(text, c.end, not_other);
    } else if (c.code == ' ' && behind.other(not_other)) {
        end = run_of_other(text, behind.end, not_other);
    }
    if (end != at) {
        while (end < text.size() && (text[end] == '\r' || text[end] == '\n')) ++end;
        return end;
    }
    // White space up to its last line break, or as in space_end.
    const size_t run = run_of(text, at, kSpace);
    for (size_t i = run; i > at; --i) {
        if (text[i - 1] == '\r' || text[i - 1] == '\n') return i;
    }
    return space_end(text, at);
}

}  // namespace

size_t match_end(Pattern pattern, std::string_view text, size_t at) {
    switch (pattern) {
        case Pattern::kGpt2:
            return gpt2_end(text, at);
        case Pattern::kLlama3:
            return llama3_end(text, at, kLetter, 3);
        case Pattern::kQwen2:
            return llama3_end(text, at, kLetter, 1);
        case Pattern::kQwen35:
            return llama3_end(text, at, kLetter | kMark, 1);
        case Pattern::kNone:
            break;
    }
    return text.size();
}

size_t digit_run_end(std::string_view text, size_t at, bool single, bool& digits) {
    const Char c(text, at);
    digits = c.is(kDigit);
    if (!digits) return run_of_other(text, c.end, kDigit);
    return single ? c.end : run_of(text, c.end, kDigit);
}

}  // namespace pliant::tok
