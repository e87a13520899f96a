// Products x Wᵀ and x W whose rows have the same bits whatever the other rows are.
//
// An element is a sum of chains of multiply-adds, each over kPanelSteps steps of the inputs in their order and from zero: neither
// the number of rows nor the split between threads has a part in it. A panel of kPanel outputs is packed at a time, step by step
// side by side, then every block of rows runs through it; while one is packed the next is fetched from memory.
#pragma once
#include "vectors.h"

namespace arete {
namespace {

struct ProductScratch {
  Buffer<float> panel, sums, rows[kFactors];
};
inline ProductScratch& product_scratch() {
  static thread_local ProductScratch memory;
  return memory;
}

// ---- vectors of this instruction set ----

#if defined(__AVX512F__)
typedef f32x16 Lanes;
constexpr int kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
typedef f32x8 Lanes;
constexpr int kTileRows = 6, kTileVectors = 2;
#else
typedef f32x4 Lanes;
constexpr int kTileRows = 4, kTileVectors = 2;
#endif
constexpr int kLanes = sizeof(Lanes) / 4;
constexpr int64_t kPanel = kTileVectors * kLanes;
// Steps of a packed panel that are held at a time, and rows whose sums are: 128 KiB of each at most.
constexpr int64_t kPanelSteps = 1024, kSumRows = 504;
static_assert(kSumRows % kTileRows == 0 && kPanelSteps % 16 == 0);

inline Lanes load_lanes(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}
// Not a sum with zero, which compilers keep as one.
inline Lanes everywhere(float x) {
#if defined(__AVX512F__)
  return Lanes{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return Lanes{x, x, x, x, x, x, x, x};
#else
  return Lanes{x, x, x, x};
#endif
}
inline void store_lanes(float* p, Lanes v) { memcpy(p, &v, sizeof v); }

// kLanes rows of kLanes words become columns.
inline void transpose_lanes(Lanes r[kLanes]) {
#if defined(__AVX512F__)
  Lanes t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      Lanes a = t[i + j], b = t[i + 2 + j];
      u[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      u[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  // u[4 g + c] holds, in its quarter q, column 4 q + c of rows 4 g to 4 g + 3.
  auto even = [](Lanes a, Lanes b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  auto odd = [](Lanes a, Lanes b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  for (int c = 0; c < 4; c++) {
    Lanes a = even(u[c], u[4 + c]), b = even(u[8 + c], u[12 + c]), d = odd(u[c], u[4 + c]), e = odd(u[8 + c], u[12 + c]);
    r[c] = even(a, b), r[4 + c] = even(d, e), r[8 + c] = odd(a, b), r[12 + c] = odd(d, e);
  }
#elif defined(__AVX2__)
  Lanes t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      u[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int c = 0; c < 4; c++) {
    r[c] = __builtin_shufflevector(u[c], u[4 + c], 0, 1, 2, 3, 8, 9, 10, 11);
    r[4 + c] = __builtin_shufflevector(u[c], u[4 + c], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  Lanes a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  Lanes c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5), r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// ---- how one step multiplies ----

// A step is one input in f32.
template <class T>
struct Single {
  typedef T Element;
  static constexpr int64_t kInputs = 1;
  static constexpr bool kWidens = sizeof(T) == 2;  // the rows of x are widened before they are used
  // kLanes steps of a row of W.
  static Lanes along(const T* w) {
    if constexpr (sizeof(T) == 4) return load_lanes(w);
    Lanes v;
    for (int i = 0; i < kLanes; i++) v[i] = to_float(w[i]);
    return v;
  }
  // One step of kLanes outputs; `w` is their row.
  static Lanes across(const T* w, int64_t, bool) { return along(w); }
  static Lanes multiply(Lanes sum, Lanes x, Lanes w) { return sum + x * w; }
};

// A step is a pair of inputs in bf16.
struct Pair {
  typedef bf16 Element;
  static constexpr int64_t kInputs = 2;
  static constexpr bool kWidens = false;
  static Lanes along(const bf16* w) { return load_lanes((const float*)w); }
  static Lanes across(const bf16* w, int64_t stride, bool both) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
    auto row = [](const bf16* p) {
      Halves bits;
      memcpy(&bits, p, sizeof bits);
      return __builtin_convertvector(bits, Words);
    };
    return (Lanes)(both ? row(w) | row(w + stride) << 16 : row(w));
  }
#ifdef __AVX512BF16__
  // Two multiply-adds, the odd input's first.
  static Lanes multiply(Lanes sum, Lanes x, Lanes w) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
#endif
};
#ifdef __AVX512BF16__
template <class T>
using Step = std::conditional_t<sizeof(T) == 2, Pair, Single<T>>;
#else
template <class T>
using Step = Single<T>;
#endif

// ---- packing ----

// Steps [first, first + n) of outputs [output, output + n_outputs) of W [outputs, inputs]; what is missing becomes 0.
template <class S>
void pack_along(const typename S::Element* w, int64_t stride, int64_t inputs, int64_t output, int64_t n_outputs, int64_t first,
                int64_t n, float* panel) {
  typedef typename S::Element T;
  constexpr int64_t kAtOnce = kLanes * S::kInputs;
  for (int64_t v = 0; v < kTileVectors; v++) {
    for (int64_t k = 0; k < n; k += kLanes) {
      int64_t from = (first + k) * S::kInputs;
      Lanes rows[kLanes];
      for (int64_t j = 0; j < kLanes; j++) {
        int64_t row = v * kLanes + j;
        rows[j] = Lanes{};
        if (row >= n_outputs) continue;
        const T* at = w + (output + row) * stride + from;
        __builtin_prefetch(at + kPanel * stride, 0, 2);  // the next panel's
        if (from + kAtOnce <= inputs) {
          rows[j] = S::along(at);
        } else if (from < inputs) {
          T part[kAtOnce] = {};
          memcpy(part, at, size_t(inputs - from) * sizeof(T));
          rows[j] = S::along(part);
        }
      }
      transpose_lanes(rows);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, n - k); i++) store_lanes(panel + (k + i) * kPanel + v * kLanes, rows[i]);
    }
  }
}

// The same of W [inputs, outputs].
template <class S>
void pack_across(const typename S::Element* w, int64_t stride, int64_t inputs, int64_t output, int64_t n_outputs, int64_t first,
                 int64_t n, float* panel) {
  typedef typename S::Element T;
  for (int64_t k = 0; k < n; k++) {
    int64_t input = (first + k) * S::kInputs;
    bool both = input + 1 < inputs;
    for (int64_t v = 0; v < kTileVectors; v++) {
      int64_t left = n_outputs - v * kLanes;
      const T* at = w + input * stride + output + v * kLanes;
      __builtin_prefetch(at + kPanel, 0, 2);
      Lanes step{};
      if (input < inputs && left >= kLanes) {
        step = S::across(at, stride, both);
      } else if (input < inputs && left > 0) {
        T part[2 * kLanes] = {};
        memcpy(part, at, size_t(left) * sizeof(T));
        if (both) memcpy(part + kLanes, at + stride, size_t(left) * sizeof(T));
        step = S::across(part, kLanes, both);
      }
      store_lanes(panel + k * kPanel + v * kLanes, step);
    }
  }
}

template <class S>
void pack(const Factor& factor, bool across, int64_t output, int64_t n_outputs, int64_t first, int64_t n, float* panel) {
  auto w = (const typename S::Element*)factor.w;
  (across ? pack_across<S> : pack_along<S>)(w, factor.w_stride, factor.inputs, output, n_outputs, first, n, panel);
}

// ---- products ----

// The sum of `n` steps of M rows of x (one word a step, `stride` bytes from row to row) becomes the rows' sums [M, kPanel], or is
// added to them.
template <class S, int M>
void add_steps(const char* x, int64_t stride, const float* panel, int64_t n, float* sums, bool fresh) {
  Lanes total[M][kTileVectors];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kTileVectors; v++) total[m][v] = Lanes{};
  for (int64_t k = 0; k < n; k++) {
    Lanes w[kTileVectors];
    for (int v = 0; v < kTileVectors; v++) w[v] = load_lanes(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      float word;
      memcpy(&word, x + m * stride + k * 4, 4);
      Lanes all = everywhere(word);
      for (int v = 0; v < kTileVectors; v++) total[m][v] = S::multiply(total[m][v], all, w[v]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kTileVectors; v++) {
      float* to = sums + m * kPanel + v * kLanes;
      store_lanes(to, fresh ? total[m][v] : load_lanes(to) + total[m][v]);
    }
}

template <class S, int M = kTileRows>
void add_rows(int64_t rows, const char* x, int64_t stride, const float* panel, int64_t n, float* sums, bool fresh) {
  for (; rows >= M; rows -= M, x += M * stride, sums += M * kPanel) add_steps<S, M>(x, stride, panel, n, sums, fresh);
  if constexpr (M > 1)
    if (rows > 0) add_rows<S, M - 1>(rows, x, stride, panel, n, sums, fresh);
}

// Rows of x as add_steps wants them: as they are, or in f32, or with a last input of 0 where pairs need one.
template <class S>
struct Rows {
  const char* data;
  int64_t stride;  // bytes
};
template <class S>
Rows<S> rows_of(const typename S::Element* x, int64_t stride, int64_t inputs, int64_t rows, Buffer<float>& memory) {
  typedef typename S::Element T;
  if constexpr (S::kWidens) {
    float* wide = memory.at_least(rows * inputs);
    for (int64_t m = 0; m < rows; m++) widen(x + m * stride, inputs, wide + m * inputs, inputs);
    return {(const char*)wide, inputs * 4};
  }
  if (inputs % S::kInputs == 0) return {(const char*)x, stride * int64_t(sizeof(T))};
  int64_t steps = inputs / S::kInputs + 1;
  float* copy = memory.at_least(rows * steps);
  for (int64_t m = 0; m < rows; m++) {
    copy[(m + 1) * steps - 1] = 0;
    memcpy(copy + m * steps, x + m * stride, size_t(inputs) * sizeof(T));
  }
  return {(const char*)copy, steps * 4};
}

// See Kernels::product.
template <class T>
void product(const Factor* factors, int64_t n_factors, void* y_, int64_t y_stride, bool across, int64_t row_begin,
             int64_t row_end, int64_t begin, int64_t end) {
  typedef Step<T> S;
  ProductScratch& memory = product_scratch();
  float* panel = memory.panel.at_least(kPanelSteps * kPanel);
  float* sums = memory.sums.at_least(std::min(kSumRows, row_end - row_begin) * kPanel);
  for (int64_t m0 = row_begin; m0 < row_end; m0 += kSumRows) {
    int64_t rows = std::min(kSumRows, row_end - m0);
    Rows<S> x[kFactors];
    for (int64_t f = 0; f < n_factors; f++)
      x[f] = rows_of<S>((const T*)factors[f].x + m0 * factors[f].x_stride, factors[f].x_stride, factors[f].inputs, rows,
                        memory.rows[f]);
    for (int64_t n0 = begin; n0 < end; n0 += kPanel) {
      int64_t n_outputs = std::min(kPanel, end - n0);
      bool fresh = true;
      for (int64_t f = 0; f < n_factors; f++) {
        const Factor& factor = factors[f];
        int64_t steps = (factor.inputs + S::kInputs - 1) / S::kInputs;
        for (int64_t k = 0; k < steps; k += kPanelSteps) {
          int64_t n = std::min(kPanelSteps, steps - k);
          pack<S>(factor, across, n0, n_outputs, k, n, panel);
          add_rows<S>(rows, x[f].data + k * 4, x[f].stride, panel, n, sums, fresh);
          fresh = false;
        }
      }
      for (int64_t m = 0; m < rows; m++) narrow(sums + m * kPanel, n_outputs, (T*)y_ + (m0 + m) * y_stride + n0);
    }
  }
}

}  // namespace
}  // namespace arete
