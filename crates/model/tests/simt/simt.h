// A small SIMT machine on the CPU: enough of CUDA C++ to build the .cu files of src/cuda/kernels with a C++ compiler and
// run them, so that their results can be checked, and their memory accesses watched by sanitizers, without a GPU.
//
// Every CUDA thread of a block is a fiber with its own stack; blocks run one after another. Fibers run in a chosen order
// until they wait at a barrier or a warp shuffle, or return. A launch is repeated under several orders by the tests: a
// missing barrier shows as a result that depends on the order, or as NaN, with which shared memory is filled before every
// block. Shared memory is one heap allocation of exactly the requested size, so the address sanitizer knows its end.
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
// Waits until the 32 lanes of the warp are here with the same offset; returns what lane ^ offset brought.
uint32_t shuffle_xor(uint32_t mask, uint32_t value, int offset);
}  // namespace simt

inline void __syncthreads() { simt::barrier(); }
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
inline float __shfl_xor_sync(uint32_t mask, float value, int offset) {
  return __uint_as_float(simt::shuffle_xor(mask, __float_as_uint(value), offset));
}
// Built with -ffp-contract=off, so plain operators round once each.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int min(int a, int b) { return a < b ? a : b; }
