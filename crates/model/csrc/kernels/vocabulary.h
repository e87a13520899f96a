// Over the vocabulary: log-probabilities and sampling.
#pragma once
#include "vectors.h"

namespace arete {
namespace {

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

}  // namespace
}  // namespace arete
