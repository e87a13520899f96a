// How libtorch's threads wait for their next work: they give their cores up soon.
//
// libgomp's threads spin while they wait, some ten milliseconds long; beside a busy process they then take the core on which the
// thread that they wait for would run. libgomp reads its variables (OMP_WAIT_POLICY, GOMP_SPINCOUNT) before any code of this
// program runs, but it also shortens the spinning to 100 rounds, some microseconds, where "there are more OpenMP threads than
// available CPUs" (its manual, GOMP_SPINCOUNT). So a thread that sleeps for good opens a team of its own that makes up the number.
#pragma once
#include <ATen/Parallel.h>
#include <omp.h>

#include <cstdlib>
#include <future>
#include <mutex>
#include <thread>
#include <utility>

namespace arete {

enum Waiting : int32_t { kShortSpins = 0, kWaitingSetByUser = 1, kSingleThread = 2 };

// Call it after the number of threads was set; each call only adds what is missing.
inline Waiting wait_briefly() {
  static std::mutex mutex;
  static int sleeping = 0;
  auto is_set = [](const char* name) {
    const char* value = std::getenv(name);
    return value && *value;
  };
  if (is_set("OMP_WAIT_POLICY") || is_set("GOMP_SPINCOUNT")) return kWaitingSetByUser;
  int threads = at::get_num_threads();
  if (threads < 2) return kSingleThread;
  std::lock_guard<std::mutex> lock(mutex);
  int missing = omp_get_num_procs() - threads + 1 - sleeping;
  if (missing > 0) {
    std::promise<void> opened;
    std::future<void> open = opened.get_future();
    std::thread([missing, opened = std::move(opened)]() mutable {
#pragma omp parallel num_threads(missing + 1)
      { asm volatile(""); }
      opened.set_value();
      // The team is dissolved, and counts no longer, when the thread that opened it ends.
      std::promise<void>().get_future().wait();
    }).detach();
    open.wait();
    sleeping += missing;
  }
  return kShortSpins;
}

}  // namespace arete
