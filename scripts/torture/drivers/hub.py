"""A hub that lies, stalls, never ends: downloads are right or refused (69), pushes are whole, told truly, and made once."""

import functools
import gzip
import json
import os
import shutil
import signal
import subprocess
import threading
import time

from common import TINY, last_words, spread
from listening import COMMIT, REPOSITORY, TOKEN, Hub, status

AMOUNT = 10_000  # faults; there are fewer
MAX_S, MAX_MIB = 100, 1024


def drive(bench, report, amount):
    rng = bench.rng("hub")
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    cases = [("download", where, name, once) for where in _DOWNLOADS for name in _download_faults() for once in (True, False)]
    cases += [("push", where, name, once) for where in _PUSHES for name in _push_faults() for once in (True, False)]
    cases += [("name", kind, name, None) for kind in ("index", "data", "listing") for name in _names()]
    cases += [("killed download", idx, None, None) for idx in range(40)] + [("killed push", idx, None, None) for idx in range(40)]
    cases += [("damaged cache", name, None, None) for name in sorted(files)]
    trial = Trial(bench, files, rng)
    for case in spread(cases, amount, rng, of=lambda case: case[:2] if case[0] in ("download", "push", "name") else case[0]):
        kind, where, name, once = case
        if kind == "download":
            found = trial.download(where, _download_faults()[name], once)
        elif kind == "push":
            found = trial.push(where, _push_faults()[name], once)
        elif kind == "name":
            found = trial.name(where, name)
        elif kind == "killed download":
            found = trial.killed_download()
        elif kind == "killed push":
            found = trial.killed_push(where)
        else:
            found = trial.damaged_cache(where)
        moment = {True: ", once", False: ", always", None: ""}[once]
        report.case(f"{kind}, {where}{'' if name is None else f', {name!r:.60}'}{moment}", found)


class Trial:
    def __init__(self, bench, files, rng):
        self.bench, self.files, self.rng = bench, files, rng
        self.home = bench.work / "hub-home"
        self.inspect = [bench.program("model"), "inspect", "--model", REPOSITORY]
        self.pushing = [bench.program("arete"), "push", "--repository", REPOSITORY, "--directory", "run/sft/merged", "--base-model", "a/b"]
        started = time.monotonic()
        self.wanted = bench.run([*self.inspect[:3], TINY], bench.reference).out
        self.took_s = time.monotonic() - started
        assert self.wanted, "inspect says nothing of the tiny model"

    def environment(self, hub):
        return self.bench.environment(HF_ENDPOINT=hub.url, HF_HOME=self.home, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")

    def run(self, command, hub, cwd=None):
        return self.bench.run(command, cwd or self.bench.reference, MAX_S + 10, self.environment(hub))

    def fresh(self):
        shutil.rmtree(self.home, ignore_errors=True)

    def common_faults(self, ended, may_end):
        found = ended.faults()
        if not found and ended.code not in may_end:
            found.append(f"exit code {ended.code}: {last_words(ended.err)}")
        if ended.wall_s > self.bench.patient(MAX_S):
            found.append(f"{ended.wall_s:.0f} s")
        if ended.peak_mib > MAX_MIB:
            found.append(f"{ended.peak_mib:.0f} MiB")
        if TOKEN in ended.err + ended.out:
            found.append("the token is shown")
        return found

    def cache_faults(self):
        """Files under the names of the snapshot with other bytes, and what a kill may leave but its successor may not."""
        found = []
        for folder, _, names in os.walk(self.home / "hub"):
            for name in names:
                path = os.path.join(folder, name)
                if "/snapshots/" in path and os.path.exists(path) and name in self.files:
                    with open(path, "rb") as file:
                        if file.read() != self.files[name]:
                            found.append(f"other bytes under {name} in the cache")
                if ".tmp-" in name or name.endswith(".link"):
                    found.append(f"left behind: {name}")
        return found

    def download(self, where, fault, once):
        self.fresh()
        struck = []

        def strikes(request):
            if request.path.endswith("/ring"):
                return status(302, location="/ring")
            if _DOWNLOADS[where](request.path) and request.method != "HEAD" and not (once and struck):
                struck.append(request)
                return fault
            return None

        with Hub(self.files, strikes) as hub:
            with Watch(self.home) as watch:
                ended = self.run(self.inspect, hub)
            found = self.common_faults(ended, (0, 69))
            if ended.code == 0 and ended.out != self.wanted:
                found.append("exit code 0 with another model")
            if watch.most_bytes > 64 << 20:
                found.append(f"{watch.most_bytes >> 20} MiB on the disk for a model of 220 kB")
            found += self.cache_faults()
            hub.fault = None
            again = self.run(self.inspect, hub)
            if again.code != 0 or again.out != self.wanted:
                found.append(f"from a good hub again: exit code {again.code}: {last_words(again.err)}")
        return found + self.cache_faults()

    def push(self, where, fault, once):
        self.fresh()
        struck = []

        def strikes(request):
            if request.path.endswith("/ring"):
                return status(302, location="/ring")
            if _PUSHES[where] in request.path and not (once and struck):
                struck.append(request)
                return fault
            return None

        with Hub(fault=strikes) as hub:
            ended = self.run(self.pushing, hub)
            found = self.common_faults(ended, (0, 69))
            if ended.code == 0 and hub.n_commits != 1:
                found.append(f"exit code 0 with {hub.n_commits} commits")
            hub.fault = None
            again = self.run(self.pushing, hub)
            if again.code != 0 or hub.n_commits != 1:
                found.append(f"to a good hub again: exit code {again.code}, {hub.n_commits} commits: {last_words(again.err)}")
        return found

    def killed_download(self):
        self.fresh()
        with Hub(self.files) as hub:
            for _ in range(6):
                if self._killed(self.inspect, hub, self.rng.uniform(0, self.took_s * 1.3)):
                    break
            ended = self.run(self.inspect, hub)
            found = [] if ended.out == self.wanted else [f"exit code {ended.code}: {last_words(ended.err)}"]
        return found + self.cache_faults()

    def killed_push(self, number):
        """Killed as the hub has its `number`th request, or at random moments where there are fewer."""
        self.fresh()
        with Hub() as hub:
            child = []

            def strikes(request):
                if request.number == number + 1 and child:
                    os.kill(child[0].pid, signal.SIGKILL)
                return None

            hub.fault = strikes
            child.append(self._start(self.pushing, hub))
            child[0].wait()
            hub.fault = None
            ended = self.run(self.pushing, hub)
            found = [] if ended.code == 0 else [f"again: exit code {ended.code}: {last_words(ended.err)}"]
            if hub.n_commits != 1:
                found.append(f"{hub.n_commits} commits")
            if "model.safetensors" not in hub.files:
                found.append("the hub has no weights")
        return found

    def _start(self, command, hub):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=self.bench.reference, env=self.environment(hub), **quiet)

    def _killed(self, command, hub, delay):
        """Whether it was done before."""
        child = self._start(command, hub)
        try:
            child.wait(timeout=delay)
            return True
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return False

    def name(self, kind, name):
        """A file of a hostile name: nothing is opened for writing outside the cache and the output."""
        self.fresh()
        output = self.bench.work / "hub-output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        files, command = dict(self.files), self.inspect
        if kind == "index":
            shard = name if name.endswith(".safetensors") else f"{name}.safetensors"
            files.pop("model.safetensors")
            files |= {"model.safetensors.index.json": b'{"weight_map": {"a": %s}}' % json.dumps(shard).encode(), shard: b"evil"}
        elif kind == "data":
            files = {f"{name}.jsonl": b'{"prompt":"a"}\n'}
            command = [self.bench.program("curation"), "prompts", "--input", REPOSITORY, "--output", "out"]
        else:
            files[name] = b"evil"
        before = _evil(self.bench.work)
        with Hub(files) as hub:
            ended = self.run(command, hub, cwd=output)
        found = self.common_faults(ended, (0, 65, 69))
        return found + [f"written outside: {path}" for path in sorted(_evil(self.bench.work) - before)]

    def damaged_cache(self, name):
        """A bit flips in a cached file: noticed, whether it is fetched again or refused."""
        self.fresh()
        with Hub(self.files) as hub:
            self.run(self.inspect, hub)
            path = next(path for path in (self.home / "hub").rglob(name) if path.exists()).resolve()
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.chmod(0o644)
            path.write_bytes(bytes(content))
            ended = self.run([self.bench.program("model"), "generate", "--model", REPOSITORY, "--prompt", "hi", "--max-new-tokens", "1"], hub)
        found = ended.faults()
        if ended.code == 0 and path.read_bytes() == bytes(content):
            found.append("a damaged file of the cache is used in silence")
        return found


class Watch:
    """The most bytes that lay below a folder at a time."""

    def __init__(self, folder):
        self.folder, self.most_bytes, self.ends = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ends.set()
        self.thread.join()

    def _watch(self):
        while not self.ends.wait(0.1):
            try:
                self.most_bytes = max(self.most_bytes, sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()))
            except OSError:
                pass  # a file went away between


def _evil(work):
    """Files that a hostile name would have made."""
    found = set()
    for folder in (work, work.parent, "/tmp", "/etc", os.path.expanduser("~")):
        try:
            found |= {os.path.join(folder, name) for name in os.listdir(folder) if "evil" in name}
        except OSError:
            pass  # not ours to read
    return found


_DOWNLOADS = {
    "revision": lambda path: "/revision/" in path,
    "tree": lambda path: "/tree/" in path,
    "config": lambda path: path.endswith("/config.json"),
    "weights": lambda path: path.endswith("/model.safetensors"),
}
_PUSHES = {
    "create": "/api/repos/create",
    "revision": "/revision/",
    "tree": "/tree/",
    "preupload": "/preupload/",
    "commit": "/commit/",
    "write-token": "/xet-write-token",
    "batch": "/lfs/objects/batch",
    "xorbs": "/v1/xorbs/",
    "shards": "/v1/shards",
}


def _usual_faults():
    echo = f'{{"error":"bad: authorization: Bearer {TOKEN}"}}'.encode()
    return {
        **{str(code): status(code, b'{"error":"x"}') for code in (401, 403, 404, 409, 412, 413, 416, 429, 500, 503)},
        "400-echo": status(400, echo),
        "400-escapes": status(400, b"\x1b[2J\x1b]0;owned\x07"),
        "429-hour": status(429, retry_after="3600"),
        "504-html": status(504, b"<html>" * 1000),
        "drops": ("drop", None),
        "no-http": ("raw", b"\x16\x03\x01\x02\x00"),
        "ring": status(302, location="/ring"),
        "to-a-file": status(302, location="file:///etc/passwd"),
        "cut": ("cut", 3),
        "not-gzip": status(200, b"\x1f\x8b" + b"x" * 30, content_encoding="gzip"),
    }


def _push_faults():
    return _usual_faults() | {
        "text": status(200, b"hello"),
        "list": status(200, b"[]"),
        "null": status(200, b"null"),
        "10MB": status(200, b'{"a":"' + b"x" * 10_000_000 + b'"}'),
    }


@functools.cache
def _download_faults():
    head = b"HTTP/1.1 200 OK\r\n"
    named = head + f'etag: "a"\r\nx-repo-commit: {COMMIT}\r\n'.encode()
    return _usual_faults() | {
        **{f"cut-{n}": ("cut", n) for n in (0, 1, 100, 1000, 5000, 100_000)},
        **{f"flip-{n}": ("flip", n) for n in (0, 50, 150)},
        "empty": status(200, b""),
        "etag-outside": status(200, b"xxx", etag="../../../../tmp/evil"),
        "slow": ("slow", 0.5),
        "hangs": ("hang", 90),
        "endless": ("chunks", named + b"transfer-encoding: chunked\r\n\r\n"),
        "chunk-huge": ("raw", head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n"),
        "length-negative": ("raw", head + b"content-length: -5\r\n\r\nabc"),
        "length-2^63": ("raw", named + b"content-length: 9223372036854775807\r\n\r\nabc"),
        "headers-20000": ("raw", head + b"x: y\r\n" * 20_000 + b"\r\n"),
        "header-10MB": ("raw", head + b"x: " + b"y" * 10**7 + b"\r\n\r\n"),
        "gzip-bomb": status(200, gzip.compress(b"0" * 300_000_000, 9, mtime=0), content_encoding="gzip"),
    }


def _names():
    return [
        "../evil.safetensors", "../../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:evil", "nul\0x", "x" * 300, "a/" * 600 + "x",
        "dir./x", "x ", ".", "..", "", "a//b", "~/evil", "\u202e.json", "a\nb", "a\x1b[2Jb", "%2e%2e/evil", "./x", "a/./b",
        "snapshots/../../evil", ".locks/x", "..\u2215x", "refs/../../evil", "//host/share/evil", "file:///evil", "a:b", "a*b", '"x"',
        "'; touch evil", "$(touch evil)", "`touch evil`", "-rf", "--help", "config.json/x", "/config.json", "x/config.json/../../../../evil",
    ]  # fmt: skip
