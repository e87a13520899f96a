// Runs kernel launches read from standard input on the SIMT machine of simt.h and writes the buffers back. Built once a
// kernel file: ARETE_FILE names it, ARETE_KERNELS lists its kernels as KERNEL(name), KERNEL(name), …
//
// Input: launches, one after another, until the end; integers are little-endian.
//   u32 length, name | u32 grid x, y | u32 threads | u32 shared bytes | u64 order | u32 arguments, each:
//     u8 0, u32 value | u8 1, u64 value | u8 2, u64 length, bytes (a buffer of exactly that length) | u8 3 (null pointer)
// Output: for every launch the bytes of its buffers, in order.
#include "simt.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common.cuh"
#include ARETE_FILE

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

uint8_t* shared_memory = nullptr;

namespace {

enum State { kReady, kAtBarrier, kInWarp, kDone };

constexpr size_t kStackBytes = 1 << 17;

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, group;
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  State state = kReady;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  // Two slots in turn: a lane may post its next words before a neighbour has read these.
  uint32_t posted[2][kWords];
  int turn = 0;
  Together what = Together::kSync;
  uint32_t detail = 0;
  std::vector<Copy> copies;
  uint32_t copy_group = 0;
  void* fake_stack = nullptr;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
jmp_buf scheduler_place;
uint32_t running = 0;
void (*body)(const void*) = nullptr;
const void* body_arguments = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "simt: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  exit(3);
}

// Between fibers that have started, jumps: swapcontext asks the kernel for the signal mask each time. The address sanitizer
// follows swapcontext only.
#ifdef __SANITIZE_ADDRESS__
void leave(Fiber& fiber, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber.context, &scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}
void enter(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
void leave(Fiber& fiber, bool) {
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler_place, 1);
}
void enter(Fiber& fiber) {
  if (_setjmp(scheduler_place) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
#endif

void start() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  body(body_arguments);
  if (!fibers[running].copies.empty()) fail("a thread ends without waiting for its copies");
  fibers[running].state = kDone;
  leave(fibers[running], true);
}

void wait(State state) {
  Fiber& fiber = fibers[running];
  fiber.state = state;
  leave(fiber, false);
}

// Lets waiting threads go on; false if nothing can.
bool release() {
  bool any = false;
  size_t at_barrier = 0;
  for (size_t warp = 0; warp < fibers.size(); warp += 32) {
    int together = 0;
    for (size_t i = warp; i < warp + 32; i++) {
      together += fibers[i].state == kInWarp;
      at_barrier += fibers[i].state == kAtBarrier;
    }
    if (together != 32) continue;  // the others may still be on their way
    for (size_t i = warp; i < warp + 32; i++) {
      if (fibers[i].what != fibers[warp].what || fibers[i].detail != fibers[warp].detail)
        fail("the lanes of a warp do different things together");
      fibers[i].state = kReady;
    }
    any = true;
  }
  if (at_barrier == fibers.size()) {
    for (Fiber& fiber : fibers) fiber.state = kReady;
    any = true;
  }
  return any;
}

// One permutation per order: 0 ascending, 1 descending, else shuffled.
std::vector<uint32_t> permutation(uint32_t n, uint64_t order) {
  std::vector<uint32_t> out(n);
  for (uint32_t i = 0; i < n; i++) out[i] = order == 1 ? n - 1 - i : i;
  if (order > 1)
    for (uint32_t i = n; i > 1; i--) {
      order = order * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(out[i - 1], out[(order >> 33) % i]);
    }
  return out;
}

void run_block(uint64_t order) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    fiber.started = false;
    fiber.state = kReady;
    fiber.turn = 0;
    fiber.copy_group = 0;
  }
  std::vector<uint32_t> threads = permutation(uint32_t(fibers.size()), order);
  for (;;) {
    bool done = true;
    for (uint32_t thread : threads) {
      if (fibers[thread].state == kReady) {
        running = thread;
        threadIdx = dim3{thread, 0, 0};
        enter(fibers[thread]);
      }
      done &= fibers[thread].state == kDone;
    }
    if (done) return;
    if (!release()) fail("deadlock: the threads of a block, or the lanes of a warp, wait at different places");
  }
}

}  // namespace

void barrier() { wait(kAtBarrier); }

Meeting::Meeting(uint32_t mask, Together what, uint32_t detail, const uint32_t* words, int n) : me_(running) {
  if (mask != 0xffffffffu) fail("only some lanes of a warp are named");
  Fiber& fiber = fibers[me_];
  turn_ = fiber.turn;
  for (int i = 0; i < n; i++) fiber.posted[turn_][i] = words[i];
  fiber.what = what;
  fiber.detail = detail;
  fiber.turn = 1 - turn_;
  wait(kInWarp);
}
const uint32_t* Meeting::of(uint32_t lane) const { return fibers[me_ / 32 * 32 + lane].posted[turn_]; }

void copy_async(void* to, const void* from, uint32_t bytes) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes > 16) fail("an asynchronous copy is not one of 16 aligned bytes");
  memset(to, 0xff, 16);
  fibers[running].copies.push_back({to, from, bytes, fibers[running].copy_group});
}
void close_copies() { fibers[running].copy_group++; }
void wait_copies(uint32_t n) {
  Fiber& fiber = fibers[running];
  size_t kept = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group + n >= fiber.copy_group) {
      fiber.copies[kept++] = copy;
      continue;
    }
    memset(copy.to, 0, 16);
    memcpy(copy.to, copy.from, copy.bytes);
  }
  fiber.copies.resize(kept);
}

void launch(dim3 grid, uint32_t n_threads, uint32_t shared_bytes, uint64_t order, void (*kernel)(const void*),
            const void* arguments) {
  if (n_threads == 0 || n_threads % 32) fail("the number of threads is no multiple of a warp");
  if (fibers.size() != n_threads) fibers = std::vector<Fiber>(n_threads);
  body = kernel;
  body_arguments = arguments;
  gridDim = grid;
  blockDim = dim3{n_threads, 1, 1};
  for (uint32_t block : permutation(grid.x * grid.y, order)) {
    blockIdx = dim3{block % grid.x, block / grid.x, 0};
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes)) fail("out of memory");
    memset(memory, 0xff, shared_bytes);  // NaN in every format
    shared_memory = static_cast<uint8_t*>(memory);
    run_block(order + block * (order > 1));
    free(memory);
  }
}

}  // namespace simt

// ---- launches by name ----

namespace {

// As cuLaunchKernel wants them: 8 bytes hold one argument, whatever its type.
using Arguments = std::vector<uint64_t>;

template <auto kernel>
struct Caller;
template <class... A, void (*kernel)(A...)>
struct Caller<kernel> {
  template <size_t... I>
  static void call(const Arguments& arguments, std::index_sequence<I...>) {
    std::tuple<A...> typed;
    (memcpy(&std::get<I>(typed), &arguments[I], sizeof(A)), ...);
    kernel(std::get<I>(typed)...);
  }
  static void run(const void* raw) { call(*static_cast<const Arguments*>(raw), std::index_sequence_for<A...>{}); }
  static constexpr size_t kCount = sizeof...(A);
};

struct Kernel {
  const char* name;
  void (*run)(const void*);
  size_t n_arguments;
};
#define KERNEL(name) Kernel{#name, Caller<name>::run, Caller<name>::kCount}
const Kernel kKernels[] = {ARETE_KERNELS};

bool take(void* out, size_t n, bool first = false) {
  size_t got = fread(out, 1, n, stdin);
  if (got == n) return true;
  if (first && got == 0) return false;
  fprintf(stderr, "simt: the input ends in the middle of a launch\n");
  exit(3);
}
template <class T>
T number() {
  T value;
  take(&value, sizeof value);
  return value;
}

}  // namespace

int main() {
  uint32_t length;
  while (take(&length, 4, true)) {
    std::string name(length, 0);
    take(name.data(), length);
    dim3 grid{number<uint32_t>(), number<uint32_t>(), 1};
    uint32_t n_threads = number<uint32_t>(), shared_bytes = number<uint32_t>();
    uint64_t order = number<uint64_t>();
    Arguments arguments(number<uint32_t>());
    std::vector<std::pair<uint8_t*, size_t>> buffers;
    for (uint64_t& argument : arguments) {
      argument = 0;
      switch (number<uint8_t>()) {
        case 0: argument = number<uint32_t>(); break;
        case 1: argument = number<uint64_t>(); break;
        case 2: {
          size_t n = number<uint64_t>();
          void* memory = nullptr;
          if (posix_memalign(&memory, 16, n)) return 3;
          take(memory, n);
          buffers.push_back({static_cast<uint8_t*>(memory), n});
          memcpy(&argument, &memory, sizeof memory);
          break;
        }
        case 3: break;
        default: fprintf(stderr, "simt: unknown kind of argument\n"); return 3;
      }
    }
    const Kernel* kernel = nullptr;
    for (const Kernel& candidate : kKernels)
      if (name == candidate.name) kernel = &candidate;
    if (kernel == nullptr || kernel->n_arguments != arguments.size()) {
      fprintf(stderr, "simt: no kernel %s with %zu arguments\n", name.c_str(), arguments.size());
      return 3;
    }
    simt::launch(grid, n_threads, shared_bytes, order, kernel->run, &arguments);
    for (auto [memory, n] : buffers) {
      fwrite(memory, 1, n, stdout);
      free(memory);
    }
  }
  return fflush(stdout) ? 3 : 0;
}
