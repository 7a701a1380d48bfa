#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <vector>

#include "../error.h"

namespace pliant::tok {
namespace {

static_assert(std::endian::native == std::endian::little, "tokenizer.bin is little-endian");

constexpr char kMagic[8] = {'p', 'l', 'i', 'a', 'n', 't', 'T', 'K'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kMaxTokens = (1u << 21) - 1;
constexpr uint32_t kMaxMerges = (1u << 22) - 1;
constexpr uint32_t kMaxProbe = 1u << 12;
constexpr uint64_t kAlignment = 64;
constexpr uint64_t kPairBits = (uint64_t{1} << 42) - 1;

uint64_t mix(uint64_t x) {
    x *= 0x9E3779B97F4A7C15u;
    x ^= x >> 32;
    x *= 0xD6E8FEB86659FD93u;
    return x ^ x >> 32;
}

// The first slot to look at.
size_t home(uint64_t hash, uint32_t slots) { return (hash & 0xFFFFFFFF) * slots >> 32; }

uint64_t hash_bytes(std::string_view bytes) {
    uint64_t hash = bytes.size();
    for (size_t at = 0; at < bytes.size(); at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
        hash = mix(hash ^ word);
    }
    return hash;
}

}  // namespace

File::File(const std::string& path) : path_(path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) broken(std::string("cannot be opened: ") + std::strerror(errno));
    struct stat status{};
    const bool known = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    void* data = MAP_FAILED;
    if (known && static_cast<uint64_t>(status.st_size) >= sizeof(Header)) {
        bytes_ = static_cast<size_t>(status.st_size);
        data = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    ::close(file);
    if (!known) broken("is not a regular file");
    if (bytes_ == 0) {
        broken("has " + std::to_string(status.st_size) + " bytes; the header alone has " +
               std::to_string(sizeof(Header)));
    }
    if (data == MAP_FAILED) broken("cannot be mapped into memory");
    data_ = static_cast<const uint8_t*>(data);
    // Reads are scattered: reading ahead would only fill memory.
    ::madvise(data, bytes_, MADV_RANDOM);
    try {
        check();
    } catch (...) {
        ::munmap(data, bytes_);
        throw;
    }
}

File::~File() { ::munmap(const_cast<uint8_t*>(data_), bytes_); }

void File::broken(const std::string& what) const {
    throw FormatError("tokenizer file " + path_ + ": " + what + "; build it again from the model");
}

template <typename T>
std::span<const T> File::section(Section which) const {
    const Extent& extent = header_.sections[which];
    if (extent.bytes % sizeof(T)) {
        broken("section " + std::to_string(which) + " has a part of an entry");
    }
    return {reinterpret_cast<const T*>(data_ + extent.offset), extent.bytes / sizeof(T)};
}

void File::check() {
    std::memcpy(&header_, data_, sizeof(Header));
    const Header& h = header_;
    const auto require = [&](bool good, const char* what) {
        if (!good) broken(what);
    };
    require(!std::memcmp(h.magic, kMagic, sizeof kMagic), "is not a tokenizer.bin");
    if (h.version != kVersion) {
        broken("has version " + std::to_string(h.version) + "; this program reads version " +
               std::to_string(kVersion));
    }
    require(h.header_bytes == sizeof(Header), "has a header of another size");
    if (h.file_bytes != bytes_) {
        broken("should have " + std::to_string(h.file_bytes) + " bytes and has " +
               std::to_string(bytes_));
    }
    uint64_t end = sizeof(Header);
    for (const Extent& s : h.sections) {
        require(s.offset % kAlignment == 0, "a section is not aligned");
        require(s.offset >= end && s.offset <= bytes_ && s.bytes <= bytes_ - s.offset,
                "a section lies outside the file or over another");
        end = s.offset + s.bytes;
    }
    offsets_ = section<uint32_t>(kTokenOffsets);
    blob_ = section<uint8_t>(kTokenBytes);
    flags_ = section<uint8_t>(kTokenFlags);
    tokens_ = section<uint64_t>(kTokenTable);
    merges_ = section<uint64_t>(kMergeTable);
    merge_ids_ = section<uint32_t>(kMergeIds);
    chars_ = section<uint64_t>(kCharTable);
    byte_ids_ = section<uint32_t>(kByteIds);
    joints_ = section<uint8_t>(kJoints);
    nodes_ = section<TrieNode>(kTrieNodes);
    edges_ = section<uint32_t>(kTrieEdges);
    added_ = section<AddedToken>(kAdded);
    prefix_ = section<uint32_t>(kPrefix);
    suffix_ = section<uint32_t>(kSuffix);

    require(h.vocab_size >= 1 && h.vocab_size <= kMaxTokens, "vocabulary size out of range");
    require(h.merge_count <= kMaxMerges, "too many merges");
    require(offsets_.size() == h.vocab_size + 1 && flags_.size() == h.vocab_size,
            "the token sections do not have vocab_size entries");
    require(merge_ids_.size() == h.merge_count, "the merges do not have merge_count entries");
    require(byte_ids_.size() == 256 && joints_.size() == 8192, "a fixed section has a wrong size");
    const auto table = [&](size_t entries, uint32_t slots, uint32_t probe) {
        require(
            slots >= 1 && probe >= 1 && probe <= kMaxProbe && entries == uint64_t{slots} + probe,
            "a hash table does not have slots + probe entries");
    };
    table(tokens_.size(), h.token_slots, h.token_probe);
    table(merges_.size(), h.merge_slots, h.merge_probe);
    table(chars_.size(), h.char_slots, h.char_probe);

    require(h.atoms >= 1 && h.atoms <= 2 && h.decoder >= 1 && h.decoder <= 3 &&
                (h.atoms == 1) == (h.decoder == 1),
            "unknown kind of model or decoder");
    require(!(h.normalizer & ~kNormalizerBits) && h.metaspace <= 3 && h.metaspace_split <= 1,
            "unknown normaliser");
    require(h.digits <= 2 && h.pattern <= static_cast<uint32_t>(Pattern::kLast) &&
                h.prefix_space <= 1 && h.second_pattern <= static_cast<uint32_t>(Pattern::kLast),
            "unknown pre-tokenizer");
    require(!(h.model & ~kModelBits), "unknown property of the model");
    const auto known = [&](uint32_t id) {
        require(id < h.vocab_size, "an id is outside the vocabulary");
    };
    const auto known_or_none = [&](uint32_t id) {
        if (id != kNone) known(id);
    };
    known_or_none(h.unknown_id);
    std::for_each(byte_ids_.begin(), byte_ids_.end(), known_or_none);
    std::for_each(prefix_.begin(), prefix_.end(), known);
    std::for_each(suffix_.begin(), suffix_.end(), known);
    require((h.raw_root == kNone || h.raw_root < nodes_.size()) &&
                (h.normalized_root == kNone || h.normalized_root < nodes_.size()),
            "a trie has no root");
}

std::string_view File::token(uint32_t id) const {
    const uint32_t begin = offsets_[id], end = offsets_[id + 1];
    if (begin > end || end > blob_.size()) broken("token " + std::to_string(id) + " has no bytes");
    return {reinterpret_cast<const char*>(blob_.data()) + begin, end - begin};
}

uint8_t File::token_flags(uint32_t id) const { return flags_[id]; }

uint32_t File::find_token(std::string_view bytes, uint8_t mask, uint8_t flags) const {
    const uint64_t hash = hash_bytes(bytes);
    const size_t first = home(hash, header_.token_slots);
    for (size_t slot = first; slot < first + header_.token_probe; ++slot) {
        const uint64_t entry = tokens_[slot];
        if (entry == UINT64_MAX) break;
        if ((entry & 0xFFFFFFFF) != hash >> 32) continue;
        const auto id = static_cast<uint32_t>(entry >> 32);
        if (id >= header_.vocab_size) broken("the token table has an unknown id");
        if ((flags_[id] & mask) == flags && token(id) == bytes) return id;
    }
    return kNone;
}

uint32_t File::find_char(uint32_t code_point) const {
    const size_t first = home(mix(code_point), header_.char_slots);
    for (size_t slot = first; slot < first + header_.char_probe; ++slot) {
        const uint64_t entry = chars_[slot];
        if (entry == UINT64_MAX) break;
        if ((entry & 0xFFFFFFFF) != code_point) continue;
        const auto id = static_cast<uint32_t>(entry >> 32);
        if (id >= header_.vocab_size) broken("the character table has an unknown id");
        return id;
    }
    return kNone;
}

uint32_t File::merge_rank(uint32_t left, uint32_t right) const {
    const uint64_t pair = left | uint64_t{right} << 21;
    const uint64_t* slot = merges_.data() + home(mix(pair), header_.merge_slots);
    for (const uint64_t* end = slot + header_.merge_probe; slot != end; ++slot) {
        if (*slot == UINT64_MAX) break;
        if ((*slot & kPairBits) != pair) continue;
        const auto rank = static_cast<uint32_t>(*slot >> 42);
        if (rank >= header_.merge_count) broken("the merge table has an unknown rank");
        return rank;
    }
    return kNone;
}

uint32_t File::merged_token(uint32_t rank) const {
    const uint32_t id = merge_ids_[rank];
    if (id >= header_.vocab_size) broken("a merge makes an unknown token");
    return id;
}

TrieNode File::trie_node(uint32_t node) const {
    const TrieNode& n = nodes_[node];
    if (n.first_edge > edges_.size() || n.edges > edges_.size() - n.first_edge ||
        (n.added != kNone && n.added >= added_.size()))
        broken("a node of the added tokens points outside");
    return n;
}

uint32_t File::trie_child(const TrieNode& node, uint32_t parent, uint8_t byte) const {
    const auto edges = edges_.subspan(node.first_edge, node.edges);
    const auto edge = std::lower_bound(edges.begin(), edges.end(), uint32_t{byte} << 24);
    if (edge == edges.end() || *edge >> 24 != byte) return kNone;
    const uint32_t child = *edge & 0xFFFFFF;
    // Children stand behind their parents, so a walk always ends.
    if (child <= parent || child >= nodes_.size()) broken("the added tokens are not a tree");
    return child;
}

AddedToken File::added(uint32_t index) const {
    const AddedToken& token = added_[index];
    if (token.id >= header_.vocab_size) broken("an added token has an unknown id");
    return token;
}

size_t File::resident_bytes() const {
    const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    const size_t pages = (bytes_ + page - 1) / page;
    // One u64 per page of our address space; bit 63: present (Documentation/admin-guide/mm).
    const int map = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (map < 0) return pages * page;
    std::vector<uint64_t> entries(pages);
    const auto at = static_cast<off_t>(reinterpret_cast<uintptr_t>(data_) / page * 8);
    const ssize_t got = ::pread(map, entries.data(), pages * 8, at);
    ::close(map);
    if (got != static_cast<ssize_t>(pages * 8)) return pages * page;
    const auto present = [](uint64_t entry) { return entry >> 63; };
    return page * static_cast<size_t>(std::count_if(entries.begin(), entries.end(), present));
}

}  // namespace pliant::tok
