// Added tokens: those that are found in the text before it is split into words.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "file.h"

namespace pliant::tok {

// A part of a text: an added token, or (id kNone) what lies between two of them.
struct Part {
    uint32_t id;
    size_t begin, end;
};

// Finds the added tokens of one trie: leftmost first, the longest of those that begin together.
class AddedFinder {
  public:
    AddedFinder(const File& file, uint32_t root);

    // Cuts `text` (well-formed UTF-8) into parts that cover it. With `special` false, special
    // tokens are left in the text, though what they cover is not searched again.
    std::vector<Part> cut(std::string_view text, bool special) const;

  private:
    uint32_t longest(std::string_view text, size_t at, size_t& end) const;

    const File& file_;
    uint32_t root_;
    std::array<bool, 256> starts_{};  // bytes that begin a token
};

}  // namespace pliant::tok
