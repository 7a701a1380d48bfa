// tokenizer.bin, mapped read-only: the layout (docs/tokenizer.md) and checked access to it.
//
// Opening checks the header and the extent of every section, and touches no page beyond the first.
// Everything else is checked when it is read, so a broken file ends in a FormatError, whatever its
// bytes are. Nothing here changes after opening: all of it may be used from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "split.h"

namespace pliant::tok {

constexpr uint32_t kNone = 0xFFFFFFFF;

enum class Atoms : uint32_t { kBytes = 1, kChars = 2 };
enum class Decoder : uint32_t { kByteLevel = 1, kByteFallback = 2, kMetaspace = 3 };
enum class Metaspace : uint32_t { kAbsent = 0, kNever = 1, kFirst = 2, kAlways = 3 };
enum class Digits : uint32_t { kTogether = 0, kRuns = 1, kSingle = 2 };

// Bits of Header::normalizer.
enum : uint32_t { kNfc = 1, kPrepend = 2, kReplaceSpaces = 4, kNormalizerBits = 7 };

// Bits of Header::model.
enum : uint32_t {
    kFuseUnknown = 1,
    kUseByteFallback = 2,
    kIgnoreMerges = 4,
    kAnyAtomMerges = 8,  // atoms of byte fallback take part in merges: words cannot be cut
    kModelBits = 15
};

// Bits of an entry of kTokenFlags.
enum : uint8_t {
    kPresent = 1,  // the id has a token
    kMapped = 2,   // its text is the byte-level spelling of its bytes
    kSpecial = 4,  // a special token
    kByte = 8,     // <0xNN>: stands for one byte
    kInModel = 16  // part of the BPE model, not only added to it
};

// Bits of AddedToken::flags.
enum : uint32_t { kAddedSpecial = 1, kLeftStrip = 2, kRightStrip = 4, kSingleWord = 8 };

enum Section : uint32_t {
    kTokenOffsets,  // u32[vocab_size + 1] into kTokenBytes
    kTokenBytes,    // u8[]
    kTokenFlags,    // u8[vocab_size]
    kTokenTable,    // {u32 tag, u32 id}[]: hash table, bytes of a token -> id
    kMergeTable,    // u64[]: hash table, left | right << 21 | rank << 42
    kMergeIds,      // u32[merge_count]: the token that the merge of this rank makes
    kCharTable,     // {u32 code point, u32 id}[]: hash table, tokens of one character
    kByteIds,       // u32[256]: the token of every byte
    kJoints,        // u8[8192]: bit (left class * 256 + right class) is set if a merge joins them
    kTrieNodes,     // {u32 first edge, u32 edges, u32 added token or kNone}[]
    kTrieEdges,     // u32[]: byte << 24 | node
    kAdded,         // {u32 id, u32 flags}[]
    kPrefix,        // u32[]: ids that add_special puts in front
    kSuffix,        // u32[]: and behind
    kSections
};

struct Extent {
    uint64_t offset, bytes;
};

struct Header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t file_bytes;
    uint32_t vocab_size, merge_count;
    uint32_t atoms, decoder, strip;  // strip: spaces that the decoder removes from the front
    uint32_t normalizer, metaspace, metaspace_split;
    uint32_t digits, pattern, prefix_space, second_pattern;
    uint32_t model, unknown_id;
    uint32_t raw_root, normalized_root;  // nodes of the two tries, or kNone
    uint32_t token_slots, token_probe;   // first slots of the hash tables; slots looked at
    uint32_t merge_slots, merge_probe;
    uint32_t char_slots, char_probe;
    Extent sections[kSections];
};
static_assert(sizeof(Header) == 24 + 22 * 4 + 16 * kSections);

struct TrieNode {
    uint32_t first_edge, edges, added;
};
struct AddedToken {
    uint32_t id, flags;
};

class File {
  public:
    // Throws FormatError if the file is not a tokenizer.bin that this program reads.
    explicit File(const std::string& path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const Header& header() const { return header_; }
    bool model_bit(uint32_t bit) const { return header_.model & bit; }

    // The stored bytes of a token and its flags; `id` < vocab_size.
    std::string_view token(uint32_t id) const;
    uint8_t token_flags(uint32_t id) const;

    // The id of a token with these bytes whose flags, masked, are `flags`; kNone if there is none.
    uint32_t find_token(std::string_view bytes, uint8_t mask, uint8_t flags) const;
    uint32_t find_char(uint32_t code_point) const;
    uint32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }

    // The rank of the merge of two tokens, or kNone; and the token that a merge makes.
    uint32_t merge_rank(uint32_t left, uint32_t right) const;
    uint32_t merged_token(uint32_t rank) const;

    // Whether any merge joins an atom of class `left` with one of class `right` behind it.
    bool joins(uint8_t left, uint8_t right) const {
        const uint32_t bit = left * 256u + right;
        return joints_[bit >> 3] >> (bit & 7) & 1;
    }

    TrieNode trie_node(uint32_t node) const;
    // The child of a node for a byte, or kNone.
    uint32_t trie_child(const TrieNode& node, uint32_t parent, uint8_t byte) const;
    AddedToken added(uint32_t index) const;

    std::span<const uint32_t> prefix() const { return prefix_; }
    std::span<const uint32_t> suffix() const { return suffix_; }

    // Bytes of the mapping that are resident now, in whole pages.
    size_t resident_bytes() const;

    [[noreturn]] void broken(const std::string& what) const;

  private:
    void check();
    template <typename T>
    std::span<const T> section(Section which) const;

    std::string path_;
    const uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
    Header header_{};
    std::span<const uint32_t> offsets_, merge_ids_, byte_ids_, edges_, prefix_, suffix_;
    std::span<const uint64_t> tokens_, merges_, chars_;
    std::span<const uint8_t> blob_, flags_, joints_;
    std::span<const TrieNode> nodes_;
    std::span<const AddedToken> added_;
};

}  // namespace pliant::tok
