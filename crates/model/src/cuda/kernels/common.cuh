// What the kernels share: number formats, 16-byte moves, tensor cores, NF4's codebook and the scale of a block.
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
typedef float f32;

#ifndef ARETE_SIMT
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // threads per block of every kernel
constexpr int kWarps = kThreads / kWarp;
constexpr u32 kAllLanes = 0xffffffffu;

// ---- number formats; arithmetic happens in f32 ----

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

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
// Two numbers rounded as from_float does (a NaN may have other bits), the first in the low half.
__device__ inline u32 pair(float low, float high, bf16) {
#if !defined(ARETE_SIMT) && __CUDA_ARCH__ >= 800
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  bf16 a, b;
  from_float(low, &a);
  from_float(high, &b);
  return u32(a.bits) | u32(b.bits) << 16;
#endif
}
__device__ inline u32 pair(float low, float high, f16) {
#if !defined(ARETE_SIMT) && __CUDA_ARCH__ >= 800
  u32 out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  f16 a, b;
  from_float(low, &a);
  from_float(high, &b);
  return u32(a.bits) | u32(b.bits) << 16;
#endif
}

// ---- copies to shared memory that run beside the arithmetic (from sm_80 on), and what blocks tell each other ----

// Copies the first `bytes` (0 or 16) of 16 and zeroes the rest. Seen by this thread after wait_copies, by others after a barrier.
__device__ inline void copy_async(uint4* to, const void* from, u32 bytes) {
#if defined(ARETE_SIMT)
  simt::copy_async(to, from, bytes);
#elif __CUDA_ARCH__ >= 800
  u32 address = u32(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  *to = bytes ? *static_cast<const uint4*>(from) : uint4{};
#endif
}
// Ends a group of copies.
__device__ inline void close_copies() {
#if defined(ARETE_SIMT)
  simt::close_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups of this thread but the newest N.
template <int N>
__device__ inline void wait_copies() {
#if defined(ARETE_SIMT)
  simt::wait_copies(N);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Reads what another block wrote in this launch: past the L1 cache, which other multiprocessors' writes do not reach.
__device__ inline float4 load_written(const float4* from) {
#ifdef ARETE_SIMT
  return *from;
#else
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
#endif
}
__device__ inline float load_written(const float* from) {
#ifdef ARETE_SIMT
  return *from;
#else
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
#endif
}

// Whether this block is the last of `n` to come here; what the others wrote before is then to be seen. The counter starts at 0
// and is left at 0. All threads call it; `flag` is a word of shared memory.
__device__ inline bool last_to_arrive(u32* counter, u32 n, u32* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 before = atomicAdd(counter, 1u);
    if (before == n - 1) *counter = 0;
    *flag = before == n - 1;
  }
  __syncthreads();
  bool last = *flag != 0;
  if (last) __threadfence();
  return last;
}

// ---- tensor cores: D = A B + C of one warp, 16x16 by 16x8, in f32 ----

// Register i of A holds row lane / 4 + i % 2 * 8, columns lane % 4 * 2 + i / 2 * 8 and the next; b0 and b1 hold column lane / 4, the
// rows of those; C holds row lane / 4 + i / 2 * 8, column lane % 4 * 2 + i % 2.
__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
#if defined(ARETE_SIMT)
  simt::mma(c, a, b0, b1, [](u16 bits) { return to_float(f16{bits}); });
#elif __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing multiplies eight columns at a time
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
#if defined(ARETE_SIMT)
  simt::mma(c, a, b0, b1, [](u16 bits) { return to_float(bf16{bits}); });
#elif __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- NF4 ----

// The codes of bytes 0..3 of `word` in element order: the high nibble of a byte comes first.
__device__ inline u32 code_of(u32 word, int element) { return (word >> ((element >> 1) * 8 + ((element & 1) ? 0 : 4))) & 15; }

// The codes of a word as byte offsets into a table of floats, four at a time: two operations for four codes and one to
// take a byte out, where shifting and masking code by code takes two for each.
struct Offsets {
  u32 high, low;  // of the first and the second element of each byte
};
__device__ inline Offsets offsets_of(u32 word) { return Offsets{(word >> 2) & 0x3c3c3c3cu, (word << 2) & 0x3c3c3c3cu}; }
__device__ inline float entry(const float* table, const Offsets& offsets, int element) {
  u32 offset = __byte_perm(element % 2 ? offsets.low : offsets.high, 0, 0x4440 + element / 2);  // byte element / 2
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset);
}
__device__ inline u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Absmax of the blocks: f32 as it is (codes == nullptr), or double-quantised, 8-bit codes in groups of 256 blocks with
// absmax = map[code] * nested[block / 256].x + nested[block / 256].y.
struct Scales {
  const float* absmax;
  const u8* codes;
  const float* map;
  const float2* nested;
};
// A scale split into its first loads and the rest, so that the former can run ahead.
struct RawScale {
  float absmax;
  u32 code;  // of a double-quantised one in the low byte, the group above
};
__device__ inline RawScale fetch_scale(const Scales& scales, i64 block) {
  if (scales.codes == nullptr) return RawScale{scales.absmax[block], 0};
  u32 group = u32(block >> 8);
  return RawScale{scales.nested[group].x, group << 8 | scales.codes[block]};
}
__device__ inline float finish_scale(const Scales& scales, const float* map, RawScale raw) {
  if (scales.codes == nullptr) return raw.absmax;
  // Two roundings, as in bitsandbytes: a fused multiply-add would differ in the last bit.
  return __fadd_rn(__fmul_rn(map[raw.code & 255], raw.absmax), scales.nested[raw.code >> 8].y);
}
