// Address space that is reserved once and holds memory only where it was touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pliant {

// A range of anonymous memory, aligned to 2 MiB. Nothing inside is ever moved. Memory is taken from
// the kernel when it is first written and given back by `release`, so the resident bytes follow
// what is in use, not what is reserved.
class Arena {
  public:
    Arena() = default;
    explicit Arena(size_t bytes);  // throws BudgetError if the address space cannot be reserved
    ~Arena();
    Arena(Arena&& other) noexcept;
    Arena& operator=(Arena&& other) noexcept;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

    // Asks for huge pages below `end`, as far as it fills them, and for small pages above: huge
    // ones are ten times cheaper to touch and to give back, but one that reaches beyond `end` would
    // take memory that nobody planned.
    void prefer_huge(size_t end);
    // Gives the memory of [begin, end) back to the kernel at once; it reads as zeros afterwards.
    // `begin` is rounded up and `end` down to whole pages.
    void release(size_t begin, size_t end);

  private:
    void* mapping_ = nullptr;
    size_t mapped_ = 0;
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
    size_t huge_ = 0;  // where the huge pages end
};

}  // namespace pliant
