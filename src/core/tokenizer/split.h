// The split patterns of the known tokenizer families, one hand-written scanner each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pliant::tok {

// Numbers as in tokenizer.bin; the patterns themselves are in docs/tokenizer.md.
enum class Pattern : uint32_t {
    kNone = 0,
    kGpt2 = 1,    // GPT-2, SmolLM2
    kLlama3 = 2,  // digits in groups of three
    kQwen2 = 3,   // every digit alone
    kQwen35 = 4,  // as kQwen2, marks count as letters
    kLast = kQwen35
};

// The end of the match of `pattern` that begins at `at` < text.size(). Every pattern matches at
// every place, so repeating this cuts a text completely. `text` is well-formed UTF-8.
size_t match_end(Pattern pattern, std::string_view text, size_t at);

// The end of the run of characters at `at` that are (or are not) digits for the Digits
// pre-tokenizer; with `single`, a digit stands alone. Sets `digits` to which of both it is.
size_t digit_run_end(std::string_view text, size_t at, bool single, bool& digits);

}  // namespace pliant::tok
