#include "parallel.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace flexpipe {
namespace {

// A helper looks for the next job this long before it sleeps: longer than the pauses between the jobs of a layer, and
// too short to matter to anybody else.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kSpinsBeforeYield = 2000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
   public:
    void run(Task task, void* context, int64_t num_tasks, int num_threads) {
        std::unique_lock<std::mutex> only_caller(callers_, std::try_to_lock);
        if (num_tasks == 1 || num_threads <= 1 || !only_caller.owns_lock()) {
            for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
            return;
        }
        grow(num_threads - 1);
        // Nobody can take a task now, so the job may be described piece by piece.
        task_.store(task, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        num_helpers_.store(num_threads - 1, std::memory_order_relaxed);
        num_done_.store(0, std::memory_order_relaxed);
        is_resting_.store(false, std::memory_order_relaxed);
        generation_ = (generation_ + 1) & 0xffffffffu;
        tickets_.store(generation_ << 32 | uint64_t(num_tasks), std::memory_order_seq_cst);
        if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> guard(sleep_);
            awake_.notify_all();
        }
        while (take_one()) {
        }
        for (int spins = 0; num_done_.load(std::memory_order_acquire) < num_tasks; ++spins) {
            spins < kSpinsBeforeYield ? relax() : void(sched_yield());
        }
    }

    void rest() { is_resting_.store(true, std::memory_order_relaxed); }

   private:
    void grow(int num_helpers) {
        if (pid_ != getpid()) {  // a fork has no helpers
            pid_ = getpid();
            num_threads_ = 0;
        }
        while (num_threads_ < num_helpers) {
            try {
                std::thread(&Pool::help, this, num_threads_).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: fewer do the work
            }
            ++num_threads_;
        }
    }

    // Takes and runs one task; false if none is left. A ticket is the job's generation above the number of tasks left:
    // while it is not used up the job's description stands still, and a ticket of an old job cannot be taken.
    bool take_one() {
        uint64_t ticket = tickets_.load(std::memory_order_acquire);
        for (;;) {
            if (uint32_t(ticket) == 0) return false;
            const Task task = task_.load(std::memory_order_relaxed);
            void* const context = context_.load(std::memory_order_relaxed);
            if (tickets_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire)) {
                task(context, int64_t(uint32_t(ticket)) - 1);
                num_done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
    }

    bool wanted(int helper) const {
        return uint32_t(tickets_.load(std::memory_order_seq_cst)) != 0 &&
               helper < num_helpers_.load(std::memory_order_relaxed);
    }

    void help(int helper) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + kSpin;
            do {
                for (int spins = 0; spins < 100; ++spins) {
                    if (wanted(helper) || is_resting_.load(std::memory_order_relaxed)) break;
                    relax();
                }
            } while (!wanted(helper) && !is_resting_.load(std::memory_order_relaxed) &&
                     std::chrono::steady_clock::now() < until);
            if (!wanted(helper)) {
                std::unique_lock<std::mutex> lock(sleep_);
                num_asleep_.fetch_add(1, std::memory_order_seq_cst);
                awake_.wait(lock, [&] { return wanted(helper); });
                num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
            }
            while (wanted(helper) && take_one()) {
            }
        }
    }

    std::mutex callers_;
    pid_t pid_ = getpid();
    int num_threads_ = 0;
    uint64_t generation_ = 0;
    alignas(64) std::atomic<uint64_t> tickets_{0};
    std::atomic<Task> task_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> num_helpers_{0};
    std::atomic<bool> is_resting_{false};
    alignas(64) std::atomic<int64_t> num_done_{0};
    alignas(64) std::atomic<int> num_asleep_{0};
    std::mutex sleep_;
    std::condition_variable awake_;
};

Pool& pool() {
    static Pool* only = new Pool;  // never destroyed: helpers may outlive static objects
    return *only;
}

}  // namespace

void run_tasks(Task task, void* context, int64_t num_tasks, int num_threads) {
    if (num_tasks == 0) return;
    pool().run(task, context, num_tasks, num_threads);
}

void rest_helpers() { pool().rest(); }

}  // namespace flexpipe
