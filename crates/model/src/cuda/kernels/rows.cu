// What lies between the matrix products of a block, row by row: norms with the residual added, rotary embedding with the
// cache's slots, SwiGLU, LoRA's small products and its factors. Forward and backward.
//
// Every kernel reads and writes each number once or twice and is bound by memory, or by the launch itself. A row is computed by
// one block (or thread) in an order that its own shape fixes, so its bits do not depend on the other rows.

namespace rows {

template <class T>
__device__ inline float rounded(float x) {
  T out;
  from_float(x, &out);
  return to_float(out);
}

__device__ inline uint4 packed(const float (&v)[4], float) {
  uint4 out;
  out.x = __float_as_uint(v[0]);
  out.y = __float_as_uint(v[1]);
  out.z = __float_as_uint(v[2]);
  out.w = __float_as_uint(v[3]);
  return out;
}
template <class T>
__device__ inline uint4 packed(const float (&v)[8], T) {
  uint4 out;
  out.x = pair(v[0], v[1], T{});
  out.y = pair(v[2], v[3], T{});
  out.z = pair(v[4], v[5], T{});
  out.w = pair(v[6], v[7], T{});
  return out;
}

// N numbers at a time: a vector of 16 bytes, or one number where the width is no multiple of a vector.
template <int N, class T>
__device__ inline void load(const T* from, float (&out)[N]) {
  if constexpr (N == 1) out[0] = to_float(*from);
  else unpack(*reinterpret_cast<const uint4*>(from), out, T{});
}
template <int N, class T>
__device__ inline void store(T* to, const float (&values)[N]) {
  if constexpr (N == 1) from_float(values[0], to);
  else *reinterpret_cast<uint4*>(to) = packed(values, T{});
}

// The sums of COUNT numbers over the threads of a block, the same in every thread.
template <int COUNT>
__device__ inline void block_sums(float (&values)[COUNT], float* shared) {
#pragma unroll
  for (int c = 0; c < COUNT; c++)
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) values[c] += __shfl_xor_sync(kAllLanes, values[c], offset);
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int c = 0; c < COUNT; c++) shared[threadIdx.x / kWarp * COUNT + c] = values[c];
  __syncthreads();
#pragma unroll
  for (int c = 0; c < COUNT; c++) {
    values[c] = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) values[c] += shared[w * COUNT + c];
  }
}

// ---- RMS norm of x + delta ----

// sum = x + delta in T (delta and sum null: x itself), out = sum * inverse, rounded, * weight; inverse (null: not wanted) is what
// the backward pass needs. A block a row.
template <int N, class T>
__device__ inline void add_norm(T* out, T* sum, float* inverse, const T* x, const T* delta, const T* weight, int width,
                                float eps, float* shared) {
  i64 row = i64(blockIdx.x) * width;
  float squares[1] = {};
  for (int i = threadIdx.x * N; i < width; i += kThreads * N) {
    float values[N];
    load<N>(x + row + i, values);
    if (delta != nullptr) {
      float more[N];
      load<N>(delta + row + i, more);
#pragma unroll
      for (int j = 0; j < N; j++) values[j] = rounded<T>(values[j] + more[j]);
      store<N>(sum + row + i, values);
    }
#pragma unroll
    for (int j = 0; j < N; j++) squares[0] = fmaf(values[j], values[j], squares[0]);
  }
  block_sums(squares, shared);
  float factor = 1.0f / sqrtf(squares[0] / float(width) + eps);
  if (threadIdx.x == 0 && inverse != nullptr) inverse[blockIdx.x] = factor;
  const T* from = delta == nullptr ? x : sum;  // a thread reads what it wrote itself
  for (int i = threadIdx.x * N; i < width; i += kThreads * N) {
    float values[N], weights[N];
    load<N>(from + row + i, values);
    load<N>(weight + i, weights);
    // The normalised value is rounded before the weight is applied, as transformers does.
#pragma unroll
    for (int j = 0; j < N; j++) values[j] = rounded<T>(values[j] * factor) * weights[j];
    store<N>(out + row + i, values);
  }
}

template <int N, class T>
__device__ inline void add_norm_backward(T* grad_x, const T* grad_out, const T* grad_sum, const T* sum, const T* weight,
                                         const float* inverse, int width, float* shared) {
  i64 row = i64(blockIdx.x) * width;
  float dots[1] = {};
  for (int i = threadIdx.x * N; i < width; i += kThreads * N) {
    float grads[N], weights[N], values[N];
    load<N>(grad_out + row + i, grads);
    load<N>(weight + i, weights);
    load<N>(sum + row + i, values);
#pragma unroll
    for (int j = 0; j < N; j++) dots[0] = fmaf(grads[j] * weights[j], values[j], dots[0]);
  }
  block_sums(dots, shared);
  float factor = inverse[blockIdx.x];
  float mean = dots[0] * factor * factor / float(width);
  for (int i = threadIdx.x * N; i < width; i += kThreads * N) {
    float grads[N], weights[N], values[N], more[N] = {};
    load<N>(grad_out + row + i, grads);
    load<N>(weight + i, weights);
    load<N>(sum + row + i, values);
    if (grad_sum != nullptr) load<N>(grad_sum + row + i, more);
#pragma unroll
    for (int j = 0; j < N; j++) grads[j] = fmaf(fmaf(grads[j], weights[j], -values[j] * mean), factor, more[j]);
    store<N>(grad_x + row + i, grads);
  }
}

// ---- SwiGLU of [rows, 2 width], gate first: silu(gate) * up ----

template <int N, class T>
__device__ inline void swiglu(T* out, const T* gate_up, int width) {
  int i = (blockIdx.y * kThreads + threadIdx.x) * N;
  if (i >= width) return;
  const T* from = gate_up + i64(blockIdx.x) * 2 * width + i;
  float gates[N], ups[N];
  load<N>(from, gates);
  load<N>(from + width, ups);
#pragma unroll
  for (int j = 0; j < N; j++) gates[j] = gates[j] / (expf(-gates[j]) + 1.0f) * ups[j];
  store<N>(out + i64(blockIdx.x) * width + i, gates);
}

template <int N, class T>
__device__ inline void swiglu_backward(T* grad_gate_up, const T* gate_up, const T* grad_out, int width) {
  int i = (blockIdx.y * kThreads + threadIdx.x) * N;
  if (i >= width) return;
  i64 at = i64(blockIdx.x) * 2 * width + i;
  float gates[N], ups[N], grads[N], to_gate[N], to_up[N];
  load<N>(gate_up + at, gates);
  load<N>(gate_up + at + width, ups);
  load<N>(grad_out + i64(blockIdx.x) * width + i, grads);
#pragma unroll
  for (int j = 0; j < N; j++) {
    float sigmoid = 1.0f / (expf(-gates[j]) + 1.0f);
    to_up[j] = grads[j] * gates[j] * sigmoid;
    to_gate[j] = grads[j] * ups[j] * sigmoid * (1.0f + gates[j] * (1.0f - sigmoid));
  }
  store<N>(grad_gate_up + at, to_gate);
  store<N>(grad_gate_up + at + width, to_up);
}

// ---- rotary embedding, half-split as in transformers; queries, keys and values part ways ----

// Row i of qkv [rows, (heads + 2 kv_heads) head_size]: its queries, rotated by the angles of positions[i], go to row i of q, its
// keys, rotated, and its values to row slots[i] (slots null: i) of k and v. A block a row.
template <class T>
__device__ inline void rotate(T* q, T* k, T* v, const T* qkv, const i64* positions, const i64* slots, const float* cos_sin,
                              int heads, int kv_heads, int head_size) {
  i64 row = blockIdx.x, slot = slots == nullptr ? row : slots[row];
  int half = head_size / 2, key_width = kv_heads * head_size;
  const float* cosines = cos_sin + positions[row] * head_size;
  const float* sines = cosines + half;
  const T* from = qkv + row * (i64(heads) * head_size + 2 * key_width);
  for (int p = threadIdx.x; p < (heads + kv_heads) * half; p += kThreads) {
    int head = p / half, i = p % half;
    const T* in = from + head * head_size + i;
    T* out = head < heads ? q + (row * heads + head) * head_size + i : k + (slot * kv_heads + head - heads) * head_size + i;
    float a = to_float(in[0]), b = to_float(in[half]), c = cosines[i], s = sines[i];
    from_float(a * c - b * s, out);
    from_float(b * c + a * s, out + half);
  }
  from += (heads + kv_heads) * head_size;
  for (int i = threadIdx.x; i < key_width; i += kThreads) v[slot * key_width + i] = from[i];
}

// Gradients to q, k and v, row by row, to that of qkv.
template <class T>
__device__ inline void rotate_backward(T* grad_qkv, const T* grad_q, const T* grad_k, const T* grad_v, const i64* positions,
                                       const float* cos_sin, int heads, int kv_heads, int head_size) {
  i64 row = blockIdx.x;
  int half = head_size / 2, key_width = kv_heads * head_size;
  const float* cosines = cos_sin + positions[row] * head_size;
  const float* sines = cosines + half;
  T* to = grad_qkv + row * (i64(heads) * head_size + 2 * key_width);
  for (int p = threadIdx.x; p < (heads + kv_heads) * half; p += kThreads) {
    int head = p / half, i = p % half;
    const T* in = head < heads ? grad_q + (row * heads + head) * head_size + i
                               : grad_k + (row * kv_heads + head - heads) * head_size + i;
    T* out = to + head * head_size + i;
    float a = to_float(in[0]), b = to_float(in[half]), c = cosines[i], s = sines[i];
    from_float(a * c + b * s, out);
    from_float(b * c - a * s, out + half);
  }
  to += (heads + kv_heads) * head_size;
  for (int i = threadIdx.x; i < key_width; i += kThreads) to[i] = grad_v[row * key_width + i];
}

// ---- LoRA's products for few rows ----

constexpr int kLoraRows = 4;  // rows of x that share one reading of a factor

// down[m, r] = sum_k x[m, k] a[r, k]: block (r, group of rows).
template <int N, class T>
__device__ inline void lora_down(T* down, const T* x, const T* a, int rows, int inputs, int rank, float* shared) {
  int r = blockIdx.x, first = blockIdx.y * kLoraRows;
  float sums[kLoraRows] = {};
  for (int i = threadIdx.x * N; i < inputs; i += kThreads * N) {
    float factor[N];
    load<N>(a + i64(r) * inputs + i, factor);
#pragma unroll
    for (int m = 0; m < kLoraRows; m++) {
      if (first + m >= rows) break;
      float values[N];
      load<N>(x + i64(first + m) * inputs + i, values);
#pragma unroll
      for (int j = 0; j < N; j++) sums[m] = fmaf(values[j], factor[j], sums[m]);
    }
  }
  block_sums(sums, shared);
  if (threadIdx.x == 0)
#pragma unroll
    for (int m = 0; m < kLoraRows; m++)
      if (first + m < rows) from_float(sums[m], down + i64(first + m) * rank + r);
}

// y[m, n] += sum_r down[m, r] b[n, r]: a thread an output, its rows together.
template <int N, class T>
__device__ inline void lora_up(T* y, const T* down, const T* b, int rows, int rank, int outputs) {
  int n = blockIdx.x * kThreads + threadIdx.x, first = blockIdx.y * kLoraRows;
  if (n >= outputs) return;
  float sums[kLoraRows] = {};
  for (int r = 0; r < rank; r += N) {
    float factor[N];
    load<N>(b + i64(n) * rank + r, factor);
#pragma unroll
    for (int m = 0; m < kLoraRows; m++) {
      if (first + m >= rows) break;
      float values[N];
      load<N>(down + i64(first + m) * rank + r, values);
#pragma unroll
      for (int j = 0; j < N; j++) sums[m] = fmaf(values[j], factor[j], sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kLoraRows; m++) {
    if (first + m >= rows) break;
    T* to = y + i64(first + m) * outputs + n;
    from_float(to_float(*to) + sums[m], to);
  }
}

// ---- LoRA's factors of up to three layers that share their input, joined and rounded, and their gradients parted again ----

constexpr int kParts = 3;
struct Parts {
  int ranks[kParts], outputs[kParts];  // a layer without an adapter has rank 0
};
// Where entry i of the parts laid one after another lies: its part, and how far into it.
struct Place {
  int part, at;
};
__device__ inline Place place_of(const int (&sizes)[kParts], int i) {
  if (i < sizes[0]) return Place{0, i};
  i -= sizes[0];
  if (i < sizes[1]) return Place{1, i};
  return Place{2, i - sizes[1]};
}
// By comparisons: an index that is not known when compiling would send the array to the stack.
template <class V>
__device__ inline V pick(const V (&of)[kParts], int part) {
  return part == 0 ? of[0] : part == 1 ? of[1] : of[2];
}

// a [rank, inputs]: the parts' A one below the other. b [outputs, rank]: the parts' B, times scale, along a diagonal.
template <class T>
__device__ inline void lora_join(T* a, T* b, const float* const (&as)[kParts], const float* const (&bs)[kParts], int inputs,
                                 const Parts& parts, float scale) {
  int rank = 0, outputs = 0;
#pragma unroll
  for (int p = 0; p < kParts; p++) {
    rank += parts.ranks[p];
    outputs += parts.outputs[p];
  }
  i64 i = i64(blockIdx.x) * kThreads + threadIdx.x, n_a = i64(rank) * inputs;
  if (i < n_a) {
    Place row = place_of(parts.ranks, int(i / inputs));
    from_float(pick(as, row.part)[i64(row.at) * inputs + i % inputs], a + i);
    return;
  }
  i -= n_a;
  if (i >= i64(outputs) * rank) return;
  Place row = place_of(parts.outputs, int(i / rank)), column = place_of(parts.ranks, int(i % rank));
  float value = 0.0f;
  if (row.part == column.part) value = pick(bs, row.part)[i64(row.at) * pick(parts.ranks, row.part) + column.at] * scale;
  from_float(value, b + i);
}

// The other way round: grads of a and b to those of the parts, in f32.
template <class T>
__device__ inline void lora_part(float* const (&as)[kParts], float* const (&bs)[kParts], const T* grad_a, const T* grad_b,
                                 int inputs, const Parts& parts, float scale) {
  int rank = 0, outputs = 0;
#pragma unroll
  for (int p = 0; p < kParts; p++) {
    rank += parts.ranks[p];
    outputs += parts.outputs[p];
  }
  i64 i = i64(blockIdx.x) * kThreads + threadIdx.x, n_a = i64(rank) * inputs;
  if (i < n_a) {
    Place row = place_of(parts.ranks, int(i / inputs));
    pick(as, row.part)[i64(row.at) * inputs + i % inputs] = to_float(grad_a[i]);
    return;
  }
  i -= n_a;
  if (i >= i64(outputs) * rank) return;
  Place row = place_of(parts.outputs, int(i / rank)), column = place_of(parts.ranks, int(i % rank));
  if (row.part == column.part) pick(bs, row.part)[i64(row.at) * pick(parts.ranks, row.part) + column.at] = to_float(grad_b[i]) * scale;
}

}  // namespace rows

// Vectors where rows are whole ones, else number by number.
#define BY_VECTORS(T, width, call)                       \
  if ((width) % Vector<T>::kValues == 0) {               \
    constexpr int N = Vector<T>::kValues;                \
    call;                                                \
  } else {                                               \
    constexpr int N = 1;                                 \
    call;                                                \
  }

#define ROWS(T)                                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) add_norm_##T(                                                        \
      T* out, T* sum, float* inverse, const T* x, const T* delta, const T* weight, int width, float eps) {                    \
    DYNAMIC_SHARED(shared);                                                                                                   \
    BY_VECTORS(T, width, (rows::add_norm<N>(out, sum, inverse, x, delta, weight, width, eps, (float*)shared)))                \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) add_norm_backward_##T(                                               \
      T* grad_x, const T* grad_out, const T* grad_sum, const T* sum, const T* weight, const float* inverse, int width) {      \
    DYNAMIC_SHARED(shared);                                                                                                   \
    BY_VECTORS(T, width,                                                                                                      \
               (rows::add_norm_backward<N>(grad_x, grad_out, grad_sum, sum, weight, inverse, width, (float*)shared)))         \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) swiglu_##T(T* out, const T* gate_up, int width) {                    \
    BY_VECTORS(T, width, (rows::swiglu<N>(out, gate_up, width)))                                                              \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) swiglu_backward_##T(T* grad_gate_up, const T* gate_up,               \
                                                                              const T* grad_out, int width) {                 \
    BY_VECTORS(T, width, (rows::swiglu_backward<N>(grad_gate_up, gate_up, grad_out, width)))                                  \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) rotate_##T(                                                          \
      T* q, T* k, T* v, const T* qkv, const i64* positions, const i64* slots, const float* cos_sin, int heads, int kv_heads,  \
      int head_size) {                                                                                                        \
    rows::rotate(q, k, v, qkv, positions, slots, cos_sin, heads, kv_heads, head_size);                                        \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) rotate_backward_##T(                                                 \
      T* grad_qkv, const T* grad_q, const T* grad_k, const T* grad_v, const i64* positions, const float* cos_sin, int heads,  \
      int kv_heads, int head_size) {                                                                                          \
    rows::rotate_backward(grad_qkv, grad_q, grad_k, grad_v, positions, cos_sin, heads, kv_heads, head_size);                  \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) lora_down_##T(T* down, const T* x, const T* a, int n_rows,           \
                                                                        int inputs, int rank) {                               \
    DYNAMIC_SHARED(shared);                                                                                                   \
    BY_VECTORS(T, inputs, (rows::lora_down<N>(down, x, a, n_rows, inputs, rank, (float*)shared)))                             \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) lora_up_##T(T* y, const T* down, const T* b, int n_rows, int rank,   \
                                                                      int outputs) {                                          \
    BY_VECTORS(T, rank, (rows::lora_up<N>(y, down, b, n_rows, rank, outputs)))                                                \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) lora_join_##T(                                                       \
      T* a, T* b, const float* a0, const float* a1, const float* a2, const float* b0, const float* b1, const float* b2,       \
      int inputs, int r0, int r1, int r2, int o0, int o1, int o2, float scale) {                                              \
    rows::lora_join(a, b, {a0, a1, a2}, {b0, b1, b2}, inputs, rows::Parts{{r0, r1, r2}, {o0, o1, o2}}, scale);                \
  }                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) lora_part_##T(                                                       \
      float* a0, float* a1, float* a2, float* b0, float* b1, float* b2, const T* grad_a, const T* grad_b, int inputs, int r0, \
      int r1, int r2, int o0, int o1, int o2, float scale) {                                                                  \
    rows::lora_part({a0, a1, a2}, {b0, b1, b2}, grad_a, grad_b, inputs, rows::Parts{{r0, r1, r2}, {o0, o1, o2}}, scale);      \
  }

// NVRTC builds one number format at a time.
#if defined(ARETE_F32) || defined(ARETE_SIMT)
ROWS(f32)
#endif
#if defined(ARETE_BF16) || defined(ARETE_SIMT)
ROWS(bf16)
#endif
#if defined(ARETE_F16) || defined(ARETE_SIMT)
ROWS(f16)
#endif
