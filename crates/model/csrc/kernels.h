// The decoder's own CPU kernels: plain loops over raw pointers, without libtorch.
//
// kernels.cpp is compiled once per instruction set (AMX, AVX-512, AVX2, baseline; or portable); isa.h picks one at start-up and splits the
// work over libtorch's own threads. Every kernel works on rows [begin, end) and gives the same bits for a row whatever the
// other rows are: sampling and training then agree (docs/numerics.md).
#pragma once
#include <cstdint>

namespace arete {

// bfloat16 bits; arithmetic happens in f32.
struct bf16 {
  uint16_t bits;
};

// A run of query rows that attend to the same keys: rows [row, row + n_rows) stand at positions [position, …) and
// see the slots of `n_spans` spans starting at spans[span], the last of which ends with the rows' own keys.
struct Segment {
  int64_t row, n_rows, position, span, n_spans;
};

// `length` consecutive key/value slots.
struct Span {
  int64_t slot, length;
};

struct AttentionShape {
  int64_t heads, kv_heads, head_size;
  int64_t q_stride, k_stride, v_stride, out_stride;  // elements from one row or slot to the next
  float scale;
  int64_t window;  // sliding window in tokens; 0 = none
};

// One of the products that a result is the sum of: x [rows, inputs] and W, with the elements from one row to the next.
struct Factor {
  const void* x;
  const void* w;
  int64_t x_stride, w_stride, inputs;
};
constexpr int kFactors = 2;

enum Type { kF32 = 0, kBF16 = 1 };

// What is needed to draw one token from a row of logits.
struct SampleSettings {
  float temperature;  // 0 = greedy
  int64_t top_k;      // 0 = all
  float top_p;        // 1 = all
};

// y = the sum of the factors' x Wᵀ, W [outputs, inputs], or (`across`) of their x W, W [inputs, outputs]; for rows [row_begin,
// row_end) and outputs [begin, end). `begin` is a multiple of Kernels::panel. An element's bits depend on its row, its column and
// the lengths alone. kernels/product.h.
typedef void Product(const Factor* factors, int64_t n_factors, void* y, int64_t y_stride, bool across, int64_t row_begin,
                     int64_t row_end, int64_t begin, int64_t end);

// One table of kernels per instruction set; arrays are indexed by Type.
struct Kernels {
  const char* name;
  void (*rms_norm[2])(const void* x, const void* delta, const void* weight, void* sum, void* out, float* inverse_rms,
                      int64_t begin, int64_t end, int64_t width, float eps);
  void (*rms_norm_backward[2])(const void* grad_out, const void* grad_sum, const void* sum, const void* weight,
                               const float* inverse_rms, void* grad_x, int64_t begin, int64_t end, int64_t width);
  void (*rope[2])(const void* in, int64_t in_stride, void* out, int64_t out_stride, const int64_t* slots,
                  const int64_t* positions, const float* cos_sin, int64_t heads, int64_t head_size, bool inverse,
                  int64_t begin, int64_t end);
  void (*attention[2])(const AttentionShape& shape, const Segment& segment, const Span* spans, int64_t kv_head,
                       int64_t row_begin, int64_t row_end, const void* q, const void* k, const void* v, void* out,
                       float* log_sum_exp);
  // Accumulates into grad_k, grad_v (f32, [slots, kv_heads, head_size]); grad_q is written (f32, [rows, heads, head_size]).
  void (*attention_backward[2])(const AttentionShape& shape, const Segment& segment, const Span* spans, int64_t kv_head,
                                const void* q, const void* k, const void* v, const void* out, const void* grad_out,
                                int64_t grad_out_stride, const float* log_sum_exp, float* grad_q, float* grad_k,
                                float* grad_v);
  void (*swiglu[2])(const void* gate_up, void* out, int64_t begin, int64_t end, int64_t width);
  void (*swiglu_backward[2])(const void* gate_up, const void* grad_out, void* grad_gate_up, int64_t begin, int64_t end,
                             int64_t width);
  // Per row: log-probability of target, entropy (if not null); probabilities over the logits in place (if `softmax`).
  void (*token_logprob[2])(void* logits, const int64_t* targets, float inverse_temperature, float* logprob, float* entropy,
                           bool softmax, int64_t begin, int64_t end, int64_t width);
  void (*sample[2])(const void* logits, const double* uniform, const SampleSettings* settings, int64_t* token,
                    float* logprob, int64_t begin, int64_t end, int64_t width);
  void (*nf4_quantize[2])(const void* in, const float* codebook, uint8_t* codes, float* absmax, int64_t begin, int64_t end,
                          int64_t block_size, int64_t count);
  void (*nf4_dequantize[2])(const uint8_t* codes, const float* absmax, const float* codebook, void* out, int64_t begin,
                            int64_t end, int64_t block_size);
  // y[m, n] = sum_k x[m, k] W[n, k] for output columns [begin, end); W packed row by row, columns a multiple of block_size
  // and block_size of 64. With AVX2 both factors become 15-bit integers (docs/numerics.md).
  void (*nf4_matmul[2])(const void* x, const uint8_t* codes, const float* absmax, const float* codebook, void* y,
                        int64_t rows, int64_t columns, int64_t outputs, int64_t block_size, int64_t begin, int64_t end);
  // The same for a dense bf16 W: for few rows, where reading W takes the time.
  void (*bf16_matmul[2])(const void* x, const bf16* weight, void* y, int64_t rows, int64_t columns, int64_t outputs,
                         int64_t begin, int64_t end);
  Product* product[2];
  // Outputs that the product packs at a time.
  int64_t panel;
  // product[kBF16] on emulated AMX tiles (kernels/tiles.h).
  Product* emulated_tiles;
};

const Kernels* kernels_amx();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_baseline();
const Kernels* kernels_portable();  // where none of the others is

}  // namespace arete
