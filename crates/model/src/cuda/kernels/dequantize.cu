// Packed NF4 to dense weights.
//
// A thread turns 4 bytes (8 codes) into 8 values, so that a warp reads 128 and writes 512 (f32: 1024) consecutive bytes;
// four such groups per thread are in flight. Reads 0.5 bytes of codes and 4 / 2^block_log2 bytes of absmax per weight and
// writes sizeof(T): memory-bound everywhere.

constexpr int kGroups = 4;  // groups of 8 codes per thread

template <class T>
__device__ inline void store8(T* out, const float (&values)[8]) {
  uint4 packed;
  packed.x = pair(values[0], values[1], T{});
  packed.y = pair(values[2], values[3], T{});
  packed.z = pair(values[4], values[5], T{});
  packed.w = pair(values[6], values[7], T{});
  *reinterpret_cast<uint4*>(out) = packed;
}
__device__ inline void store8(float* out, const float (&values)[8]) {
  reinterpret_cast<float4*>(out)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

// out[i] = codebook[code i] * absmax[i >> block_log2] for i < n; codes and out aligned to 16 bytes, block_log2 >= 3.
template <class T>
__device__ inline void dequantize(T* out, const u8* codes, const float* codebook, const Scales& scales, i64 n,
                                  int block_log2) {
  DYNAMIC_SHARED(shared);  // the codebook: 16 floats lie in 16 banks, so lookups never collide
  float* table = reinterpret_cast<float*>(shared);
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  constexpr int kStep = kThreads * 8;
  i64 begin = i64(blockIdx.x) * kGroups * kStep;
  if (begin + kGroups * kStep > n) {  // the last block
    for (i64 i = begin + threadIdx.x; i < n; i += kThreads)
      from_float(table[code_of(codes[i / 2], int(i & 1))] * finish_scale(scales, scales.map, fetch_scale(scales, i >> block_log2)), out + i);
    return;
  }
  begin += threadIdx.x * 8;
  u32 words[kGroups];
  RawScale raw[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    words[g] = *reinterpret_cast<const u32*>(codes + (begin + g * kStep) / 2);
    raw[g] = fetch_scale(scales, (begin + g * kStep) >> block_log2);
  }
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    float scale = finish_scale(scales, scales.map, raw[g]);
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = table[code_of(words[g], i)] * scale;
    store8(out + begin + g * kStep, values);
  }
}

#define DEQUANTIZE(name, T)                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                \
      name(T* out, const u8* codes, const float* codebook, const float* absmax, const u8* absmax_codes, const float* map, \
           const float2* nested, i64 n, int block_log2) {                                                                \
    dequantize<T>(out, codes, codebook, Scales{absmax, absmax_codes, map, nested}, n, block_log2);                      \
  }
DEQUANTIZE(dequantize_f32, float)
DEQUANTIZE(dequantize_bf16, bf16)
DEQUANTIZE(dequantize_f16, f16)
