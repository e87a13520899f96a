// What the parts of ops.cpp share: types and the split of work over libtorch's threads.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"
#include "kernels.h"

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

using namespace arete;

bool on_kernels(const Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}
Type type_of(const Tensor& x) { return x.scalar_type() == at::kBFloat16 ? kBF16 : kF32; }

void parallel_rows(int64_t rows, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { work(begin, end); });
}

}  // namespace
