// A step: what the caller wants is checked, cut into chunks, and each chunk goes through the
// decoder (forward.h).
#include <algorithm>

#include "error.h"
#include "executor.h"
#include "forward.h"

namespace pliant {

bool Executor::step(const std::vector<Piece>& pieces, const int32_t* tokens, float* logits,
                    float* states, bool whole) {
    if (!buffers_) throw EngineError("the executor is not finished");
    int pages = 0;
    size_t at = 0;
    std::vector<int> seen, lengths;
    for (const Piece& piece : pieces) {
        if (piece.count < 1) throw UsageError("a sequence must add at least one token to a step");
        if (std::find(seen.begin(), seen.end(), piece.sequence) != seen.end())
            throw UsageError("a sequence is in a step twice");
        seen.push_back(piece.sequence);
        const int length = kv.length(piece.sequence);
        kv.check_seen(piece.sequence);
        lengths.push_back(length);
        if (piece.count > model_.context - length)
            throw EngineError("sequence " + std::to_string(piece.sequence) + " has " +
                              std::to_string(length) + " tokens and cannot take " +
                              std::to_string(piece.count) + " more: the model's context is " +
                              std::to_string(model_.context));
        pages += kv.pages_needed(piece.sequence, piece.count);
        for (int i = 0; i < piece.count; ++i, ++at)
            if (tokens[at] < 0 || tokens[at] >= model_.vocab)
                throw UsageError("token " + std::to_string(tokens[at]) +
                                 " is not in the vocabulary of " + std::to_string(model_.vocab));
    }
    if (pages > kv.pages_free())
        throw EngineError("the step needs " + std::to_string(pages) + " pages of the KV cache, " +
                          std::to_string(kv.pages_free()) + " of " +
                          std::to_string(kv.pages_total()) +
                          " are free: close a sequence or give more memory to the context");

    std::vector<ChunkToken> chunk;
    size_t begun = 0;
    bool first = true;
    const auto run = [&] {
        // What the step began with may be gone then, so it cannot be made again.
        if (kv.fit() && !first) whole = true;
        first = false;
        const bool ended = Forward(*this, chunk, logits, states, whole).run();
        // With a ladder the page that a sequence goes on in stays exact: the step may yet be given
        // up.
        for (size_t i = 0; ended && i < std::min(begun + 1, pieces.size()); ++i)
            kv.seal(pieces[i].sequence, (lengths[i] + kPageTokens - 1) / kPageTokens);
        chunk.clear();
        return ended;
    };
    at = 0;
    int row = 0;
    bool ended = true;
    for (; begun < pieces.size() && ended; ++begun) {
        const Piece& piece = pieces[begun];
        for (int i = 0; i < piece.count && ended; ++i, ++at) {
            ChunkToken token{tokens[at], piece.sequence, lengths[begun] + i, -1, -1};
            kv.extend(piece.sequence, 1);
            if (piece.want == Want::kAll || (piece.want == Want::kLast && i + 1 == piece.count))
                token.logits = row++;
            if (piece.want == Want::kStates) token.state = static_cast<int>(at);
            chunk.push_back(token);
            if (static_cast<int>(chunk.size()) == chunk_) ended = run();
        }
    }
    if (ended && !chunk.empty()) ended = run();
    for (size_t i = 0; i < begun; ++i) {
        if (ended)
            kv.seal(pieces[i].sequence, lengths[i] / kPageTokens);
        else
            kv.cut(pieces[i].sequence, lengths[i]);
    }
    return ended;
}

}  // namespace pliant
