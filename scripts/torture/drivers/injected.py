"""What `steps` and `faults` share: a stage of which the k-th operation on a file below run/ is struck by the shim."""

from common import STAGES

WRITING = "open,write,fsync,rename,unlink,mkdir,trunc"
# Operations are counted once a stage and kind.
_COUNTS = {}


def attempt(bench, stage, folder, ops, k, **fault):
    """Runs the stage in a fresh folder with the k-th operation struck (0: none)."""
    bench.prepare(folder.name, STAGES[stage].reads)
    fault = {f"FAULT_{name.upper()}": value for name, value in fault.items()}
    where = {"LD_PRELOAD": bench.shim, "FAULT_MATCH": folder / "run", "FAULT_OPS": ops, "FAULT_K": k, "FAULT_COUNT": folder / "count"}
    return bench.run(bench.command(stage), folder, 90, bench.environment(**where, **fault))


def count(bench, stage, folder, ops):
    """How many such operations the stage has."""
    if (stage, ops) not in _COUNTS:
        ended = attempt(bench, stage, folder, ops, 0)
        if ended.code != 0:
            raise SystemExit(f"{stage} fails under the shim without a fault: {ended.err[-800:]}")
        _COUNTS[stage, ops] = int((folder / "count").read_text())
    return _COUNTS[stage, ops]


def some(stages, n, rng):
    """`n` of the stages, one at least: counting a stage's operations costs a run."""
    return rng.sample(list(stages), max(1, min(n, len(stages))))


def choose(bench, stages, folder, ops, amount, rng):
    """`amount` pairs of a stage and the number of an operation, each stage in turn."""
    left = list(stages)
    rng.shuffle(left)
    chosen, numbers = [], {}
    while len(chosen) < amount and left:
        for stage in list(left):
            if len(chosen) == amount:
                break
            if stage not in numbers:
                numbers[stage] = list(range(1, count(bench, stage, folder, ops) + 1))
                rng.shuffle(numbers[stage])
            if numbers[stage]:
                chosen.append((stage, numbers[stage].pop()))
            else:
                left.remove(stage)
    return chosen
