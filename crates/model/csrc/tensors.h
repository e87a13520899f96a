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
#include "pool.h"

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

// work(begin, end) over [0, rows), cut for as many threads as libtorch has, `grain` rows at least each.
void parallel_rows(int64_t rows, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  if (rows <= 0) return;
  int64_t parts = std::min<int64_t>(at::get_num_threads(), (rows + grain - 1) / grain);
  if (parts <= 1 || arete::Pool::is_inside() || at::in_parallel_region()) return work(0, rows);
  int64_t each = (rows + parts - 1) / parts;
  auto part = [&](int part) {
    int64_t begin = part * each, end = std::min(rows, begin + each);
    if (begin < end) work(begin, end);
  };
  if (!arete::Pool::own().run(int(parts), part)) at::parallel_for(0, rows, grain, work);
}

}  // namespace
