// Products of few rows with a dense bf16 matrix, where reading it takes the time.
#pragma once
#include "vectors.h"

namespace arete {
namespace {

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
          for (int o = 0; o < kOutputs; o++) {
            __builtin_prefetch(in[o] + i + kOutputs * columns, 0, 2);  // the next outputs': their rows are too short for the hardware's guess
            sums[o] = _mm512_dpbf16_ps(sums[o], part, (__m512bh)_mm512_loadu_si512(in[o] + i));
          }
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

}  // namespace
}  // namespace arete
