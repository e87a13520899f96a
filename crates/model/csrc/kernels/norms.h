// RMS norm, SwiGLU and the rotary embedding, forward and backward.
#pragma once
#include "vectors.h"

namespace arete {
namespace {

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

}  // namespace
}  // namespace arete
