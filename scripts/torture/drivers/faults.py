"""No space, I/O errors, quotas, short writes: exit code 74 and a path, and with the fault gone the same bytes as ever."""

import errno

from common import STAGES, differing, error_of, last_words, tree
from drivers.injected import WRITING, attempt, choose, some

AMOUNT = 300  # injections
GROWING = "open,write,fsync,mkdir"
# Errno, operations, whether all later ones fail too.
KINDS = [
    ("ENOSPC", GROWING, True),
    ("EIO", WRITING, False),
    ("EDQUOT", GROWING, True),
    ("EROFS", "open,mkdir,rename,unlink", True),
    ("EMFILE", "open,openread", False),
    ("EIO", "read,openread", False),
    ("EINTR", "read,write,open", False),
]


def drive(bench, report, amount):
    rng, folder = bench.rng("faults"), bench.work / "faults"
    share, n_left = amount // len(KINDS), amount
    stages = some(STAGES, amount // 10, rng)
    for idx, (name, ops, sticky) in enumerate(KINDS):
        here = n_left if idx == len(KINDS) - 1 else max(1, share)
        for stage, k in choose(bench, stages, folder, ops, min(here, n_left), rng):
            n_left -= 1
            fault = {"errno": getattr(errno, name)} | ({"sticky": 1} if sticky else {})
            ended = attempt(bench, stage, folder, ops, k, **fault)
            found = _judged(bench, stage, folder, ended, must_pass=name == "EINTR") + bench.again(stage, folder)
            report.case(f"{stage}, {name} at {k} of {ops}", found, keep=folder, code=ended.code, said=last_words(ended.err))
    for stage in stages:
        ended = attempt(bench, stage, folder, WRITING, 0, mode="short")
        report.case(f"{stage}, every write cut in half", _judged(bench, stage, folder, ended, must_pass=True), keep=folder)
        # CIFS, sshfs and some of FUSE know no such call.
        ended = attempt(bench, stage, folder, "fsyncdir", 1, errno=errno.EINVAL, sticky=1)
        report.case(f"{stage}, folders cannot be flushed", _judged(bench, stage, folder, ended, must_pass=True), keep=folder)


def _judged(bench, stage, folder, ended, must_pass):
    found = ended.faults()
    if ended.code == 0:
        differ = differing(tree(folder / "run" / STAGES[stage].output), bench.wanted(stage))
        if differ:
            found.append("exit code 0 with other bytes in " + ", ".join(differ[:4]))
    elif must_pass:
        found.append(f"exit code {ended.code}: {last_words(ended.err)}")
    elif not found:
        if ended.code != 74:
            found.append(f"exit code {ended.code} and not 74: {last_words(ended.err)}")
        if "run" not in error_of(ended.err):
            found.append(f"no path in: {last_words(ended.err)}")
    return found
