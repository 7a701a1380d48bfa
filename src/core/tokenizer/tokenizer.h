// Text to token ids and back, exactly as the tokenizer that a model was trained with.
//
// Everything is prepared in tokenizer.bin (docs/tokenizer.md), which is mapped, not read. A
// Tokenizer does not change: any number of threads may use one. Errors: FormatError for a file
// that is broken, found when opening it or when the broken part is used; UsageError for arguments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace pliant {

namespace tok {
class AddedFinder;
class Bpe;
class File;
}  // namespace tok

class Tokenizer {
  public:
    explicit Tokenizer(const std::string& path);
    ~Tokenizer();
    Tokenizer(const Tokenizer&) = delete;
    Tokenizer& operator=(const Tokenizer&) = delete;

    // `text` is UTF-8. With `add_special`, the tokens that the model wants in front and behind
    // (beginning of text and the like) are added. With `parse_special` false, special tokens
    // spelled out in the text are plain text.
    std::vector<uint32_t> encode(std::string_view text, bool add_special = false,
                                 bool parse_special = true) const;

    // Well-formed UTF-8. Ids without a token give nothing, so padded vocabularies do no harm.
    std::string decode(std::span<const uint32_t> ids, bool skip_special = false) const;

    // The bytes that one token stands for, which need not be whole characters.
    std::string token_bytes(uint32_t id) const;

    // The id of a token as tokenizer.json spells it.
    std::optional<uint32_t> id_of(std::string_view token) const;

    bool is_special(uint32_t id) const;

    // One more than the highest id that has a token.
    uint32_t vocab_size() const;

    // What this object holds in memory now: pages of the mapped file, and itself.
    size_t resident_bytes() const;

  private:
    friend class TokenStream;

    void encode_piece(std::string_view piece, bool first, tok::Bpe& bpe,
                      std::vector<uint32_t>& out) const;
    void split_piece(std::string_view piece, tok::Bpe& bpe, std::vector<uint32_t>& out) const;
    void split_word(std::string_view word, tok::Bpe& bpe, std::vector<uint32_t>& out) const;
    bool has_token(uint32_t id, bool skip_special) const;
    void check_id(uint32_t id) const;

    std::unique_ptr<const tok::File> file_;
    std::unique_ptr<const tok::AddedFinder> raw_added_, normalized_added_;
};

// Decodes tokens one by one into whole characters. What it returns, put together, is what decode
// gives for the same ids, with one exception: where tokens for single bytes follow each other
// (byte fallback) and are not UTF-8 as a whole, decode shows every one as U+FFFD, and the stream
// has by then returned the characters that were complete before the fault.
class TokenStream {
  public:
    explicit TokenStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special = false);

    // The characters that this token completes; maybe none.
    std::string push(uint32_t id);

    // What is still held back, as U+FFFD; the stream then begins anew.
    std::string flush();

  private:
    void add_text(std::string_view text, std::string& out);
    void add_byte(uint8_t byte, std::string& out);
    void end_bytes(std::string& out);
    void begin();

    std::shared_ptr<const Tokenizer> tokenizer_;
    bool skip_special_;
    std::string held_;         // bytes of a character that is not complete
    bool broken_run_ = false;  // the present run of single bytes is not UTF-8
    bool first_ = true;        // no token so far
    uint32_t strip_left_ = 0;  // spaces still to be removed from the front
};

}  // namespace pliant
