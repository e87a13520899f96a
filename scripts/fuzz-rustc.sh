#!/usr/bin/env bash
# rustc for `make fuzz`: counts the edges that an input takes through our own crates; dependencies are compiled as ever.
#   RUSTC_WRAPPER=scripts/fuzz-rustc.sh cargo build …
set -eu
rustc=$1
shift
case "${CARGO_PKG_NAME:-} ${CARGO_CRATE_NAME:-}" in
    *" build_script_build") ;;
    arete-*)
        set -- "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
            -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
            -Cllvm-args=-sanitizer-coverage-trace-compares
        ;;
esac
exec "$rustc" "$@"
