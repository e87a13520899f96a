#!/usr/bin/env bash
# The kernels' threads (crates/model/csrc/pool.h) under g++'s thread sanitizer.
#
# usage: scripts/pool.sh [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
g++ -std=c++20 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -pthread crates/model/csrc/tests/pool.cpp -o "$work/pool"
TSAN_OPTIONS=halt_on_error=1 "$work/pool" "${1:-20000}"
