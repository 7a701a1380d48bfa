#include "weights.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>

#include "error.h"

namespace pliant {

namespace {

constexpr uint64_t kPage = 4096;

}  // namespace

int Weights::add_input(std::vector<uint16_t> order) {
    orders_.push_back(std::move(order));
    narrow_.push_back(false);
    wide_.push_back(false);
    return static_cast<int>(orders_.size()) - 1;
}

int Weights::add_matrix(int rows, int columns, int input, const std::vector<int>& block_rows,
                        const float* row_scale, const float* group_scale,
                        const uint32_t* row_order) {
    const int index = static_cast<int>(matrices_.size());
    CodedMatrix& matrix = matrices_.emplace_back();
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.input = input;
    matrix.groups = (columns + kGroup - 1) / kGroup;
    const size_t groups = static_cast<size_t>(matrix.groups);
    matrix.group_scale.assign(group_scale, group_scale + block_rows.size() * groups);
    int row = 0;
    for (size_t b = 0; b < block_rows.size(); ++b) {
        const int block_size = block_rows[b];
        if (block_size < 1 || block_size > rows - row ||
            (b + 1 < block_rows.size() && block_size % kSupertile != 0))
            throw FormatError("a row block has " + std::to_string(block_size) + " rows");
        CodedBlock& block = matrix.blocks.emplace_back();
        block.rows = block_size;
        block.first = row;
        block.padded = (block.rows + kSupertile - 1) / kSupertile * kSupertile;
        block.groups = matrix.groups;
        block.codes.assign(groups, nullptr);
        block.planes.assign(groups * kMaxDepth, nullptr);
        block.depth.assign(groups, 0);
        for (int g = 0; g < matrix.groups; ++g) units_.push_back({index, static_cast<int>(b), g});
        row += block.rows;
    }
    if (row != rows) throw FormatError("the row blocks of a matrix do not add up to its rows");
    matrix.row_scale.assign(row_scale, row_scale + rows);
    matrix.row_scale.resize(static_cast<size_t>((rows + kSupertile - 1) / kSupertile * kSupertile));
    for (size_t b = 0; b < matrix.blocks.size(); ++b) {
        matrix.blocks[b].row_scale = matrix.row_scale.data() + matrix.blocks[b].first;
        matrix.blocks[b].group_scale = matrix.group_scale.data() + b * groups;
    }
    if (row_order != nullptr) {
        matrix.position.assign(static_cast<size_t>(rows), UINT32_MAX);
        for (uint32_t stored = 0; stored < static_cast<uint32_t>(rows); ++stored) {
            const uint32_t source = row_order[stored];
            if (source >= static_cast<uint32_t>(rows) || matrix.position[source] != UINT32_MAX)
                throw FormatError("a row order is no permutation");
            matrix.position[source] = stored;
        }
    }
    return index;
}

void Weights::set_ladder(std::vector<uint32_t> units, const std::vector<uint32_t>& rung_plies,
                         const std::vector<uint64_t>& rung_bytes) {
    if (rung_plies.size() != rung_bytes.size())
        throw FormatError("rungs: two lists of different length");
    ladder_ = std::move(units);
    uint64_t total = 0;
    rung_begin_.assign(1, 0);
    for (uint64_t bytes : rung_bytes) {
        if (bytes % kPage != 0 || bytes > (uint64_t{1} << 40) || total > (uint64_t{1} << 46))
            throw FormatError("a rung has an impossible size: " + std::to_string(bytes));
        rung_begin_.push_back(total += bytes);
    }
    arena_ = Arena(total);

    std::vector<uint8_t> bits(units_.size(), 0);
    size_t ply = 0;
    for (size_t rung = 0; rung < rung_plies.size(); ++rung) {
        uint64_t at = rung_begin_[rung];
        for (uint32_t i = 0; i < rung_plies[rung]; ++i, ++ply) {
            if (ply >= ladder_.size())
                throw FormatError("the rungs have more plies than the ladder");
            const uint32_t id = ladder_[ply];
            if (id >= units_.size() || bits[id] >= kMaxDepth)
                throw FormatError("the ladder names unit " + std::to_string(id) + " of " +
                                  std::to_string(units_.size()) +
                                  " too often, or it does not exist");
            const Unit& unit = units_[id];
            CodedBlock& block =
                matrices_[static_cast<size_t>(unit.matrix)].blocks[static_cast<size_t>(unit.block)];
            const size_t group = static_cast<size_t>(unit.group);
            if (bits[id] == 0) {
                block.codes[group] = arena_.data() + at;
                at += (static_cast<uint64_t>(block.padded) / 2 + 63) / 64 * 64;
            }
            block.planes[group * kMaxDepth + bits[id]] = arena_.data() + at;
            at += static_cast<uint64_t>(block.padded) * 8;
            ++bits[id];
        }
        if (at > rung_begin_[rung + 1])
            throw FormatError("rung " + std::to_string(rung) + " is smaller than its plies");
        rung_end_ply_.push_back(ply);
    }
    if (ply != ladder_.size()) throw FormatError("the ladder has more plies than the rungs");
}

std::vector<uint8_t> Weights::depths() const {
    std::vector<uint8_t> depths;
    depths.reserve(units_.size());
    for (const Unit& unit : units_)
        depths.push_back(matrices_[static_cast<size_t>(unit.matrix)]
                             .blocks[static_cast<size_t>(unit.block)]
                             .depth[static_cast<size_t>(unit.group)]);
    return depths;
}

uint64_t Weights::arena_bytes() const { return rung_begin_[static_cast<size_t>(read_)]; }

uint64_t Weights::table_bytes() const {
    uint64_t bytes = units_.capacity() * sizeof(Unit) + ladder_.capacity() * 4 +
                     rung_begin_.capacity() * 8 + rung_end_ply_.capacity() * 8;
    for (const auto& order : orders_) bytes += order.capacity() * 2;
    for (const CodedMatrix& m : matrices_) {
        bytes +=
            m.row_scale.capacity() * 4 + m.group_scale.capacity() * 4 + m.position.capacity() * 4;
        for (const CodedBlock& b : m.blocks)
            bytes += sizeof b + b.codes.capacity() * 8 + b.planes.capacity() * 8 +
                     b.depth.capacity() + b.runs.capacity() * sizeof(Run);
    }
    return bytes;
}

void Weights::overtake(uint64_t ticket) {
    uint64_t newest = newest_.load();
    while (newest < ticket && !newest_.compare_exchange_weak(newest, ticket)) {
    }
}

bool Weights::read(int first, const std::vector<RungSource>& sources, const Reading& how) {
    const int count = static_cast<int>(sources.size());
    if (first < 0 || first > rungs() || count > rungs() - first)
        throw UsageError("asked to read " + std::to_string(count) + " rungs after " +
                         std::to_string(first) + ", but there are " + std::to_string(rungs()));
    for (int i = 0; i < count; ++i)
        if (sources[static_cast<size_t>(i)].bytes != rung_bytes(first + i, first + i + 1))
            throw UsageError("a rung is not of the size that the ladder says");
    const size_t begin = rung_begin_[static_cast<size_t>(first)];
    const size_t end = rung_begin_[static_cast<size_t>(first + count)];
    {
        const std::lock_guard lock(moving_);
        if (first != read_ || newest_.load() > how.ticket) return false;
        const int goal = std::clamp(how.goal, first + count, rungs());
        arena_.prefer_huge(rung_begin_[static_cast<size_t>(goal)]);
        reading_ = cut_ = first + count;
    }
    std::map<int, DirectFile> second;
    if (how.direct)
        for (const RungSource& source : sources) second.try_emplace(source.fd, source.fd);

    const int threads = std::clamp(how.threads, 1, std::max(count, 1));
    std::vector<char> complete(static_cast<size_t>(count), 0);
    std::atomic<int> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    std::mutex guard;
    const std::function<bool()> ended = [&] {
        return failed.load() || newest_.load() > how.ticket;
    };
    const auto work = [&] {
        for (int i = next++; i < count && !ended(); i = next++) {
            try {
                const RungSource& source = sources[static_cast<size_t>(i)];
                uint8_t* to = arena_.data() + rung_begin_[static_cast<size_t>(first + i)];
                const int direct = how.direct ? second.at(source.fd).fd() : -1;
                complete[static_cast<size_t>(i)] =
                    read_rung(source, direct, to, first + i, how.beside, ended);
            } catch (...) {
                // Who overtakes may take the memory away under a read, before its checksum.
                if (newest_.load() > how.ticket) return;
                const std::lock_guard lock(guard);
                if (!error) error = std::current_exception();
                failed = true;
            }
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads can be had: those that there are do it
    }
    work();
    for (auto& helper : helpers) helper.join();
    const std::lock_guard lock(moving_);
    reading_ = 0;
    const int whole =
        static_cast<int>(std::find(complete.begin(), complete.end(), 0) - complete.begin());
    // A change beside us may have cut off some of ours, or rungs before them.
    if (!error && first == read_) read_ = std::max(first, std::min(first + whole, cut_));
    const int there = read_;
    if (there == first + count) return true;
    arena_.release(std::max(begin, rung_begin_[static_cast<size_t>(there)]), end);
    arena_.prefer_huge(rung_begin_[static_cast<size_t>(there)]);
    if (error) std::rethrow_exception(error);
    return false;
}

void Weights::discard(int rungs) {
    const std::lock_guard lock(moving_);
    rungs = std::max(rungs, published_);
    const int end = std::max(reading_, read_.load());
    if (rungs >= end) return;
    cut_ = std::min(cut_, rungs);
    arena_.release(rung_begin_[static_cast<size_t>(rungs)], rung_begin_[static_cast<size_t>(end)]);
    read_ = std::min(rungs, read_.load());
    arena_.prefer_huge(rung_begin_[static_cast<size_t>(read_)]);
}

void Weights::publish(int rungs) {
    const std::lock_guard lock(moving_);
    if (rungs < 0 || rungs > read_)
        throw UsageError("cannot publish " + std::to_string(rungs) +
                         " rungs: " + std::to_string(read_) + " are in memory");
    for (CodedMatrix& matrix : matrices_)
        for (CodedBlock& block : matrix.blocks)
            std::fill(block.depth.begin(), block.depth.end(), uint8_t{0});
    const size_t plies = rungs == 0 ? 0 : rung_end_ply_[static_cast<size_t>(rungs - 1)];
    for (size_t i = 0; i < plies; ++i) {
        const Unit& unit = units_[ladder_[i]];
        ++matrices_[static_cast<size_t>(unit.matrix)]
              .blocks[static_cast<size_t>(unit.block)]
              .depth[static_cast<size_t>(unit.group)];
    }
    std::fill(narrow_.begin(), narrow_.end(), false);
    std::fill(wide_.begin(), wide_.end(), false);
    for (CodedMatrix& matrix : matrices_)
        for (CodedBlock& block : matrix.blocks) {
            block.update_runs();
            for (const Run& run : block.runs)
                (run.depth < kWideDepth ? narrow_ : wide_)[static_cast<size_t>(matrix.input)] =
                    true;
        }
    // Of a read in progress too: its caller knows that it is overtaken, or will see it at the end.
    arena_.release(rung_begin_[static_cast<size_t>(rungs)],
                   rung_begin_[static_cast<size_t>(std::max(reading_, read_.load()))]);
    cut_ = std::min(cut_, rungs);
    read_ = published_ = rungs;
    arena_.prefer_huge(rung_begin_[static_cast<size_t>(rungs)]);
}

}  // namespace pliant
