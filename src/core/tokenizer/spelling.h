// How tokenizer.json spells what it cannot write: spaces as ▁, bytes as letters or as <0xNN>.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace pliant::tok {

constexpr std::string_view kLowLine = "\u2581";
constexpr std::string_view kReplacement = "\uFFFD";  // stands for bytes that are no character

// `lead`, then `text` with every space as ▁.
std::string spaces_to_low_lines(std::string_view lead, std::string_view text);

// `text` with every ▁ as `space`.
std::string low_lines_to(std::string_view space, std::string_view text);

// The bytes of a token in the byte-level spelling of GPT-2, where every byte is a visible letter.
// False if the token has other letters.
bool bytes_of_spelling(std::string_view token, std::string& bytes);

// The value of <0xNN>. False if the token is not of this form.
bool byte_of_name(std::string_view token, uint8_t& byte);

}  // namespace pliant::tok
