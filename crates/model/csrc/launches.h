// Counts what a GPU would be sent: our launches by the launcher's own plan, libtorch's by its operators' calls. Part of ops.cpp.
//
// A thread counts while it asks for it (src/launches.rs). libtorch tells of every operator that it calls (RecordFunction); those that
// only make another view or reserve memory launch nothing and are listed below, and of operators within operators the outermost
// that is not listed counts. What a fused operation computes on the CPU in the place of its kernel is not counted.
#pragma once
#include <ATen/record_function.h>

#include <map>
#include <set>
#include <string>

#include "tensors.h"

namespace {

// Operators that launch nothing by themselves: views, memory, questions, and names for others that are counted when they are called.
const std::set<std::string>& free_operators() {
  static const std::set<std::string> names = {
      // views
      "aten::alias", "aten::as_strided", "aten::chunk", "aten::detach", "aten::detach_", "detach", "detach_", "aten::diagonal", "aten::expand",
      "aten::expand_as", "aten::narrow", "aten::permute", "aten::select", "aten::slice", "aten::split", "aten::split_with_sizes",
      "aten::squeeze", "aten::t", "aten::transpose", "aten::unbind", "aten::unsqueeze", "aten::view", "aten::view_as", "aten::_unsafe_view",
      "aten::_reshape_alias", "aten::numpy_T", "aten::unflatten", "aten::flatten",
      // memory and questions
      "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::resize_", "aten::set_",
      "aten::result_type", "aten::is_pinned", "aten::lift_fresh", "aten::requires_grad_", "aten::is_nonzero", "aten::size", "aten::stride",
      "aten::can_cast", "aten::is_floating_point",
      // made of others
      "aten::to", "aten::_to_copy", "aten::contiguous", "aten::clone", "aten::reshape", "aten::reshape_as", "aten::zeros", "aten::zeros_like", "aten::new_zeros",
      "aten::ones", "aten::ones_like", "aten::full", "aten::matmul", "aten::linear", "aten::item", "aten::squeeze_backward", "aten::block_diag",
      "aten::repeat_interleave", "aten::index_select_backward", "aten::select_backward", "aten::slice_backward", "aten::type_as", "aten::expand_backward",
      "aten::float", "aten::log_sigmoid", "aten::square", "aten::pad", "aten::constant_pad_nd", "aten::sum_to_size", "aten::value_selecting_reduction_backward"};
  return names;
}

struct LaunchCounter {
  bool dry = false;       // products are not computed: their results are zero
  int64_t ours = 0, libtorch = 0;
  std::map<std::string, int64_t> by_name;
  int depth = 0;          // within an operator that was counted, or in what stands for a kernel
  at::CallbackHandle callback{};
};
thread_local LaunchCounter* launch_counter = nullptr;

// While it lives, nothing that libtorch does is counted.
struct Uncounted {
  Uncounted() : counter(launch_counter) {
    if (counter) counter->depth++;
  }
  ~Uncounted() {
    if (counter) counter->depth--;
  }
  LaunchCounter* counter;
};

// `n` launches of libtorch that the CPU makes by other means.
void count_libtorch(const char* name, int64_t n) {
  if (!launch_counter || launch_counter->depth > 0) return;
  launch_counter->libtorch += n;
  launch_counter->by_name[name] += n;
}

struct Counted : at::ObserverContext {};

std::unique_ptr<at::ObserverContext> begin_operator(const at::RecordFunction& function) {
  LaunchCounter* counter = launch_counter;
  if (!counter) return nullptr;
  std::string name = function.name();
  if (name.compare(0, 10, "autograd::") == 0 || free_operators().count(name)) return nullptr;  // the engine names what it calls
  if (counter->depth == 0) {
    counter->libtorch++;
    counter->by_name[name]++;
  }
  counter->depth++;
  return std::make_unique<Counted>();
}
void end_operator(const at::RecordFunction&, at::ObserverContext* context) {
  if (context && launch_counter) launch_counter->depth--;
}

void start_counting(bool dry) {
  launch_counter = new LaunchCounter;
  launch_counter->dry = dry;
  launch_counter->callback = at::addThreadLocalCallback(
      at::RecordFunctionCallback(begin_operator, end_operator).scopes({at::RecordScope::FUNCTION}));
}

// One name and number a line, the sums first.
std::string stop_counting() {
  LaunchCounter* counter = launch_counter;
  at::removeCallback(counter->callback);
  launch_counter = nullptr;
  std::string report = "ours " + std::to_string(counter->ours) + "\nlibtorch " + std::to_string(counter->libtorch) + "\n";
  for (const auto& [name, n] : counter->by_name) report += name + " " + std::to_string(n) + "\n";
  delete counter;
  return report;
}

bool counts_dry() { return launch_counter && launch_counter->dry; }

// ---- the products that libtorch does ----

Tensor of_shape(const Tensor& x) { return at::empty_strided(x.sizes(), x.strides(), x.options().device(at::kMeta)); }

// a b, or in a dry count the call with shapes alone.
Tensor library_product(const Tensor& a, const Tensor& b) {
  if (!counts_dry()) return at::mm(a, b);
  at::mm(of_shape(a), of_shape(b));
  Uncounted uncounted;
  return at::zeros({a.size(0), b.size(1)}, a.options());
}
// y += a b.
void add_library_product(Tensor& y, const Tensor& a, const Tensor& b) {
  if (counts_dry()) of_shape(y).addmm_(of_shape(a), of_shape(b));
  else y.addmm_(a, b);
}
void library_product_into(Tensor y, const Tensor& a, const Tensor& b) {
  if (!counts_dry()) {
    at::mm_out(y, a, b);
    return;
  }
  Tensor shape = of_shape(y);
  at::mm_out(shape, of_shape(a), of_shape(b));
  Uncounted uncounted;
  y.zero_();
}

}  // namespace
