// Which instruction sets the CPU's products run on: our kernels' table, and the highest that oneDNN may take.
//
// Included by ops.cpp alone, which every program that computes anything links: the constructor below runs once in each of them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#if defined(__x86_64__) && !defined(ARETE_PORTABLE)
#define ARETE_X86_KERNELS
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(ARETE_X86_KERNELS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace arete {

// EDX of CPUID leaf 7: the bits of AMX. Every later part of AMX (fp16, complex) comes with the tiles.
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;

inline uint32_t leaf7_edx() {
#ifdef __x86_64__
  uint32_t eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return edx;
#endif
  return 0;
}

// What became of the CPU's tiles; Amx in src/ops.rs.
enum AmxState : int32_t { kNoTiles = 0, kTilesUsed = 1, kTilesRefused = 2, kTilesWrong = 3, kTilesEmulated = 4, kTilesNotWanted = 5 };

struct Chosen {
  Kernels table;
  AmxState amx;
};

#ifdef ARETE_X86_KERNELS
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd");
}
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
// Linux gives a process the tiles' registers when it asks for them.
inline bool tiles_granted() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
// A product by the tiles and by their emulation, bit for bit: what the emulation's tests say holds only for tiles that agree.
inline bool tiles_agree(const Kernels& table) {
  constexpr int64_t kRows = 33, kInputs = 70, kOutputs = 40;
  static bf16 x[kRows * kInputs], w[kOutputs * kInputs], found[kRows * kOutputs], expected[kRows * kOutputs];
  uint32_t state = 1;
  auto fill = [&](bf16* values, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      state = state * 1664525u + 1013904223u;
      values[i].bits = uint16_t(0x3c00 + (state >> 23) + (state >> 16 & 0x8000));  // of either sign, 0.0078 to 0.125
    }
  };
  fill(x, kRows * kInputs);
  fill(w, kOutputs * kInputs);
  Factor factor{x, w, kInputs, kInputs, kInputs};
  table.product[kBF16](&factor, 1, found, kOutputs, false, 0, kRows, 0, kOutputs);
  table.emulated_tiles(&factor, 1, expected, kOutputs, false, 0, kRows, 0, kOutputs);
  return std::memcmp(found, expected, sizeof found) == 0;
}
inline const Kernels* best_vectors() { return has_avx512() ? kernels_avx512() : has_avx2() ? kernels_avx2() : kernels_baseline(); }

inline Chosen choose_kernels(const std::string& wanted) {
  if (wanted == "avx2" && has_avx2()) return {*kernels_avx2(), kTilesNotWanted};
  if (wanted == "avx512" && has_avx512()) return {*kernels_avx512(), kTilesNotWanted};
  if (wanted == "baseline") return {*kernels_baseline(), kTilesNotWanted};
  AmxState amx = kNoTiles;
  if ((leaf7_edx() & (kAmxBf16 | kAmxTile)) == (kAmxBf16 | kAmxTile) && has_avx512()) {
    amx = !tiles_granted() ? kTilesRefused : tiles_agree(*kernels_amx()) ? kTilesUsed : kTilesWrong;
    if (amx == kTilesUsed) return {*kernels_amx(), amx};
  }
  if (wanted != "amx") return {*best_vectors(), amx};
  Kernels emulated = *best_vectors();
  emulated.name = "amx-emulated";
  emulated.product[kBF16] = emulated.emulated_tiles;
  return {emulated, kTilesEmulated};
}
#else
inline Chosen choose_kernels(const std::string& wanted) {
  Kernels table = *kernels_portable();
  if (wanted != "amx") return {table, kNoTiles};
  table.name = "amx-emulated";
  table.product[kBF16] = table.emulated_tiles;
  return {table, kTilesEmulated};
}
#endif

// ARETE_CPU_KERNELS is for tests: a lesser table than the CPU could use, or emulated tiles.
inline const Chosen& chosen_kernels() {
  static const Chosen chosen = [] {
    const char* wanted = std::getenv("ARETE_CPU_KERNELS");
    return choose_kernels(wanted ? wanted : "");
  }();
  return chosen;
}
inline const Kernels& kernels() { return chosen_kernels().table; }

// How oneDNN's instruction set was decided; IsaCap in src/self_test.rs.
enum IsaCap : int32_t { kUndecided = 0, kNoAmx = 1, kSetByUser = 2, kCapped = 3 };

// The products of oneDNN's AMX kernels are not equal row for row (docs/numerics.md), so they are left out, unless the user chose.
// Ours on AMX are; oneDNN has what is left: f16, and what libtorch gives it.
inline IsaCap decide_isa_cap(uint32_t features, bool set_by_user) {
  if (set_by_user) return kSetByUser;
  return features & (kAmxBf16 | kAmxTile) ? kCapped : kNoAmx;
}

inline IsaCap isa_cap = kUndecided;

// oneDNN reads the variable once, at its first product: by then it must be set. A constructor of the program runs after those of
// libtorch (which do not ask for it; they turn MKLDNN_… into DNNL_…) and before main, so before any thread could read the
// environment at the same time. oneDNN's own function for it is not exported by libtorch.
__attribute__((constructor)) static void cap_onednn_isa() {
  auto is_set = [](const char* name) {
    const char* value = std::getenv(name);
    return value && *value;
  };
  isa_cap = decide_isa_cap(leaf7_edx(), is_set("ONEDNN_MAX_CPU_ISA") || is_set("DNNL_MAX_CPU_ISA"));
  if (isa_cap == kCapped) setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", 1);
}

}  // namespace arete
