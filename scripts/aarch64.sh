#!/usr/bin/env bash
# Compiles the CPU kernels for aarch64 with Debian's cross compiler and runs their own test under qemu-user; then `cargo check` for
# that target where its standard library is installed. What is missing is said and skipped; `--require` makes that an error.
#
# usage: scripts/aarch64.sh [--require]
set -euo pipefail
cd "$(dirname "$0")/.."
required=${1:-}
skip() {
  echo "aarch64: skipped, $1"
  if [ "$required" = --require ]; then exit 1; fi
}
target=aarch64-unknown-linux-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
  skip "there is no aarch64-linux-gnu-g++ (apt-get install g++-aarch64-linux-gnu)"
else
  flags=(-std=c++20 -O3 -fno-math-errno -Wall -Wextra -Werror -Wno-psabi -DARETE_KERNELS=kernels_portable '-DARETE_NAME="portable"')
  aarch64-linux-gnu-g++ "${flags[@]}" -c crates/model/csrc/kernels.cpp -o "$work/kernels.o"
  aarch64-linux-gnu-g++ -std=c++20 -O1 -Wall -Wextra -Werror -DARETE_PORTABLE crates/model/csrc/tests/products.cpp "$work/kernels.o" -static -o "$work/products"
  aarch64-linux-gnu-g++ -std=c++20 -O1 -Wall -Wextra -Werror -pthread crates/model/csrc/tests/pool.cpp -static -o "$work/pool"
  echo "aarch64: the kernels compile"
  emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
  if [ -z "$emulator" ]; then
    skip "there is no qemu-aarch64 (apt-get install qemu-user)"
  else
    "$emulator" "$work/products"
    "$emulator" "$work/pool" 2000
  fi
fi

if [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
  # Without libtorch for that target only what needs none of it can be checked.
  cargo check --target "$target" -p arete-records -p arete-stage
else
  skip "no standard library of Rust for $target (rustup target add $target)"
fi
