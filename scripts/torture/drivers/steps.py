"""SIGKILL as the k-th operation begins that opens, writes, flushes, renames, removes or makes something; then as `kills`."""

from common import STAGES
from drivers.injected import WRITING, attempt, choose, some

AMOUNT = 500  # operations, of all stages


def drive(bench, report, amount):
    folder = bench.work / "steps"
    rng = bench.rng("steps")
    for stage, k in choose(bench, some(STAGES, amount // 3, rng), folder, WRITING, amount, rng):
        ended = attempt(bench, stage, folder, WRITING, k, mode="kill")
        found = [] if ended.code == -9 else [f"not killed: exit code {ended.code}"]
        found += bench.again(stage, folder)
        report.case(f"{stage}, operation {k}", found, keep=folder)
