// The products of the tables that are linked, against sums in f64, and their rows alone against the same rows among others. A program
// of its own for kinds of CPU on which the Rust tests do not run (scripts/aarch64.sh); 0 = all is well.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../kernels.h"

using namespace arete;

namespace {

float value(float x) { return x; }
float value(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
void set(float x, float* out) { *out = x; }
void set(float x, bf16* out) {  // truncated: the numbers are arbitrary
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = uint16_t(bits >> 16);
}

uint32_t state = 1;
template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> out(size_t(n > 0 ? n : 1));
  for (T& x : out) {
    state = state * 1664525u + 1013904223u;
    set(float(int32_t(state)) / 2147483648.0f, &x);
  }
  return out;
}

// Rows, inputs, outputs, inputs of a second factor.
constexpr std::array<std::array<int64_t, 4>, 6> kSizes = {
    {{1, 1, 1, 0}, {5, 33, 7, 0}, {13, 64, 40, 24}, {37, 577, 65, 3}, {20, 2100, 33, 0}, {530, 40, 24, 5}}};

template <class T>
int failures(const char* name, Product* product, int64_t panel) {
  int failed = 0;
  for (auto [rows, inputs, outputs, rank] : kSizes)
    for (bool across : {false, true}) {
      auto x = numbers<T>(rows * inputs), w = numbers<T>(outputs * inputs), x2 = numbers<T>(rows * rank),
           w2 = numbers<T>(outputs * rank);
      Factor factors[2] = {{x.data(), w.data(), inputs, across ? outputs : inputs, inputs},
                           {x2.data(), w2.data(), rank, across ? outputs : rank, rank}};
      int64_t n_factors = rank > 0 ? 2 : 1;
      std::vector<T> y(size_t(rows * outputs)), alone(size_t(rows * outputs));
      product(factors, n_factors, y.data(), outputs, across, 0, rows, 0, outputs);
      int64_t half = outputs / 2 / panel * panel;
      for (int64_t m = 0; m < rows; m++) {
        product(factors, n_factors, alone.data(), outputs, across, m, m + 1, half, outputs);
        if (half > 0) product(factors, n_factors, alone.data(), outputs, across, m, m + 1, 0, half);
      }
      bool equal = std::memcmp(y.data(), alone.data(), y.size() * sizeof(T)) == 0;
      double worst = 0;
      for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < outputs; n++) {
          double sum = 0, size = 0;
          auto add = [&](const std::vector<T>& a, const std::vector<T>& b, int64_t length) {
            for (int64_t k = 0; k < length; k++) {
              double term = double(value(a[size_t(m * length + k)])) * value(b[size_t(across ? k * outputs + n : n * length + k)]);
              sum += term;
              size += std::fabs(term);
            }
          };
          add(x, w, inputs);
          add(x2, w2, rank);
          double allowed = size * 4e-6 + (sizeof(T) == 2 ? std::fabs(sum) / 256 : 0);
          worst = std::fmax(worst, std::fabs(value(y[size_t(m * outputs + n)]) - sum) / allowed);
        }
      if (equal && worst <= 1) continue;
      failed++;
      std::printf("%s, %zu bytes, %ld x %ld x %ld, second factor %ld, across %d: rows equal %d, error %.3g of what is allowed\n", name,
                  sizeof(T), long(rows), long(inputs), long(outputs), long(rank), across, equal, worst);
    }
  return failed;
}

}  // namespace

int main() {
  const Kernels& table = *kernels_portable();
  int failed = failures<float>("product", table.product[kF32], table.panel) +
               failures<bf16>("product", table.product[kBF16], table.panel) +
               failures<bf16>("tiles", table.emulated_tiles, table.panel);
  std::printf("products of the table %s: %s\n", table.name, failed ? "WRONG" : "right, and rows equal");
  return failed ? 1 : 0;
}
