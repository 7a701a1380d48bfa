// A small pool: the calling thread and n - 1 workers run the same function and meet at barriers.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace pliant {

class ThreadPool {
  public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // Runs job(0) here and job(1) … job(size - 1) on the workers; returns when all have returned.
    // The job must not throw. Only one thread may call this at a time.
    void run(const std::function<void(int)>& job);

    // Inside a job: waits until all threads have come here.
    void barrier();

  private:
    void work(int index);

    int size_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* job_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};    // counts jobs; workers wait for it to change
    alignas(64) std::atomic<uint32_t> arrived_{0};  // threads that wait at the barrier
    alignas(64) std::atomic<uint32_t> phase_{0};    // counts barriers
    std::atomic<bool> stop_{false};
};

}  // namespace pliant
