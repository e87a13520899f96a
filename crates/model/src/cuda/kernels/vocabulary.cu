// Over the vocabulary: log-probabilities of given tokens with what their gradient needs, and the sampler. A block a row.
//
// Exponentials lie in [0, 1] and are summed as whole numbers of 2^-40: such a sum is exact in any order and below 2^64 for every
// vocabulary, so partial sums may be taken as the machine likes, and a search for the place where a cumulative sum passes a
// number finds the same token whatever the block's shape. A term loses less than 2^-40 of the largest one.

namespace vocabulary {

constexpr int kBlockThreads = 512;
constexpr int kTile = 256;  // neighbouring tokens whose sum is kept, eight a lane
constexpr float kUnit = 0x1p40f;

__device__ inline float not_a_number() { return __uint_as_float(0x7fc00000u); }

struct Shared {
  u64 sums[3 * (kBlockThreads / kWarp)];
  float tops[kBlockThreads / kWarp];
  u64 weights[kTile];
  u64 groups[kTile / kWarp];
  u64 total, left;
  int tile, chosen;
};
static_assert(sizeof(Shared) == 2584, "what the launches ask for: plan/rows.rs");

__device__ inline u64 shuffle_xor(u64 value, int offset) {
  u32 low = __shfl_xor_sync(kAllLanes, u32(value), offset), high = __shfl_xor_sync(kAllLanes, u32(value >> 32), offset);
  return u64(high) << 32 | low;
}
__device__ inline u64 warp_sum(u64 value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

// The sums of COUNT numbers over the threads of a block, the same in every thread.
template <int COUNT>
__device__ inline void block_sums(u64 (&values)[COUNT], Shared& shared) {
#pragma unroll
  for (int c = 0; c < COUNT; c++) values[c] = warp_sum(values[c]);
  __syncthreads();  // the last sums were read
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int c = 0; c < COUNT; c++) shared.sums[threadIdx.x / kWarp * COUNT + c] = values[c];
  __syncthreads();
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    values[c] = 0;
    for (int w = 0; w < kBlockThreads / kWarp; w++) values[c] += shared.sums[w * COUNT + c];
  }
}

// One row of logits at a temperature.
template <class T>
struct Row {
  const T* logits;
  int width;
  float top, inverse_temperature;

  __device__ float at(int i) const { return to_float(logits[i]) + 0.0f; }  // -0 becomes 0: they are the same logit
  __device__ float exponent(float logit) const { return (logit - top) * inverse_temperature; }
  __device__ u64 weight(float logit) const { return u64(expf(exponent(logit)) * kUnit); }
  // Finds the largest logit; false if one is NaN or none is finite.
  __device__ bool find_top(Shared& shared) {
    float most = -infinity();
    for (int i = threadIdx.x; i < width; i += kBlockThreads) {
      float logit = at(i);
      most = logit != logit ? infinity() : fmaxf(most, logit);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
    if (threadIdx.x % kWarp == 0) shared.tops[threadIdx.x / kWarp] = most;
    __syncthreads();
    for (int w = 0; w < kBlockThreads / kWarp; w++) most = fmaxf(most, shared.tops[w]);
    top = most;
    return fabsf(most) < infinity();
  }
};
__device__ inline double log_of(u64 total) { return log(double(total)) - 40.0 * 0.69314718055994530942; }

// ---- log-probabilities ----

// logprob[row] of targets[row], entropy[row] (null: not wanted); with `derive` the logits become the derivative of the
// log-probability by the logits before the temperature, (1[target] - p) / temperature.
template <class T>
__device__ inline void token_logprob(float* logprob, float* entropy, T* logits, const i64* targets, int width,
                                     float inverse_temperature, int derive, Shared& shared) {
  T* own = logits + i64(blockIdx.x) * width;
  Row<T> row{own, width, 0.0f, inverse_temperature};
  int target = int(targets[blockIdx.x]);
  if (!row.find_top(shared)) {
    for (int i = threadIdx.x; derive && i < width; i += kBlockThreads) from_float(not_a_number(), own + i);
    if (threadIdx.x == 0) {
      logprob[blockIdx.x] = not_a_number();
      if (entropy != nullptr) entropy[blockIdx.x] = not_a_number();
    }
    return;
  }
  u64 sums[2] = {};
  for (int i = threadIdx.x; i < width; i += kBlockThreads) {
    float exponent = row.exponent(row.at(i)), weight = expf(exponent);
    sums[0] += u64(weight * kUnit);
    if (weight > 0.0f) sums[1] += u64(weight * -exponent * kUnit);
  }
  float target_exponent = row.exponent(row.at(target));
  block_sums(sums, shared);  // and every thread has read the target's logit
  double log_total = log_of(sums[0]);
  if (threadIdx.x == 0) {
    logprob[blockIdx.x] = float(double(target_exponent) - log_total);
    if (entropy != nullptr) entropy[blockIdx.x] = float(log_total + double(sums[1]) / double(sums[0]));
  }
  if (!derive) return;
  float inverse = float(1099511627776.0 / double(sums[0]));
  for (int i = threadIdx.x; i < width; i += kBlockThreads) {
    float probability = expf(row.exponent(row.at(i))) * inverse;
    from_float(((i == target ? 1.0f : 0.0f) - probability) * inverse_temperature, own + i);
  }
}

// ---- the sampler ----

// Sums weight(i) over tiles of neighbouring tokens into `tiles`, and returns the whole.
template <class Weight>
__device__ inline u64 sum_tiles(int width, Weight weight, u64* tiles, Shared& shared) {
  int lane = threadIdx.x % kWarp, n_tiles = (width + kTile - 1) / kTile;
  u64 whole[1] = {};
  for (int tile = threadIdx.x / kWarp; tile < n_tiles; tile += kBlockThreads / kWarp) {
    u64 sum = 0;
    for (int i = tile * kTile + lane; i < min((tile + 1) * kTile, width); i += kWarp) sum += weight(i);
    sum = warp_sum(sum);
    if (lane == 0) {
      tiles[tile] = sum;
      whole[0] += sum;
    }
  }
  block_sums(whole, shared);
  return whole[0];
}

// The first token, in vocabulary order, at which the cumulative weight passes `target`, which the whole does; by the tiles' sums.
template <class Weight>
__device__ inline int find(int width, Weight weight, u64 target, const u64* tiles, Shared& shared) {
  if (threadIdx.x == 0) {
    int tile = 0;
    while (target >= tiles[tile]) target -= tiles[tile++];
    shared.tile = tile;
    shared.left = target;
  }
  __syncthreads();
  int first = shared.tile * kTile;
  if (threadIdx.x < kTile) {
    int i = first + threadIdx.x;
    u64 own = i < width ? weight(i) : 0;
    shared.weights[threadIdx.x] = own;
    own = warp_sum(own);
    if (threadIdx.x % kWarp == 0) shared.groups[threadIdx.x / kWarp] = own;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    u64 left = shared.left;
    int group = 0;
    while (left >= shared.groups[group]) left -= shared.groups[group++];
    int i = group * kWarp;
    while (left >= shared.weights[i]) left -= shared.weights[i++];
    shared.chosen = first + i;
  }
  __syncthreads();
  return shared.chosen;
}

// Whole numbers in the order of the logits.
__device__ inline u32 key_of(float logit) {
  u32 bits = __float_as_uint(logit);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// In the order of falling logits, the first key at which the cumulative weight passes `target`, which the whole does; `above`
// becomes the weight of the keys above it. Sixteen rounds settle two bits each: of four halves of what is left, the highest
// that still passes.
template <class T, class Weight>
__device__ inline u32 find_key(const Row<T>& row, Weight weight, u64 target, u64& above, Shared& shared) {
  u32 found = 0;
  above = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    u64 sums[3] = {};
    for (int i = threadIdx.x; i < row.width; i += kBlockThreads) {
      float logit = row.at(i);
      u32 key = key_of(logit);
      if (key < (found | 1u << shift)) continue;
      u64 own = weight(logit);
#pragma unroll
      for (u32 c = 0; c < 3; c++)
        if (key >= (found | (c + 1) << shift)) sums[c] += own;
    }
    block_sums(sums, shared);
    u32 passed = 3;
#pragma unroll
    for (int c = 2; c >= 0; c--)  // the sums fall
      if (sums[c] <= target) {
        passed = c;
        above = sums[c];
      }
    found |= passed << shift;
  }
  return found;
}

// One token a row: drawn[row] has the token in its low 32 bits and the f32 of its log-probability (at the temperature, over the
// whole vocabulary) in its high ones. Row i reads logits row sources[i] (null: i) and draws with uniforms[i] in [0, 1): the
// first token, in vocabulary order, or in the order of falling logits under top-k and top-p, at which the cumulative distribution
// passes it. temperature 0 takes the most probable token.
template <class T>
__device__ inline void sample(i64* drawn, const T* logits, const i64* sources, const double* uniforms, int width,
                              float temperature, int top_k, float top_p, Shared& shared, u64* tiles) {
  i64 source = sources == nullptr ? i64(blockIdx.x) : sources[blockIdx.x];
  bool greedy = temperature == 0.0f;
  Row<T> row{logits + source * width, width, 0.0f, greedy ? 1.0f : 1.0f / temperature};
  if (!row.find_top(shared)) {  // nothing is drawn, and the caller sees why
    if (threadIdx.x == 0) drawn[blockIdx.x] = i64(u64(0x7fc00000u) << 32);
    return;
  }
  auto weight = [&](int i) { return row.weight(row.at(i)); };
  // u of the whole, below it: the cumulative sum passes u * whole where it passes the number below.
  auto part = [&](u64 whole) {
    double target = uniforms[blockIdx.x] * double(whole);
    return target < double(whole - 1) ? u64(target) : whole - 1;
  };
  u64 total = sum_tiles(width, weight, tiles, shared);
  int chosen;
  if (!greedy && top_k == 0 && top_p >= 1.0f) {
    chosen = find(width, weight, part(total), tiles, shared);
  } else {
    u32 key = key_of(row.top);
    u64 among = 0;  // which of the tokens with this key
    if (!greedy) {
      auto by_logit = [&](float logit) { return row.weight(logit); };
      auto one = [](float) { return u64(1); };
      u64 above, kept = total;
      auto logit_of = [](u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); };
      if (top_k > 0 && top_k < width) {
        u32 last = find_key(row, one, u64(top_k - 1), above, shared);
        u64 n_last = u64(top_k) - above;
        u64 sums[1] = {};
        for (int i = threadIdx.x; i < width; i += kBlockThreads) {
          float logit = row.at(i);
          if (key_of(logit) > last) sums[0] += row.weight(logit);
        }
        block_sums(sums, shared);
        kept = sums[0] + n_last * row.weight(logit_of(last));
      }
      if (top_p < 1.0f) {  // the smallest set whose mass (after top-k) reaches top_p
        double wanted = double(top_p) * double(kept);
        u64 target = u64(wanted);
        if (double(target) == wanted && target > 0) target--;
        u32 last = find_key(row, by_logit, target, above, shared);
        u64 each = row.weight(logit_of(last));
        kept = above + ((target - above) / each + 1) * each;
      }
      u64 target = part(kept);
      key = find_key(row, by_logit, target, above, shared);
      among = (target - above) / row.weight(logit_of(key));
    }
    auto has_key = [&](int i) { return u64(key_of(row.at(i)) == key ? 1 : 0); };
    sum_tiles(width, has_key, tiles, shared);
    chosen = find(width, has_key, among, tiles, shared);
  }
  if (threadIdx.x == 0) {
    float logprob = float(double(row.exponent(row.at(chosen))) - log_of(total));
    drawn[blockIdx.x] = i64(u64(__float_as_uint(logprob)) << 32 | u64(u32(chosen)));
  }
}

}  // namespace vocabulary

// Dynamic shared memory: vocabulary::Shared, then (the sampler) the tiles' sums.
#define VOCABULARY(T)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(vocabulary::kBlockThreads) token_logprob_##T(                                \
      float* logprob, float* entropy, T* logits, const i64* targets, int width, float inverse_temperature, int derive) {    \
    DYNAMIC_SHARED(shared);                                                                                                 \
    vocabulary::token_logprob(logprob, entropy, logits, targets, width, inverse_temperature, derive,                        \
                              *reinterpret_cast<vocabulary::Shared*>(shared));                                              \
  }                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(vocabulary::kBlockThreads) sample_##T(                                       \
      i64* drawn, const T* logits, const i64* sources, const double* uniforms, int width, float temperature, int top_k,     \
      float top_p) {                                                                                                        \
    DYNAMIC_SHARED(shared);                                                                                                 \
    vocabulary::Shared& own = *reinterpret_cast<vocabulary::Shared*>(shared);                                               \
    vocabulary::sample(drawn, logits, sources, uniforms, width, temperature, top_k, top_p, own,                             \
                       reinterpret_cast<u64*>(&own + 1));                                                                   \
  }
#if defined(ARETE_F32) || defined(ARETE_SIMT)
VOCABULARY(f32)
#endif
#if defined(ARETE_BF16) || defined(ARETE_SIMT)
VOCABULARY(bf16)
#endif
#if defined(ARETE_F16) || defined(ARETE_SIMT)
VOCABULARY(f16)
#endif
