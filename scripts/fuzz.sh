#!/usr/bin/env bash
# Runs fuzz targets under libFuzzer, one after the other, and ends with a table of what each reached.
#   bash scripts/fuzz.sh MINUTES [TARGET…]      corpora grow in runs/fuzz/TARGET, findings lie in runs/fuzz
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=$1
shift
target=${CARGO_TARGET_DIR:-$PWD/target}
RUSTC_WRAPPER=$PWD/scripts/fuzz-rustc.sh CARGO_TARGET_DIR=$target \
    cargo build --quiet --release --locked --manifest-path tests/fuzz/Cargo.toml
export OMP_NUM_THREADS=1 RUST_BACKTRACE=0
mkdir -p runs/fuzz
all=()
[ $# -gt 0 ] || mapfile -t all < <("$target/release/libfuzzer" 2>/dev/null | sed -n 's/^target //p')
rows=
failed=0
for name in "$@" "${all[@]}"; do
    corpus=runs/fuzz/$name
    mkdir -p "$corpus"
    ARETE_FUZZ=$name ARETE_FUZZ_SEEDS=$corpus "$target/release/libfuzzer" >runs/fuzz/$name.log 2>&1 || true
    ARETE_FUZZ=$name nice -n 10 "$target/release/libfuzzer" "$corpus" -artifact_prefix=runs/fuzz/$name- -max_len=65536 -timeout=20 \
        -rss_limit_mb=4096 -malloc_limit_mb=1024 -max_total_time=$((minutes * 60)) -print_final_stats=1 >>runs/fuzz/$name.log 2>&1 \
        || { failed=1; tail -n 5 runs/fuzz/$name.log; }
    n=$(sed -n 's/^stat::number_of_executed_units: *//p' runs/fuzz/$name.log | tail -n 1)
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' runs/fuzz/$name.log | tail -n 1)
    rows+="| \`$name\` | ${n:-0} | ${edges:-0} | $(find "$corpus" -type f | wc -l) |"$'\n'
done
printf '| target | executions | edges | corpus |\n|---|---|---|---|\n%s' "$rows"
exit $failed
