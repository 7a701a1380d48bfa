// A small pool of threads, and the phases of the work that they do together.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace pliant {

namespace detail {

// Longer than a task usually takes. A thread that sleeps is back some 50 microseconds after it was
// woken, and to wake it takes nearly as long.
constexpr auto kSpin = std::chrono::microseconds(100);
// Longer than the pause between two steps: all that Python does there has to come from memory.
constexpr auto kPause = std::chrono::microseconds(1000);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Waits until `value` is no longer `old`: spins for a while, then sleeps in the kernel.
template <typename T>
T wait_while(std::atomic<T>& value, T old, std::chrono::microseconds spin = kSpin) {
    using Clock = std::chrono::steady_clock;
    for (const auto end = Clock::now() + spin; Clock::now() < end;)
        for (int i = 0; i < 64; ++i) {
            const T now = value.load(std::memory_order_acquire);
            if (now != old) return now;
            relax();
        }
    for (;;) {
        const T now = value.load(std::memory_order_acquire);
        if (now != old) return now;
        value.wait(old, std::memory_order_acquire);
    }
}

}  // namespace detail

constexpr int kMostShares = 8;

// A phase is a number of tasks that threads take one by one. It is over when all tasks are done,
// and not when all threads have come: a thread whose core is busy with another program holds nobody
// up unless it holds a task, and finds the phases over when it comes back.
//
// Tasks lie in shares of nearly one size. A thread begins with the one that it had in the phases
// before, since the caches of its core still have what belongs to it, and then helps with the
// others.
class Phase {
  public:
    // Before the threads that work on it are told of it.
    void reset() {
        for (auto& next : next_) next.store(0, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
    }

    // Takes tasks, work(0) … work(tasks - 1), as long as there are any, and returns when all are
    // done, whoever did them. What they wrote is visible then. All threads give the same numbers,
    // but for `own`, the share to begin with.
    template <typename F>
    void run(int tasks, int shares, int own, F&& work) {
        for (int i = 0; i < shares; ++i) {
            const int share = (own + i) % shares, end = tasks * (share + 1) / shares;
            auto& next = next_[share];
            for (int task; (task = tasks * share / shares +
                                   next.fetch_add(1, std::memory_order_relaxed)) < end;) {
                work(task);
                if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) done_.notify_all();
            }
        }
        wait(tasks);
    }

    // The first task of a share that nobody has taken yet, now; it may be one of the next share.
    int next(int tasks, int shares, int share) const {
        return tasks * share / shares + next_[share].load(std::memory_order_relaxed);
    }

  private:
    void wait(int tasks) {
        for (int done; (done = done_.load(std::memory_order_acquire)) != tasks;)
            detail::wait_while(done_, done);
    }

    alignas(64) std::atomic<int> next_[kMostShares] = {};
    std::atomic<int> done_{0};
};

// The calling thread and n - 1 workers.
class ThreadPool {
  public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Runs job(0) here and job(1) … job(size - 1) on the workers; returns when all that have begun
    // have returned. A worker that is late may miss a job, so a job is complete when job(0) alone
    // makes it so: it goes through phases. The job must not throw. Only one thread may call this at
    // a time.
    void run(const std::function<void(int)>& job);

  private:
    void work(int index);

    int size_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* job_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs; idle workers wait for it to change
    // Workers inside the job, and whether more may come in.
    alignas(64) std::atomic<uint32_t> inside_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace pliant
