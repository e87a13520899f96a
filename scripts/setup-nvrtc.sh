#!/usr/bin/env bash
# Fetches NVRTC, the compiler of the CUDA kernels, into .deps/nvrtc (110 MB), for tests on machines without CUDA.
# Pinned in scripts/setup/pins.txt; `make setup DEVICE=cuda` brings the same file, and then there is nothing to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -e .deps/libtorch/nvidia/cu13/lib/libnvrtc.so.13 ]; then
    exit 0
fi
pin=$(grep '^cuda nvidia-cuda-nvrtc ' scripts/setup/pins.txt)
if [ -f .deps/nvrtc/pin ] && [ "$(cat .deps/nvrtc/pin)" = "$pin" ]; then
    exit 0
fi
command -v python3 >/dev/null || {
    echo "setup: python3 is missing: install Python 3.8 or newer with pip" >&2
    exit 1
}
PYTHONDONTWRITEBYTECODE=1 exec python3 - "$pin" <<'PYTHON'
import fcntl
import sys

sys.path.insert(0, "scripts/setup")
import fetch

pin = fetch.Pin(sys.argv[1])
try:
    fetch.WHEELS.mkdir(parents=True, exist_ok=True)
    with open(fetch.DEPS / "lock-nvrtc", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark = fetch.DEPS / "nvrtc/pin"
        if not (mark.exists() and mark.read_text() == sys.argv[1]):  # another may have fetched it meanwhile
            fetch.unpack([(fetch.fetch(pin), fetch.NVIDIA)], fetch.DEPS / "nvrtc", ["*.alt.so*"])
            mark.write_text(sys.argv[1])
except fetch.Failure as failure:
    sys.exit(f"setup: {failure}")
PYTHON
