// Dense weights to packed NF4, bit for bit what bitsandbytes 0.50's CPU backend makes.
//
// min(32, block / 8) neighbouring lanes share a block, 8 elements a lane at a time; a warp reads 512 (f32: 1024)
// consecutive bytes and writes 128. The block's second pass finds its elements in the L1 cache.
//
// bitsandbytes' CUDA kernel differs from its CPU backend in three places, and so from this one: some of its thresholds are
// one unit in the last place off the halfway point, an all-zero block gets code 0 (-1 * 0) instead of 7 (0 * 0), and the
// last, incomplete block is multiplied by 1 / absmax instead of divided by absmax.

constexpr float kSmallestAbsmax = 1e-38f;

// The 16 values of bitsandbytes' get_4bit_type("nf4").
__constant__ const float kCodebook[16] = {
    -1.0f,                 -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f,  0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f,  0.5626170039176941f,   0.7229568362236023f,   1.0f};

// The nearest code: the number of halfway points between neighbouring codebook values that lie below x.
__device__ inline u32 nearest_code(float x) {
  u32 code = 0;
#pragma unroll
  for (int i = 0; i < 15; i++) code += x > (kCodebook[i] + kCodebook[i + 1]) * 0.5f ? 1 : 0;
  return code;
}

// Elements [first, first + 8) of x, 0 past its end.
template <class T>
__device__ inline void load8(const T* x, i64 first, i64 n, float (&out)[8]) {
  constexpr int kValues = Vector<T>::kValues;
  if (first + 8 <= n) {
#pragma unroll
    for (int v = 0; v < 8 / kValues; v++) {
      float part[kValues];
      unpack(reinterpret_cast<const uint4*>(x + first)[v], part, T{});
#pragma unroll
      for (int i = 0; i < kValues; i++) out[v * kValues + i] = part[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = first + i < n ? to_float(x[first + i]) : 0.0f;
  }
}

// codes [(n + 1) / 2], absmax [blocks] of x [n]; x and codes aligned to 16 bytes, block_log2 >= 3.
template <class T>
__device__ inline void quantize(u8* codes, float* absmax, const T* x, i64 n, int block_log2) {
  int block_size = 1 << block_log2;
  int lanes_log2 = min(5, block_log2 - 3);
  int lanes = 1 << lanes_log2;
  i64 block = (i64(blockIdx.x) * kThreads + threadIdx.x) >> lanes_log2;
  int lane = threadIdx.x & (lanes - 1);
  i64 begin = block << block_log2;
  float values[8];
  float highest = 0.0f;
  for (int i = lane * 8; i < block_size; i += lanes * 8) {
    load8(x, begin + i, n, values);
#pragma unroll
    for (int j = 0; j < 8; j++) highest = fmaxf(highest, fabsf(values[j]));
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, offset));
  if (begin >= n) return;

  bool complete = begin + block_size <= n;
  float divisor = fmaxf(highest, kSmallestAbsmax);
  float factor = 1.0f / divisor;
  if (lane == 0) absmax[block] = complete ? highest : divisor;
  for (int i = lane * 8; i < block_size; i += lanes * 8) {
    i64 first = begin + i;
    load8(x, first, n, values);
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float scaled = complete ? values[j] * factor : values[j] / divisor;
      word |= nearest_code(scaled) << ((j / 2) * 8 + (j % 2 ? 0 : 4));
    }
    if (first + 8 <= n) {
      *reinterpret_cast<u32*>(codes + first / 2) = word;
    } else {
      for (int j = 0; j < 8 && first + j < n; j += 2) codes[(first + j) / 2] = u8(word >> (j * 4));
    }
  }
}

#define QUANTIZE(name, T)                                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads) name(u8* codes, float* absmax, const T* x, i64 n,         \
                                                              int block_log2) {                                    \
    quantize<T>(codes, absmax, x, n, block_log2);                                                                  \
  }
QUANTIZE(quantize_f32, float)
QUANTIZE(quantize_bf16, bf16)
QUANTIZE(quantize_f16, f16)
