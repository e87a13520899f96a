// Which instruction sets the CPU's products run on: our kernels' table, and the highest that oneDNN may take.
//
// Included by ops.cpp alone, which every program that computes anything links: the constructor below runs once in each of them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "kernels.h"

namespace arete {

inline const Kernels& kernels() {
  static const Kernels* chosen = [] {
    const char* wanted = std::getenv("ARETE_CPU_KERNELS");  // for tests: a lesser table than the CPU could use
    std::string name = wanted ? wanted : "";
    if (name.empty() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd"))
      return kernels_avx512();
    if ((name.empty() || name == "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
      return kernels_avx2();
    if (name == "avx512") return kernels_avx512();
    return kernels_baseline();
  }();
  return *chosen;
}

// How oneDNN's instruction set was decided; IsaCap in src/self_test.rs.
enum IsaCap : int32_t { kUndecided = 0, kNoAmx = 1, kSetByUser = 2, kCapped = 3 };

// EDX of CPUID leaf 7: the bits of AMX. Every later part of AMX (fp16, complex) comes with the tiles.
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;

// The products of oneDNN's AMX kernels are not equal row for row (docs/numerics.md), so they are left out, unless the user chose.
inline IsaCap decide_isa_cap(uint32_t leaf7_edx, bool set_by_user) {
  if (set_by_user) return kSetByUser;
  return leaf7_edx & (kAmxBf16 | kAmxTile) ? kCapped : kNoAmx;
}

inline IsaCap isa_cap = kUndecided;

// oneDNN reads the variable once, at its first product: by then it must be set. A constructor of the program runs after those of
// libtorch (which do not ask for it; they turn MKLDNN_… into DNNL_…) and before main, so before any thread could read the
// environment at the same time. oneDNN's own function for it is not exported by libtorch.
__attribute__((constructor)) static void cap_onednn_isa() {
  uint32_t features = 0;
#ifdef __x86_64__
  uint32_t eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) features = edx;
#endif
  auto is_set = [](const char* name) {
    const char* value = std::getenv(name);
    return value && *value;
  };
  isa_cap = decide_isa_cap(features, is_set("ONEDNN_MAX_CPU_ISA") || is_set("DNNL_MAX_CPU_ISA"));
  if (isa_cap == kCapped) setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", 1);
}

}  // namespace arete
