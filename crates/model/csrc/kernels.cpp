// See kernels.h. Compiled three times with ARETE_KERNELS naming the table and different -march flags.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace arete {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

inline f32x16 splat(float x) { return f32x16{} + x; }

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

// exp(x) to about 1 ulp for x in [-87, 88]; 0 below; NaN stays NaN. Cody-Waite reduction and a degree-6 polynomial (Cephes
// expf).
inline f32x16 exp16(f32x16 x) {
  i32x16 tiny = x < splat(-87.0f);
  x = tiny ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
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

// ---- norms and activations ----

template <class T>
void rms_norm(const void* x_, const void* delta_, const void* weight_, void* sum_, void* out_, float* inverse_rms,
              int64_t begin, int64_t end, int64_t width, float eps) {
  const T* weight = (const T*)weight_;
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)x_ + row * width;
    const T* delta = delta_ ? (const T*)delta_ + row * width : nullptr;
    T* sum = sum_ ? (T*)sum_ + row * width : nullptr;
    T* out = (T*)out_ + row * width;
    f32x16 squares = splat(0);
    float tail = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      f32x16 value = load16(x + i);
      if (delta) {
        value = round16<T>(value + load16(delta + i));
        store16(sum + i, value);
      }
      squares += value * value;
    }
    for (; i < width; i++) {
      float value = to_float(x[i]);
      if (delta) {
        value = rounded<T>(value + to_float(delta[i]));
        from_float(value, sum + i);
      }
      tail += value * value;
    }
    float inverse = 1.0f / std::sqrt((sum16(squares) + tail) / float(width) + eps);
    inverse_rms[row] = inverse;
    const T* from = delta ? sum : x;
    // The normalised value is rounded before the weight is applied, as transformers does.
    for (i = 0; i + 16 <= width; i += 16)
      store16(out + i, round16<T>(load16(from + i) * inverse) * load16(weight + i));
    for (; i < width; i++) from_float(rounded<T>(to_float(from[i]) * inverse) * to_float(weight[i]), out + i);
  }
}

template <class T>
void rms_norm_backward(const void* grad_out_, const void* grad_sum_, const void* sum_, const void* weight_,
                       const float* inverse_rms, void* grad_x_, int64_t begin, int64_t end, int64_t width) {
  const T* weight = (const T*)weight_;
  for (int64_t row = begin; row < end; row++) {
    const T* grad_out = (const T*)grad_out_ + row * width;
    const T* grad_sum = grad_sum_ ? (const T*)grad_sum_ + row * width : nullptr;
    const T* x = (const T*)sum_ + row * width;
    T* grad_x = (T*)grad_x_ + row * width;
    float inverse = inverse_rms[row];
    f32x16 dots = splat(0);
    float tail = 0;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) dots += load16(grad_out + i) * load16(weight + i) * load16(x + i);
    for (; i < width; i++) tail += to_float(grad_out[i]) * to_float(weight[i]) * to_float(x[i]);
    float mean = (sum16(dots) + tail) * inverse * inverse / float(width);
    for (i = 0; i + 16 <= width; i += 16) {
      f32x16 grad = (load16(grad_out + i) * load16(weight + i) - load16(x + i) * mean) * inverse;
      if (grad_sum) grad += load16(grad_sum + i);
      store16(grad_x + i, grad);
    }
    for (; i < width; i++) {
      float grad = (to_float(grad_out[i]) * to_float(weight[i]) - to_float(x[i]) * mean) * inverse;
      if (grad_sum) grad += to_float(grad_sum[i]);
      from_float(grad, grad_x + i);
    }
  }
}

template <class T>
void swiglu(const void* gate_up_, void* out_, int64_t begin, int64_t end, int64_t width) {
  for (int64_t row = begin; row < end; row++) {
    const T* gate = (const T*)gate_up_ + row * 2 * width;
    const T* up = gate + width;
    T* out = (T*)out_ + row * width;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      f32x16 g = load16(gate + i);
      store16(out + i, g / (exp16(-g) + 1.0f) * load16(up + i));
    }
    for (; i < width; i++) {
      float g = to_float(gate[i]);
      from_float(g / (std::exp(-g) + 1.0f) * to_float(up[i]), out + i);
    }
  }
}

template <class T>
void swiglu_backward(const void* gate_up_, const void* grad_out_, void* grad_gate_up_, int64_t begin, int64_t end,
                     int64_t width) {
  for (int64_t row = begin; row < end; row++) {
    const T* gate = (const T*)gate_up_ + row * 2 * width;
    const T* up = gate + width;
    const T* grad_out = (const T*)grad_out_ + row * width;
    T* grad_gate = (T*)grad_gate_up_ + row * 2 * width;
    T* grad_up = grad_gate + width;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      f32x16 g = load16(gate + i), grad = load16(grad_out + i);
      f32x16 sigmoid = 1.0f / (exp16(-g) + 1.0f);
      store16(grad_up + i, grad * g * sigmoid);
      store16(grad_gate + i, grad * load16(up + i) * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    }
    for (; i < width; i++) {
      float g = to_float(gate[i]), grad = to_float(grad_out[i]);
      float sigmoid = 1.0f / (std::exp(-g) + 1.0f);
      from_float(grad * g * sigmoid, grad_up + i);
      from_float(grad * to_float(up[i]) * sigmoid * (1.0f + g * (1.0f - sigmoid)), grad_gate + i);
    }
  }
}

// ---- rotary position embedding: half-split layout of transformers ----

// Row i of `in` goes to row slots[i] (or i) of `out`, rotated by the angles of positions[i]; `inverse` rotates back.
template <class T>
void rope(const void* in_, int64_t in_stride, void* out_, int64_t out_stride, const int64_t* slots,
          const int64_t* positions, const float* cos_sin, int64_t heads, int64_t head_size, bool inverse, int64_t begin,
          int64_t end) {
  int64_t half = head_size / 2;
  for (int64_t row = begin; row < end; row++) {
    const float* cosines = cos_sin + positions[row] * head_size;
    const float* sines = cosines + half;
    float sign = inverse ? -1.0f : 1.0f;
    for (int64_t head = 0; head < heads; head++) {
      const T* in = (const T*)in_ + row * in_stride + head * head_size;
      T* out = (T*)out_ + (slots ? slots[row] : row) * out_stride + head * head_size;
      int64_t i = 0;
      for (; i + 16 <= half; i += 16) {
        f32x16 a = load16(in + i), b = load16(in + half + i), c = load16(cosines + i), s = load16(sines + i) * sign;
        store16(out + i, a * c - b * s);
        store16(out + half + i, b * c + a * s);
      }
      for (; i < half; i++) {
        float a = to_float(in[i]), b = to_float(in[half + i]), c = cosines[i], s = sines[i] * sign;
        from_float(a * c - b * s, out + i);
        from_float(b * c + a * s, out + half + i);
      }
    }
  }
}

// ---- attention ----

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
      if (!data) {
        capacity = 0;
        throw std::bad_alloc();  // libtorch's loops hand it to their caller
      }
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

// The slot of every position that the segment's last row can see.
inline int64_t list_slots(const Segment& segment, const Span* spans, Buffer<int64_t>& slots) {
  int64_t total = 0, n = 0;
  for (int64_t s = 0; s < segment.n_spans; s++) total += spans[segment.span + s].length;
  int64_t* out = slots.at_least(total);
  for (int64_t s = 0; s < segment.n_spans; s++)
    for (int64_t i = 0; i < spans[segment.span + s].length; i++) out[n++] = spans[segment.span + s].slot + i;
  return total;
}

// Turns scores[0, n), whole blocks, into exp(score - max), and returns (max, sum).
inline std::pair<float, float> exponentials(float* scores, int64_t n) {
  f32x16 tops = splat(-INFINITY);
  for (int64_t j = 0; j < n; j += 16) tops = max16(tops, load16(scores + j));
  float top = highest(tops);
  f32x16 sum = splat(0);
  for (int64_t j = 0; j < n; j += 16) {
    f32x16 e = exp16(load16(scores + j) - splat(top));
    sum += e;
    store16(scores + j, e);
  }
  return {top, sum16(sum)};
}

// Attention works on blocks of sixteen positions. "Across" is a block turned round: for every element of the head the
// sixteen positions side by side, so that sixteen scores are one chain of multiply-adds over the head, in the same order
// however many rows share the block.
constexpr int64_t kBlock = 16;
#ifdef __AVX512F__
constexpr int kTile = 4;  // blocks, or sixteenths of a head, whose sums are held in registers at a time
#else
constexpr int kTile = 1;
#endif

// Sixteen rows of sixteen become columns.
inline void transpose(f32x16 rows[16]) {
  f32x16 other[16];
  for (int round = 0; round < 4; round++) {  // each round moves row i + 8 between the elements of row i
    for (int i = 0; i < 8; i++) {
      f32x16 a = rows[i], b = rows[i + 8];
      other[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      other[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; i++) rows[i] = other[i];
  }
}

// The positions [16 b, 16 b + 16) of a head's keys or values in f32: as they are (if `along`) and across; missing ones are 0.
template <class T>
void widen_block(const T* head, int64_t stride, const int64_t* slots, int64_t b, int64_t last, int64_t head_size,
                 int64_t chunks, float* along, float* across) {
  int64_t n = std::min(kBlock, last - b * kBlock), padded = chunks * 16;
  for (int64_t c = 0; c < chunks; c++) {
    f32x16 rows[16];
    int64_t width = std::min<int64_t>(16, head_size - 16 * c);
    for (int64_t j = 0; j < kBlock; j++) {
      rows[j] = splat(0);
      if (j >= n) continue;
      const T* from = head + slots[b * kBlock + j] * stride + 16 * c;
      if (width == 16) {
        rows[j] = load16(from);
      } else {
        float part[16] = {};
        for (int64_t i = 0; i < width; i++) part[i] = to_float(from[i]);
        rows[j] = load16(part);
      }
    }
    if (along)
      for (int64_t j = 0; j < kBlock; j++) store16(along + (b * kBlock + j) * padded + 16 * c, rows[j]);
    if (!across) continue;
    transpose(rows);
    for (int64_t i = 0; i < 16; i++) store16(across + (b * padded + 16 * c + i) * kBlock, rows[i]);
  }
}

// out[q][j] = dot(rows[q], position j) for Q rows and the positions of blocks [from, to), given across.
template <int C, int Q, int B>
inline void dots_of_blocks(const float* rows, const float* across, int64_t chunks, int64_t block, float* out,
                           int64_t out_stride) {
  int64_t padded = (C ? C : chunks) * 16;
  f32x16 sums[Q][B];
  for (int q = 0; q < Q; q++)
    for (int b = 0; b < B; b++) sums[q][b] = splat(0);
  const float* at = across + block * padded * kBlock;
  for (int64_t e = 0; e < padded; e++) {
    f32x16 columns[B];
    for (int b = 0; b < B; b++) columns[b] = load16(at + (b * padded + e) * kBlock);
    for (int q = 0; q < Q; q++) {
      f32x16 element = splat(rows[q * padded + e]);
      for (int b = 0; b < B; b++) sums[q][b] += element * columns[b];
    }
  }
  for (int q = 0; q < Q; q++)
    for (int b = 0; b < B; b++) store16(out + q * out_stride + (block + b) * kBlock, sums[q][b]);
}
template <int C, int Q>
inline void dots(const float* rows, const float* across, int64_t chunks, int64_t from, int64_t to, float* out,
                 int64_t out_stride) {
  int64_t b = from;
  for (; b + kTile <= to; b += kTile) dots_of_blocks<C, Q, kTile>(rows, across, chunks, b, out, out_stride);
  for (; b < to; b++) dots_of_blocks<C, Q, 1>(rows, across, chunks, b, out, out_stride);
}

// out[q] += sum over j in [begin, end) of weights[q][j] * along[j], for Q rows, in the order of j.
template <int Q, int W>
inline void add_weighted_chunks(const float* weights, int64_t weight_stride, const float* along, int64_t padded, int64_t begin,
                                int64_t end, float* out) {
  f32x16 sums[Q][W];
  for (int q = 0; q < Q; q++)
    for (int c = 0; c < W; c++) sums[q][c] = load16(out + q * padded + 16 * c);
  for (int64_t j = begin; j < end; j++) {
    f32x16 columns[W];
    for (int c = 0; c < W; c++) columns[c] = load16(along + j * padded + 16 * c);
    for (int q = 0; q < Q; q++) {
      f32x16 weight = splat(weights[q * weight_stride + j]);
      for (int c = 0; c < W; c++) sums[q][c] += weight * columns[c];
    }
  }
  for (int q = 0; q < Q; q++)
    for (int c = 0; c < W; c++) store16(out + q * padded + 16 * c, sums[q][c]);
}
template <int C, int Q>
inline void add_weighted(const float* weights, int64_t weight_stride, const float* along, int64_t chunks, int64_t begin,
                         int64_t end, float* out) {
  int64_t n = C ? C : chunks, padded = n * 16, c = 0;
  for (; c + kTile <= n; c += kTile)
    add_weighted_chunks<Q, kTile>(weights, weight_stride, along + 16 * c, padded, begin, end, out + 16 * c);
  if constexpr (C % kTile != 0 || C == 0)
    for (; c < n; c++) add_weighted_chunks<Q, 1>(weights, weight_stride, along + 16 * c, padded, begin, end, out + 16 * c);
}

// out[j] += sum over q of weights[q][j] * rows[q], for j in [begin, end).
template <int C, int Q>
inline void add_outer(const float* weights, int64_t weight_stride, const float* rows, int64_t chunks, int64_t begin,
                      int64_t end, float* out) {
  int64_t n = C ? C : chunks, padded = n * 16;
  for (int64_t j = begin; j < end; j++)
    for (int64_t c = 0; c < n; c++) {
      f32x16 sum = load16(out + j * padded + 16 * c);
      for (int q = 0; q < Q; q++) sum += splat(weights[q * weight_stride + j]) * load16(rows + q * padded + 16 * c);
      store16(out + j * padded + 16 * c, sum);
    }
}

// One key/value head's part of a row: its position's range of visible keys, in positions and in blocks.
struct Range {
  int64_t begin, end;
  Range(const AttentionShape& shape, const Segment& segment, int64_t row) {
    end = segment.position + (row - segment.row) + 1;
    begin = shape.window > 0 ? std::max<int64_t>(0, end - shape.window) : 0;
  }
  int64_t first_block() const { return begin / kBlock; }
  int64_t end_block() const { return (end + kBlock - 1) / kBlock; }
  // What the blocks hold beyond the range becomes `value`.
  void mask(float* scores, float value) const {
    for (int64_t j = first_block() * kBlock; j < begin; j++) scores[j] = value;
    for (int64_t j = end; j < end_block() * kBlock; j++) scores[j] = value;
  }
};

// Runs `work` with the number of query heads, up to four at a time, that share a key/value head.
template <class Work>
inline void by_fours(int64_t group, Work work) {
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) work(g, std::integral_constant<int, 4>());
  if (group - g == 3) work(g, std::integral_constant<int, 3>());
  if (group - g == 2) work(g, std::integral_constant<int, 2>());
  if (group - g == 1) work(g, std::integral_constant<int, 1>());
}

template <class T, int C>
void attention_rows(const AttentionShape& shape, const Segment& segment, const Span* spans, int64_t kv_head,
                    int64_t row_begin, int64_t row_end, const T* q, const T* k, const T* v, T* out,
                    float* log_sum_exp) {
  Scratch& memory = scratch();
  int64_t n_blocks = (list_slots(segment, spans, memory.slots) + kBlock - 1) / kBlock;
  const int64_t* slots = memory.slots.data;
  int64_t head_size = shape.head_size, group = shape.heads / shape.kv_heads;
  int64_t chunks = (head_size + 15) / 16, padded = chunks * 16, score_stride = n_blocks * kBlock;
  int64_t last = Range(shape, segment, row_end - 1).end;
  float* keys = memory.keys_across.at_least(n_blocks * kBlock * padded);
  float* values = memory.values.at_least(n_blocks * kBlock * padded);
  float* query = memory.query.at_least(group * padded);
  float* scores = memory.scores.at_least(group * score_stride);
  float* output = memory.output.at_least(group * padded);
  for (int64_t b = Range(shape, segment, row_begin).first_block(); b * kBlock < last; b++) {
    widen_block<T>(k + kv_head * head_size, shape.k_stride, slots, b, last, head_size, chunks, nullptr, keys);
    widen_block<T>(v + kv_head * head_size, shape.v_stride, slots, b, last, head_size, chunks, values, nullptr);
  }
  for (int64_t row = row_begin; row < row_end; row++) {
    Range range(shape, segment, row);
    for (int64_t g = 0; g < group; g++) {
      widen(q + row * shape.q_stride + (kv_head * group + g) * head_size, head_size, query + g * padded, padded);
      for (int64_t c = 0; c < chunks; c++)
        store16(query + g * padded + 16 * c, load16(query + g * padded + 16 * c) * shape.scale);
    }
    memset(output, 0, group * padded * 4);
    by_fours(group, [&](int64_t g, auto heads) {
      float* at = scores + g * score_stride;
      dots<C, heads()>(query + g * padded, keys, chunks, range.first_block(), range.end_block(), at, score_stride);
      for (int i = 0; i < heads(); i++) {
        float* row_scores = at + i * score_stride;
        range.mask(row_scores, -INFINITY);
        int64_t start = range.first_block() * kBlock, n = range.end_block() * kBlock - start;
        auto [top, total] = exponentials(row_scores + start, n);
        if (log_sum_exp) log_sum_exp[row * shape.heads + kv_head * group + g + i] = top + std::log(total);
        float inverse = 1.0f / total;
        for (int64_t j = start; j < start + n; j += 16) store16(row_scores + j, load16(row_scores + j) * inverse);
      }
      add_weighted<C, heads()>(at, score_stride, values, chunks, range.begin, range.end, output + g * padded);
    });
    for (int64_t g = 0; g < group; g++)
      narrow(output + g * padded, head_size, out + row * shape.out_stride + (kv_head * group + g) * head_size);
  }
}

template <class T>
void attention(const AttentionShape& shape, const Segment& segment, const Span* spans, int64_t kv_head,
               int64_t row_begin, int64_t row_end, const void* q, const void* k, const void* v, void* out,
               float* log_sum_exp) {
  auto run = shape.head_size == 64 ? attention_rows<T, 4> : shape.head_size == 128 ? attention_rows<T, 8> : attention_rows<T, 0>;
  run(shape, segment, spans, kv_head, row_begin, row_end, (const T*)q, (const T*)k, (const T*)v, (T*)out, log_sum_exp);
}

template <class T, int C>
void attention_backward_rows(const AttentionShape& shape, const Segment& segment, const Span* spans, int64_t kv_head,
                             const T* q, const T* k, const T* v, const T* out, const T* grad_out,
                             int64_t grad_out_stride, const float* log_sum_exp, float* grad_q, float* grad_k,
                             float* grad_v) {
  Scratch& memory = scratch();
  int64_t n_slots = list_slots(segment, spans, memory.slots), n_blocks = (n_slots + kBlock - 1) / kBlock;
  const int64_t* slots = memory.slots.data;
  int64_t head_size = shape.head_size, group = shape.heads / shape.kv_heads;
  int64_t chunks = (head_size + 15) / 16, padded = chunks * 16, size = n_blocks * kBlock * padded;
  int64_t stride = n_blocks * kBlock;  // of rows of scores
  float* keys = memory.keys.at_least(size);
  float* keys_across = memory.keys_across.at_least(size);
  float* values_across = memory.values_across.at_least(size);
  float* grad_keys = memory.grads.at_least(2 * size);
  float* grad_values = grad_keys + size;
  float* query = memory.query.at_least(group * padded);
  float* grad_output = memory.grad_output.at_least(group * padded);
  float* grad_query = memory.output.at_least((group + 1) * padded);
  float* output = grad_query + group * padded;
  float* probabilities = memory.scores.at_least(2 * group * stride);
  float* grad_scores = probabilities + group * stride;
  memset(grad_keys, 0, 2 * size * 4);
  for (int64_t b = 0; b < n_blocks; b++) {
    widen_block<T>(k + kv_head * head_size, shape.k_stride, slots, b, n_slots, head_size, chunks, keys, keys_across);
    widen_block<T>(v + kv_head * head_size, shape.v_stride, slots, b, n_slots, head_size, chunks, nullptr, values_across);
  }
  for (int64_t row = segment.row; row < segment.row + segment.n_rows; row++) {
    Range range(shape, segment, row);
    int64_t from = range.first_block(), to = range.end_block();
    for (int64_t g = 0; g < group; g++) {
      int64_t head = kv_head * group + g;
      widen(q + row * shape.q_stride + head * head_size, head_size, query + g * padded, padded);
      for (int64_t c = 0; c < chunks; c++)
        store16(query + g * padded + 16 * c, load16(query + g * padded + 16 * c) * shape.scale);
      widen(grad_out + row * grad_out_stride + head * head_size, head_size, grad_output + g * padded, padded);
    }
    memset(grad_query, 0, group * padded * 4);
    by_fours(group, [&](int64_t g, auto heads) {
      float *p = probabilities + g * stride, *ds = grad_scores + g * stride;
      const float *queries = query + g * padded, *grads = grad_output + g * padded;
      dots<C, heads()>(queries, keys_across, chunks, from, to, p, stride);
      dots<C, heads()>(grads, values_across, chunks, from, to, ds, stride);
      for (int i = 0; i < heads(); i++) {
        int64_t head = kv_head * group + g + i;
        widen(out + row * shape.out_stride + head * head_size, head_size, output, padded);
        f32x16 products = splat(0);
        for (int64_t c = 0; c < chunks; c++) products += load16(grads + i * padded + 16 * c) * load16(output + 16 * c);
        float total = sum16(products), log_sum = log_sum_exp[row * shape.heads + head];
        range.mask(p + i * stride, -INFINITY);
        for (int64_t j = from * kBlock; j < to * kBlock; j += 16) {
          f32x16 probability = exp16(load16(p + i * stride + j) - splat(log_sum));
          store16(p + i * stride + j, probability);
          store16(ds + i * stride + j, probability * (load16(ds + i * stride + j) - splat(total)));
        }
      }
      add_outer<C, heads()>(p, stride, grads, chunks, range.begin, range.end, grad_values);
      add_outer<C, heads()>(ds, stride, queries, chunks, range.begin, range.end, grad_keys);  // queries carry the scale
      add_weighted<C, heads()>(ds, stride, keys, chunks, range.begin, range.end, grad_query + g * padded);
    });
    float* to_q = grad_q + (row * shape.heads + kv_head * group) * head_size;
    for (int64_t g = 0; g < group; g++)
      for (int64_t i = 0; i < head_size; i++) to_q[g * head_size + i] = grad_query[g * padded + i] * shape.scale;
  }
  for (int64_t j = 0; j < n_slots; j++) {
    float* to_k = grad_k + (slots[j] * shape.kv_heads + kv_head) * head_size;
    float* to_v = grad_v + (slots[j] * shape.kv_heads + kv_head) * head_size;
    for (int64_t i = 0; i < head_size; i++) {
      to_k[i] += grad_keys[j * padded + i];
      to_v[i] += grad_values[j * padded + i];
    }
  }
}

template <class T>
void attention_backward(const AttentionShape& shape, const Segment& segment, const Span* spans, int64_t kv_head,
                        const void* q, const void* k, const void* v, const void* out, const void* grad_out,
                        int64_t grad_out_stride, const float* log_sum_exp, float* grad_q, float* grad_k, float* grad_v) {
  auto run = shape.head_size == 64    ? attention_backward_rows<T, 4>
             : shape.head_size == 128 ? attention_backward_rows<T, 8>
                                      : attention_backward_rows<T, 0>;
  run(shape, segment, spans, kv_head, (const T*)q, (const T*)k, (const T*)v, (const T*)out, (const T*)grad_out,
      grad_out_stride, log_sum_exp, grad_q, grad_k, grad_v);
}

// ---- vocabulary: log-probabilities and sampling ----

template <class T>
float row_max(const T* logits, int64_t width) {
  f32x16 top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) top = max16(top, load16(logits + i));
  float out = highest(top);
  for (; i < width; i++) out = std::max(out, to_float(logits[i]));
  return out;
}

// Sum of exp((logit - top) * inverse_temperature) over [begin, end), in a fixed order.
template <class T>
double sum_exp(const T* logits, int64_t begin, int64_t end, float top, float inverse_temperature) {
  f32x16 sum = splat(0);
  float tail = 0;
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) sum += exp16((load16(logits + i) - splat(top)) * inverse_temperature);
  for (; i < end; i++) tail += std::exp((to_float(logits[i]) - top) * inverse_temperature);
  return double(sum16(sum)) + double(tail);
}

constexpr int64_t kVocabularyBlock = 1024;  // partial sums of this many exponentials are added in f64

template <class T>
double sum_exp_blocks(const T* logits, int64_t width, float top, float inverse_temperature) {
  double total = 0;
  for (int64_t b = 0; b < width; b += kVocabularyBlock)
    total += sum_exp(logits, b, std::min(width, b + kVocabularyBlock), top, inverse_temperature);
  return total;
}

template <class T>
void token_logprob(void* logits_, const int64_t* targets, float inverse_temperature, float* logprob, float* entropy,
                   bool softmax, int64_t begin, int64_t end, int64_t width) {
  for (int64_t row = begin; row < end; row++) {
    T* logits = (T*)logits_ + row * width;
    float top = row_max(logits, width);
    double total = sum_exp_blocks(logits, width, top, inverse_temperature);
    double log_total = std::log(total);
    logprob[row] = float(double((to_float(logits[targets[row]]) - top) * inverse_temperature) - log_total);
    if (!entropy && !softmax) continue;
    float inverse = float(1.0 / total);
    double weighted = 0;
    for (int64_t b = 0; b < width; b += kVocabularyBlock) {
      int64_t stop = std::min(width, b + kVocabularyBlock), i = b;
      f32x16 sum = splat(0);
      float tail = 0;
      for (; i + 16 <= stop; i += 16) {
        f32x16 scaled = (load16(logits + i) - splat(top)) * inverse_temperature;
        f32x16 probability = exp16(scaled) * inverse;
        sum += probability > splat(0) ? probability * scaled : splat(0);
        if (softmax) store16(logits + i, probability);
      }
      for (; i < stop; i++) {
        float scaled = (to_float(logits[i]) - top) * inverse_temperature;
        float probability = std::exp(scaled) * inverse;
        if (probability > 0) tail += probability * scaled;
        if (softmax) from_float(probability, logits + i);
      }
      weighted += double(sum16(sum)) + double(tail);
    }
    if (entropy) entropy[row] = float(log_total - weighted);
  }
}

// Draws by inverting the cumulative distribution over tokens in vocabulary order (or in order of falling logits under
// top-k / top-p). The log-probability is that of the whole distribution at the sampling temperature.
template <class T>
void sample(const void* logits_, const double* uniform, const SampleSettings* settings, int64_t* token, float* logprob,
            int64_t begin, int64_t end, int64_t width) {
  for (int64_t row = begin; row < end; row++) {
    const T* logits = (const T*)logits_ + row * width;
    SampleSettings set = settings[row];
    bool greedy = set.temperature == 0;
    float inverse_temperature = greedy ? 1.0f : 1.0f / set.temperature;
    float top = row_max(logits, width);
    double total = sum_exp_blocks(logits, width, top, inverse_temperature);
    if (!std::isfinite(total)) {  // a logit is NaN or infinite: nothing is drawn, and the caller sees why
      token[row] = 0;
      logprob[row] = NAN;
      continue;
    }
    int64_t chosen = width - 1;
    if (greedy) {
      chosen = 0;
      while (chosen + 1 < width && to_float(logits[chosen]) != top) chosen++;
    } else if (set.top_k == 0 && set.top_p >= 1.0f) {
      double left = uniform[row] * total;
      for (int64_t b = 0; b < width; b += kVocabularyBlock) {
        int64_t stop = std::min(width, b + kVocabularyBlock);
        double mass = sum_exp(logits, b, stop, top, inverse_temperature);
        if (left >= mass && stop < width) {
          left -= mass;
          continue;
        }
        // Rounding can leave a remainder past the block's last token: the most probable one of the block then stands in.
        int64_t best = b;
        chosen = -1;
        for (int64_t i = b; i < stop; i++) {
          if (to_float(logits[i]) > to_float(logits[best])) best = i;
          left -= double(std::exp((to_float(logits[i]) - top) * inverse_temperature));
          if (left < 0) {
            chosen = i;
            break;
          }
        }
        if (chosen < 0) chosen = best;
        break;
      }
    } else {
      int64_t* order = scratch().slots.at_least(width);
      for (int64_t i = 0; i < width; i++) order[i] = i;
      auto before = [&](int64_t a, int64_t b) {
        float x = to_float(logits[a]), y = to_float(logits[b]);
        return x != y ? x > y : a < b;
      };
      int64_t keep = set.top_k > 0 ? std::min(set.top_k, width) : width;
      std::partial_sort(order, order + keep, order + width, before);
      double kept = 0;
      for (int64_t i = 0; i < keep; i++) kept += std::exp(double(to_float(logits[order[i]]) - top) * inverse_temperature);
      if (set.top_p < 1.0f) {  // the smallest set whose mass (after top-k) reaches top_p
        double mass = 0;
        int64_t n = 0;
        while (n < keep && (n == 0 || mass < double(set.top_p) * kept))
          mass += std::exp(double(to_float(logits[order[n++]]) - top) * inverse_temperature);
        keep = n;
        kept = mass;
      }
      double left = uniform[row] * kept;
      chosen = order[keep - 1];
      for (int64_t i = 0; i < keep; i++) {
        left -= std::exp(double(to_float(logits[order[i]]) - top) * inverse_temperature);
        if (left < 0) {
          chosen = order[i];
          break;
        }
      }
    }
    token[row] = chosen;
    logprob[row] = float(double((to_float(logits[chosen]) - top) * inverse_temperature) - std::log(total));
  }
}

// ---- NF4 ----

constexpr float kNf4Codebook[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The nearest code to x, the lower one at a halfway point. Halfway points are rounded to f32, as bitsandbytes does on the CPU.
inline int nearest_nf4(float x) {
  int index = 0;
  for (int c = 0; c < 15; c++) index += x > (kNf4Codebook[c] + kNf4Codebook[c + 1]) * 0.5f;
  return index;
}

template <class T>
void nf4_quantize(const void* in_, uint8_t* codes, float* absmax, int64_t begin, int64_t end, int64_t block_size,
                  int64_t count) {
  for (int64_t block = begin; block < end; block++) {
    const T* in = (const T*)in_ + block * block_size;
    int64_t n = std::min(block_size, count - block * block_size);
    float largest = 0, check = 0;
    for (int64_t i = 0; i < n; i++) {
      float value = to_float(in[i]);
      largest = std::max(largest, std::fabs(value));
      check += value * 0.0f;  // NaN if a value is not finite
    }
    absmax[block] = largest + check;
    float inverse = 1.0f / std::max(largest, 1e-38f);
    uint8_t* out = codes + block * block_size / 2;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      f32x16 x = load16(in + i) * inverse;
      i32x16 index = {};
      for (int c = 0; c < 15; c++) index -= x > splat((kNf4Codebook[c] + kNf4Codebook[c + 1]) * 0.5f);  // true is -1
      for (int64_t j = 0; j < 8; j++) out[i / 2 + j] = uint8_t(index[2 * j] << 4 | index[2 * j + 1]);
    }
    for (; i < n; i += 2) {
      int high = nearest_nf4(to_float(in[i]) * inverse);
      int low = i + 1 < n ? nearest_nf4(to_float(in[i + 1]) * inverse) : 0;
      out[i / 2] = uint8_t(high << 4 | low);
    }
  }
}

template <class T>
void nf4_dequantize(const uint8_t* codes, const float* absmax, const float* codebook, void* out_, int64_t begin,
                    int64_t end, int64_t block_size) {
  T* out = (T*)out_;
  for (int64_t block = begin; block < end; block++) {
    float table[16];
    T values[16];
    for (int c = 0; c < 16; c++) {
      table[c] = codebook[c] * absmax[block];
      from_float(table[c], values + c);
    }
    const uint8_t* in = codes + block * block_size / 2;
    T* to = out + block * block_size;
    for (int64_t i = 0; i < block_size / 2; i++) {
      to[2 * i] = values[in[i] >> 4];
      to[2 * i + 1] = values[in[i] & 15];
    }
  }
}

#ifdef __AVX2__
constexpr int64_t kGroup = 64;           // elements quantised with one scale: 32 bytes of codes
constexpr float kLargestInteger = 16383;  // eight products of two such integers fit in 32 bits

// Sixty-four elements of x as integers of 15 bits, in the order in which the codes of 32 bytes are unpacked: first those of the
// high nibbles, then those of the low ones; within each, eight from bytes 0-7, 16-23, 8-15, 24-31. Returns the scale.
template <class T>
inline float to_integers(const T* x, int16_t* out) {
  float largest = 0, check = 0;
  for (int64_t i = 0; i < kGroup; i++) {
    float value = to_float(x[i]);
    largest = std::max(largest, std::fabs(value));
    check += value * 0.0f;  // NaN if a value is not finite
  }
  bool usable = largest > 1e-30f && check == 0;
  float inverse = usable ? kLargestInteger / largest : 0.0f;
  for (int64_t half = 0; half < 4; half++) {  // lanes 0-7 and 8-15 of each vector
    int64_t byte = half % 2 * 8;
    int16_t* to = out + half * 16;
    for (int64_t j = 0; j < 8; j++) {
      to[j] = usable ? int16_t(std::lrintf(to_float(x[2 * (byte + j) + half / 2]) * inverse)) : int16_t(0);
      to[j + 8] = usable ? int16_t(std::lrintf(to_float(x[2 * (byte + 16 + j) + half / 2]) * inverse)) : int16_t(0);
    }
  }
  return largest / kLargestInteger + check;
}

// Rows [0, R) of integers against packed rows [begin, end). Sixteen codes become sixteen 16-bit integers by two shuffles (their
// low and high bytes); the products of 64 elements are added as integers, then scaled in f32.
template <class T, int R>
void nf4_matmul_integers(const int16_t* integers, const float* scales, const uint8_t* codes, const float* absmax,
                         const float* codebook, T* y, int64_t columns, int64_t outputs, int64_t block_size, int64_t begin,
                         int64_t end) {
  alignas(16) uint8_t low_bytes[16], high_bytes[16];
  for (int c = 0; c < 16; c++) {
    int value = int(std::lrintf(codebook[c] * kLargestInteger));
    low_bytes[c] = uint8_t(value & 255);
    high_bytes[c] = uint8_t((value >> 8) & 255);
  }
  __m256i low_table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)low_bytes));
  __m256i high_table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)high_bytes));
  __m256i nibble = _mm256_set1_epi8(15);
  int64_t groups = columns / kGroup, per_block = block_size / kGroup;
  for (int64_t n = begin; n < end; n++) {
    const uint8_t* in = codes + n * columns / 2;
    const float* row_absmax = absmax + n * columns / block_size;
    __m256 totals[R];
    for (int m = 0; m < R; m++) totals[m] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
      __m256i bytes = _mm256_loadu_si256((const __m256i*)(in + g * kGroup / 2));
      __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), low = _mm256_and_si256(bytes, nibble);
      __m256i high0 = _mm256_shuffle_epi8(low_table, high), high1 = _mm256_shuffle_epi8(high_table, high);
      __m256i low0 = _mm256_shuffle_epi8(low_table, low), low1 = _mm256_shuffle_epi8(high_table, low);
      __m256i weights[4] = {_mm256_unpacklo_epi8(high0, high1), _mm256_unpackhi_epi8(high0, high1),
                            _mm256_unpacklo_epi8(low0, low1), _mm256_unpackhi_epi8(low0, low1)};
      float scale = row_absmax[per_block == 1 ? g : g / per_block];
      for (int m = 0; m < R; m++) {
        const __m256i* x = (const __m256i*)(integers + m * columns + g * kGroup);
        __m256i sum = _mm256_add_epi32(
            _mm256_add_epi32(_mm256_madd_epi16(weights[0], x[0]), _mm256_madd_epi16(weights[1], x[1])),
            _mm256_add_epi32(_mm256_madd_epi16(weights[2], x[2]), _mm256_madd_epi16(weights[3], x[3])));
        totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale * scales[m * groups + g]), totals[m]);
      }
    }
    for (int m = 0; m < R; m++) {
      f32x8 t = (f32x8)totals[m];
      f32x4 b = __builtin_shufflevector(t, t, 0, 1, 2, 3) + __builtin_shufflevector(t, t, 4, 5, 6, 7);
      from_float(((b[0] + b[2]) + (b[1] + b[3])) * (1.0f / kLargestInteger), y + m * outputs + n);
    }
  }
}
#else
// Splits a row of x into its even and odd elements, matching the high and low nibbles of the codes.
template <class T>
inline void split_even_odd(const T* x, int64_t columns, float* even, float* odd) {
  for (int64_t i = 0; i < columns / 2; i++) {
    even[i] = to_float(x[2 * i]);
    odd[i] = to_float(x[2 * i + 1]);
  }
}
#endif

template <class T>
void nf4_matmul(const void* x_, const uint8_t* codes, const float* absmax, const float* codebook, void* y_,
                int64_t rows, int64_t columns, int64_t outputs, int64_t block_size, int64_t begin, int64_t end) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  Scratch& memory = scratch();
  [[maybe_unused]] int64_t half = columns / 2, blocks = columns / block_size, half_block = block_size / 2;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    // 32 bf16 activations of each parity against 32 looked-up bf16 codes per instruction; absmax in f32 per block.
    uint16_t* split = (uint16_t*)memory.query.at_least(rows * columns);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < half; i++) {
        split[m * columns + i] = x[m * columns + 2 * i].bits;
        split[m * columns + half + i] = x[m * columns + 2 * i + 1].bits;
      }
    alignas(64) bf16 table_values[32];
    for (int c = 0; c < 32; c++) from_float(codebook[c & 15], table_values + c);
    __m512i table = _mm512_load_si512(table_values);
    for (int64_t n = begin; n < end; n++) {
      const uint8_t* in = codes + n * half;
      const float* scales = absmax + n * blocks;
      for (int64_t m0 = 0; m0 < rows; m0 += 4) {
        int64_t group = std::min<int64_t>(4, rows - m0);
        __m512 totals[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t b = 0; b < blocks; b++) {
          __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
          for (int64_t i = b * half_block; i < (b + 1) * half_block; i += 32) {
            __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(in + i)));
            __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
            __m512bh low = (__m512bh)_mm512_permutexvar_epi16(bytes, table);
            for (int64_t g = 0; g < group; g++) {
              const uint16_t* at = split + (m0 + g) * columns + i;
              sums[g] = _mm512_dpbf16_ps(sums[g], (__m512bh)_mm512_loadu_si512(at), high);
              sums[g] = _mm512_dpbf16_ps(sums[g], (__m512bh)_mm512_loadu_si512(at + half), low);
            }
          }
          __m512 scale = _mm512_set1_ps(scales[b]);
          for (int64_t g = 0; g < group; g++) totals[g] = _mm512_fmadd_ps(sums[g], scale, totals[g]);
        }
        for (int64_t g = 0; g < group; g++) from_float(sum16((f32x16)totals[g]), y + (m0 + g) * outputs + n);
      }
    }
    return;
  }
#endif
#ifdef __AVX2__
  int64_t groups = columns / kGroup;
  int16_t* integers = (int16_t*)memory.query.at_least((rows * columns + 1) / 2);
  float* scales = memory.keys.at_least(rows * groups);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t g = 0; g < groups; g++)
      scales[m * groups + g] = to_integers(x + m * columns + g * kGroup, integers + m * columns + g * kGroup);
  for (int64_t m = 0; m < rows; m += 4) {
    auto run = rows - m == 1   ? nf4_matmul_integers<T, 1>
               : rows - m == 2 ? nf4_matmul_integers<T, 2>
               : rows - m == 3 ? nf4_matmul_integers<T, 3>
                               : nf4_matmul_integers<T, 4>;
    run(integers + m * columns, scales + m * groups, codes, absmax, codebook, y + m * outputs, columns, outputs, block_size,
        begin, end);
  }
#else
  float* split = memory.query.at_least(rows * columns);
  float* weights = memory.keys.at_least(columns);
  for (int64_t m = 0; m < rows; m++) split_even_odd(x + m * columns, columns, split + m * columns, split + m * columns + half);
  for (int64_t n = begin; n < end; n++) {
    const uint8_t* in = codes + n * half;
    for (int64_t b = 0; b < blocks; b++) {
      float table[16];
      for (int c = 0; c < 16; c++) table[c] = codebook[c] * absmax[n * blocks + b];
      for (int64_t i = b * half_block; i < (b + 1) * half_block; i++) {
        weights[i] = table[in[i] >> 4];
        weights[half + i] = table[in[i] & 15];
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      const float* row = split + m * columns;
      f32x16 sum = splat(0);
      int64_t i = 0;
      for (; i + 16 <= columns; i += 16) sum += load16(row + i) * load16(weights + i);
      float tail = 0;
      for (; i < columns; i++) tail += row[i] * weights[i];
      from_float(sum16(sum) + tail, y + m * outputs + n);
    }
  }
#endif
}

template <class T>
void bf16_matmul(const void* x_, const bf16* weight, void* y_, int64_t rows, int64_t columns, int64_t outputs, int64_t begin,
                 int64_t end) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {
    constexpr int kOutputs = 4;
    for (int64_t m = 0; m < rows; m++) {
      const T* row = x + m * columns;
      for (int64_t n = begin; n < end; n += kOutputs) {
        int64_t count = std::min<int64_t>(kOutputs, end - n);
        const bf16* in[kOutputs];
        for (int o = 0; o < kOutputs; o++) in[o] = weight + (n + std::min<int64_t>(o, count - 1)) * columns;
        __m512 sums[kOutputs];
        for (int o = 0; o < kOutputs; o++) sums[o] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 32 <= columns; i += 32) {
          __m512bh part = (__m512bh)_mm512_loadu_si512(row + i);
          for (int o = 0; o < kOutputs; o++) sums[o] = _mm512_dpbf16_ps(sums[o], part, (__m512bh)_mm512_loadu_si512(in[o] + i));
        }
        for (int64_t o = 0; o < count; o++) {
          float tail = 0;
          for (int64_t k = i; k < columns; k++) tail += to_float(row[k]) * to_float(in[o][k]);
          from_float(sum16((f32x16)sums[o]) + tail, y + m * outputs + n + o);
        }
      }
    }
    return;
  }
#endif
  float* wide = scratch().query.at_least(rows * columns);
  for (int64_t m = 0; m < rows; m++) widen(x + m * columns, columns, wide + m * columns, columns);
  for (int64_t n = begin; n < end; n++) {
    const bf16* in = weight + n * columns;
    for (int64_t m = 0; m < rows; m++) {
      const float* row = wide + m * columns;
      f32x16 sums[2] = {splat(0), splat(0)};
      float tail = 0;
      int64_t i = 0;
#ifdef __AVX2__
      // Written out: compilers make much more of the conversion in load16.
      __m256 parts[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
      for (; i + 32 <= columns; i += 32)
        for (int64_t j = 0; j < 4; j++) {
          __m256i wide_bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(in + i + 8 * j)));
          parts[j] = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(wide_bits, 16), _mm256_loadu_ps(row + i + 8 * j), parts[j]);
        }
      memcpy(&sums[0], parts, 64);
      memcpy(&sums[1], parts + 2, 64);
#endif
      for (; i + 32 <= columns; i += 32) {
        sums[0] += load16(row + i) * load16(in + i);
        sums[1] += load16(row + i + 16) * load16(in + i + 16);
      }
      for (; i < columns; i++) tail += row[i] * to_float(in[i]);
      from_float(sum16(sums[0] + sums[1]) + tail, y + m * outputs + n);
    }
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Sizes of the blocks of the f32 product: x in the second-level cache, W read once for each block of rows.
constexpr int64_t kProductRows = 64, kProductLength = 768, kProductOutputs = 48;

inline float sum8(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// Adds M x N dot products of length `length` to `sums`; every one in the same order whatever M and N are.
template <int M, int N>
inline void add_dots(const float* x, int64_t x_stride, const float* weight, int64_t weight_stride, int64_t length, float* sums) {
  __m256 totals[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) totals[m][n] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= length; k += 8) {
    __m256 columns[N];
    for (int n = 0; n < N; n++) columns[n] = _mm256_loadu_ps(weight + n * weight_stride + k);
    for (int m = 0; m < M; m++) {
      __m256 row = _mm256_loadu_ps(x + m * x_stride + k);
      for (int n = 0; n < N; n++) totals[m][n] = _mm256_fmadd_ps(row, columns[n], totals[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float sum = sum8(totals[m][n]);
      for (int64_t i = k; i < length; i++) sum = std::fma(x[m * x_stride + i], weight[n * weight_stride + i], sum);
      sums[m * kProductOutputs + n] += sum;
    }
}

template <int N>
inline void add_columns(const float* x, int64_t x_stride, const float* weight, int64_t weight_stride, int64_t rows,
                        int64_t length, float* sums) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    add_dots<4, N>(x + m * x_stride, x_stride, weight, weight_stride, length, sums + m * kProductOutputs);
  for (; m < rows; m++)
    add_dots<1, N>(x + m * x_stride, x_stride, weight, weight_stride, length, sums + m * kProductOutputs);
}

// Dot products of rows as they lie, twelve at a time in registers: nothing is packed, so few rows cost no more than reading W.
void f32_matmul(const float* x, int64_t x_stride, const float* weight, int64_t weight_stride, float* y, int64_t rows,
                int64_t columns, int64_t outputs, int64_t begin, int64_t end) {
  float sums[kProductRows * kProductOutputs];
  for (int64_t m0 = 0; m0 < rows; m0 += kProductRows) {
    int64_t n_rows = std::min(kProductRows, rows - m0);
    for (int64_t n0 = begin; n0 < end; n0 += kProductOutputs) {
      int64_t n_outputs = std::min(kProductOutputs, end - n0);
      memset(sums, 0, sizeof(float) * size_t(n_rows * kProductOutputs));
      for (int64_t k = 0; k < columns; k += kProductLength) {
        int64_t length = std::min(kProductLength, columns - k);
        const float* from = x + m0 * x_stride + k;
        const float* to = weight + n0 * weight_stride + k;
        int64_t n = 0;
        for (; n + 3 <= n_outputs; n += 3)
          add_columns<3>(from, x_stride, to + n * weight_stride, weight_stride, n_rows, length, sums + n);
        for (; n < n_outputs; n++)
          add_columns<1>(from, x_stride, to + n * weight_stride, weight_stride, n_rows, length, sums + n);
      }
      for (int64_t m = 0; m < n_rows; m++)
        memcpy(y + (m0 + m) * outputs + n0, sums + m * kProductOutputs, sizeof(float) * size_t(n_outputs));
    }
  }
}
#else
constexpr std::nullptr_t f32_matmul = nullptr;  // the libraries behind libtorch are good at the others
#endif

const Kernels table = {
    ARETE_NAME,
    {rms_norm<float>, rms_norm<bf16>},
    {rms_norm_backward<float>, rms_norm_backward<bf16>},
    {rope<float>, rope<bf16>},
    {attention<float>, attention<bf16>},
    {attention_backward<float>, attention_backward<bf16>},
    {swiglu<float>, swiglu<bf16>},
    {swiglu_backward<float>, swiglu_backward<bf16>},
    {token_logprob<float>, token_logprob<bf16>},
    {sample<float>, sample<bf16>},
    {nf4_quantize<float>, nf4_quantize<bf16>},
    {nf4_dequantize<float>, nf4_dequantize<bf16>},
    {nf4_matmul<float>, nf4_matmul<bf16>},
    {bf16_matmul<float>, bf16_matmul<bf16>},
    f32_matmul,
};

}  // namespace

const Kernels* ARETE_KERNELS() { return &table; }

}  // namespace arete
