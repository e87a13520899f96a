#!/usr/bin/env bash
# Installs into a fresh folder, moves it, and runs the programs from / without the checkout's path: they must load the libtorch
# beside them and nothing of the build.
#
# usage: scripts/install-test.sh [BINARIES]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 "$root/scripts/install.py" "$work/first" "${1:-$root/target/release}"
mv "$work/first" "$work/moved"
cd /
for program in "$work"/moved/bin/*; do
  libraries=$(ldd "$program")
  if grep -E 'not found' <<<"$libraries"; then echo "$program: a library is missing"; exit 1; fi
  if grep -F "$root" <<<"$libraries"; then echo "$program: it still loads from the checkout"; exit 1; fi
  grep -qF "$work/moved" <<<"$libraries" || { echo "$program: libtorch is not the installed one"; exit 1; }
  env -i PATH=/usr/bin:/bin HOME="$work" "$program" --version
done
env -i PATH=/usr/bin:/bin HOME="$work" "$work/moved/bin/arete-model" machine | grep -q '"kernels"'
echo "installed programs work from anywhere"
