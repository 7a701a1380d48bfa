#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pliant {

namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Waits until `value` is no longer `old`: spins for some tens of microseconds, the usual distance
// of two barriers, then sleeps in the kernel.
void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < 2000; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) : size_(threads < 1 ? 1 : threads) {
    for (int i = 1; i < size_; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& job) {
    if (size_ > 1) {
        job_ = &job;
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }
    job(0);
    barrier();  // nobody returns while a worker still uses the job
}

void ThreadPool::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while(phase_, phase);
    }
}

void ThreadPool::work(int index) {
    uint32_t seen = 0;
    for (;;) {
        wait_while(epoch_, seen);
        ++seen;  // jobs come one at a time: run() does not return before all have done the last one
        if (stop_.load()) return;
        (*job_)(index);
        barrier();
    }
}

}  // namespace pliant
