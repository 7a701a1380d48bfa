#include "duty.h"

#include <algorithm>

namespace pliant {

namespace {

// Long beside a task of a step. A disk of 0.5 GB/s has four reads of 1 MiB to do in the time
// between two of them.
constexpr auto kSpan = std::chrono::milliseconds(12);

}  // namespace

void DutyCycle::allow(double share) {
    const std::lock_guard lock(guard_);
    const double processors = share * processors_;
    most_ = std::max(static_cast<int>(processors), 1);
    part_ = std::min(processors / most_, 1.0);
}

void DutyCycle::enter() {
    std::unique_lock lock(guard_);
    for (;;) {
        const auto now = Clock::now();
        if (inside_ == 0 && over(now)) close(now);
        if (!open_ && now >= opens_) {
            open_ = true;
            opened_ = now;
            busy_ = {};
        }
        if (open_ && inside_ < most_ && !over(now)) break;
        if (open_)
            changed_.wait(lock);  // for somebody to leave
        else
            changed_.wait_until(lock, opens_);
    }
    if (inside_++ == 0) entered_ = Clock::now();
}

void DutyCycle::leave() {
    const std::lock_guard lock(guard_);
    const auto now = Clock::now();
    if (--inside_ == 0) {
        busy_ += now - entered_;
        if (over(now)) close(now);
    }
    changed_.notify_all();
}

bool DutyCycle::over(Clock::time_point now) const { return open_ && now - opened_ >= kSpan; }

void DutyCycle::close(Clock::time_point now) {
    open_ = false;
    opens_ = now + std::chrono::duration_cast<Clock::duration>(busy_ * (1.0 / part_ - 1.0));
}

}  // namespace pliant
