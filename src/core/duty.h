// Work beside the steps of a model, such as reading rungs, with a share of the processors.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace pliant {

// Whoever takes a processor from a step stops one of its threads in the middle of a task, and the
// others wait for that one: what is lost is more than what is taken. So threads that work beside
// steps take turns, few at a time, in spans of some milliseconds, between which the steps are
// alone. The more of a span was work, the longer is the time after it.
class DutyCycle {
  public:
    explicit DutyCycle(int processors) : processors_(processors) {}

    // The share of the processors, above 0, for all turns together.
    void allow(double share);

    // A thread computes beside the steps only while it has one of these. It waits for one, but not
    // with a null pointer: then there are no steps.
    class Turn {
      public:
        explicit Turn(DutyCycle* cycle) : cycle_(cycle) {
            if (cycle_ != nullptr) cycle_->enter();
        }
        ~Turn() { end(); }
        void end() {
            if (cycle_ != nullptr) cycle_->leave();
            cycle_ = nullptr;
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

      private:
        DutyCycle* cycle_;
    };

  private:
    using Clock = std::chrono::steady_clock;

    void enter();
    void leave();
    bool over(Clock::time_point now) const;
    void close(Clock::time_point now);

    const int processors_;
    std::mutex guard_;
    std::condition_variable changed_;
    int most_ = 1, inside_ = 0;             // threads at once
    bool open_ = false;                     // a span
    double part_ = 1.0;                     // of the time in which there is work
    Clock::duration busy_{};                // work in this span
    Clock::time_point entered_{};           // when there was somebody inside again
    Clock::time_point opened_{}, opens_{};  // the span, and the next one
};

}  // namespace pliant
