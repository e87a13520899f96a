#!/usr/bin/env bash
# Builds tests/reuse as another project would: outside this folder, with arete-model by its path and libtorch by LIBTORCH alone, and
# runs its two programs on the tiny chat model. Ends with what they said.
#   bash scripts/reuse.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
cp -r tests/reuse/. "$outside"
sed -i "s|\.\./\.\./crates/model|$repository/crates/model|" "$outside/Cargo.toml"
export LIBTORCH=${LIBTORCH:-$repository/.deps/libtorch/torch} CARGO_TARGET_DIR=$repository/target/reuse
cd "$outside"
cargo build --release --locked
model=$repository/tests/fixtures/tiny-chat
cd /
said=$("$CARGO_TARGET_DIR/release/reply" "$model" "How do I apologise?")
samples=$("$CARGO_TARGET_DIR/release/several" "$model" "How do I apologise?")
[ -n "$said" ] && [ "$(wc -l <<<"$samples")" -ge 3 ] || {
    echo "reuse: the programs said too little: '$said', '$samples'" >&2
    exit 1
}
echo "reuse: $(cargo tree --manifest-path "$outside/Cargo.toml" -e normal --prefix none | sed 's/ (\*)//' | sort -u | grep -cv '^reuse ') crates"
printf 'reply: %s\nseveral:\n%s\n' "$said" "$samples"
