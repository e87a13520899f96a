// Fused dequantise-multiply for few rows (decoding): y[M, N] = x[M, K] * W[N, K]^T with W packed NF4.
//
// A warp computes kOutputs neighbouring columns of y for ROWS rows of x. Its lanes stride along K in chunks of 32 codes,
// one 16-byte load each, the next chunk's codes and scales already in flight while the current one is multiplied. x lies in
// shared memory, laid out so that neighbouring lanes read neighbouring 16-byte vectors. Products are summed in f32 over the
// 32 codes of a chunk, then scaled by the block's absmax; nothing is rounded before y.
//
// `splits` warps share the same columns where N alone would leave the machine idle; each takes every splits-th run of 32
// chunks. A lane's chunks depend on K and splits only, never on the rows, so a row of y has the same bits whatever the
// other rows are.

constexpr int kChunk = 32;  // codes per 16-byte load

template <class T>
struct Layout {
  static constexpr int kValues = Vector<T>::kValues;  // numbers per 16-byte vector of x
  static constexpr int kParts = kChunk / kValues;     // such vectors per chunk
  // Vectors from one part to the next, at least `chunks`: neighbouring threads store the parts of a chunk one after
  // another, and 8 / kParts more than a multiple of 8 puts them in different banks.
  __device__ static int stride(int chunks) { return (chunks + 7 - 8 / kParts) / 8 * 8 + 8 / kParts; }
};

struct Chunk {
  uint4 codes;
  RawScale scale;
};

// Shared memory: table [16] f32, sums [kWarps][ROWS][kOutputs] f32, x [ROWS][kParts][stride] 16-byte vectors.
// Needs K % 32 == 0, block_log2 >= 5, x and codes aligned to 16 bytes; tile_chunks a multiple of 32 * splits, or all of K.
template <class T, int ROWS>
__device__ inline void multiply(T* y, const T* x, const u8* codes, const float* codebook, const Scales& scales, int rows,
                                int outputs, int columns, int block_log2, int tile_chunks, int splits) {
  constexpr int kParts = Layout<T>::kParts, kValues = Layout<T>::kValues;
  constexpr int kOutputs = ROWS <= 2 ? 4 : 2;  // more would spill registers
  DYNAMIC_SHARED(shared);
  float* table = reinterpret_cast<float*>(shared);
  float* shared_sums = table + 16;
  uint4* tile = shared + 4 + kWarps * ROWS * kOutputs / 4;
  int stride = Layout<T>::stride(tile_chunks);

  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int split = warp % splits;
  int first = (blockIdx.x * (kWarps / splits) + warp / splits) * kOutputs;
  int first_row = blockIdx.y * ROWS;
  int chunks = columns / kChunk;
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];

  // Columns past the end read the last one again and are not written.
  i64 starts[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; o++) starts[o] = i64(min(first + o, outputs - 1)) * columns;
  auto load = [&](int chunk, Chunk(&out)[kOutputs]) {
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      i64 at = starts[o] + i64(chunk) * kChunk;
      out[o].codes = *reinterpret_cast<const uint4*>(codes + at / 2);
      out[o].scale = fetch_scale(scales, at >> block_log2);
    }
  };

  float sums[ROWS][kOutputs] = {};
  for (int tile_begin = 0; tile_begin < chunks; tile_begin += tile_chunks) {
    int here = min(tile_chunks, chunks - tile_begin);
    int at = split * kWarp + lane;
    Chunk current[kOutputs] = {};
    if (at < here) load(tile_begin + at, current);

    __syncthreads();  // every warp is done with the previous tile
    int vectors = here * kParts;
    for (int i = threadIdx.x; i < ROWS * vectors; i += kThreads) {
      int row = i / vectors, vector = i % vectors;
      uint4 value = {};
      if (first_row + row < rows)
        value = reinterpret_cast<const uint4*>(x + i64(first_row + row) * columns)[i64(tile_begin) * kParts + vector];
      tile[(row * kParts + vector % kParts) * stride + vector / kParts] = value;
    }
    __syncthreads();

    while (at < here) {
      int following = at + kWarp * splits;
      Chunk next[kOutputs] = {};
      if (following < here) load(tile_begin + following, next);
      float chunk_sums[ROWS][kOutputs] = {};
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        float weights[kOutputs][kValues];
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
          u32 word = word_of(current[o].codes, part * kValues / 8) >> (kValues == 4 && part % 2 ? 16 : 0);
          Offsets offsets = offsets_of(word);
#pragma unroll
          for (int i = 0; i < kValues; i++) weights[o][i] = entry(table, offsets, i);
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
          float values[kValues];
          unpack(tile[(row * kParts + part) * stride + at], values, T{});
#pragma unroll
          for (int o = 0; o < kOutputs; o++)
#pragma unroll
            for (int i = 0; i < kValues; i++)
              chunk_sums[row][o] = fmaf(weights[o][i], values[i], chunk_sums[row][o]);
        }
      }
#pragma unroll
      for (int o = 0; o < kOutputs; o++) {
        float scale = finish_scale(scales, scales.map, current[o].scale);
#pragma unroll
        for (int row = 0; row < ROWS; row++) sums[row][o] = fmaf(chunk_sums[row][o], scale, sums[row][o]);
        current[o] = next[o];
      }
      at = following;
    }
  }

#pragma unroll
  for (int row = 0; row < ROWS; row++)
#pragma unroll
    for (int o = 0; o < kOutputs; o++) {
      float sum = sums[row][o];
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      if (lane == 0) shared_sums[(warp * ROWS + row) * kOutputs + o] = sum;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < kWarps / splits * ROWS * kOutputs; i += kThreads) {
    int group = i / (ROWS * kOutputs), rest = i % (ROWS * kOutputs);
    int row = first_row + rest / kOutputs;
    int output = (blockIdx.x * (kWarps / splits) + group) * kOutputs + rest % kOutputs;
    if (row >= rows || output >= outputs) continue;
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) sum += shared_sums[(group * splits + s) * ROWS * kOutputs + rest];
    from_float(sum, y + i64(row) * outputs + output);
  }
}

#define MULTIPLY(T, ROWS)                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, ROWS * sizeof(T) < 32 ? 2 : 1) multiply_##T##_##ROWS(                     \
      T* y, const T* x, const u8* codes, const float* codebook, const float* absmax, const u8* absmax_codes,           \
      const float* map, const float2* nested, int rows, int outputs, int columns, int block_log2, int tile_chunks,      \
      int splits) {                                                                                                    \
    multiply<T, ROWS>(y, x, codes, codebook, Scales{absmax, absmax_codes, map, nested}, rows, outputs, columns,        \
                      block_log2, tile_chunks, splits);                                                                \
  }
// NVRTC builds one number format at a time: all fourteen kernels at once take 4 s.
#if defined(ARETE_F32) || defined(ARETE_SIMT)
MULTIPLY(f32, 1)
MULTIPLY(f32, 2)
MULTIPLY(f32, 4)
MULTIPLY(f32, 8)
#endif
#if defined(ARETE_BF16) || defined(ARETE_SIMT)
MULTIPLY(bf16, 1)
MULTIPLY(bf16, 2)
MULTIPLY(bf16, 4)
MULTIPLY(bf16, 8)
MULTIPLY(bf16, 16)
#endif
#if defined(ARETE_F16) || defined(ARETE_SIMT)
MULTIPLY(f16, 1)
MULTIPLY(f16, 2)
MULTIPLY(f16, 4)
MULTIPLY(f16, 8)
MULTIPLY(f16, 16)
#endif
