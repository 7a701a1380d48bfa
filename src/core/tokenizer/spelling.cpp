#include "spelling.h"

#include <charconv>

#include "unicode.h"

namespace pliant::tok {
namespace {

// Bytes that are spelled as the character of the same number; the others, in their order, are
// U+0100, U+0101 and so on.
bool spelled_as_itself(uint32_t byte) {
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to,
                        std::string out) {
    out.reserve(out.size() + text.size() + text.size() / 4);
    for (;;) {
        const size_t at = text.find(from);
        out.append(text.substr(0, at));
        if (at == std::string_view::npos) return out;
        out.append(to);
        text.remove_prefix(at + from.size());
    }
}

}  // namespace

std::string spaces_to_low_lines(std::string_view lead, std::string_view text) {
    return replace_all(text, " ", kLowLine, std::string(lead));
}

std::string low_lines_to(std::string_view space, std::string_view text) {
    return replace_all(text, kLowLine, space, {});
}

bool bytes_of_spelling(std::string_view token, std::string& bytes) {
    bytes.clear();
    if (!is_utf8(token)) return false;
    for (size_t at = 0; at < token.size();) {
        const uint32_t letter = next_char(token, at);
        uint32_t byte = letter;
        if (letter >= 0x100) {
            uint32_t skip = letter - 0x100;
            for (byte = 0; byte < 0x100; ++byte) {
                if (!spelled_as_itself(byte) && skip-- == 0) break;
            }
            if (byte == 0x100) return false;
        } else if (!spelled_as_itself(byte)) {
            return false;
        }
        bytes.push_back(static_cast<char>(byte));
    }
    return true;
}

bool byte_of_name(std::string_view token, uint8_t& byte) {
    if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return false;
    const char* end = token.data() + 5;
    const auto result = std::from_chars(token.data() + 3, end, byte, 16);
    return result.ec == std::errc() && result.ptr == end;
}

}  // namespace pliant::tok
