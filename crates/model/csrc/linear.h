// Products over libtorch's tensors, and the linear layers. Part of ops.cpp.
#pragma once
#include "fused.h"
#include "tensors.h"

namespace {

// ---- products ----

// Multiplications below which a second thread is not woken.
constexpr int64_t kSerialProduct = 200'000;

// How the rows of a product are divided, so that with few panels the threads still have work each.
struct RowBlocks {
  int64_t size, count;
  RowBlocks(int64_t rows, int64_t n_panels, int64_t threads) {
    constexpr int64_t kFewest = 48;  // a panel is packed anew for every block
    int64_t wanted = std::max<int64_t>(1, (2 * threads + n_panels - 1) / n_panels);
    int64_t blocks = std::clamp<int64_t>(rows / kFewest, 1, wanted);
    size = std::max<int64_t>(kFewest, ((rows + blocks - 1) / blocks + kFewest - 1) / kFewest * kFewest);
    count = std::max<int64_t>(1, (rows + size - 1) / size);
  }
};

// One product that a result is the sum of.
struct Operands {
  Tensor x, w;
};

// The sum of x Wᵀ with W [outputs, inputs] or, if `across`, of x W with W [inputs, outputs], of one or two pairs. On the CPU by our
// kernels: a row's bits do not depend on the others. cuBLAS promises nothing of the kind, and f16 on the CPU is for tests.
Tensor product(const Operands& first, const Operands& second = {}, bool across = false) {
  if (!on_kernels(first.x)) {
    Tensor y = at::mm(first.x, across ? first.w : first.w.t());
    return second.x.defined() ? y.addmm_(second.x, across ? second.w : second.w.t()) : y;
  }
  auto lines = [](const Tensor& tensor) { return tensor.stride(1) == 1 ? tensor : tensor.contiguous(); };
  Tensor held[2 * kFactors];
  Factor factors[kFactors];
  int64_t n_factors = 0, inputs = 0;
  for (const Operands* pair : {&first, &second}) {
    if (!pair->x.defined()) continue;
    Tensor &x = held[2 * n_factors] = lines(pair->x), &w = held[2 * n_factors + 1] = lines(pair->w);
    TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.size(across ? 0 : 1) == x.size(1), "product: operands do not fit");
    factors[n_factors++] = {x.data_ptr(), w.data_ptr(), x.stride(0), w.stride(0), x.size(1)};
    inputs += x.size(1);
  }
  int64_t rows = first.x.size(0), outputs = first.w.size(across ? 1 : 0);
  Tensor y = at::empty({rows, outputs}, first.x.options());
  Product* kernel = kernels().product[type_of(first.x)];
  int64_t panel = kernels().panel, n_panels = (outputs + panel - 1) / panel;
  RowBlocks blocks(rows, n_panels, at::get_num_threads());
  int64_t each = std::max<int64_t>(1, std::min(blocks.size, rows) * inputs * std::min(panel, outputs));
  parallel_rows(n_panels * blocks.count, std::max<int64_t>(1, kSerialProduct / each), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      int64_t block = task / n_panels, from = task % n_panels, to = std::min(n_panels, from + end - task);
      kernel(factors, n_factors, y.data_ptr(), outputs, across, block * blocks.size, std::min(rows, (block + 1) * blocks.size),
             from * panel, std::min(outputs, to * panel));
      task += to - from;
    }
  });
  return y;
}

// ---- linear layer over a frozen weight, with an optional adapter ----

// NF4, or undefined. A block's scale is absmax in f32, or where there is a map, absmax in eight bits:
// map[absmax] * nested[block / 256][0] + nested[block / 256][1].
struct Packed {
  Tensor codes, absmax, codebook, map, nested;

  bool defined() const { return codes.defined(); }

  // The scales in f32, as the CPU's kernels read them.
  Tensor scales() const {
    if (!map.defined()) return absmax;
    Tensor of_block = nested.repeat_interleave(kNestedBlock, 0).slice(0, 0, absmax.numel());  // [blocks, 2]
    return map.index_select(0, absmax.to(at::kLong)) * of_block.select(1, 0) + of_block.select(1, 1);
  }

 private:
  static constexpr int64_t kNestedBlock = 256;
};

struct Weight {
  Tensor dense;  // [out, in], or undefined
  Packed packed;
  int64_t outputs, inputs, block_size;

  // The matrix in `type`: the dense one, or the packed one unpacked into a new tensor.
  Tensor in_type(at::ScalarType type) const {
    if (dense.defined()) return dense;
    Tensor out = at::empty({outputs, inputs}, packed.codes.options().dtype(type));
    unpack(out);
    return out;
  }

  // The same for a product that is queued at once: on a GPU in one buffer that all layers of a thread share, as large as the
  // largest matrix so far. The stream runs a layer's product before it unpacks the next layer.
  Tensor for_product(at::ScalarType type) const {
    if (dense.defined() || !packed.codes.is_cuda()) return in_type(type);
    // Never freed: at the end of the process the driver may be gone before a thread's variables are.
    static thread_local auto& buffers = *new std::map<std::pair<int64_t, at::ScalarType>, Tensor>;
    Tensor& buffer = buffers[{packed.codes.get_device(), type}];
    int64_t numel = outputs * inputs;
    if (!buffer.defined() || buffer.numel() < numel) {
      buffer = Tensor();  // given back before its successor is asked for
      buffer = at::empty({numel}, packed.codes.options().dtype(type));
    }
    Tensor out = buffer.narrow(0, 0, numel).view({outputs, inputs});
    unpack(out);
    return out;
  }

 private:
  void unpack(Tensor& out) const {
    TORCH_CHECK(fusable(out), "no NF4 kernels for this device or dtype");
    const auto& [codes, absmax, codebook, map, nested] = packed;
    fused(kNf4Dequantize, out, {&out, &codes, &absmax, &codebook, &map, &nested}, {outputs, inputs, block_size}, {}, [&] {
      if (counts_dry()) return;
      auto kernel = kernels().nf4_dequantize[type_of(out)];
      int64_t blocks = outputs * inputs / block_size;
      Tensor scales = packed.scales();
      parallel_rows(blocks, 256, [&](int64_t begin, int64_t end) {
        kernel(packed.codes.data_ptr<uint8_t>(), scales.data_ptr<float>(), packed.codebook.data_ptr<float>(), out.data_ptr(), begin,
               end, block_size);
      });
    });
  }
};

// Up to this many rows the packed weights are multiplied without being unpacked, if the caller asks for it: the sums
// run in another order than those of the unpacked product, so a row's bits then depend on the number of rows.
constexpr int64_t kPackedRows = 4;

// x Wᵀ straight from packed weights where that is the faster way, else undefined.
Tensor packed_product(const Tensor& x, const Weight& weight, bool allow_packed) {
  if (!weight.packed.defined()) return {};
  bool fits = allow_packed && on_kernels(x) && x.size(0) <= kPackedRows && weight.inputs % weight.block_size == 0 &&
                weight.block_size % 64 == 0;
  if (!fits) return {};
  Tensor input = x.contiguous(), scales = weight.packed.scales();
  Tensor y = at::empty({x.size(0), weight.outputs}, x.options());
  auto kernel = kernels().nf4_matmul[type_of(x)];
  parallel_rows(weight.outputs, 64, [&](int64_t begin, int64_t end) {
    kernel(input.data_ptr(), weight.packed.codes.data_ptr<uint8_t>(), scales.data_ptr<float>(),
           weight.packed.codebook.data_ptr<float>(), y.data_ptr(), x.size(0), weight.inputs, weight.outputs, weight.block_size,
           begin, end);
  });
  return y;
}

Tensor gpu_adapted_product(const Tensor& x, const Weight& weight, const Tensor& a, const Tensor& b, Tensor& down);

// y = x Wᵀ + (x Aᵀ) Bᵀ, on the CPU's path summed before it is rounded; `down` becomes x Aᵀ.
Tensor adapted_product(const Tensor& x, const Weight& weight, const Tensor& a, const Tensor& b, bool allow_packed,
                       Tensor& down) {
  if (gpu_shaped(x)) return gpu_adapted_product(x, weight, a, b, down);
  if (a.defined()) down = product({x, a});
  Tensor y = packed_product(x, weight, allow_packed);
  if (!y.defined()) return product({x, weight.for_product(x.scalar_type())}, {down, b});
  return a.defined() ? y.add_(product({down, b})) : y;
}

// ---- the same on the GPU's path ----

// Up to so many rows packed weights are multiplied as they are (fewer on a GPU without tensor cores), and LoRA's factors by our
// kernels; more are cuBLAS's work.
int64_t gpu_packed_rows = 256;
constexpr int64_t kLoraRows = 64;

// x Wᵀ by our kernels for packed weights; the CPU unpacks them. Weights are rounded once to the format of x, as for many rows.
Tensor few_rows_product(const Tensor& x, const Weight& weight) {
  Tensor y = result_like(x, {x.size(0), weight.outputs});
  const auto& [codes, absmax, codebook, map, nested] = weight.packed;
  fused(kNf4Product, x, {&y, &x, &codes, &absmax, &codebook, &map, &nested},
        {x.size(0), weight.outputs, weight.inputs, weight.block_size}, {}, [&] {
          if (counts_dry()) return;
          y.copy_(product({x, weight.in_type(x.scalar_type())}));
        });
  return y;
}

Tensor gpu_adapted_product(const Tensor& x_, const Weight& weight, const Tensor& a, const Tensor& b, Tensor& down) {
  Tensor x = x_.contiguous();
  int64_t rows = x.size(0);
  bool packed = weight.packed.defined() && rows <= gpu_packed_rows && weight.inputs % 32 == 0;
  Tensor y = packed ? few_rows_product(x, weight) : library_product(x, weight.for_product(x.scalar_type()).t());
  if (!a.defined()) return y;
  if (rows > kLoraRows) {
    down = library_product(x, a.t());
    add_library_product(y, down, b.t());
    return y;
  }
  int64_t rank = a.size(0);
  down = result_like(x, {rows, rank});
  fused(kLoraDown, x, {&down, &x, &a}, {rows, weight.inputs, rank}, {}, [&] { down.copy_(product({x, a})); });
  fused(kLoraUp, x, {&y, &down, &b}, {rows, rank, weight.outputs}, {}, [&] { y.add_(product({down, b})); });
  return y;
}

struct LinearGrads {
  Tensor x, a, b;
};
LinearGrads gpu_linear_grads(const Tensor& grad_y, const Weight& weight, const Tensor& x, const Tensor& a, const Tensor& b,
                             const Tensor& down, bool wants_x, bool trained) {
  LinearGrads grads;
  Tensor grad_down = a.defined() ? library_product(grad_y, b) : Tensor();
  if (wants_x) {
    grads.x = library_product(grad_y, weight.for_product(grad_y.scalar_type()));
    if (a.defined()) add_library_product(grads.x, grad_down, a);
  }
  if (trained) {
    grads.a = library_product(grad_down.t(), x);
    grads.b = library_product(grad_y.t(), down);
  }
  return grads;
}

// LoRA's factors of up to three layers that share their input, from f32 masters: A stacked, B along a diagonal and scaled, both in
// `type`. An undefined pair is a layer without an adapter. `sizes`: inputs, ranks, outputs.
constexpr int64_t kParts = 3;
std::pair<Tensor, Tensor> joined_factors(const variable_list& masters, const std::vector<int64_t>& sizes, double scale,
                                         at::ScalarType type) {
  int64_t inputs = sizes[0], rank = 0, outputs = 0;
  const Tensor* like = nullptr;
  for (int64_t p = 0; p < kParts; p++) {
    rank += sizes[1 + p];
    outputs += sizes[1 + kParts + p];
    if (masters[p].defined()) like = &masters[p];
  }
  auto options = like->options().dtype(type);
  Tensor a = at::empty({rank, inputs}, options), b = at::empty({outputs, rank}, options);
  fused(kLoraJoin, a, {&a, &b, &masters[0], &masters[1], &masters[2], &masters[3], &masters[4], &masters[5]},
        {inputs, sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]}, {scale}, [&] {
          b.zero_();
          for (int64_t p = 0, left = 0, top = 0; p < kParts; left += sizes[1 + p], top += sizes[1 + kParts + p], p++) {
            if (!masters[p].defined()) continue;
            a.narrow(0, left, sizes[1 + p]).copy_(masters[p]);
            b.narrow(0, top, sizes[1 + kParts + p]).narrow(1, left, sizes[1 + p]).copy_(masters[kParts + p] * scale);
          }
        });
  return {a, b};
}

struct JoinFactors : Function<JoinFactors> {
  using Optional = std::optional<Tensor>;
  static variable_list forward(AutogradContext* ctx, const Optional& a0, const Optional& a1, const Optional& a2, const Optional& b0,
                               const Optional& b1, const Optional& b2, std::vector<int64_t> sizes, double scale, int64_t type) {
    variable_list masters;
    for (const Optional* master : {&a0, &a1, &a2, &b0, &b1, &b2}) masters.push_back(master->value_or(Tensor()));
    auto [a, b] = joined_factors(masters, sizes, scale, at::ScalarType(type));
    ctx->saved_data["sizes"] = sizes;
    ctx->saved_data["scale"] = scale;
    return {a, b};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto sizes = ctx->saved_data["sizes"].toIntVector();
    double scale = ctx->saved_data["scale"].toDouble();
    Tensor grad_a = grads[0].contiguous(), grad_b = grads[1].contiguous(), none;
    auto wide = grad_a.options().dtype(at::kFloat);
    variable_list out(2 * kParts);
    for (int64_t p = 0; p < kParts; p++) {
      if (sizes[1 + p] == 0) continue;
      out[p] = at::empty({sizes[1 + p], sizes[0]}, wide);
      out[kParts + p] = at::empty({sizes[1 + kParts + p], sizes[1 + p]}, wide);
    }
    fused(kLoraPart, grad_a, {&out[0], &out[1], &out[2], &out[3], &out[4], &out[5], &grad_a, &grad_b},
          {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]}, {scale}, [&] {
            for (int64_t p = 0, left = 0, top = 0; p < kParts; left += sizes[1 + p], top += sizes[1 + kParts + p], p++) {
              if (sizes[1 + p] == 0) continue;
              out[p].copy_(grad_a.narrow(0, left, sizes[1 + p]));
              out[kParts + p].copy_(grad_b.narrow(0, top, sizes[1 + kParts + p]).narrow(1, left, sizes[1 + p]).to(at::kFloat) * scale);
            }
          });
    out.insert(out.end(), {none, none, none});
    return out;
  }
};

// Keeps x and x Aᵀ where the adapter is trained, and the weight as it is stored (packed if NF4).
struct AdaptedLinear : Function<AdaptedLinear> {
  using Optional = std::optional<Tensor>;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Weight& weight, const Optional& a_, const Optional& b_,
                        bool allow_packed) {
    Tensor a = a_.value_or(Tensor()), b = b_.value_or(Tensor()), down;
    Tensor y = adapted_product(x, weight, a, b, allow_packed, down);
    bool trained = a.defined() && (a.requires_grad() || b.requires_grad());
    const auto& [codes, absmax, codebook, map, nested] = weight.packed;
    ctx->save_for_backward(
        {trained ? x : Tensor(), weight.dense, codes, absmax, codebook, map, nested, a, b, trained ? down : Tensor()});
    ctx->saved_data["sizes"] = std::vector<int64_t>{weight.outputs, weight.inputs, weight.block_size};
    ctx->saved_data["trained"] = trained;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto sizes = ctx->saved_data["sizes"].toIntVector();
    Weight weight{saved[1], {saved[2], saved[3], saved[4], saved[5], saved[6]}, sizes[0], sizes[1], sizes[2]};
    const Tensor &x = saved[0], &a = saved[7], &b = saved[8], &down = saved[9];
    Tensor grad_y = grads[0].contiguous();
    if (gpu_shaped(grad_y)) {
      Tensor none;
      LinearGrads found = gpu_linear_grads(grad_y, weight, x, a, b, down, ctx->needs_input_grad(0), ctx->saved_data["trained"].toBool());
      return {found.x, none, found.a, found.b, none};
    }
    Tensor grad_x, grad_a, grad_b, grad_down;
    if (a.defined()) grad_down = product({grad_y, b}, {}, true);
    if (ctx->needs_input_grad(0))
      grad_x = product({grad_y, weight.for_product(grad_y.scalar_type())}, {grad_down, a}, true);
    if (ctx->saved_data["trained"].toBool()) {
      grad_a = product({grad_down.t(), x}, {}, true);
      grad_b = product({down.t(), grad_y}, {}, true).t().contiguous();
    }
    Tensor none;
    return {grad_x, none, grad_a, grad_b, none};
  }
};

// y = x Wᵀ of a trained W (a scalar head's). Keeps both.
struct TrainedLinear : Function<TrainedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w) {
    ctx->save_for_backward({x, w});
    return product({x, w});
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    Tensor grad_y = grads[0].contiguous(), grad_x, grad_w;
    if (ctx->needs_input_grad(0)) grad_x = product({grad_y, saved[1]}, {}, true);
    if (ctx->needs_input_grad(1)) grad_w = product({grad_y.t(), saved[0]}, {}, true);
    return {grad_x, grad_w};
  }
};

}  // namespace
