// Token ids to text.

#include <utility>

#include "../error.h"
#include "file.h"
#include "spelling.h"
#include "tokenizer.h"
#include "unicode.h"

namespace pliant {
namespace {

using tok::Decoder;
using tok::File;

Decoder decoder(const File& file) { return static_cast<Decoder>(file.header().decoder); }

// The byte that a token of byte fallback stands for. False for other tokens.
bool single_byte(const File& file, uint32_t id, uint8_t& byte) {
    if (!(file.token_flags(id) & tok::kByte)) return false;
    if (!tok::byte_of_name(file.token(id), byte)) file.broken("a byte token has another spelling");
    return true;
}

// What a token that is not a single byte adds to the text.
std::string token_text(const File& file, uint32_t id, bool first) {
    const std::string_view stored = file.token(id);
    if (decoder(file) == Decoder::kByteLevel) return std::string(stored);
    if (!tok::is_utf8(stored)) file.broken("token " + std::to_string(id) + " is not UTF-8");
    // The Metaspace decoder removes the spaces that its pre-tokenizer puts in front.
    const bool strip = first && decoder(file) == Decoder::kMetaspace && file.header().strip;
    return tok::low_lines_to(strip ? "" : " ", stored);
}

// Appends all whole characters of `bytes` from `at` on, a U+FFFD for every broken part; returns
// where an incomplete character begins, or the end.
size_t append_lossy(std::string_view bytes, std::string& out) {
    size_t at = 0;
    while (at < bytes.size()) {
        const tok::Utf8Part part = tok::utf8_part(bytes, at);
        if (part.kind == tok::Utf8::kIncomplete) break;
        out.append(part.kind == tok::Utf8::kCharacter ? bytes.substr(at, part.bytes)
                                                      : tok::kReplacement);
        at += part.bytes;
    }
    return at;
}

}  // namespace

std::string Tokenizer::decode(std::span<const uint32_t> ids, bool skip_special) const {
    const File& file = *file_;
    std::string text, bytes;
    const auto end_bytes = [&] {
        if (tok::is_utf8(bytes)) {
            text += bytes;
        } else {
            for (size_t i = 0; i < bytes.size(); ++i) text += tok::kReplacement;
        }
        bytes.clear();
    };
    bool first = true;
    for (const uint32_t id : ids) {
        if (!has_token(id, skip_special)) continue;
        uint8_t byte;
        if (single_byte(file, id, byte)) {
            bytes.push_back(static_cast<char>(byte));
        } else {
            end_bytes();
            text += token_text(file, id, first);
        }
        first = false;
    }
    end_bytes();
    if (decoder(file) == Decoder::kByteLevel) {
        std::string whole;
        whole.reserve(text.size());
        if (append_lossy(text, whole) < text.size()) whole += tok::kReplacement;
        return whole;
    }
    if (decoder(file) == Decoder::kByteFallback) {
        size_t spaces = 0;
        while (spaces < file.header().strip && spaces < text.size() && text[spaces] == ' ')
            ++spaces;
        text.erase(0, spaces);
    }
    return text;
}

std::string Tokenizer::token_bytes(uint32_t id) const {
    check_id(id);
    if (!has_token(id, false)) return {};
    uint8_t byte;
    if (single_byte(*file_, id, byte)) return std::string(1, static_cast<char>(byte));
    return token_text(*file_, id, false);
}

TokenStream::TokenStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {
    begin();
}

void TokenStream::begin() {
    const File& file = *tokenizer_->file_;
    held_.clear();
    broken_run_ = false;
    first_ = true;
    strip_left_ = decoder(file) == Decoder::kByteFallback ? file.header().strip : 0;
}

std::string TokenStream::push(uint32_t id) {
    const File& file = *tokenizer_->file_;
    std::string out;
    if (!tokenizer_->has_token(id, skip_special_)) return out;
    uint8_t byte;
    if (decoder(file) == Decoder::kByteLevel) {
        held_ += file.token(id);
        held_.erase(0, append_lossy(held_, out));
    } else if (single_byte(file, id, byte)) {
        add_byte(byte, out);
    } else {
        end_bytes(out);
        add_text(token_text(file, id, first_), out);
    }
    first_ = false;
    return out;
}

std::string TokenStream::flush() {
    std::string out;
    if (decoder(*tokenizer_->file_) == Decoder::kByteLevel) {
        if (!held_.empty()) out = tok::kReplacement;
    } else {
        end_bytes(out);
    }
    begin();
    return out;
}

void TokenStream::add_text(std::string_view text, std::string& out) {
    while (strip_left_ && text.starts_with(' ')) {
        text.remove_prefix(1);
        --strip_left_;
    }
    if (!text.empty()) strip_left_ = 0;
    out += text;
}

// A token for one byte: characters go out when they are complete.
void TokenStream::add_byte(uint8_t byte, std::string& out) {
    held_.push_back(static_cast<char>(byte));
    if (!broken_run_) {
        const tok::Utf8Part part = tok::utf8_part(held_, 0);
        if (part.kind == tok::Utf8::kIncomplete) return;
        if (part.kind == tok::Utf8::kCharacter) {
            add_text(held_, out);
            held_.clear();
            return;
        }
        broken_run_ = true;
    }
    for (size_t i = 0; i < held_.size(); ++i) add_text(tok::kReplacement, out);
    held_.clear();
}

// Something else follows a run of single bytes: what is not complete will not be.
void TokenStream::end_bytes(std::string& out) {
    for (size_t i = 0; i < held_.size(); ++i) add_text(tok::kReplacement, out);
    held_.clear();
    broken_run_ = false;
}

}  // namespace pliant
