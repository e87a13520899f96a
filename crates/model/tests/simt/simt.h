// A small SIMT machine on the CPU: enough of CUDA C++ to build the .cu files of src/cuda/kernels with a C++ compiler and
// run them, so that their results can be checked, and their memory accesses watched by sanitizers, without a GPU.
//
// Every CUDA thread of a block is a fiber with its own stack; blocks run one after another. Fibers run in a chosen order
// until they wait at a barrier or for their warp (shuffles, tensor cores), or return. A launch is repeated under several
// orders by the tests, which permute the blocks too: a missing barrier shows as a result that depends on the order, or as
// NaN, with which shared memory is filled before every block. Shared memory is one heap allocation of exactly the requested
// size, so the address sanitizer knows its end. What is copied asynchronously arrives when it is waited for, and not before.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ARETE_SIMT
#define __global__
#define __device__
#define __constant__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint4* name = reinterpret_cast<uint4*>(simt::shared_memory)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
extern uint8_t* shared_memory;
// Waits until every thread of the block is here.
void barrier();

// What the lanes of a warp do together. Lanes that meet must do the same, with the same `detail`.
enum class Together : uint32_t { kSync, kShuffle, kMatrix };
constexpr int kWords = 6;
// Waits until the 32 lanes of the warp are here, each with kWords words or fewer.
class Meeting {
 public:
  Meeting(uint32_t mask, Together what, uint32_t detail, const uint32_t* words, int n);
  // What a lane brought.
  const uint32_t* of(uint32_t lane) const;
  uint32_t lane() const { return me_ % 32; }

 private:
  uint32_t me_;
  int turn_;
};

// 16 bytes of which `bytes` are copied and the rest becomes zero, once they are waited for; until then the target holds NaN.
void copy_async(void* to, const void* from, uint32_t bytes);
void close_copies();
// Waits for all closed groups of copies of this thread but the newest n.
void wait_copies(uint32_t n);

// D = A B + C for one warp: A 16x16 by rows, B 16x8 by columns, C 16x8, spread over the lanes as PTX defines for
// mma.m16n8k16. Products are exact, and their sum is rounded once, where a GPU's tensor core rounds in its own way.
template <class Decode>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  const uint32_t words[kWords] = {a[0], a[1], a[2], a[3], b0, b1};
  Meeting meeting(0xffffffffu, Together::kMatrix, 0, words, kWords);
  uint32_t group = meeting.lane() / 4, t = meeting.lane() % 4;
  for (uint32_t i = 0; i < 4; i++) {
    uint32_t half = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (uint32_t k = 0; k < 16; k++) {
      uint32_t quarter = k % 8 / 2, shift = k % 2 * 16;
      uint32_t left = meeting.of(group * 4 + quarter)[half + k / 8 * 2], right = meeting.of(column * 4 + quarter)[4 + k / 8];
      sum += double(decode(uint16_t(left >> shift))) * double(decode(uint16_t(right >> shift)));
    }
    c[i] = float(sum);
  }
}
}  // namespace simt

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { simt::Meeting(mask, simt::Together::kSync, 0, nullptr, 0); }
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  uint32_t before = *at;
  *at += value;
  return before;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// Byte i of the result is the one of the eight bytes (a's, then b's) that nibble i of the selector names.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= uint32_t(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return out;
}
inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, int offset) {
  simt::Meeting meeting(mask, simt::Together::kShuffle, uint32_t(offset), &value, 1);
  return *meeting.of(meeting.lane() ^ uint32_t(offset));
}
inline float __shfl_xor_sync(uint32_t mask, float value, int offset) {
  return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(value), offset));
}
// Built with -ffp-contract=off, so plain operators round once each.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
