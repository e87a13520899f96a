// What the NF4 kernels share: number formats, the codebook, the scale of a block.
//
// Prepended to every .cu file here. Plain CUDA C++ without headers, because NVRTC brings none that are certain to be found;
// tests/simt/simt.h lets a C++ compiler build the same files for the CPU.
//
// The format is bitsandbytes': two 4-bit codes a byte, the first element in the high nibble; one f32 absmax per block of
// 2^block_log2 consecutive elements of the flattened matrix; weight = codebook[code] * absmax, in f32.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef ARETE_SIMT
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // threads per block of every kernel
constexpr int kWarps = kThreads / kWarp;
constexpr u32 kAllLanes = 0xffffffffu;

// ---- number formats; arithmetic happens in f32 ----

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ inline float to_float(f16 x) {
#ifdef ARETE_SIMT
  u32 sign = u32(x.bits & 0x8000) << 16, magnitude = u32(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return __uint_as_float(sign | 0x7f800000 | magnitude);         // infinity, NaN
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));  // subnormals included
#else
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#endif
}

// Rounding is to nearest, ties to even; NaN stays NaN.
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, bf16* out) {
  u32 bits = __float_as_uint(x);
  out->bits = x != x ? u16(0x7fc0) : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ inline void from_float(float x, f16* out) {
#ifdef ARETE_SIMT
  u32 bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  u32 half;
  if (magnitude > 0x7f800000) half = 0x7fff;        // NaN, as the hardware writes it
  else if (magnitude >= 0x477ff000) half = 0x7c00;  // rounds to 65536 or more: infinity
  else if (magnitude < 0x38800000)                  // subnormal: adding 2^-1 leaves the rounded value in the low bits
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  else half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  out->bits = magnitude > 0x7f800000 ? u16(0x7fff) : u16(sign | half);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#endif
}

// 16 bytes as numbers, and back.
template <class T>
struct Vector {
  static constexpr int kValues = 16 / sizeof(T);
};
__device__ inline void unpack(uint4 v, float (&out)[4], float) {
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z);
  out[3] = __uint_as_float(v.w);
}
template <class T>
__device__ inline void unpack(uint4 v, float (&out)[8], T) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[2 * i] = to_float(T{u16(words[i] & 0xffff)});
    out[2 * i + 1] = to_float(T{u16(words[i] >> 16)});
  }
}
__device__ inline u32 pair(float low, float high, bf16) {
  bf16 a, b;
  from_float(low, &a);
  from_float(high, &b);
  return u32(a.bits) | u32(b.bits) << 16;
}
__device__ inline u32 pair(float low, float high, f16) {
  f16 a, b;
  from_float(low, &a);
  from_float(high, &b);
  return u32(a.bits) | u32(b.bits) << 16;
}

// ---- NF4 ----

// The codes of bytes 0..3 of `word` in element order: the high nibble of a byte comes first.
__device__ inline u32 code_of(u32 word, int element) { return (word >> ((element >> 1) * 8 + ((element & 1) ? 0 : 4))) & 15; }

// Absmax of the blocks: f32 as it is (codes == nullptr), or double-quantised, 8-bit codes in blocks of 256 with
// absmax = map[code] * nested_absmax[block / 256] + *offset.
struct Scales {
  const float* absmax;  // per block, or per 256 blocks when double-quantised
  const u8* codes;
  const float* map;
  const float* offset;
};
// A scale split into its loads and its arithmetic, so that the loads can run ahead.
struct RawScale {
  float absmax;
  u32 code;
};
__device__ inline RawScale fetch_scale(const Scales& scales, i64 block) {
  if (scales.codes == nullptr) return RawScale{scales.absmax[block], 0};
  return RawScale{scales.absmax[block >> 8], scales.codes[block]};
}
__device__ inline float finish_scale(const Scales& scales, RawScale raw) {
  if (scales.codes == nullptr) return raw.absmax;
  // Two roundings, as in bitsandbytes: a fused multiply-add would differ in the last bit.
  return __fadd_rn(__fmul_rn(scales.map[raw.code], raw.absmax), *scales.offset);
}
