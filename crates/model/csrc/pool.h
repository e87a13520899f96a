// The kernels' own threads: between two kernels they wait awhile, then they sleep.
//
// From one kernel to the next pass some microseconds. libgomp's threads either spin for milliseconds, and take the core of a busy
// neighbour, or, as waiting.h has them, sleep after one: then every kernel begins with waking them, which cost the sampling of a
// single sequence most of its time. These spin for kSpinNs at most, and ever more seldom where that is in vain: where others run, or
// where kernels are far apart.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <strings.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <utility>

namespace arete {

class Pool {
 public:
  // Never destroyed: its threads may outlive everything else of a process.
  static Pool& own() {
    static Pool& pool = *new Pool;
    return pool;
  }

  // Whether this thread is doing a part of some work.
  static bool is_inside() { return inside(); }

  // Calls work(part) for each part in [0, parts), part 0 on this thread, and throws what one of them threw. Returns false, and does
  // nothing, while another thread has the pool, or where the system has no more threads.
  template <class Work>
  bool run(int parts, const Work& work) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock || !grow(parts - 1)) return false;
    call_ = [](const void* work, int part) { (*(const Work*)work)(part); };
    work_ = &work;
    spin_ns_.store(spin_ns(parts), std::memory_order_relaxed);
    left_.store(uint32_t(parts - 1));
    for (int i = 0; i < parts - 1; i++) {
      workers_[i].turn.fetch_add(1);
      workers_[i].turn.notify_one();
    }
    do_part(0);
    while (uint32_t left = left_.load(std::memory_order_acquire)) wait_while(left_, left, patience_);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    return true;
  }

 private:
  static constexpr int64_t kSpinNs = 50'000;
  static constexpr size_t kStackBytes = 1 << 20;

  // How often a thread spins: after one time in vain not for the next eight, after two sixteen, and so on.
  class Patience {
   public:
    bool spins() {
      if (left_ == 0) return true;
      left_--;
      return false;
    }
    void won() { next_ = kFewest; }
    void lost() {
      left_ = next_;
      next_ = std::min(2 * next_, kMost);
    }

   private:
    static constexpr int kFewest = 8, kMost = 512;
    int left_ = 0, next_ = kFewest;
  };

  struct alignas(64) Worker {
    std::atomic<uint32_t> turn{0};
    Patience patience;
    Pool* pool;
    int part;
  };

  static bool& inside() {
    static thread_local bool inside = false;
    return inside;
  }

  // How long threads spin, where so many work at a time: not at all if some of them wait for the cores of the others.
  static int64_t spin_ns(int threads) {
    static const bool is_passive = [] {
      const char* policy = std::getenv("OMP_WAIT_POLICY");
      return policy && strcasecmp(policy, "passive") == 0;
    }();
    static const int n_cores = [] {
      cpu_set_t cores;
      return sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    }();
    return is_passive || threads > n_cores ? 0 : kSpinNs;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void wait_while(const std::atomic<uint32_t>& value, uint32_t old, Patience& patience) const {
    using Clock = std::chrono::steady_clock;
    int64_t spin_ns = spin_ns_.load(std::memory_order_relaxed);
    if (spin_ns > 0 && patience.spins()) {
      auto until = Clock::now() + std::chrono::nanoseconds(spin_ns);
      do {
        for (int i = 0; i < 32; i++) {
          if (value.load(std::memory_order_acquire) != old) return patience.won();
          pause();
        }
      } while (Clock::now() < until);
      patience.lost();
    }
    value.wait(old, std::memory_order_acquire);
  }

  bool grow(int n) {
    while (int(workers_.size()) < n) {
      Worker& worker = workers_.emplace_back();
      worker.pool = this;
      worker.part = int(workers_.size());
      pthread_attr_t attributes;
      pthread_t thread;
      pthread_attr_init(&attributes);
      pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
      pthread_attr_setstacksize(&attributes, kStackBytes);
      int error = pthread_create(&thread, &attributes, serve, &worker);
      pthread_attr_destroy(&attributes);
      if (error != 0) {
        workers_.pop_back();
        return false;
      }
    }
    return true;
  }

  static void* serve(void* worker_) {
    Worker& worker = *(Worker*)worker_;
    for (uint32_t seen = 0;; seen++) {
      worker.pool->wait_while(worker.turn, seen, worker.patience);
      worker.pool->do_part(worker.part);
      auto& left = worker.pool->left_;
      if (left.fetch_sub(1) == 1) left.notify_one();
    }
    return nullptr;
  }

  void do_part(int part) {
    inside() = true;
    try {
      call_(work_, part);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failing_);
      failure_ = std::current_exception();
    }
    inside() = false;
  }

  std::mutex busy_, failing_;
  std::deque<Worker> workers_;  // whose places do not change as it grows
  void (*call_)(const void* work, int part) = nullptr;
  const void* work_ = nullptr;
  std::atomic<int64_t> spin_ns_{0};
  Patience patience_;  // of whoever has the pool
  std::exception_ptr failure_;
  alignas(64) std::atomic<uint32_t> left_{0};
};

}  // namespace arete
