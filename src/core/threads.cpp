#include "threads.h"

namespace pliant {

namespace {

constexpr uint32_t kOpen = 1u << 31;

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
    if (size_ == 1) return job(0);
    job_ = &job;
    inside_.fetch_or(kOpen, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    job(0);
    // Nobody comes in any more; nobody uses the job when the last one has left.
    uint32_t left = inside_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    while (left != 0) left = detail::wait_while(inside_, left);
}

void ThreadPool::work(int index) {
    for (uint32_t seen = 0;;) {
        seen = detail::wait_while(epoch_, seen, detail::kPause);
        if (stop_.load()) return;
        if (inside_.fetch_add(1, std::memory_order_acq_rel) & kOpen) (*job_)(index);
        if (inside_.fetch_sub(1, std::memory_order_acq_rel) == 1) inside_.notify_all();
    }
}

}  // namespace pliant
