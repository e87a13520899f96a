// Decoding attention: every row, all its query heads, over the segment and span tables of the cache, in one launch.
//
// A block takes 128 neighbouring positions of one row (a split) and up to HEADS of the query heads that share a key/value head. Keys
// come to shared memory by asynchronous copies, a thread then computes the scores of one key: no sums across lanes. Values go from
// memory straight into the threads that sum them, eight of a thread's already under way before the keys have arrived. The last block
// of a row merges its splits in the order of the positions.
//
// Splits begin at multiples of 128 of a row's own positions, so a row's bits depend on its keys and values alone: not on the other
// rows, not on where its keys lie. A row without sharing and one that continues a shared prefix differ in their spans only.

constexpr int kSplit = 128;  // positions of a split, threads of a block
constexpr int kSplitWarps = kSplit / kWarp;
constexpr int kStride = 17;         // vectors from key to key in shared memory: 16 and one, so that eight lanes meet eight banks
constexpr int kAhead = 8;           // values a thread has under way
constexpr float kLog2E = 1.4426950408889634f;

__device__ inline float highest_of_warp(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}
__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// q, out: [rows, heads * head_size]; keys, values: [slots, kv_heads * head_size]; segments: [n, 5] (first row, rows, first position,
// first span, spans), spans: [.., 2] (first slot, length); window: keys a row sees, 0 = all.
// grid: x = kv_heads * batches * splits with batches = ceil(heads / kv_heads / HEADS), y = rows.
// partials: [rows, kv_heads * batches, splits, HEADS, head_size + 2] f32: sums, highest score, sum of weights; not read where a row has
// one split. arrivals: [rows, kv_heads * batches] u32, zero before and after.
// Needs head_size % 8 == 0, at most 256; everything aligned to 16 bytes.
// Shared memory: row [4] int, slots [kSplit] int, weights [HEADS][kSplit] f32, extremes [2][kSplitWarps][HEADS] f32, queries
// [HEADS][head_size] f32, then keys [kSplit][kStride] vectors and later sums [kSplit / lanes][HEADS][lanes * kValues] f32.
template <class T, int HEADS>
__device__ inline void attention(T* out, const T* q, const T* keys, const T* values, const i64* segments, const i64* spans,
                                 float* partials, u32* arrivals, int n_segments, int heads, int kv_heads, int head_size, int window,
                                 int splits, float scale) {
  constexpr int kValues = Vector<T>::kValues;
  DYNAMIC_SHARED(shared);
  int* found = reinterpret_cast<int*>(shared);
  int* slots = found + 4;
  float* weights = reinterpret_cast<float*>(slots + kSplit);
  float* extremes = weights + HEADS * kSplit;
  float* queries = extremes + 2 * kSplitWarps * HEADS;
  uint4* tile = reinterpret_cast<uint4*>(queries + HEADS * head_size);
  float* sums = reinterpret_cast<float*>(tile);

  int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  int group = heads / kv_heads, batches = (group + HEADS - 1) / HEADS;
  int part = blockIdx.x / splits, split = blockIdx.x % splits, row = blockIdx.y;
  int kv_head = part / batches, first_head = kv_head * group + part % batches * HEADS;
  int n_heads = min(HEADS, (kv_head + 1) * group - first_head);
  int vectors = head_size / kValues;

  for (int i = thread; i < n_segments; i += kSplit) {
    const i64* segment = segments + i64(i) * 5;
    int within = int(row - segment[0]);
    if (within < 0 || within >= segment[1]) continue;
    found[0] = int(segment[2]) + within;
    found[1] = int(segment[3]);
    found[2] = int(segment[4]);
  }
  __syncthreads();
  int last = found[0], first_span = found[1], n_spans = found[2];
  int begin = window > 0 ? max(0, last + 1 - window) : 0;
  int active = last / kSplit - begin / kSplit + 1;
  if (split >= active) return;
  int position = (begin / kSplit + split) * kSplit + thread;
  bool seen = position >= begin && position <= last;

  int slot = -1;
  if (seen) {
    i64 rest = position;
    for (int i = first_span; i < first_span + n_spans; i++) {
      i64 start = spans[2 * i], length = spans[2 * i + 1];
      if (rest < length) {
        slot = int(start + rest);
        break;
      }
      rest -= length;
    }
  }
  slots[thread] = slot;
  const T* query_row = q + (i64(row) * heads + first_head) * head_size;
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    for (int i = h * head_size + thread; i < (h + 1) * head_size; i += kSplit)
      queries[i] = h < n_heads ? to_float(query_row[i]) * (scale * kLog2E) : 0.0f;
  __syncthreads();

  // `lanes` threads share a key or value, each with one vector of 16 bytes.
  int lanes_log2 = 3;
  while (lanes_log2 < 5 && (1 << lanes_log2) < vectors) lanes_log2++;
  int slot_size = kv_heads * head_size;
  const T* own_keys = keys + kv_head * head_size;
  const T* own_values = values + kv_head * head_size;

  // Keys: 16 vectors of each at a time.
  int key_lanes_log2 = min(4, lanes_log2), key_vector = thread & ((1 << key_lanes_log2) - 1);
  auto fetch_keys = [&](int chunk) {
    if (chunk + key_vector < vectors)
#pragma unroll 4
      for (int key = thread >> key_lanes_log2; key < kSplit; key += kSplit >> key_lanes_log2) {
        int at = slots[key];
        const T* from = own_keys + i64(max(at, 0)) * slot_size + (chunk + key_vector) * kValues;
        copy_async(&tile[key * kStride + key_vector], from, at < 0 ? 0 : 16);
      }
    close_copies();
  };
  fetch_keys(0);

  // Values: a thread sums keys own_key, own_key + step, …
  int lanes = 1 << lanes_log2, step = kSplit >> lanes_log2;
  int own_vector = thread & (lanes - 1), own_key = thread >> lanes_log2;
  auto fetch_values = [&](int first_key, int vector, uint4(&into)[kAhead]) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      int at = slots[first_key + i * step];
      into[i] = uint4{};
      if (at >= 0 && vector < vectors)
        into[i] = *reinterpret_cast<const uint4*>(own_values + i64(at) * slot_size + vector * kValues);
    }
  };
  uint4 ahead[kAhead];
  fetch_values(own_key, own_vector, ahead);

  float scores[HEADS] = {};
  for (int chunk = 0; chunk < vectors; chunk += 16) {
    wait_copies<0>();
    __syncthreads();
#pragma unroll 2
    for (int v = 0; v < min(16, vectors - chunk); v++) {
      float key[kValues];
      unpack(tile[thread * kStride + v], key, T{});
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float4* query = reinterpret_cast<const float4*>(queries + h * head_size + (chunk + v) * kValues);
#pragma unroll
        for (int i = 0; i < kValues / 4; i++) {
          float4 four = query[i];
          scores[h] = fmaf(key[4 * i], four.x, scores[h]);
          scores[h] = fmaf(key[4 * i + 1], four.y, scores[h]);
          scores[h] = fmaf(key[4 * i + 2], four.z, scores[h]);
          scores[h] = fmaf(key[4 * i + 3], four.w, scores[h]);
        }
      }
    }
    __syncthreads();
    if (chunk + 16 < vectors) fetch_keys(chunk + 16);
  }

  // Softmax over the split, to the base 2; at least one of its keys is seen.
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (!seen) scores[h] = -infinity();
    float highest = highest_of_warp(scores[h]);
    if (lane == 0) extremes[warp * HEADS + h] = highest;
  }
  __syncthreads();
  float top[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    top[h] = extremes[h];
#pragma unroll
    for (int w = 1; w < kSplitWarps; w++) top[h] = fmaxf(top[h], extremes[w * HEADS + h]);
    float weight = exp2f(scores[h] - top[h]);
    weights[h * kSplit + thread] = weight;
    float sum = sum_of_warp(weight);
    if (lane == 0) extremes[(kSplitWarps + warp) * HEADS + h] = sum;
  }
  __syncthreads();

  i64 item = i64(row) * kv_heads * batches + part;
  float* record = partials + (item * splits + split) * HEADS * (head_size + 2);
  auto total_of = [&](int h) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kSplitWarps; w++) total += extremes[(kSplitWarps + w) * HEADS + h];
    return total;
  };
  auto out_of = [&](int h) { return out + (i64(row) * heads + first_head + h) * head_size; };

  for (int pass = 0; pass < vectors; pass += lanes) {
    int vector = pass + own_vector;
    float partial[HEADS][kValues] = {};
    for (int first_key = own_key; first_key < kSplit; first_key += kAhead * step) {
      if (pass > 0 || first_key > own_key) fetch_values(first_key, vector, ahead);
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        float value[kValues];
        unpack(ahead[i], value, T{});
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          float weight = weights[h * kSplit + first_key + i * step];
#pragma unroll
          for (int j = 0; j < kValues; j++) partial[h][j] = fmaf(weight, value[j], partial[h][j]);
        }
      }
    }
    // Across the threads that summed other keys of the same elements.
    int width = lanes * kValues;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
      for (int j = 0; j < kValues; j += 4)
        *reinterpret_cast<float4*>(sums + (own_key * HEADS + h) * width + own_vector * kValues + j) =
            make_float4(partial[h][j], partial[h][j + 1], partial[h][j + 2], partial[h][j + 3]);
    __syncthreads();
#pragma unroll 1
    for (int h = 0; h < n_heads; h++) {
      float total = total_of(h);
#pragma unroll 1
      for (int i = thread; i < width; i += kSplit) {
        int element = pass * kValues + i;
        if (element >= head_size) continue;
        float sum = 0.0f;
        for (int k = 0; k < step; k++) sum += sums[(k * HEADS + h) * width + i];
        if (active == 1) from_float(sum / total, out_of(h) + element);
        else record[h * (head_size + 2) + element] = sum;
      }
    }
    __syncthreads();
  }
  if (active == 1) return;

#pragma unroll
  for (int h = 0; h < HEADS; h++)
    if (thread == h) {
      record[h * (head_size + 2) + head_size] = top[h];
      record[h * (head_size + 2) + head_size + 1] = total_of(h);
    }
  if (!last_to_arrive(&arrivals[item], u32(active), reinterpret_cast<u32*>(found) + 3)) return;
  const float* records = partials + item * splits * HEADS * (head_size + 2);
  int stride = HEADS * (head_size + 2);
#pragma unroll 1
  for (int h = 0; h < n_heads; h++) {
    const float* own = records + h * (head_size + 2);
    float highest = -infinity();
    for (int s = 0; s < active; s++) highest = fmaxf(highest, load_written(own + i64(s) * stride + head_size));
#pragma unroll 1
    for (int element = thread; element < head_size; element += kSplit) {
      float sum = 0.0f, total = 0.0f;
      for (int s = 0; s < active; s++) {
        const float* at = own + i64(s) * stride;
        float factor = exp2f(load_written(at + head_size) - highest);
        sum = fmaf(factor, load_written(at + element), sum);
        total = fmaf(factor, load_written(at + head_size + 1), total);
      }
      from_float(sum / total, out_of(h) + element);
    }
  }
}

#define ATTENTION(name, T, HEADS)                                                                                               \
  extern "C" __global__ void __launch_bounds__(kSplit, HEADS <= 2 ? 4 : 3) name##_##HEADS(                                                       \
      T* out, const T* q, const T* keys, const T* values, const i64* segments, const i64* spans, float* partials,              \
      u32* arrivals, int n_segments, int heads, int kv_heads, int head_size, int window, int splits, float scale) {            \
    attention<T, HEADS>(out, q, keys, values, segments, spans, partials, arrivals, n_segments, heads, kv_heads, head_size,     \
                        window, splits, scale);                                                                                 \
  }
#if defined(ARETE_F32) || defined(ARETE_SIMT)
ATTENTION(attention_f32, float, 1)
ATTENTION(attention_f32, float, 2)
ATTENTION(attention_f32, float, 4)
ATTENTION(attention_f32, float, 8)
#endif
#if defined(ARETE_BF16) || defined(ARETE_SIMT)
ATTENTION(attention_bf16, bf16, 1)
ATTENTION(attention_bf16, bf16, 2)
ATTENTION(attention_bf16, bf16, 4)
ATTENTION(attention_bf16, bf16, 8)
#endif
#if defined(ARETE_F16) || defined(ARETE_SIMT)
ATTENTION(attention_f16, f16, 1)
ATTENTION(attention_f16, f16, 2)
ATTENTION(attention_f16, f16, 4)
ATTENTION(attention_f16, f16, 8)
#endif
