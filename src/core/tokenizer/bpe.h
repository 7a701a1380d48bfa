// Byte pair encoding of one word.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "file.h"

namespace pliant::tok {

// Encodes words of one text. Not for several threads at once: it keeps its buffers.
class Bpe {
  public:
    explicit Bpe(const File& file) : file_(file) {}

    // Appends the tokens of a word, which is well-formed UTF-8. Time n log n in its length.
    void encode(std::string_view word, std::vector<uint32_t>& out);

  private:
    // Atoms are added to run_ until no merge can join the next one to it; then the run is merged.
    void add_atom(uint32_t id, uint8_t joint_class, std::vector<uint32_t>& out);
    void add_unmergeable(uint32_t id, std::vector<uint32_t>& out);
    void add_unknown(std::vector<uint32_t>& out);
    void end_unknown(std::vector<uint32_t>& out);
    void end_run(std::vector<uint32_t>& out);
    void merge_short(std::vector<uint32_t>& out);
    void merge_long(std::vector<uint32_t>& out);

    const File& file_;
    std::vector<uint32_t> run_;
    uint8_t last_class_ = 0;
    bool unknown_ = false;  // an unknown token waits: the next unknown character may join it
};

}  // namespace pliant::tok
