// Attention over packed spans of keys, forward and backward.
#pragma once
#include "vectors.h"

namespace arete {
namespace {

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

}  // namespace
}  // namespace arete
