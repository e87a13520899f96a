// Attention on the GPU's path. Part of ops.cpp, after SpanAttention.
//
// With a cache: one launch of our kernel over the segment and span tables. In training: libtorch's flash attention, one call for all
// segments, causal from the last key on. A segment's keys stand together: those of the segments it continues, then its own; where
// segments continue others they are gathered first, as the composite does segment by segment.
#pragma once


struct Rotated {
  Tensor q, k, v;
};
// Queries and keys rotated and apart, values beside them: [rows, heads, head_size] each.
Rotated gpu_rotated(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin, const Heads& sizes) {
  int64_t rows = qkv.size(0), q_width = sizes.query_width(), k_width = sizes.key_width();
  Rotated out{result_like(qkv, {rows, sizes.heads, sizes.head_size}), result_like(qkv, {rows, sizes.kv_heads, sizes.head_size}),
              result_like(qkv, {rows, sizes.kv_heads, sizes.head_size})};
  fused(kRotate, qkv, {&out.q, &out.k, &out.v, &qkv, &positions, nullptr, &cos_sin},
        {rows, sizes.heads, sizes.kv_heads, sizes.head_size}, {}, [&] {
          Type type = type_of(qkv);
          rotate(type, qkv, 0, out.q, q_width, 0, nullptr, positions, cos_sin, sizes.heads, sizes.head_size, false);
          rotate(type, qkv, q_width, out.k, k_width, 0, nullptr, positions, cos_sin, sizes.kv_heads, sizes.head_size, false);
          out.v.copy_(qkv.slice(1, q_width + k_width).view_as(out.v));
        });
  return out;
}

// ---- with a cache ----

// Shapes that attention.cu takes; the CPU takes all.
bool attended_by_kernel(const Tensor& qkv, const Heads& sizes) {
  return !qkv.is_cuda() || (sizes.head_size % 8 == 0 && sizes.head_size <= 256 && qkv.size(0) <= 65535);
}

Tensor gpu_cached_attention(const Tensor& qkv, const Tensor& positions, const Tensor& cos_sin, const Layout& layout, const Tensor& slots,
                            const Tensor& keys, const Tensor& values, const Heads& sizes, const Tensor& segments, const Tensor& spans) {
  int64_t rows = qkv.size(0), q_width = sizes.query_width(), k_width = sizes.key_width();
  Type type = type_of(qkv);
  Tensor q = result_like(qkv, {rows, q_width}), out = result_like(qkv, {rows, q_width});
  fused(kRotate, qkv, {&q, &keys, &values, &qkv, &positions, &slots, &cos_sin}, {rows, sizes.heads, sizes.kv_heads, sizes.head_size}, {},
        [&] {
          const int64_t* slot = slots.data_ptr<int64_t>();
          rotate(type, qkv, 0, q, q_width, 0, nullptr, positions, cos_sin, sizes.heads, sizes.head_size, false);
          rotate(type, qkv, q_width, keys, k_width, 0, slot, positions, cos_sin, sizes.kv_heads, sizes.head_size, false);
          values.index_copy_(0, slots, qkv.slice(1, q_width + k_width));
        });
  int64_t last = 0;  // the highest position: it decides how far a row's keys are cut for the GPU
  for (int64_t s = 0; s < layout.n_segments; s++)
    last = std::max(last, layout.segments[s].position + layout.segments[s].n_rows - 1);
  fused(kAttend, qkv, {&out, &q, &keys, &values, &segments, &spans},
        {rows, layout.n_segments, sizes.heads, sizes.kv_heads, sizes.head_size, sizes.window, last}, {}, [&] {
          attend(type, sizes.shape(q_width, k_width, k_width, q_width), layout, q.data_ptr(), keys.data_ptr(), values.data_ptr(),
                 out.data_ptr(), nullptr);
        });
  return out;
}

// ---- in training ----

// What libtorch's flash attention is told of its sequences: `starts` [n + 1] i32 of their queries and of their keys.
struct Sequences {
  Tensor query_starts, key_starts;
  int64_t longest_query, longest_key;
};
struct Flash {
  Tensor out, log_sum_exp, rng_state, unused;
};

// The sequences as segments with a span each.
struct FlashLayout {
  std::vector<Segment> segments;
  std::vector<Span> spans;
  std::vector<int64_t> trees;
  explicit FlashLayout(const Sequences& sequences) {
    const int32_t *q = sequences.query_starts.data_ptr<int32_t>(), *k = sequences.key_starts.data_ptr<int32_t>();
    for (int64_t s = 0; s + 1 < sequences.query_starts.size(0); s++) {
      int64_t rows = q[s + 1] - q[s], keys = k[s + 1] - k[s];
      segments.push_back({q[s], rows, keys - rows, s, 1});
      spans.push_back({k[s], keys});
      trees.push_back(s);
    }
    trees.push_back(int64_t(segments.size()));
  }
  Layout layout() const { return {segments.data(), spans.data(), trees.data(), int64_t(segments.size()), int64_t(trees.size()) - 1}; }
};

std::optional<int64_t> window_left(const Heads& sizes) {
  return sizes.window > 0 ? std::optional<int64_t>(sizes.window - 1) : std::nullopt;
}

// Causal attention of every sequence, its last query at its last key.
Flash flash_forward(const Rotated& rotated, const Sequences& at, const Heads& sizes) {
  double scale = 1.0 / std::sqrt(double(sizes.head_size));
  if (rotated.q.is_cuda()) {
    auto [out, log_sum_exp, rng_state, unused, mask] =
        at::_flash_attention_forward(rotated.q, rotated.k, rotated.v, at.query_starts, at.key_starts, at.longest_query, at.longest_key, 0.0,
                                     true, false, scale, window_left(sizes), std::nullopt);
    return {out, log_sum_exp, rng_state, unused};
  }
  count_libtorch("aten::_flash_attention_forward", 1);
  Flash result{result_like(rotated.q, rotated.q.sizes()), Tensor(), Tensor(), Tensor()};
  Uncounted uncounted;
  result.log_sum_exp = at::empty({rotated.q.size(0), sizes.heads}, rotated.q.options().dtype(at::kFloat));
  attend(type_of(rotated.q), sizes.shape(sizes.query_width(), sizes.key_width(), sizes.key_width(), sizes.query_width()),
         FlashLayout(at).layout(), rotated.q.data_ptr(), rotated.k.data_ptr(), rotated.v.data_ptr(), result.out.data_ptr(),
         result.log_sum_exp.data_ptr<float>());
  return result;
}

Rotated flash_backward(const Tensor& grad_out, const Rotated& rotated, const Flash& flash, const Sequences& at, const Heads& sizes) {
  double scale = 1.0 / std::sqrt(double(sizes.head_size));
  if (rotated.q.is_cuda()) {
    auto [q, k, v] = at::_flash_attention_backward(grad_out, rotated.q, rotated.k, rotated.v, flash.out, flash.log_sum_exp, at.query_starts,
                                                   at.key_starts, at.longest_query, at.longest_key, 0.0, true, flash.rng_state, flash.unused,
                                                   scale, window_left(sizes), std::nullopt);
    return {q, k, v};
  }
  // Row sums, the gradients, queries' gradients rounded; keys' and values' summed over the query heads that share them.
  count_libtorch("aten::_flash_attention_backward", 5);
  Uncounted uncounted;
  auto wide = rotated.q.options().dtype(at::kFloat);
  Tensor grad_q = at::empty(rotated.q.sizes(), wide), grad_k = at::zeros(rotated.k.sizes(), wide), grad_v = at::zeros(rotated.v.sizes(), wide);
  FlashLayout own(at);
  Layout layout = own.layout();
  auto shape = sizes.shape(sizes.query_width(), sizes.key_width(), sizes.key_width(), sizes.query_width());
  auto kernel = kernels().attention_backward[type_of(rotated.q)];
  parallel_rows(layout.n_segments * sizes.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      kernel(shape, layout.segments[t / sizes.kv_heads], layout.spans, t % sizes.kv_heads, rotated.q.data_ptr(), rotated.k.data_ptr(),
             rotated.v.data_ptr(), flash.out.data_ptr(), grad_out.data_ptr(), sizes.query_width(), flash.log_sum_exp.data_ptr<float>(),
             grad_q.data_ptr<float>(), grad_k.data_ptr<float>(), grad_v.data_ptr<float>());
  });
  auto type = rotated.q.scalar_type();
  return {grad_q.to(type), grad_k.to(type), grad_v.to(type)};
}

// Keeps the rotated queries and keys, the values, the output and one f32 a row and head. `sources`: the row that each gathered key
// stands for; none: the keys stand as the rows do.
struct FlashAttention : Function<FlashAttention> {
  static Tensor gathered(const Tensor& rows, const Tensor& sources) { return sources.defined() ? rows.index_select(0, sources) : rows; }
  // What gathered keys were given, for the rows: summed in f32.
  static Tensor scattered(const Tensor& grad, const Tensor& sources, const Tensor& rows) {
    if (!sources.defined()) return grad;
    return at::zeros(rows.sizes(), rows.options().dtype(at::kFloat)).index_add_(0, sources, grad.to(at::kFloat)).to(rows.scalar_type());
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& qkv_, const Tensor& positions, const Tensor& cos_sin, const Tensor& query_starts,
                        const Tensor& key_starts, const std::optional<Tensor>& sources_, std::vector<int64_t> numbers) {
    Heads sizes{numbers[0], numbers[1], numbers[2], numbers[3]};
    Sequences at{query_starts, key_starts, numbers[4], numbers[5]};
    Tensor qkv = qkv_.contiguous(), sources = sources_.value_or(Tensor());
    Rotated own = gpu_rotated(qkv, positions, cos_sin, sizes);
    Flash flash = flash_forward({own.q, gathered(own.k, sources), gathered(own.v, sources)}, at, sizes);
    ctx->save_for_backward({own.q, own.k, own.v, flash.out, flash.log_sum_exp, flash.rng_state, flash.unused, positions, cos_sin, query_starts,
                            key_starts, sources});
    ctx->saved_data["numbers"] = numbers;
    return flash.out.view({qkv.size(0), sizes.query_width()});
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    auto numbers = ctx->saved_data["numbers"].toIntVector();
    Heads sizes{numbers[0], numbers[1], numbers[2], numbers[3]};
    Rotated own{saved[0], saved[1], saved[2]};
    Flash flash{saved[3], saved[4], saved[5], saved[6]};
    const Tensor &positions = saved[7], &cos_sin = saved[8], &sources = saved[11];
    Sequences at{saved[9], saved[10], numbers[4], numbers[5]};
    Tensor grad_out = grads[0].contiguous().view(own.q.sizes());
    Rotated found = flash_backward(grad_out, {own.q, gathered(own.k, sources), gathered(own.v, sources)}, flash, at, sizes);
    Tensor grad_q = found.q.contiguous(), grad_k = scattered(found.k, sources, own.k).contiguous(),
           grad_v = scattered(found.v, sources, own.v).contiguous();
    int64_t rows = grad_q.size(0), q_width = sizes.query_width(), k_width = sizes.key_width();
    Tensor grad = result_like(own.q, {rows, q_width + 2 * k_width});
    fused(kRotateBackward, grad, {&grad_q, &grad_k, &grad_v, &grad, &positions, &cos_sin},
          {rows, sizes.heads, sizes.kv_heads, sizes.head_size}, {}, [&] {
            Type type = type_of(grad);
            rotate(type, grad_q.view({rows, q_width}), 0, grad, grad.stride(0), 0, nullptr, positions, cos_sin, sizes.heads, sizes.head_size, true);
            rotate(type, grad_k.view({rows, k_width}), 0, grad, grad.stride(0), q_width, nullptr, positions, cos_sin, sizes.kv_heads,
                   sizes.head_size, true);
            grad.slice(1, q_width + k_width).copy_(grad_v.view({rows, k_width}));
          });
    Tensor none;
    return {grad, none, none, none, none, none, none};
  }
};
