#include "added.h"

#include <algorithm>

#include "unicode.h"

namespace pliant::tok {
namespace {

bool word_before(std::string_view text, size_t at) {
    if (at == 0) return false;
    size_t i = previous_char(text, at);
    return char_class(next_char(text, i)) & kWord;
}

bool word_at(std::string_view text, size_t at) {
    return at < text.size() && (char_class(next_char(text, at)) & kWord);
}

bool is_boundary(std::string_view text, size_t at) {
    return at == text.size() || (static_cast<uint8_t>(text[at]) & 0xC0) != 0x80;
}

// Where the white space before `at` begins, but not before `limit`.
size_t spaces_begin(std::string_view text, size_t at, size_t limit) {
    while (at > limit) {
        const size_t begin = previous_char(text, at);
        size_t i = begin;
        if (!(char_class(next_char(text, i)) & kSpace)) break;
        at = begin;
    }
    return std::max(at, limit);
}

size_t spaces_end(std::string_view text, size_t at) {
    while (at < text.size()) {
        size_t next = at;
        if (!(char_class(next_char(text, next)) & kSpace)) break;
        at = next;
    }
    return at;
}

}  // namespace

AddedFinder::AddedFinder(const File& file, uint32_t root) : file_(file), root_(root) {
    if (root_ == kNone) return;
    const TrieNode node = file_.trie_node(root_);
    for (int byte = 0; byte < 256; ++byte) {
        const bool inside = byte >= 0x80 && byte < 0xC0;  // of a character: no token begins there
        starts_[byte] =
            !inside && file_.trie_child(node, root_, static_cast<uint8_t>(byte)) != kNone;
    }
}

// Index of the longest added token at `at`, or kNone.
uint32_t AddedFinder::longest(std::string_view text, size_t at, size_t& end) const {
    uint32_t node_index = root_, found = kNone;
    TrieNode node = file_.trie_node(node_index);
    while (at < text.size()) {
        const uint32_t child = file_.trie_child(node, node_index, static_cast<uint8_t>(text[at]));
        if (child == kNone) break;
        ++at;
        node = file_.trie_node(node_index = child);
        if (node.added != kNone) {
            if (!is_boundary(text, at)) file_.broken("an added token ends inside a character");
            found = node.added;
            end = at;
        }
    }
    return found;
}

std::vector<Part> AddedFinder::cut(std::string_view text, bool special) const {
    std::vector<Part> parts;
    size_t done = 0;  // what lies before it is in `parts`
    for (size_t at = 0; root_ != kNone && at < text.size();) {
        if (!starts_[static_cast<uint8_t>(text[at])]) {
            ++at;
            continue;
        }
        size_t end = at;
        const uint32_t index = longest(text, at, end);
        if (index == kNone) {
            ++at;
            continue;
        }
        size_t begin = at, stop = end;
        at = end;
        const AddedToken token = file_.added(index);
        if (!special && (token.flags & kAddedSpecial)) continue;
        if ((token.flags & kSingleWord) && (word_before(text, begin) || word_at(text, stop)))
            continue;
        // White space that a token takes on its right stays searchable, so the next token may
        // begin before `done`.
        if (token.flags & kLeftStrip) begin = spaces_begin(text, begin, done);
        if (token.flags & kRightStrip) stop = spaces_end(text, stop);
        if (done < begin) parts.push_back({kNone, done, begin});
        parts.push_back({token.id, begin, stop});
        done = stop;
    }
    if (done < text.size()) parts.push_back({kNone, done, text.size()});
    return parts;
}

}  // namespace pliant::tok
