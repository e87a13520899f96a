// Products over libtorch's tensors, and the linear layers. Part of ops.cpp.
#pragma once
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

// Called for weights that are not on the CPU; set once from Rust (src/cuda). 0 = done.
typedef int (*Dequantizer)(const Tensor* codes, const Tensor* absmax, const Tensor* codebook, int64_t block_size, Tensor* out);
typedef int (*Multiplier)(const Tensor* x, const Tensor* codes, const Tensor* absmax, const Tensor* codebook,
                          int64_t block_size, Tensor* y);
Dequantizer cuda_dequantizer = nullptr;
Multiplier cuda_multiplier = nullptr;
int64_t cuda_multiplier_rows = 0;  // the most that it takes

struct Weight {
  Tensor dense;                      // [out, in], or undefined
  Tensor codes, absmax, codebook;    // NF4, or undefined
  int64_t outputs, inputs, block_size;

  // The matrix in `type`: the dense one, or the packed one unpacked into a new tensor.
  Tensor in_type(at::ScalarType type) const {
    if (dense.defined()) return dense;
    Tensor out = at::empty({outputs, inputs}, codes.options().dtype(type));
    unpack(out);
    return out;
  }

  // The same for a product that is queued at once: on a GPU in one buffer that all layers of a thread share, as large as the
  // largest matrix so far. The stream runs a layer's product before it unpacks the next layer.
  Tensor for_product(at::ScalarType type) const {
    if (dense.defined() || !codes.is_cuda()) return in_type(type);
    // Never freed: at the end of the process the driver may be gone before a thread's variables are.
    static thread_local auto& buffers = *new std::map<std::pair<int64_t, at::ScalarType>, Tensor>;
    Tensor& buffer = buffers[{codes.get_device(), type}];
    int64_t numel = outputs * inputs;
    if (!buffer.defined() || buffer.numel() < numel) {
      buffer = Tensor();  // given back before its successor is asked for
      buffer = at::empty({numel}, codes.options().dtype(type));
    }
    Tensor out = buffer.narrow(0, 0, numel).view({outputs, inputs});
    unpack(out);
    return out;
  }

 private:
  void unpack(Tensor& out) const {
    if (!on_kernels(out)) {
      TORCH_CHECK(cuda_dequantizer, "no NF4 kernels for this device or dtype");
      TORCH_CHECK(cuda_dequantizer(&codes, &absmax, &codebook, block_size, &out) == 0, "NF4 dequantisation failed on the device");
      return;
    }
    auto kernel = kernels().nf4_dequantize[type_of(out)];
    int64_t blocks = outputs * inputs / block_size;
    parallel_rows(blocks, 256, [&](int64_t begin, int64_t end) {
      kernel(codes.data_ptr<uint8_t>(), absmax.data_ptr<float>(), codebook.data_ptr<float>(), out.data_ptr(), begin, end,
             block_size);
    });
  }
};

// Up to this many rows the packed weights are multiplied without being unpacked, if the caller asks for it: the sums
// run in another order than those of the unpacked product, so a row's bits then depend on the number of rows.
constexpr int64_t kPackedRows = 4;

// x Wᵀ straight from packed weights where that is the faster way, else undefined.
Tensor packed_product(const Tensor& x, const Weight& weight, bool allow_packed) {
  if (!weight.codes.defined()) return {};
  // cuBLAS promises equal rows no more than the packed product does, so nothing is lost by always taking the faster one.
  if (x.is_cuda() && cuda_multiplier && x.size(0) <= cuda_multiplier_rows && weight.inputs % 32 == 0) {
    Tensor y = at::empty({x.size(0), weight.outputs}, x.options());
    TORCH_CHECK(cuda_multiplier(&x, &weight.codes, &weight.absmax, &weight.codebook, weight.block_size, &y) == 0,
                "the NF4 product failed on the device");
    return y;
  }
  bool packed = allow_packed && on_kernels(x) && x.size(0) <= kPackedRows && weight.inputs % weight.block_size == 0 &&
                weight.block_size % 64 == 0;
  if (!packed) return {};
  Tensor input = x.contiguous();
  Tensor y = at::empty({x.size(0), weight.outputs}, x.options());
  auto kernel = kernels().nf4_matmul[type_of(x)];
  parallel_rows(weight.outputs, 64, [&](int64_t begin, int64_t end) {
    kernel(input.data_ptr(), weight.codes.data_ptr<uint8_t>(), weight.absmax.data_ptr<float>(),
           weight.codebook.data_ptr<float>(), y.data_ptr(), x.size(0), weight.inputs, weight.outputs, weight.block_size,
           begin, end);
  });
  return y;
}

// y = x Wᵀ + (x Aᵀ) Bᵀ, summed before it is rounded; `down` becomes x Aᵀ.
Tensor adapted_product(const Tensor& x, const Weight& weight, const Tensor& a, const Tensor& b, bool allow_packed,
                       Tensor& down) {
  if (a.defined()) down = product({x, a});
  Tensor y = packed_product(x, weight, allow_packed);
  if (!y.defined()) return product({x, weight.for_product(x.scalar_type())}, {down, b});
  return a.defined() ? y.add_(product({down, b})) : y;
}

// Keeps x and x Aᵀ where the adapter is trained, and the weight as it is stored (packed if NF4).
struct AdaptedLinear : Function<AdaptedLinear> {
  using Optional = std::optional<Tensor>;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& dense_, const Optional& codes_,
                        const Optional& absmax_, const Optional& codebook_, int64_t outputs, int64_t inputs,
                        int64_t block_size, const Optional& a_, const Optional& b_, bool allow_packed) {
    Tensor none;
    Tensor dense = dense_.value_or(none), codes = codes_.value_or(none), absmax = absmax_.value_or(none),
           codebook = codebook_.value_or(none), a = a_.value_or(none), b = b_.value_or(none);
    Tensor down;
    Tensor y = adapted_product(x, {dense, codes, absmax, codebook, outputs, inputs, block_size}, a, b, allow_packed, down);
    bool trained = a.defined() && (a.requires_grad() || b.requires_grad());
    ctx->save_for_backward({trained ? x : Tensor(), dense, codes, absmax, codebook, a, b, trained ? down : Tensor()});
    ctx->saved_data["sizes"] = std::vector<int64_t>{outputs, inputs, block_size};
    ctx->saved_data["trained"] = trained;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto sizes = ctx->saved_data["sizes"].toIntVector();
    Weight weight{saved[1], saved[2], saved[3], saved[4], sizes[0], sizes[1], sizes[2]};
    const Tensor &x = saved[0], &a = saved[5], &b = saved[6], &down = saved[7];
    Tensor grad_y = grads[0].contiguous();
    Tensor grad_x, grad_a, grad_b, grad_down;
    if (a.defined()) grad_down = product({grad_y, b}, {}, true);
    if (ctx->needs_input_grad(0))
      grad_x = product({grad_y, weight.for_product(grad_y.scalar_type())}, {grad_down, a}, true);
    if (ctx->saved_data["trained"].toBool()) {
      grad_a = product({grad_down.t(), x}, {}, true);
      grad_b = product({down.t(), grad_y}, {}, true).t().contiguous();
    }
    Tensor none;
    return {grad_x, none, none, none, none, none, none, none, grad_a, grad_b, none};
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
