"""The power goes: a run's writes are recorded, disks built as they can be then (what was not flushed is lost, cut or zeroed, names
that were not made durable are there or not), and the command given again on each."""

import os

from common import STAGES

AMOUNT = 150  # disks
POLICIES = ("strict", "names", "random", "random")


def drive(bench, report, amount):
    rng = bench.rng("power")
    stages = list(STAGES)
    rng.shuffle(stages)
    stages = stages[: max(1, min(len(stages), amount // 4))]
    for idx, stage in enumerate(stages):
        operations = _record(bench, stage)
        here = amount * (idx + 1) // len(stages) - amount * idx // len(stages)
        for _ in range(here):
            until, policy = rng.randrange(1, len(operations) + 1), rng.choice(POLICIES)
            folder = bench.prepare("power", STAGES[stage].reads)
            Disk(operations[:until]).lose_power(rng, policy).write(folder)
            found = bench.again(stage, folder)
            report.case(f"{stage}, after {until} of {len(operations)} operations, {policy}", found, keep=folder)


def _record(bench, stage):
    """The operations below run/ of an uninterrupted run: (kind, path, argument), with the bytes of writes."""
    folder = bench.prepare("power", STAGES[stage].reads)
    prefix = bench.work / f"record-{stage}"
    environment = bench.environment(LD_PRELOAD=bench.shim, FAULT_MATCH=folder / "run", FAULT_K=0, FAULT_REC=prefix)
    ended = bench.run(bench.command(stage), folder, 90, environment)
    if ended.code != 0:
        raise SystemExit(f"{stage} fails under the recording shim: {ended.err[-800:]}")
    log, blob = prefix.with_name(prefix.name + ".log"), prefix.with_name(prefix.name + ".blob")
    written, operations = blob.read_bytes(), []

    def inside(path):
        return os.path.relpath(os.path.normpath(path.removesuffix(" (deleted)")), folder)

    for line in log.read_text().splitlines():
        kind, path, argument = line.split("\t")
        if kind == "write":
            at, n_bytes, blob_at = map(int, argument.split())
            argument = (at, written[blob_at : blob_at + n_bytes])
        elif kind == "rename":
            argument = inside(argument)
        operations.append((kind, inside(path), argument))
    log.unlink()
    blob.unlink()
    return operations


class File:
    """A file's bytes now, those that were flushed last (None: never), and where it was written since."""

    def __init__(self):
        self.now, self.durable, self.unflushed = bytearray(), None, []


class Names:
    """Names of files and folders."""

    def __init__(self):
        self.files, self.folders = {}, {"run"}

    def apply(self, kind, path, argument):
        if kind == "create":
            self.files[path] = argument
        elif kind == "unlink":
            self.files.pop(path, None)
        elif kind == "mkdir":
            self.folders.add(path)
        elif kind == "rmdir":
            self.folders.discard(path)
        elif path in self.files:  # rename of a file
            self.files[argument] = self.files.pop(path)
        else:  # of a folder
            for name in [name for name in self.files if name.startswith(path + "/")]:
                self.files[argument + name[len(path) :]] = self.files.pop(name)
            for name in [name for name in self.folders if name == path or name.startswith(path + "/")]:
                self.folders.discard(name)
                self.folders.add(argument + name[len(path) :])


class Disk:
    """What a disk holds after some operations, and what of it is durable."""

    def __init__(self, operations):
        self.names, self.durable, self.pending = Names(), Names(), []
        for kind, path, argument in operations:
            self._apply(kind, path, argument)

    def _apply(self, kind, path, argument):
        file = self.names.files.get(path)
        if kind in ("create", "mkdir", "unlink", "rmdir", "rename"):
            operation = (kind, path, File() if kind == "create" else argument)
            self.names.apply(*operation)
            self.pending.append(operation)
        elif kind == "fsync" and file is None:
            self._flush_folder(path)
        elif file is None:
            pass  # a file that was there before: an input, which no stage writes
        elif kind == "fsync":
            file.durable, file.unflushed = bytes(file.now), []
        elif kind == "trunc":
            length = int(argument)
            file.now = file.now[:length] + bytearray(max(0, length - len(file.now)))
            file.unflushed.append((0, 0))
        elif kind == "write":
            at, written = argument
            file.now[at : at + len(written)] = written
            file.unflushed.append((at, len(written)))

    def _flush_folder(self, folder):
        """The folder's own entries become durable."""
        waiting = []
        for operation in self.pending:
            if _folder_of(operation) == folder:
                self.durable.apply(*operation)
            else:
                waiting.append(operation)
        self.pending = waiting

    def lose_power(self, rng, policy):
        """`strict`: only what was flushed is there; `names`: every name; `random`: names up to a moment of each folder's own."""
        stopped = set()
        for operation in self.pending:
            folder = _folder_of(operation)
            if policy == "strict" or folder in stopped:
                continue
            if policy == "random" and rng.random() < 0.3:
                stopped.add(folder)
                continue
            self.durable.apply(*operation)
        for file in self.durable.files.values():
            file.left = file.durable or b""
            if file.unflushed and policy != "strict":
                file.left = _partly(file, rng)
        return self

    def write(self, folder):
        for name in sorted(self.durable.folders):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, file in self.durable.files.items():
            if (folder / name).parent.exists():  # else its folder was lost
                (folder / name).write_bytes(file.left)


def _folder_of(operation):
    kind, path, argument = operation
    return os.path.dirname(argument if kind == "rename" else path)


def _partly(file, rng):
    """What may be left of a file that was written after it was flushed last."""
    fate = rng.choice(("lost", "zeroed", "cut", "whole"))
    left = bytearray(file.now)
    if fate == "lost":
        return file.durable or b""
    if fate == "zeroed":
        for at, n_bytes in file.unflushed:
            left[at : at + n_bytes] = bytes(len(left[at : at + n_bytes]))
    if fate == "cut":
        left = left[: rng.randrange(len(left) + 1)]
    return bytes(left)
