// The decoder's operations for libtorch: autograd functions around the kernels, called from src/ops.rs.
//
// tch cannot define autograd functions, and libtorch's own operators keep more for the backward pass than a frozen base
// with adapters needs. What each function keeps is said at its head. On the CPU in f32 and bf16 the kernels of kernels.cpp do
// the work, on a GPU those of src/cuda/kernels (fused.h); elsewhere (fp16 on the CPU, shapes that the kernels do not take) the same
// formulas run as libtorch operators (the `composite_…` functions).
#include <torch/version.h>

#include "fused.h"
#include "linear.h"
#include "tensors.h"
#include "waiting.h"

namespace {

// ---- RMS norm of x + delta; keeps the sum and one f32 a row ----

struct Normalised {
  Tensor out, sum, inverse;
};
Normalised rms_norm(const Tensor& x, const Tensor& delta, const Tensor& weight, double eps) {
  Normalised result{at::empty_like(x), delta.defined() ? at::empty_like(x) : x,
                    at::empty({x.size(0)}, x.options().dtype(at::kFloat))};
  Tensor none;
  fused(kAddNorm, x, {&result.out, delta.defined() ? &result.sum : &none, &result.inverse, &x, &delta, &weight},
        {x.size(0), x.size(1)}, {eps}, [&] {
          auto kernel = kernels().rms_norm[type_of(x)];
          const void* delta_data = delta.defined() ? delta.data_ptr() : nullptr;
          parallel_rows(x.size(0), 8, [&](int64_t begin, int64_t end) {
            kernel(x.data_ptr(), delta_data, weight.data_ptr(), result.sum.data_ptr(), result.out.data_ptr(),
                   result.inverse.data_ptr<float>(), begin, end, x.size(1), float(eps));
          });
        });
  return result;
}

struct RmsNorm : Function<RmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& addend,
                               const Tensor& weight, double eps) {
    Tensor delta = addend.value_or(Tensor());
    auto [out, sum, inverse] = rms_norm(x, delta, weight, eps);
    ctx->save_for_backward({sum, weight, inverse});
    ctx->saved_data["has_delta"] = delta.defined();
    if (!delta.defined()) return {out};
    return {out, sum};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const Tensor &sum = saved[0], &weight = saved[1], &inverse = saved[2];
    bool has_delta = ctx->saved_data["has_delta"].toBool();
    Tensor grad_out = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(sum);
    Tensor grad_sum = has_delta && grads[1].defined() ? grads[1].contiguous() : Tensor();
    Tensor grad_x = at::empty_like(sum);
    fused(kAddNormBackward, sum, {&grad_x, &grad_out, &grad_sum, &sum, &weight, &inverse}, {sum.size(0), sum.size(1)}, {}, [&] {
      auto kernel = kernels().rms_norm_backward[type_of(sum)];
      const void* grad_sum_data = grad_sum.defined() ? grad_sum.data_ptr() : nullptr;
      parallel_rows(sum.size(0), 8, [&](int64_t begin, int64_t end) {
        kernel(grad_out.data_ptr(), grad_sum_data, sum.data_ptr(), weight.data_ptr(), inverse.data_ptr<float>(),
               grad_x.data_ptr(), begin, end, sum.size(1));
      });
    });
    return {grad_x, has_delta ? grad_x : Tensor(), Tensor(), Tensor()};
  }
};

variable_list composite_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& weight, double eps) {
  Tensor sum = delta.defined() ? x + delta : x;
  Tensor wide = sum.to(at::kFloat);
  Tensor normal = wide * at::rsqrt(wide.square().mean(-1, true) + eps);
  return {weight * normal.to(x.scalar_type()), sum};
}

// ---- SwiGLU on [N, 2F] (gate, then up); keeps its input ----

Tensor swiglu(const Tensor& gate_up) {
  int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = at::empty({rows, width}, gate_up.options());
  fused(kSwiGlu, gate_up, {&out, &gate_up}, {rows, width}, {}, [&] {
    auto kernel = kernels().swiglu[type_of(gate_up)];
    parallel_rows(rows, 4, [&](int64_t begin, int64_t end) { kernel(gate_up.data_ptr(), out.data_ptr(), begin, end, width); });
  });
  return out;
}

struct SwiGlu : Function<SwiGlu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up) {
    ctx->save_for_backward({gate_up});
    return swiglu(gate_up);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor gate_up = ctx->get_saved_variables()[0];
    Tensor grad_out = grads[0].contiguous();
    Tensor grad = at::empty_like(gate_up);
    int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
    fused(kSwiGluBackward, gate_up, {&grad, &gate_up, &grad_out}, {rows, width}, {}, [&] {
      auto kernel = kernels().swiglu_backward[type_of(gate_up)];
      parallel_rows(rows, 4, [&](int64_t begin, int64_t end) {
        kernel(gate_up.data_ptr(), grad_out.data_ptr(), grad.data_ptr(), begin, end, width);
      });
    });
    return {grad};
  }
};

// ---- rotary embedding and attention ----

struct Layout {
  const Segment* segments;
  const Span* spans;
  const int64_t* trees;  // segment ranges that share no keys with each other
  int64_t n_segments, n_trees;
};
Layout layout_of(const Tensor& segments, const Tensor& spans, const Tensor& trees) {
  return {(const Segment*)segments.data_ptr<int64_t>(), (const Span*)spans.data_ptr<int64_t>(), trees.data_ptr<int64_t>(),
          segments.size(0), trees.size(0) - 1};
}

struct Heads {
  int64_t heads, kv_heads, head_size, window;
  int64_t query_width() const { return heads * head_size; }
  int64_t key_width() const { return kv_heads * head_size; }
  AttentionShape shape(int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t out_stride) const {
    return {heads, kv_heads, head_size, q_stride, k_stride, v_stride, out_stride, float(1.0 / std::sqrt(double(head_size))), window};
  }
};

void rotate(Type type, const Tensor& from, int64_t from_offset, const Tensor& to, int64_t to_stride, int64_t to_offset,
            const int64_t* slots, const Tensor& positions, const Tensor& cos_sin, int64_t heads, int64_t head_size,
            bool inverse) {
  int64_t size = from.element_size(), from_stride = from.stride(0);
  parallel_rows(positions.size(0), 16, [&](int64_t begin, int64_t end) {
    kernels().rope[type]((const char*)from.data_ptr() + from_offset * size, from_stride,
                         (char*)to.data_ptr() + to_offset * to.element_size(), to_stride, slots,
                         positions.data_ptr<int64_t>(), cos_sin.data_ptr<float>(), heads, head_size, inverse, begin, end);
  });
}

constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kSerialProducts = 200'000;  // attention of fewer multiplications is done before a second thread wakes

void attend(Type type, const AttentionShape& shape, const Layout& layout, const void* q, const void* k, const void* v, void* out,
            float* log_sum_exp) {
  struct Task {
    int64_t segment, kv_head, begin, end;
  };
  std::vector<Task> tasks;
  int64_t products = 0;
  for (int64_t s = 0; s < layout.n_segments; s++) {
    const Segment& segment = layout.segments[s];
    products += segment.n_rows * (segment.position + segment.n_rows) * shape.heads * shape.head_size * 2;
    for (int64_t begin = segment.row; begin < segment.row + segment.n_rows; begin += kRowsPerTask)
      for (int64_t head = 0; head < shape.kv_heads; head++)
        tasks.push_back({s, head, begin, std::min(begin + kRowsPerTask, segment.row + segment.n_rows)});
  }
  parallel_rows(int64_t(tasks.size()), products < kSerialProducts ? int64_t(tasks.size()) : 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      kernels().attention[type](shape, layout.segments[tasks[t].segment], layout.spans, tasks[t].kv_head, tasks[t].begin,
                                tasks[t].end, q, k, v, out, log_sum_exp);
  });
}

// Causal attention of packed segments over their own keys and those of the segments they continue.
// Keeps the rotated queries and keys, the values, the output and one f32 a row and head.
struct SpanAttention : Function<SpanAttention> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin,
                        const Tensor& segments, const Tensor& spans, const Tensor& trees, std::vector<int64_t> sizes) {
    Heads heads{sizes[0], sizes[1], sizes[2], sizes[3]};
    Type type = type_of(qkv);
    int64_t rows = qkv.size(0), q_width = heads.query_width(), k_width = heads.key_width();
    Tensor rotated = at::empty({rows, q_width + k_width}, qkv.options());
    rotate(type, qkv, 0, rotated, q_width + k_width, 0, nullptr, positions, cos_sin, heads.heads + heads.kv_heads,
           heads.head_size, false);
    Tensor values = qkv.slice(1, q_width + k_width).contiguous();
    Tensor out = at::empty({rows, q_width}, qkv.options());
    Tensor log_sum_exp = at::empty({rows, heads.heads}, qkv.options().dtype(at::kFloat));
    auto shape = heads.shape(q_width + k_width, q_width + k_width, k_width, q_width);
    const char* q = (const char*)rotated.data_ptr();
    attend(type, shape, layout_of(segments, spans, trees), q, q + q_width * rotated.element_size(), values.data_ptr(),
           out.data_ptr(), log_sum_exp.data_ptr<float>());
    ctx->save_for_backward({rotated, values, out, log_sum_exp, positions, cos_sin, segments, spans, trees});
    ctx->saved_data["sizes"] = sizes;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const Tensor &rotated = saved[0], &values = saved[1], &out = saved[2], &log_sum_exp = saved[3], &positions = saved[4],
                 &cos_sin = saved[5];
    auto sizes = ctx->saved_data["sizes"].toIntVector();
    Heads heads{sizes[0], sizes[1], sizes[2], sizes[3]};
    Layout layout = layout_of(saved[6], saved[7], saved[8]);
    Type type = type_of(rotated);
    int64_t rows = rotated.size(0), q_width = heads.query_width(), k_width = heads.key_width();
    Tensor grad_out = grads[0].contiguous();
    auto wide = rotated.options().dtype(at::kFloat);
    Tensor grad_q = at::empty({rows, q_width}, wide);
    Tensor grad_k = at::zeros({rows, k_width}, wide), grad_v = at::zeros({rows, k_width}, wide);
    auto shape = heads.shape(q_width + k_width, q_width + k_width, k_width, q_width);
    const char* q = (const char*)rotated.data_ptr();
    const char* k = q + q_width * rotated.element_size();
    // Segments of one tree add to the same keys, so a tree and key/value head belong to one thread.
    parallel_rows(layout.n_trees * heads.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t s = layout.trees[t / heads.kv_heads]; s < layout.trees[t / heads.kv_heads + 1]; s++)
          kernels().attention_backward[type](shape, layout.segments[s], layout.spans, t % heads.kv_heads, q, k,
                                             values.data_ptr(), out.data_ptr(), grad_out.data_ptr(), q_width,
                                             log_sum_exp.data_ptr<float>(), grad_q.data_ptr<float>(),
                                             grad_k.data_ptr<float>(), grad_v.data_ptr<float>());
    });
    Tensor grad = at::empty({rows, q_width + 2 * k_width}, wide);
    rotate(kF32, grad_q, 0, grad, grad.stride(0), 0, nullptr, positions, cos_sin, heads.heads, heads.head_size, true);
    rotate(kF32, grad_k, 0, grad, grad.stride(0), q_width, nullptr, positions, cos_sin, heads.kv_heads, heads.head_size, true);
    grad.slice(1, q_width + k_width).copy_(grad_v);
    Tensor none;
    return {grad.to(rotated.scalar_type()), none, none, none, none, none, none};
  }
};

Tensor rotate_half(const Tensor& x, const Tensor& cosines, const Tensor& sines) {
  auto halves = x.to(at::kFloat).chunk(2, -1);
  return at::cat({halves[0] * cosines - halves[1] * sines, halves[1] * cosines + halves[0] * sines}, -1).to(x.scalar_type());
}

// The same on any device and dtype with libtorch operators: one padded block of keys a segment.
Tensor composite_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& layout, const Heads& heads) {
  Tensor out = at::empty({0}, q.options());
  std::vector<Tensor> parts;
  for (int64_t s = 0; s < layout.n_segments; s++) {
    const Segment& segment = layout.segments[s];
    std::vector<Tensor> keys, values;
    for (int64_t i = 0; i < segment.n_spans; i++) {
      const Span& span = layout.spans[segment.span + i];
      keys.push_back(k.narrow(0, span.slot, span.length));
      values.push_back(v.narrow(0, span.slot, span.length));
    }
    int64_t group = heads.heads / heads.kv_heads;
    Tensor key = at::cat(keys).transpose(0, 1).repeat_interleave(group, 0).to(at::kFloat);      // [H, T, E]
    Tensor value = at::cat(values).transpose(0, 1).repeat_interleave(group, 0).to(at::kFloat);  // [H, T, E]
    Tensor query = q.narrow(0, segment.row, segment.n_rows).transpose(0, 1).to(at::kFloat);     // [H, S, E]
    Tensor scores = at::matmul(query, key.transpose(1, 2)) / std::sqrt(double(heads.head_size));  // [H, S, T]
    Tensor at_key = at::arange(key.size(1), q.options().dtype(at::kLong)).unsqueeze(0);
    Tensor at_row = at::arange(segment.position, segment.position + segment.n_rows, q.options().dtype(at::kLong)).unsqueeze(1);
    Tensor hidden = at_key > at_row;
    if (heads.window > 0) hidden = hidden | (at_key <= at_row - heads.window);
    Tensor weights = at::softmax(scores.masked_fill(hidden, -INFINITY), -1);
    parts.push_back(at::matmul(weights, value).transpose(0, 1).to(q.scalar_type()));  // [S, H, E]
  }
  return at::cat(parts).reshape({q.size(0), heads.query_width()});
}

std::vector<Tensor> composite_rotated(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin, const Heads& heads) {
  int64_t rows = qkv.size(0), half = heads.head_size / 2;
  Tensor table = cos_sin.index_select(0, positions).unsqueeze(1);  // [N, 1, E]
  Tensor cosines = table.narrow(2, 0, half), sines = table.narrow(2, half, half);
  auto parts = qkv.split_with_sizes({heads.query_width(), heads.key_width(), heads.key_width()}, 1);
  Tensor q = parts[0].reshape({rows, heads.heads, heads.head_size});
  Tensor k = parts[1].reshape({rows, heads.kv_heads, heads.head_size});
  Tensor v = parts[2].reshape({rows, heads.kv_heads, heads.head_size});
  return {rotate_half(q, cosines, sines), rotate_half(k, cosines, sines), v};
}

#include "attention.h"

// ---- log-probabilities of given tokens ----

// Rows of the vocabulary product held at a time.
constexpr int64_t kVocabularyRows = 256;

// One chunk on the GPU's path: the logits become their derivative, whose product with W is the jacobian.
void gpu_token_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets, double inverse, Tensor logprob, Tensor entropy,
                       Tensor jacobian) {
  int64_t rows = hidden.size(0), width = weight.size(0);
  Tensor logits = library_product(hidden, weight.t());
  bool derive = jacobian.defined();
  fused(kTokenLogprob, logits, {&logprob, &entropy, &logits, &targets}, {rows, width, derive}, {inverse}, [&] {
    Tensor wide = logits.to(at::kFloat, false, /*copy=*/true);
    parallel_rows(rows, 1, [&](int64_t begin, int64_t end) {
      kernels().token_logprob[kF32](wide.data_ptr(), targets.data_ptr<int64_t>(), float(inverse), logprob.data_ptr<float>(),
                                    entropy.defined() ? entropy.data_ptr<float>() : nullptr, derive, begin, end, width);
    });
    if (!derive) return;
    Tensor at_target = targets.unsqueeze(1);
    wide.neg_().scatter_add_(1, at_target, at::ones(at_target.sizes(), wide.options())).mul_(inverse);
    logits.copy_(wide);
  });
  if (derive) library_product_into(jacobian, logits, weight);
}

// log softmax(h Wᵀ / temperature)[target] per row. A row's log-probability depends on its own hidden vector alone, so the
// forward pass already computes that derivative, [N, D], and keeps it instead of the logits.
struct TokenLogprob : Function<TokenLogprob> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                               double temperature, bool want_entropy, bool want_grad) {
    int64_t rows = hidden.size(0), width = weight.size(0);
    auto wide = hidden.options().dtype(at::kFloat);
    Tensor logprob = at::empty({rows}, wide);
    Tensor entropy = want_entropy ? at::empty({rows}, wide) : at::empty({0}, wide);
    Tensor jacobian = want_grad ? at::empty_like(hidden) : Tensor();
    float inverse = float(1.0 / temperature);
    for (int64_t start = 0; start < rows; start += kVocabularyRows) {
      int64_t n = std::min(kVocabularyRows, rows - start);
      Tensor part = targets.narrow(0, start, n);
      if (gpu_shaped(hidden)) {
        gpu_token_logprob(hidden.narrow(0, start, n), weight, part, inverse, logprob.narrow(0, start, n),
                          want_entropy ? entropy.narrow(0, start, n) : Tensor(), want_grad ? jacobian.narrow(0, start, n) : Tensor());
        continue;
      }
      Tensor logits = product({hidden.narrow(0, start, n), weight});
      if (on_kernels(hidden)) {
        auto kernel = kernels().token_logprob[type_of(hidden)];
        parallel_rows(n, 1, [&](int64_t begin, int64_t end) {
          kernel(logits.data_ptr(), part.data_ptr<int64_t>(), inverse, logprob.data_ptr<float>() + start,
                 want_entropy ? entropy.data_ptr<float>() + start : nullptr, want_grad, begin, end, width);
        });
      } else {
        Tensor logs = at::log_softmax(logits.to(at::kFloat) * inverse, -1);
        logprob.narrow(0, start, n).copy_(logs.gather(1, part.unsqueeze(1)).squeeze(1));
        Tensor probabilities = logs.exp();
        if (want_entropy) entropy.narrow(0, start, n).copy_(-(probabilities * logs).sum(-1));
        logits = probabilities.to(hidden.scalar_type());
      }
      if (want_grad) {
        Tensor mean = product({logits, weight}, {}, true);
        jacobian.narrow(0, start, n).copy_(weight.index_select(0, part).to(at::kFloat).sub_(mean).mul_(inverse));
      }
    }
    ctx->save_for_backward({jacobian});
    ctx->mark_non_differentiable({entropy});
    return {logprob, entropy};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor jacobian = ctx->get_saved_variables()[0], none;
    Tensor grad = (jacobian * grads[0].unsqueeze(1)).to(jacobian.scalar_type());
    return {grad, none, none, none, none, none};
  }
};

// ---- calls from Rust ----

thread_local std::string last_error;

template <class Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return 1;
}

// Without gradients an autograd function's bookkeeping costs as much as the work on a lone row.
bool records_gradients() { return at::GradMode::is_enabled(); }

// The tensors of a packed matrix, null where it has none; mirrors the struct of src/ops.rs.
struct RawPacked {
  const Tensor *codes, *absmax, *codebook, *map, *nested;
};
Tensor or_none(const Tensor* tensor) { return tensor ? *tensor : Tensor(); }
Packed packed_of(const RawPacked& raw) {
  return {or_none(raw.codes), or_none(raw.absmax), or_none(raw.codebook), or_none(raw.map), or_none(raw.nested)};
}

std::optional<Tensor> optional(const Tensor* tensor) { return tensor ? std::optional<Tensor>(*tensor) : std::nullopt; }
Tensor* released(Tensor tensor) { return new Tensor(std::move(tensor)); }

}  // namespace

extern "C" {

const char* arete_last_error() { return last_error.c_str(); }
const char* arete_kernels_name() { return kernels().name; }
const char* arete_libtorch_isa() {
  static const std::string name = at::get_cpu_capability();
  return name.c_str();
}
const char* arete_libtorch_version() { return TORCH_VERSION; }
int32_t arete_wait_briefly() {
  // A thread that cannot be had (no memory for its stack, too many of one user) leaves the others spinning for longer, no more.
  try {
    return wait_briefly();
  } catch (const std::exception&) {
    return kSingleThread;
  }
}
int32_t arete_amx_state() { return chosen_kernels().amx; }
int32_t arete_isa_cap() { return isa_cap; }
int32_t arete_decide_isa_cap(uint32_t leaf7_edx, bool set_by_user) { return decide_isa_cap(leaf7_edx, set_by_user); }
int64_t arete_packed_rows() { return kPackedRows; }
void arete_set_launcher(Launcher chosen, int64_t packed_rows) {
  launcher = chosen;
  gpu_packed_rows = packed_rows;
}
bool arete_composite() { return composite(); }
// Tests: -1 as the environment says.
void arete_override_composite(int chosen) { composite_override = chosen; }
void arete_start_counting(bool dry) { start_counting(dry); }
const char* arete_stop_counting() {
  static thread_local std::string report;
  report = stop_counting();
  return report.c_str();
}

// `device` -1: the CPU, as the device that a GPU's path goes to; -2: the host beside it.
int arete_upload(const int64_t* values, int64_t n, int32_t device, Tensor** out) {
  return guarded([&] {
    if (device == -2) {
      Uncounted uncounted;
      *out = released(uploaded(values, n, at::kCPU));
      return;
    }
    at::Device there = device < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, at::DeviceIndex(device));
    *out = released(uploaded(values, n, there));
  });
}

// Numbers from the device: waits for it.
int arete_read(const Tensor* values, int64_t* to) {
  return guarded([&] {
    if (!values->is_cuda()) count_libtorch("aten::copy_", 1);
    Tensor here = values->cpu().contiguous();
    std::memcpy(to, here.data_ptr<int64_t>(), here.numel() * sizeof(int64_t));
  });
}

int arete_join_factors(const Tensor* a0, const Tensor* a1, const Tensor* a2, const Tensor* b0, const Tensor* b1, const Tensor* b2,
                       const int64_t* sizes, double scale, int32_t format, Tensor** a, Tensor** b) {
  return guarded([&] {
    std::vector<int64_t> all(sizes, sizes + 1 + 2 * kParts);
    at::ScalarType type = format == 0 ? at::kFloat : format == 1 ? at::kBFloat16 : at::kHalf;
    if (records_gradients()) {
      auto joined = JoinFactors::apply(optional(a0), optional(a1), optional(a2), optional(b0), optional(b1), optional(b2), all, scale,
                                       int64_t(type));
      *a = released(joined[0]);
      *b = released(joined[1]);
      return;
    }
    variable_list masters;
    for (const Tensor* master : {a0, a1, a2, b0, b1, b2}) masters.push_back(master ? *master : Tensor());
    auto [joined_a, joined_b] = joined_factors(masters, all, scale, type);
    *a = released(joined_a);
    *b = released(joined_b);
  });
}

int arete_rms_norm(const Tensor* x, const Tensor* delta, const Tensor* weight, double eps, Tensor** out, Tensor** sum) {
  return guarded([&] {
    Tensor addend = delta ? *delta : Tensor();
    if (fusable(*x) && !records_gradients()) {
      Normalised result = rms_norm(*x, addend, *weight, eps);
      *out = released(result.out);
      *sum = released(result.sum);
      return;
    }
    variable_list results = fusable(*x) ? RmsNorm::apply(*x, optional(delta), *weight, eps)
                                           : composite_rms_norm(*x, addend, *weight, eps);
    *out = released(results[0]);
    *sum = released(delta ? results[1] : *x);
  });
}

int arete_swiglu(const Tensor* gate_up, Tensor** out) {
  return guarded([&] {
    if (fusable(*gate_up)) {
      *out = released(records_gradients() ? SwiGlu::apply(*gate_up) : swiglu(*gate_up));
    } else {
      auto halves = gate_up->chunk(2, 1);
      *out = released(at::silu(halves[0]) * halves[1]);
    }
  });
}

int arete_linear(const Tensor* x, const Tensor* dense, RawPacked packed, int64_t outputs, int64_t inputs, int64_t block_size,
                 const Tensor* a, const Tensor* b, bool allow_packed, Tensor** out) {
  return guarded([&] {
    Weight weight{or_none(dense), packed_of(packed), outputs, inputs, block_size};
    if (!records_gradients()) {
      Tensor down;
      *out = released(adapted_product(*x, weight, or_none(a), or_none(b), allow_packed, down));
      return;
    }
    *out = released(AdaptedLinear::apply(*x, weight, optional(a), optional(b), allow_packed));
  });
}

int arete_trained_linear(const Tensor* x, const Tensor* w, Tensor** out) {
  return guarded([&] { *out = released(records_gradients() ? TrainedLinear::apply(*x, *w) : product({*x, *w})); });
}

int arete_attention(const Tensor* qkv, const Tensor* positions, const Tensor* cos_sin, const Tensor* segments,
                    const Tensor* spans, const Tensor* trees, int64_t heads, int64_t kv_heads, int64_t head_size,
                    int64_t window, bool force_composite, const Tensor* query_starts, const Tensor* key_starts, const Tensor* sources,
                    int64_t longest_query, int64_t longest_key, Tensor** out) {
  return guarded([&] {
    if (query_starts && !force_composite) {
      *out = released(FlashAttention::apply(*qkv, *positions, *cos_sin, *query_starts, *key_starts, optional(sources),
                                            std::vector<int64_t>{heads, kv_heads, head_size, window, longest_query, longest_key}));
    } else if (on_kernels(*qkv) && !force_composite) {
      *out = released(SpanAttention::apply(*qkv, *positions, *cos_sin, *segments, *spans, *trees,
                                           std::vector<int64_t>{heads, kv_heads, head_size, window}));
    } else {
      Heads sizes{heads, kv_heads, head_size, window};
      auto parts = composite_rotated(*qkv, *positions, *cos_sin, sizes);
      *out = released(composite_attention(parts[0], parts[1], parts[2], layout_of(*segments, *spans, *trees), sizes));
    }
  });
}

// Writes the new keys and values to `slots` of the cache ([slots, kv_heads * head_size] each), then attends over it.
int arete_cached_attention(const Tensor* qkv, const Tensor* positions, const Tensor* cos_sin, const Tensor* segments,
                           const Tensor* spans, const Tensor* trees, const Tensor* slots, const Tensor* keys,
                           const Tensor* values, int64_t heads, int64_t kv_heads, int64_t head_size, int64_t window,
                           const Tensor* segments_there, const Tensor* spans_there, Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    Heads sizes{heads, kv_heads, head_size, window};
    int64_t rows = qkv->size(0), q_width = sizes.query_width(), k_width = sizes.key_width();
    Layout layout = layout_of(*segments, *spans, *trees);
    if (segments_there && gpu_shaped(*qkv) && attended_by_kernel(*qkv, sizes)) {
      *out = released(gpu_cached_attention(*qkv, *positions, *cos_sin, layout, *slots, *keys, *values, sizes, *segments_there, *spans_there));
      return;
    }
    if (!on_kernels(*qkv)) {
      auto parts = composite_rotated(*qkv, *positions, *cos_sin, sizes);
      keys->index_copy_(0, *slots, parts[1].reshape({rows, k_width}));
      values->index_copy_(0, *slots, parts[2].reshape({rows, k_width}));
      *out = released(composite_attention(parts[0], keys->view({-1, kv_heads, head_size}),
                                          values->view({-1, kv_heads, head_size}), layout, sizes));
      return;
    }
    Type type = type_of(*qkv);
    const int64_t* slot = slots->data_ptr<int64_t>();
    Tensor q = at::empty({rows, q_width}, qkv->options());
    rotate(type, *qkv, 0, q, q_width, 0, nullptr, *positions, *cos_sin, heads, head_size, false);
    rotate(type, *qkv, q_width, *keys, k_width, 0, slot, *positions, *cos_sin, kv_heads, head_size, false);
    int64_t size = qkv->element_size(), bytes = k_width * size, stride = qkv->stride(0) * size;
    const char* from = (const char*)qkv->data_ptr() + (q_width + k_width) * size;
    for (int64_t row = 0; row < rows; row++)
      std::memcpy((char*)values->data_ptr() + slot[row] * bytes, from + row * stride, bytes);
    Tensor result = at::empty({rows, q_width}, qkv->options());
    attend(type, sizes.shape(q_width, k_width, k_width, q_width), layout, q.data_ptr(), keys->data_ptr(), values->data_ptr(),
           result.data_ptr(), nullptr);
    *out = released(result);
  });
}

// Attention of rotated rows over a cache on the CPU.
int arete_attend(const Tensor* q, const Tensor* keys, const Tensor* values, const Tensor* segments, const Tensor* spans,
                 int64_t heads, int64_t kv_heads, int64_t head_size, int64_t window, Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    Heads sizes{heads, kv_heads, head_size, window};
    Layout layout{(const Segment*)segments->data_ptr<int64_t>(), (const Span*)spans->data_ptr<int64_t>(), nullptr, segments->size(0), 0};
    if (!on_kernels(*q)) {
      *out = released(composite_attention(q->view({-1, heads, head_size}), keys->view({-1, kv_heads, head_size}),
                                          values->view({-1, kv_heads, head_size}), layout, sizes));
      return;
    }
    int64_t q_width = sizes.query_width(), k_width = sizes.key_width();
    Tensor result = at::empty_like(*q);
    attend(type_of(*q), sizes.shape(q_width, k_width, k_width, q_width), layout, q->data_ptr(), keys->data_ptr(),
           values->data_ptr(), result.data_ptr(), nullptr);
    *out = released(result);
  });
}

int arete_token_logprobs(const Tensor* hidden, const Tensor* weight, const Tensor* targets, double temperature,
                         bool want_entropy, Tensor** logprob, Tensor** entropy) {
  return guarded([&] {
    bool want_grad = hidden->requires_grad() && at::GradMode::is_enabled();
    auto results = TokenLogprob::apply(hidden->contiguous(), *weight, *targets, temperature, want_entropy, want_grad);
    *logprob = released(results[0]);
    *entropy = released(results[1]);
  });
}

// h Wᵀ, the vocabulary product: `[n, V]` in the dtype of `hidden`. `few_rows`: by our own kernel for few rows and a bf16
// weight on the CPU, which sums in another order than libtorch's product.
int arete_logits(const Tensor* hidden, const Tensor* weight, bool few_rows, Tensor** out) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    if (!few_rows) {
      *out = released(gpu_shaped(*hidden) ? library_product(*hidden, weight->t()) : product({*hidden, *weight}));
      return;
    }
    TORCH_CHECK(on_kernels(*hidden) && weight->scalar_type() == at::kBFloat16, "logits: the weight must be bf16");
    Tensor input = hidden->contiguous();
    int64_t rows = input.size(0), outputs = weight->size(0);
    Tensor y = at::empty({rows, outputs}, input.options());
    auto kernel = kernels().bf16_matmul[type_of(input)];
    parallel_rows(outputs, 64, [&](int64_t begin, int64_t end) {
      kernel(input.data_ptr(), (const bf16*)weight->data_ptr(), y.data_ptr(), rows, input.size(1), outputs, begin, end);
    });
    *out = released(y);
  });
}

// Draws one token a row; `uniform` in [0, 1) and `settings` have one entry a row; logits on the CPU in f32 or bf16.
int arete_sample(const Tensor* logits, const double* uniform, const SampleSettings* settings, int64_t* token, float* logprob) {
  return guarded([&] {
    TORCH_CHECK(on_kernels(*logits) && logits->is_contiguous(), "sample: logits must be contiguous f32 or bf16 on the CPU");
    auto kernel = kernels().sample[type_of(*logits)];
    parallel_rows(logits->size(0), 1, [&](int64_t begin, int64_t end) {
      kernel(logits->data_ptr(), uniform, settings, token, logprob, begin, end, logits->size(1));
    });
  });
}

// The sampler on the logits' own device: [n] i64, a token in the low half and the bits of its log-probability in the high one.
// `sources` (or null: its own) is the row of logits that each of the n draws reads; `uniforms` [n] f64 in [0, 1).
int arete_sample_there(const Tensor* logits, const Tensor* sources, const Tensor* uniforms, float temperature, int64_t top_k, float top_p,
                       Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(gpu_shaped(*logits) && logits->is_contiguous(), "sample: logits must be contiguous and on the GPU's path");
    int64_t n = uniforms->size(0), width = logits->size(1);
    Tensor drawn = at::empty({n}, uniforms->options().dtype(at::kLong));
    fused(kSample, *logits, {&drawn, logits, sources, uniforms}, {n, width, top_k}, {temperature, top_p}, [&] {
      const Tensor rows = sources ? logits->index_select(0, *sources) : *logits;
      std::vector<SampleSettings> settings(n, SampleSettings{temperature, top_k, top_p});
      std::vector<int64_t> tokens(n);
      std::vector<float> logprobs(n);
      auto kernel = kernels().sample[type_of(rows)];
      parallel_rows(n, 1, [&](int64_t begin, int64_t end) {
        kernel(rows.data_ptr(), uniforms->data_ptr<double>(), settings.data(), tokens.data(), logprobs.data(), begin, end, width);
      });
      for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, &logprobs[i], 4);
        drawn.data_ptr<int64_t>()[i] = int64_t(uint64_t(bits) << 32 | uint64_t(tokens[i]));
      }
    });
    *out = released(drawn);
  });
}

// Packs `in` (contiguous f32 or bf16 on the CPU) into `codes` [ceil(n / 2)] and `absmax` [ceil(n / block_size)].
int arete_nf4_quantize(const Tensor* in, const Tensor* codebook, int64_t block_size, const Tensor* codes, const Tensor* absmax) {
  return guarded([&] {
    TORCH_CHECK(on_kernels(*in) && in->is_contiguous(), "nf4: the matrix must be contiguous f32 or bf16 on the CPU");
    auto kernel = kernels().nf4_quantize[type_of(*in)];
    parallel_rows(absmax->size(0), 256, [&](int64_t begin, int64_t end) {
      kernel(in->data_ptr(), codebook->data_ptr<float>(), codes->data_ptr<uint8_t>(), absmax->data_ptr<float>(), begin, end, block_size, in->numel());
    });
  });
}

int arete_nf4_dequantize(RawPacked packed, int64_t outputs, int64_t inputs, int64_t block_size, bool bf16_out, Tensor** out) {
  return guarded([&] {
    Weight weight{Tensor(), packed_of(packed), outputs, inputs, block_size};
    *out = released(weight.in_type(bf16_out ? at::kBFloat16 : at::kFloat));
  });
}
}
