// The bf16 product on tiles: AMX's instruction TDPBF16PS, or an emulation of it where the compiler's target or the CPU has none.
//
// Panels are those of product.h: sixteen steps of sixteen outputs are one tile of W, sixteen rows of sixteen steps one of x. Rows
// and inputs are filled up with zeros, and an element meets its inputs 32 at a time in their order: as in product.h, nothing else
// has a part in it.
#pragma once
#include "product.h"
#ifdef __AMX_BF16__
#include <immintrin.h>
#endif

namespace arete {
namespace {

constexpr int64_t kTileSide = 16;                  // rows of a tile, and words in each of them
constexpr int64_t kTileInputs = 2 * kTileSide;     // bf16 pairs
constexpr int64_t kTiledRows = kSumRows / kTileSide * kTileSide;

// TDPBF16PS as Intel's manual defines it: for each element two sums from zero, of the even and of the odd inputs, in fused
// multiply-adds; then their sum is added to the element. Subnormal inputs count as zeros and subnormal results become zeros.
struct EmulatedTiles {
  typedef std::conditional_t<kLanes == 16, u32x16, std::conditional_t<kLanes == 8, u32x8, u32x4>> Words;
  static Lanes flush(Lanes v) {
    Words size = (Words)v & 0x7fffffff;
    return (Lanes)((Words)v & ((Words)(size >= 0x00800000) | 0x80000000));
  }
  static Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__FMA__) || defined(__aarch64__)
    return flush(a * b + c);
#else
    Lanes out;
    for (int i = 0; i < kLanes; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return flush(out);
#endif
  }

  struct Session {};
  static void add_rows(int64_t rows, const char* x, int64_t x_stride, const float* panel, int64_t n_tiles, float* sums) {
    for (int64_t m = 0; m < rows; m++)
      for (int64_t v = 0; v < kTileVectors; v++) {
        Lanes total = load_lanes(sums + m * kPanel + v * kLanes);
        for (int64_t t = 0; t < n_tiles; t++) {
          Lanes even{}, odd{};
          for (int64_t k = t * kTileSide; k < (t + 1) * kTileSide; k++) {
            uint32_t x_pair;
            memcpy(&x_pair, x + m * x_stride + k * 4, 4);
            Words pair = Words{} + x_pair, w = (Words)load_lanes(panel + k * kPanel + v * kLanes);
            even = fused(flush((Lanes)(pair << 16)), flush((Lanes)(w << 16)), even);
            odd = fused(flush((Lanes)(pair & 0xffff0000)), flush((Lanes)(w & 0xffff0000)), odd);
          }
          total = flush(total + flush(even + odd));
        }
        store_lanes(sums + m * kPanel + v * kLanes, total);
      }
  }
};

#ifdef __AMX_BF16__
static_assert(kPanel == 2 * kTileSide);
struct AmxTiles {
  // The tiles' shapes, set while one exists.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shapes;
      for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = kTileSide;
      _tile_loadconfig(&shapes);
    }
    ~Session() { _tile_release(); }
  };
  // Two tiles of rows, or one, against both of the panel's.
  template <int M>
  static void add(const char* x, int64_t x_stride, const float* panel, int64_t n_tiles, float* sums) {
    constexpr int64_t kBytes = kPanel * 4;
    _tile_loadd(0, sums, kBytes);
    _tile_loadd(1, sums + kTileSide, kBytes);
    if constexpr (M == 2) {
      _tile_loadd(2, sums + kTileSide * kPanel, kBytes);
      _tile_loadd(3, sums + kTileSide * kPanel + kTileSide, kBytes);
    }
    for (int64_t t = 0; t < n_tiles; t++) {
      const float* w = panel + t * kTileSide * kPanel;
      _tile_loadd(6, w, kBytes);
      _tile_loadd(7, w + kTileSide, kBytes);
      _tile_loadd(4, x + t * 64, x_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (M == 2) {
        _tile_loadd(5, x + kTileSide * x_stride + t * 64, x_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, kBytes);
    _tile_stored(1, sums + kTileSide, kBytes);
    if constexpr (M == 2) {
      _tile_stored(2, sums + kTileSide * kPanel, kBytes);
      _tile_stored(3, sums + kTileSide * kPanel + kTileSide, kBytes);
    }
  }
  static void add_rows(int64_t rows, const char* x, int64_t x_stride, const float* panel, int64_t n_tiles, float* sums) {
    int64_t m = 0;
    for (; m + 2 * kTileSide <= rows; m += 2 * kTileSide) add<2>(x + m * x_stride, x_stride, panel, n_tiles, sums + m * kPanel);
    if (m < rows) add<1>(x + m * x_stride, x_stride, panel, n_tiles, sums + m * kPanel);
  }
};
#endif

// Rows of x as whole tiles: as they are, or copied with zeros after the last row and the last input.
inline Rows<Pair> tiled_rows(const bf16* x, int64_t stride, int64_t inputs, int64_t rows, Buffer<float>& memory) {
  if (rows % kTileSide == 0 && inputs % kTileInputs == 0) return {(const char*)x, stride * 2};
  int64_t tiles = (inputs + kTileInputs - 1) / kTileInputs, bytes = tiles * 64, all = (rows + kTileSide - 1) / kTileSide * kTileSide;
  char* copy = (char*)memory.at_least(all * tiles * kTileSide);
  memset(copy, 0, size_t(all * bytes));
  for (int64_t m = 0; m < rows; m++) memcpy(copy + m * bytes, x + m * stride, size_t(inputs) * 2);
  return {copy, bytes};
}

template <class Tiles>
void product_of_tiles(const Factor* factors, int64_t n_factors, void* y_, int64_t y_stride, bool across,
                      int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  ProductScratch& memory = product_scratch();
  float* panel = memory.panel.at_least(kPanelSteps * kPanel);
  float* sums = memory.sums.at_least(kTiledRows * kPanel);
  [[maybe_unused]] typename Tiles::Session session;
  for (int64_t m0 = row_begin; m0 < row_end; m0 += kTiledRows) {
    int64_t rows = std::min(kTiledRows, row_end - m0), all = (rows + kTileSide - 1) / kTileSide * kTileSide;
    Rows<Pair> x[kFactors];
    for (int64_t f = 0; f < n_factors; f++)
      x[f] = tiled_rows((const bf16*)factors[f].x + m0 * factors[f].x_stride, factors[f].x_stride, factors[f].inputs, rows,
                        memory.rows[f]);
    for (int64_t n0 = begin; n0 < end; n0 += kPanel) {
      int64_t n_outputs = std::min(kPanel, end - n0);
      memset(sums, 0, size_t(all * kPanel) * 4);
      for (int64_t f = 0; f < n_factors; f++) {
        const Factor& factor = factors[f];
        int64_t steps = (factor.inputs + kTileInputs - 1) / kTileInputs * kTileSide;
        for (int64_t k = 0; k < steps; k += kPanelSteps) {
          int64_t n = std::min(kPanelSteps, steps - k);
          pack<Pair>(factor, across, n0, n_outputs, k, n, panel);
          Tiles::add_rows(all, x[f].data + k * 4, x[f].stride, panel, n / kTileSide, sums);
        }
      }
      for (int64_t m = 0; m < rows; m++) narrow(sums + m * kPanel, n_outputs, (bf16*)y_ + (m0 + m) * y_stride + n0);
    }
  }
}

}  // namespace
}  // namespace arete
