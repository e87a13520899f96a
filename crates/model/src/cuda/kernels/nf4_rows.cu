// Fused dequantise-multiply on tensor cores, for 1 to 64 rows in one pass over the weights: y[M, N] = x[M, K] * W[N, K]^T with W
// packed NF4, weights rounded once to the format of x, as the trainer's are, and summed in f32.
//
// W is the operand A. K is permuted alike in W and x so that nothing has to be repacked: of 128 neighbouring columns lane t of four
// takes 32, one 16-byte load straight from bitsandbytes' layout, and its first four codes meet those of the other three lanes in one
// product of 16 columns, and so on. A warp computes 32 outputs, a block 128; x comes to shared memory by asynchronous copies, in
// that order, once a block.
//
// The work, tiles of 128 outputs times groups of 128 columns, is cut into equal runs, one a block, whatever the matrix' shape; a tile
// that several blocks share is summed by the last of them, in the order of the columns. How it is cut, and in which order a lane
// multiplies, depends on the matrix and the GPU only, so a row of y has the same bits alone and among 64.

constexpr int kRowsThreads = 128;     // threads of a block
constexpr int kTileOutputs = 128;     // outputs of a block, 32 a warp
constexpr int kGroup = 128;           // columns taken at a time
constexpr int kGroupVectors = kGroup / 8;

// Where vector v of 8 columns of a group lies among a row's 16 in shared memory. Eight lanes that read at once hold two rows and
// vectors 4 t + v % 4: the first permutation brings those of a row side by side, the second sets odd rows beside even ones.
__device__ inline int place(int row, int v) { return row * kGroupVectors + (((v % 4) * 4 + v / 4) ^ (row % 2 * 4)); }

struct Lines {
  uint4 codes[4];  // of outputs lane / 4 + {0, 8, 16, 24}
  RawScale scales[4];
};

// partials: [gridDim.y][2 * gridDim.x][2 * TILES][kRowsThreads] float4, arrivals: [gridDim.y][tiles] u32, zero before and after.
// Needs K % 32 == 0, block_log2 >= 5, x and codes aligned to 16 bytes. Shared memory: table [16] f32, map [256] f32, a flag (16
// bytes), two stages of x [8 * TILES][16] vectors.
template <class T, int TILES>
__device__ inline void nf4_rows(T* y, const T* x, const u8* codes, const float* codebook, const Scales& scales, float4* partials,
                                u32* arrivals, int rows, int outputs, int columns, int block_log2) {
  constexpr int kRows = 8 * TILES, kStage = kRows * kGroupVectors;
  DYNAMIC_SHARED(shared);
  float* table = reinterpret_cast<float*>(shared);
  float* map = table + 16;
  u32* flag = reinterpret_cast<u32*>(map + 256);
  uint4* stages = shared + 4 + 64 + 1;

  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  int first_row = blockIdx.y * kRows;
  int groups = (columns + kGroup - 1) / kGroup, tiles = (outputs + kTileOutputs - 1) / kTileOutputs;
  int units = groups * tiles, n_blocks = gridDim.x;
  auto first_unit = [&](int block) { return int(i64(block) * units / n_blocks); };
  auto block_of = [&](int unit) { return int(((i64(unit) + 1) * n_blocks - 1) / units); };
  int begin = first_unit(blockIdx.x), end = first_unit(blockIdx.x + 1);
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
  if (scales.codes != nullptr)
    for (int i = threadIdx.x; i < 256; i += kRowsThreads) map[i] = scales.map[i];

  // Outputs past the end read the last one again and are not written; columns past the end read the row's first again and meet
  // zeros of x.
  auto load = [&](int tile, int group, Lines& lines) {
    int output = tile * kTileOutputs + warp * 32 + g, k = group * kGroup + t * 32;
    if (k >= columns) k = 0;
#pragma unroll
    for (int r = 0; r < 4; r++) {
      i64 at = i64(min(output + 8 * r, outputs - 1)) * columns + k;
      lines.codes[r] = *reinterpret_cast<const uint4*>(codes + at / 2);
      lines.scales[r] = fetch_scale(scales, at >> block_log2);
    }
  };
  auto stage = [&](int group, int which) {
    int k = group * kGroup;
#pragma unroll
    for (int i = 0; i < kStage / kRowsThreads; i++) {
      int at = i * kRowsThreads + threadIdx.x, row = at / kGroupVectors, v = at % kGroupVectors;
      bool here = first_row + row < rows && k + 8 * v < columns;
      const T* from = here ? x + i64(first_row + row) * columns + k + 8 * v : x;
      copy_async(&stages[which * kStage + place(row, v)], from, here ? 16 : 0);
    }
  };

  float sums[2][TILES][4] = {};
  Lines lines;
  int tile = begin / groups, group = begin % groups;
  if (begin < end) {
    load(tile, group, lines);
    stage(group, 0);
  }
  close_copies();
  for (int unit = begin; unit < end; unit++) {
    int which = (unit - begin) % 2, here_tile = tile;
    Lines next;
    if (++group == groups) {
      group = 0;
      tile++;
    }
    if (unit + 1 < end) {
      load(tile, group, next);
      stage(group, 1 - which);
    }
    close_copies();
    wait_copies<1>();
    __syncthreads();

    const uint4* here = stages + which * kStage;
    float factors[4];
#pragma unroll
    for (int r = 0; r < 4; r++) factors[r] = finish_scale(scales, map, lines.scales[r]);
#pragma unroll
    for (int v = 0; v < 4; v++) {  // eight codes of a lane: two products
      u32 a[2][2][4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        Offsets offsets = offsets_of(word_of(lines.codes[r], v));
        float weights[8];
#pragma unroll
        for (int i = 0; i < 8; i++) weights[i] = entry(table, offsets, i) * factors[r];
#pragma unroll
        for (int i = 0; i < 4; i++) a[r / 2][i / 2][r % 2 + i % 2 * 2] = pair(weights[2 * i], weights[2 * i + 1], T{});
      }
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        uint4 b = here[place(n * 8 + g, t * 4 + v)];
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma(sums[m][n], a[m][0], b.x, b.y, T{});
          mma(sums[m][n], a[m][1], b.z, b.w, T{});
        }
      }
    }
    __syncthreads();  // the stage may be filled again
    lines = next;

    if (unit + 1 < end && group != 0) continue;
    // A tile ends here, or this block's part of it.
    int first = block_of(here_tile * groups), last = block_of((here_tile + 1) * groups - 1);
    if (first < last) {
      auto part = [&](int block) {  // a block's first tile comes first
        i64 slot = (i64(blockIdx.y) * n_blocks + block) * 2 + (first_unit(block) / groups == here_tile ? 0 : 1);
        return partials + slot * 2 * TILES * kRowsThreads + threadIdx.x;
      };
      float4* own = part(blockIdx.x);
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++) {
        float(&c)[4] = sums[i / TILES][i % TILES];
        own[i * kRowsThreads] = make_float4(c[0], c[1], c[2], c[3]);
        c[0] = c[1] = c[2] = c[3] = 0.0f;
      }
      if (!last_to_arrive(&arrivals[i64(blockIdx.y) * tiles + here_tile], u32(last - first + 1), flag)) continue;
#pragma unroll 1
      for (int block = first; block <= last; block++) {
        const float4* other = part(block);
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
          float4 more = load_written(other + i * kRowsThreads);
          float(&c)[4] = sums[i / TILES][i % TILES];
          c[0] += more.x;
          c[1] += more.y;
          c[2] += more.z;
          c[3] += more.w;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int row = first_row + n * 8 + t * 2 + i % 2, output = here_tile * kTileOutputs + warp * 32 + m * 16 + i / 2 * 8 + g;
          if (row < rows && output < outputs) from_float(sums[m][n][i], y + i64(row) * outputs + output);
          sums[m][n][i] = 0.0f;
        }
  }
  wait_copies<0>();
}

#define NF4_ROWS(T, ROWS)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(kRowsThreads, ROWS <= 16 ? 4 : ROWS == 32 ? 3 : 2) nf4_rows_##T##_##ROWS(                          \
      T* y, const T* x, const u8* codes, const float* codebook, const float* absmax, const u8* absmax_codes, const float* map, \
      const float2* nested, float4* partials, u32* arrivals, int rows, int outputs, int columns, int block_log2) {              \
    nf4_rows<T, ROWS / 8>(y, x, codes, codebook, Scales{absmax, absmax_codes, map, nested}, partials, arrivals, rows, outputs,  \
                          columns, block_log2);                                                                                 \
  }
#if defined(ARETE_BF16) && __CUDA_ARCH__ < 800
#error "the tensor cores of Turing do not multiply bf16; multiply.cu does"
#endif
#if defined(ARETE_BF16) || defined(ARETE_SIMT)
NF4_ROWS(bf16, 8)
NF4_ROWS(bf16, 16)
NF4_ROWS(bf16, 32)
NF4_ROWS(bf16, 64)
#endif
#if defined(ARETE_F16) || defined(ARETE_SIMT)
NF4_ROWS(f16, 8)
NF4_ROWS(f16, 16)
NF4_ROWS(f16, 32)
NF4_ROWS(f16, 64)
#endif
