#!/usr/bin/env bash
# For tests on machines without CUDA: fetches NVRTC, the compiler of the CUDA kernels, into .deps/nvrtc (110 MB; pinned in
# scripts/setup/pins.txt; `make setup DEVICE=cuda` brings the same file, and then it is not fetched), and nvdisasm, which shows the machine
# code it makes, into .deps/nvdisasm (5 MB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nvrtc=$(grep '^cuda nvidia-cuda-nvrtc ' scripts/setup/pins.txt)
nvdisasm="tests nvidia-cuda-nvdisasm 13.5.37 d3fdbdd49fa53e2e4aacd3db8259d052bd2b049ececdcb69e92e083c6728e7ca nvidia_cuda_nvdisasm-13.5.37-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
has() { [ -f ".deps/$1/pin" ] && [ "$(cat ".deps/$1/pin")" = "$2" ]; }
wanted=()
[ -e .deps/libtorch/nvidia/cu13/lib/libnvrtc.so.13 ] || has nvrtc "$nvrtc" || wanted+=(nvrtc "$nvrtc" 'nvidia/*/lib/*')
has nvdisasm "$nvdisasm" || wanted+=(nvdisasm "$nvdisasm" 'nvidia/*/bin/nvdisasm')
if [ ${#wanted[@]} = 0 ]; then
    exit 0
fi
command -v python3 >/dev/null || {
    echo "setup: python3 is missing: install Python 3.8 or newer with pip" >&2
    exit 1
}
PYTHONDONTWRITEBYTECODE=1 exec python3 - "${wanted[@]}" <<'PYTHON'
import fcntl
import sys

sys.path.insert(0, "scripts/setup")
import fetch

try:
    fetch.WHEELS.mkdir(parents=True, exist_ok=True)
    with open(fetch.DEPS / "lock-nvrtc", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, line, files in zip(*[iter(sys.argv[1:])] * 3):
            folder = fetch.DEPS / name
            mark = folder / "pin"
            if mark.exists() and mark.read_text() == line:  # another may have fetched it meanwhile
                continue
            patterns = [files, "nvidia_*/[Ll]icense*", "nvidia_*/licenses/*"]
            fetch.unpack([(fetch.fetch(fetch.Pin(line)), patterns)], folder, ["*.alt.so*"])
            for program in folder.glob("nvidia/*/bin/*"):  # a wheel's permissions are not unpacked
                program.chmod(0o755)
            mark.write_text(line)
except fetch.Failure as failure:
    sys.exit(f"setup: {failure}")
PYTHON
