#include "tokenizer.h"

#include "../error.h"
#include "added.h"
#include "bpe.h"
#include "file.h"
#include "spelling.h"
#include "split.h"
#include "unicode.h"

namespace pliant {

using tok::Digits;
using tok::File;
using tok::kNone;
using tok::Metaspace;
using tok::Pattern;

Tokenizer::Tokenizer(const std::string& path)
    : file_(std::make_unique<const File>(path)),
      raw_added_(std::make_unique<const tok::AddedFinder>(*file_, file_->header().raw_root)),
      normalized_added_(
          std::make_unique<const tok::AddedFinder>(*file_, file_->header().normalized_root)) {}

Tokenizer::~Tokenizer() = default;

std::vector<uint32_t> Tokenizer::encode(std::string_view text, bool add_special,
                                        bool parse_special) const {
    if (!tok::is_utf8(text)) throw UsageError("the text to encode is not UTF-8");
    std::vector<uint32_t> out;
    out.reserve(text.size() / 4 + 8);
    if (add_special) out.assign(file_->prefix().begin(), file_->prefix().end());

    const uint32_t steps = file_->header().normalizer;
    tok::Bpe bpe(*file_);
    std::string normalized;
    for (const tok::Part& raw : raw_added_->cut(text, parse_special)) {
        if (raw.id != kNone) {
            out.push_back(raw.id);
            continue;
        }
        std::string_view piece = text.substr(raw.begin, raw.end - raw.begin);
        if (steps & tok::kNfc) {
            bool changed;
            std::string nfc = tok::to_nfc(piece, changed);
            if (changed) piece = normalized = std::move(nfc);
        }
        if (steps & (tok::kPrepend | tok::kReplaceSpaces)) {
            const std::string_view lead = steps & tok::kPrepend ? tok::kLowLine : "";
            piece = normalized = steps & tok::kReplaceSpaces ? tok::spaces_to_low_lines(lead, piece)
                                                             : std::string(lead).append(piece);
        }
        for (const tok::Part& part : normalized_added_->cut(piece, parse_special)) {
            if (part.id != kNone) {
                out.push_back(part.id);
            } else {
                encode_piece(piece.substr(part.begin, part.end - part.begin),
                             raw.begin == 0 && part.begin == 0, bpe, out);
            }
        }
    }
    if (add_special) out.insert(out.end(), file_->suffix().begin(), file_->suffix().end());
    return out;
}

// A part of the text between added tokens; `first` if it begins the text.
void Tokenizer::encode_piece(std::string_view piece, bool first, tok::Bpe& bpe,
                             std::vector<uint32_t>& out) const {
    const auto metaspace = static_cast<Metaspace>(file_->header().metaspace);
    if (metaspace == Metaspace::kAbsent) {
        split_piece(piece, bpe, out);
        return;
    }
    const bool lead =
        (metaspace == Metaspace::kAlways || (metaspace == Metaspace::kFirst && first)) &&
        !piece.starts_with(' ') && !piece.starts_with(tok::kLowLine);
    const std::string text = tok::spaces_to_low_lines(lead ? tok::kLowLine : "", piece);
    std::string_view rest = text;
    while (file_->header().metaspace_split) {  // before every ▁
        const size_t cut = rest.find(tok::kLowLine, 1);
        if (cut == std::string_view::npos) break;
        bpe.encode(rest.substr(0, cut), out);
        rest.remove_prefix(cut);
    }
    bpe.encode(rest, out);
}

void Tokenizer::split_piece(std::string_view piece, tok::Bpe& bpe,
                            std::vector<uint32_t>& out) const {
    const auto digits = static_cast<Digits>(file_->header().digits);
    const auto pattern = static_cast<Pattern>(file_->header().pattern);
    const auto by_pattern = [&](std::string_view text) {
        for (size_t at = 0; at < text.size();) {
            const size_t end = tok::match_end(pattern, text, at);
            split_word(text.substr(at, end - at), bpe, out);
            at = end;
        }
    };
    if (digits == Digits::kTogether) {
        by_pattern(piece);
        return;
    }
    for (size_t at = 0; at < piece.size();) {
        bool is_digits;
        const size_t end = tok::digit_run_end(piece, at, digits == Digits::kSingle, is_digits);
        by_pattern(piece.substr(at, end - at));
        at = end;
    }
}

void Tokenizer::split_word(std::string_view word, tok::Bpe& bpe, std::vector<uint32_t>& out) const {
    std::string spaced;
    if (file_->header().prefix_space && !word.starts_with(' ')) {
        word = spaced = std::string(" ").append(word);
    }
    const auto pattern = static_cast<Pattern>(file_->header().second_pattern);
    if (pattern == Pattern::kNone) {
        bpe.encode(word, out);
        return;
    }
    for (size_t at = 0; at < word.size();) {
        const size_t end = tok::match_end(pattern, word, at);
        bpe.encode(word.substr(at, end - at), out);
        at = end;
    }
}

bool Tokenizer::has_token(uint32_t id, bool skip_special) const {
    if (id >= file_->header().vocab_size) return false;
    const uint8_t flags = file_->token_flags(id);
    return (flags & tok::kPresent) && !(skip_special && (flags & tok::kSpecial));
}

void Tokenizer::check_id(uint32_t id) const {
    if (id >= file_->header().vocab_size) {
        throw UsageError("token " + std::to_string(id) + " does not exist; the vocabulary has " +
                         std::to_string(file_->header().vocab_size) + " tokens");
    }
}

std::optional<uint32_t> Tokenizer::id_of(std::string_view token) const {
    uint32_t id;
    std::string bytes;
    const auto atoms = static_cast<tok::Atoms>(file_->header().atoms);
    if (atoms == tok::Atoms::kBytes && tok::bytes_of_spelling(token, bytes)) {
        id = file_->find_token(bytes, tok::kMapped, tok::kMapped);
    } else {
        id = file_->find_token(token, tok::kMapped, 0);
    }
    return id == kNone ? std::nullopt : std::optional(id);
}

bool Tokenizer::is_special(uint32_t id) const {
    return id < file_->header().vocab_size && (file_->token_flags(id) & tok::kSpecial);
}

uint32_t Tokenizer::vocab_size() const { return file_->header().vocab_size; }

size_t Tokenizer::resident_bytes() const {
    return file_->resident_bytes() + sizeof(Tokenizer) + sizeof(File) +
           2 * sizeof(tok::AddedFinder);
}

}  // namespace pliant
