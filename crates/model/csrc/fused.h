// The fused operations: one call each, on a GPU a launch of our kernels (src/cuda/table.rs), on the CPU the kernels of kernels.h. Part of
// ops.cpp.
//
// The decoder's path over them has two forms. The CPU's own is the fastest there. The GPU's is what CUDA tensors take; with
// ARETE_COMPOSITE=1 f32 and bf16 tensors on the CPU take it too, so that every call but the kernels themselves is tried without a GPU.
#pragma once
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstdlib>
#include <initializer_list>

#include "launches.h"
#include "tensors.h"

namespace {

// Mirrors OPERATIONS of src/cuda/table.rs.
enum Operation : int32_t {
  kAddNorm,
  kAddNormBackward,
  kSwiGlu,
  kSwiGluBackward,
  kRotate,
  kRotateBackward,
  kLoraDown,
  kLoraUp,
  kLoraJoin,
  kLoraPart,
  kTokenLogprob,
  kSample,
  kAttend,
  kNf4Product,
  kNf4Dequantize,
};

// What the launcher is told; mirrors Call of src/cuda/table.rs.
struct Call {
  int32_t operation, format, device;  // format: 0 f32, 1 bf16, 2 f16; device: -1 = count only
  int32_t n_addresses, n_numbers, n_reals;
  const uint64_t* addresses;
  const int64_t* numbers;
  const double* reals;
  void* stream;
  char* message;
  int64_t message_bytes;
};
// Launches a call, or (device -1) counts; the number of launches, or -1 and a message.
typedef int64_t (*Launcher)(const Call* call);
Launcher launcher = nullptr;

bool gpu_format(const Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}
int32_t format_of(const Tensor& x) { return x.scalar_type() == at::kFloat ? 0 : x.scalar_type() == at::kBFloat16 ? 1 : 2; }

// Whether the operations of this header take x.
bool fusable(const Tensor& x) { return on_kernels(x) || (x.is_cuda() && gpu_format(x)); }

thread_local int composite_override = -1;  // tests: 0 or 1
bool composite() {
  static const bool wanted = [] {
    const char* value = std::getenv("ARETE_COMPOSITE");
    return value && std::string(value) == "1";
  }();
  return composite_override < 0 ? wanted : composite_override == 1;
}
// Whether x takes the GPU's path.
bool gpu_shaped(const Tensor& x) { return x.is_cuda() ? gpu_format(x) : composite() && on_kernels(x); }

// The CUDA stream that torch's next operator on this device would be queued on. libtorch_cuda is opened at run time, so its
// function is looked up by name.
void* current_stream(const Tensor& x) {
  using Native = void* (*)(const c10::Stream*);
  static const Native native = (Native)dlsym(RTLD_DEFAULT, "_ZNK3c104cuda10CUDAStream6streamEv");
  TORCH_CHECK(native, "libc10_cuda has no c10::cuda::CUDAStream::stream: another libtorch than the one compiled against");
  c10::Stream stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device());
  return native(&stream);
}

using Tensors = std::initializer_list<const Tensor*>;  // null, or undefined: no such operand

// `like` decides device and number format.
template <class OnCpu>
void fused(Operation operation, const Tensor& like, Tensors tensors, std::initializer_list<int64_t> numbers,
           std::initializer_list<double> reals, OnCpu on_cpu) {
  bool on_gpu = like.is_cuda();
  if (on_gpu || launch_counter) {
    TORCH_CHECK(launcher, "no kernels for this device: arete_model::cuda was not asked for");
    uint64_t addresses[16];
    int32_t n = 0;
    for (const Tensor* tensor : tensors) {
      bool there = tensor && tensor->defined();
      if (there && on_gpu)
        TORCH_CHECK(tensor->device() == like.device() && tensor->is_contiguous(), "fused operation ", int(operation), ": operand ", n,
                    " is not a contiguous tensor on ", like.device());
      addresses[n++] = there ? uint64_t(tensor->data_ptr()) : 0;
      TORCH_CHECK(!on_gpu || addresses[n - 1] % 8 == 0, "fused operation ", int(operation), ": operand ", n - 1, " is not aligned");
    }
    char message[1024] = "";
    Call call{operation, format_of(like), on_gpu ? like.device().index() : -1, n, int32_t(numbers.size()), int32_t(reals.size()),
              addresses, numbers.begin(), reals.begin(), on_gpu ? current_stream(like) : nullptr, message, sizeof message};
    int64_t launches = launcher(&call);
    TORCH_CHECK(launches >= 0, message);
    if (launch_counter) {
      launch_counter->ours += launches;
      launch_counter->by_name["fused " + std::to_string(int(operation))] += launches;
    }
    if (on_gpu) return;
  }
  Uncounted uncounted;
  on_cpu();
}

// What a dry count leaves uncomputed is zero.
Tensor result_like(const Tensor& like, at::IntArrayRef sizes) {
  if (!counts_dry()) return at::empty(sizes, like.options());
  Uncounted uncounted;
  return at::zeros(sizes, like.options());
}

// Small tables for the device, in one copy that the host does not wait for.
Tensor uploaded(const int64_t* values, int64_t n, at::Device device) {
  auto here = at::TensorOptions().dtype(at::kLong);
  if (!device.is_cuda()) return at::from_blob(const_cast<int64_t*>(values), {n}, here).clone();
  Tensor staged = at::empty({n}, here.pinned_memory(true));
  std::memcpy(staged.data_ptr(), values, n * sizeof(int64_t));
  return staged.to(device, /*non_blocking=*/true);
}

}  // namespace
