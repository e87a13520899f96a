// Four-bit weights: packing, unpacking, and products of few rows with them as they are.
#pragma once
#include "vectors.h"

namespace arete {
namespace {

// Halfway points between a codebook's neighbours, rounded to f32, as bitsandbytes has them on the CPU.
struct Halfway {
  float points[15];
  explicit Halfway(const float* codebook) {
    for (int c = 0; c < 15; c++) points[c] = (codebook[c] + codebook[c + 1]) * 0.5f;
  }
};

// The nearest code to x, the lower one at a halfway point.
inline int nearest_nf4(float x, const Halfway& halfway) {
  int index = 0;
  for (int c = 0; c < 15; c++) index += x > halfway.points[c];
  return index;
}

template <class T>
void nf4_quantize(const void* in_, const float* codebook, uint8_t* codes, float* absmax, int64_t begin, int64_t end,
                  int64_t block_size, int64_t count) {
  const Halfway halfway(codebook);
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
      for (int c = 0; c < 15; c++) index -= x > splat(halfway.points[c]);  // true is -1
      for (int64_t j = 0; j < 8; j++) out[i / 2 + j] = uint8_t(index[2 * j] << 4 | index[2 * j + 1]);
    }
    for (; i < n; i += 2) {
      int high = nearest_nf4(to_float(in[i]) * inverse, halfway);
      int low = i + 1 < n ? nearest_nf4(to_float(in[i + 1]) * inverse, halfway) : 0;
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

#ifdef __AVX512BF16__
// Rows [0, R) of bf16 against packed rows [begin, end): 32 activations of each parity against 32 looked-up codes per instruction,
// absmax in f32 per block. `split` holds of each row its even elements, then its odd ones. R is known to the compiler, so that
// sums stay in registers; a row's bits do not depend on it.
template <int R>
void nf4_matmul_pairs(const uint16_t* split, const uint8_t* codes, const float* absmax, __m512i table, bf16* y, int64_t columns,
                      int64_t outputs, int64_t block_size, int64_t begin, int64_t end) {
  int64_t half = columns / 2, blocks = columns / block_size, half_block = block_size / 2;
  for (int64_t n = begin; n < end; n++) {
    const uint8_t* in = codes + n * half;
    const float* scales = absmax + n * blocks;
    __m512 totals[R];
    for (int g = 0; g < R; g++) totals[g] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
      __m512 sums[R];
      for (int g = 0; g < R; g++) sums[g] = _mm512_setzero_ps();
      for (int64_t i = b * half_block; i < (b + 1) * half_block; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(in + i)));
        __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
        __m512bh low = (__m512bh)_mm512_permutexvar_epi16(bytes, table);
        for (int g = 0; g < R; g++) {
          const uint16_t* at = split + g * columns + i;
          sums[g] = _mm512_dpbf16_ps(sums[g], (__m512bh)_mm512_loadu_si512(at), high);
          sums[g] = _mm512_dpbf16_ps(sums[g], (__m512bh)_mm512_loadu_si512(at + half), low);
        }
      }
      __m512 scale = _mm512_set1_ps(scales[b]);
      for (int g = 0; g < R; g++) totals[g] = _mm512_fmadd_ps(sums[g], scale, totals[g]);
    }
    for (int g = 0; g < R; g++) from_float(sum16((f32x16)totals[g]), y + g * outputs + n);
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
    uint16_t* split = (uint16_t*)memory.query.at_least(rows * columns);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < half; i++) {
        split[m * columns + i] = x[m * columns + 2 * i].bits;
        split[m * columns + half + i] = x[m * columns + 2 * i + 1].bits;
      }
    alignas(64) bf16 table_values[32];
    for (int c = 0; c < 32; c++) from_float(codebook[c & 15], table_values + c);
    __m512i table = _mm512_load_si512(table_values);
    constexpr int64_t kOutputs = 16;  // their codes stay in the cache while all rows pass
    for (int64_t n = begin; n < end; n += kOutputs)
      for (int64_t m = 0; m < rows; m += 4) {
        auto run = rows - m == 1   ? nf4_matmul_pairs<1>
                   : rows - m == 2 ? nf4_matmul_pairs<2>
                   : rows - m == 3 ? nf4_matmul_pairs<3>
                                   : nf4_matmul_pairs<4>;
        run(split + m * columns, codes, absmax, table, y + m * outputs, columns, outputs, block_size, n, std::min(n + kOutputs, end));
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

}  // namespace
}  // namespace arete
