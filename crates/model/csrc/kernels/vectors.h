// Vectors of sixteen floats, conversions and working memory: what the kernels share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace arete {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// Not a sum with zero, which compilers keep as one.
inline f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = 0x7fc0;
    return;
  }
  out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest even, as libtorch does
}
template <class T>
inline float rounded(float x) {
  T out;
  from_float(x, &out);
  return to_float(out);
}

inline f32x16 load16(const float* p) {
  f32x16 v;
  memcpy(&v, p, 64);
  return v;
}
inline f32x16 load16(const bf16* p) {
  u16x16 v;
  memcpy(&v, p, 32);
  return (f32x16)(__builtin_convertvector(v, u32x16) << 16);
}
inline void store16(float* p, f32x16 v) { memcpy(p, &v, 64); }
inline void store16(bf16* p, f32x16 v) {
  u32x16 bits = (u32x16)v;
  u32x16 nan = (u32x16)(v != v);
  u32x16 even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u16x16 out = __builtin_convertvector((even & ~nan) | (nan & 0x7fc0), u16x16);
  memcpy(p, &out, 32);
}
template <class T>
inline f32x16 round16(f32x16 v) {
  if constexpr (sizeof(T) == 4) return v;
  T out[16];
  store16(out, v);
  return load16(out);
}

// The sum of the lanes, always in the same order.
inline float sum16(f32x16 v) {
  f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
inline f32x16 max16(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline float highest(f32x16 v) {
  float out = v[0];
  for (int i = 1; i < 16; i++) out = std::max(out, v[i]);
  return out;
}

// exp(x) to about 1 ulp for x in [-87, 88]; 0 below. Cody-Waite reduction and a degree-6 polynomial (Cephes expf).
inline f32x16 exp16(f32x16 x) {
  i32x16 tiny = x < splat(-87.0f);
  x = max16(x, splat(-87.0f));
  x = x < splat(88.0f) ? x : splat(88.0f);
  f32x16 n = x * 1.44269504088896341f + splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  i32x16 exponent = (i32x16)n - 0x4b400000;
  n = n - splat(12582912.0f);
  f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  f32x16 scale = (f32x16)((exponent + 127) << 23);
  return tiny ? splat(0.0f) : p * scale;
}

// Rows of `width` floats padded with zeros to whole vectors.
template <class T>
inline void widen(const T* in, int64_t width, float* out, int64_t padded) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) store16(out + i, load16(in + i));
  for (; i < width; i++) out[i] = to_float(in[i]);
  for (; i < padded; i++) out[i] = 0;
}
template <class T>
inline void narrow(const float* in, int64_t width, T* out) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) store16(out + i, load16(in + i));
  for (; i < width; i++) from_float(in[i], out + i);
}
// A growing array of our own: std::vector's out-of-line members would be emitted once per instruction set under one name,
// and the linker could then hand the AVX-512 version to a machine without it.
template <class T>
struct Buffer {
  T* data = nullptr;
  int64_t capacity = 0;
  T* at_least(int64_t n) {
    if (capacity < n) {
      free(data);
      capacity = n + n / 2 + 64;
      data = (T*)aligned_alloc(64, (capacity * sizeof(T) + 63) / 64 * 64);
      if (!data) abort();
    }
    return data;
  }
  ~Buffer() { free(data); }
};

// Working memory of one thread, kept between calls.
struct Scratch {
  Buffer<float> keys, keys_across, values, values_across, query, scores, grads, grad_output, output;
  Buffer<int64_t> slots;
};
inline Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

}  // namespace
}  // namespace arete
