// Characters: UTF-8, the classes that split patterns ask for, and normal form C.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pliant::tok {

// Classes of a code point, as bits.
enum : uint8_t {
    kLetter = 1,    // \p{L}
    kNumber = 2,    // \p{N}
    kSpace = 4,     // \s
    kMark = 8,      // \p{M}
    kDigit = 16,    // what the Digits pre-tokenizer cuts out
    kWord = 32,     // \w as the added tokens see it
    kUnstable = 64  // normal form C may change it or the characters before it
};

uint8_t char_class(uint32_t code_point);

// True if `text` is well-formed UTF-8 (no surrogates, nothing over U+10FFFF, nothing overlong).
bool is_utf8(std::string_view text);

// Reads the character at `at` of well-formed UTF-8 and moves `at` behind it.
uint32_t next_char(std::string_view text, size_t& at);

// Offset of the character that ends before `at`; `at` > 0.
size_t previous_char(std::string_view text, size_t at);

void append_utf8(std::string& out, uint32_t code_point);

// What stands at `at` of bytes that may be broken: how many bytes belong together, and whether
// they are a character, a broken part of one (to be shown as one U+FFFD), or a start that more
// bytes could still complete.
enum class Utf8 { kCharacter, kBroken, kIncomplete };
struct Utf8Part {
    Utf8 kind;
    size_t bytes;
};
Utf8Part utf8_part(std::string_view bytes, size_t at);

// The text in normal form C. `changed` tells whether it had to be written anew; if not, the result
// is empty and the text itself is in that form.
std::string to_nfc(std::string_view text, bool& changed);

}  // namespace pliant::tok
