"""Limits of the system: addresses, open files, file sizes, stack, room on the disk. Typed, and without the limit the same bytes."""

import resource

from common import STAGES, differing, last_words, spread, tree

AMOUNT = 10_000  # limits of stages; there are fewer
_MIB = 1 << 20
# Resource, values, exit codes that are right.
LIMITS = {
    "addresses": (resource.RLIMIT_AS, [n * _MIB for n in range(100, 3001, 145)], (0, 71)),
    "data": (resource.RLIMIT_DATA, [n * _MIB for n in (20, 50, 100, 150, 200, 300, 400, 600)], (0, 71)),
    "open files": (resource.RLIMIT_NOFILE, [3, 4, 5, 6, 8, 10, 12, 16, 24, 32], (0, 74)),
    "file size": (resource.RLIMIT_FSIZE, [0, 100, 1000, 5000, 20_000, 60_000, 120_000, 215_000, 260_000, 400_000], (0, 74)),
    "stack": (resource.RLIMIT_STACK, [64 << 10, 256 << 10, 1 << 20], (0,)),
    # Bytes that fit on a disk, by the shim.
    "room": (None, [0, 1, 100, 5000, 20_000, 60_000, 150_000, 250_000, 400_000, 600_000, 900_000], (0, 74)),
}


def drive(bench, report, amount):
    cases = [(what, stage, value) for what, (_, values, _) in LIMITS.items() for stage in STAGES for value in values]
    folder = bench.work / "limits"
    for what, stage, value in spread(cases, amount, bench.rng("limits"), of=lambda case: case[:2] if amount > 80 else case[0]):
        number, _, may_end = LIMITS[what]
        bench.prepare(folder, STAGES[stage].reads)
        limits, environment = {number: value}, bench.environment()
        if number is None:
            limits = {}
            environment |= {"LD_PRELOAD": str(bench.shim), "FAULT_MATCH": str(folder / "run"), "FAULT_ROOM": str(value)}
        ended = bench.run(bench.command(stage), folder, 90, environment, limits)
        found = []
        # Where not even libtorch can be loaded, the loader ends the program with 127 before its first line.
        loaded = ended.code != 127 and "error while loading shared libraries" not in ended.err
        if loaded:
            found = ended.faults()
            if not found and ended.code not in may_end:
                found.append(f"exit code {ended.code}: {last_words(ended.err)}")
            differ = differing(tree(folder / "run" / STAGES[stage].output), bench.wanted(stage)) if ended.code == 0 else []
            if differ:
                found.append("exit code 0 with other bytes in " + ", ".join(differ[:3]))
        found += bench.again(stage, folder)
        report.case(f"{stage}, {what} {value}", found, keep=folder, code=ended.code, said=last_words(ended.err))
