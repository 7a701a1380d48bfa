#include "arena.h"

#include <sys/mman.h>

#include <cstring>
#include <string>
#include <utility>

#include "error.h"

namespace pliant {

namespace {
constexpr size_t kPage = 4096;
constexpr size_t kHuge = size_t{2} << 20;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
}  // namespace

Arena::Arena(size_t bytes) : size_(round_up(bytes, kPage)) {
    if (size_ == 0) return;
    mapped_ = size_ + kHuge;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
        mapping_ = nullptr;
        throw BudgetError("cannot reserve " + std::to_string(mapped_) +
                          " bytes of address space: " + std::strerror(errno) +
                          " (see ulimit -v and vm.overcommit_memory)");
    }
    data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(mapping_), kHuge));
}

Arena::~Arena() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

Arena::Arena(Arena&& other) noexcept { *this = std::move(other); }

Arena& Arena::operator=(Arena&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(huge_, other.huge_);
    return *this;
}

void Arena::prefer_huge(size_t end) {
    end = end / kHuge * kHuge;
    // Refusal is harmless: the memory then comes in small pages.
    if (end > huge_) (void)madvise(data_ + huge_, end - huge_, MADV_HUGEPAGE);
    if (end < huge_) (void)madvise(data_ + end, huge_ - end, MADV_NOHUGEPAGE);
    huge_ = end;
}

void Arena::release(size_t begin, size_t end) {
    begin = round_up(begin, kPage);
    end = end / kPage * kPage;
    if (begin < end) (void)madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace pliant
