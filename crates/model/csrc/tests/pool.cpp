// The kernels' threads by themselves: `make torture` runs this under the thread sanitizer, and on aarch64 under qemu.
#include "../pool.h"

#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

using arete::Pool;

#define CHECK(condition)                                          \
  if (!(condition)) {                                             \
    std::fprintf(stderr, "line %d: " #condition "\n", __LINE__); \
    return 1;                                                     \
  }

int main(int argc, char** argv) {
  int rounds = argc > 1 ? std::atoi(argv[1]) : 20000;
  // Every part once, whatever their number was before.
  std::vector<long> sums(8);
  long wanted[8] = {};
  for (int round = 0; round < rounds; round++) {
    int parts = 1 + round % 8;
    bool ran = Pool::own().run(parts, [&](int part) { sums[part] += round; });
    CHECK(ran);
    for (int part = 0; part < parts; part++) wanted[part] += round;
    if (round % 997 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // they sleep, and are woken
  }
  for (int part = 0; part < 8; part++) CHECK(sums[part] == wanted[part]);

  // What a part throws comes out, and the next work is done as ever.
  for (int thrower = 0; thrower < 4; thrower++) {
    bool caught = false;
    try {
      Pool::own().run(4, [&](int part) {
        if (part == thrower) throw std::runtime_error("part");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught);
    int count = 0;
    CHECK(Pool::own().run(1, [&](int) { count++; }) && count == 1);
  }

  // Several threads at once: one has the pool, the others are told so.
  std::atomic<long> done{0}, refused{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; caller++)
    callers.emplace_back([&] {
      for (int round = 0; round < rounds / 4; round++) {
        long own[3] = {};
        bool ran = Pool::own().run(3, [&](int part) { own[part] = part + 1; });
        (ran ? done : refused)++;
        if (ran && own[0] + own[1] + own[2] != 6) std::abort();
      }
    });
  for (auto& caller : callers) caller.join();
  CHECK(done > 0 && done + refused == 3L * (rounds / 4));
  CHECK(!Pool::is_inside());
  std::puts("ok");
  return 0;
}
