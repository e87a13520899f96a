"""Reads what `arete wandb` wrote with the real client's own reader and compares every number with metrics.jsonl, every setting
with run.json.

Run: .venv/bin/python scripts/referees/check_wandb.py RUN OUTPUT
"""

import json
import pathlib
import sys

import wandb

wandb._assert_is_internal_process = True
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

import common


def records(path: pathlib.Path):
    store = DataStore()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def check(run: pathlib.Path, path: pathlib.Path) -> int:
    all_records = list(records(path))
    if [record.num for record in all_records] != list(range(1, len(all_records) + 1)):
        common.fail(f"{path}: records are not numbered one by one")
    kinds = [record.WhichOneof("record_type") for record in all_records]
    if kinds[:2] != ["header", "run"] or kinds[-2:] != ["exit", "final"]:
        common.fail(f"{path}: {kinds[:2]} … {kinds[-2:]}")
    about = all_records[1].run
    if f"run-{about.run_id}.wandb" != path.name or about.run_group != run.resolve().name:
        common.fail(f"{path}: is of run {about.run_id}, group {about.run_group}")
    stage = run / about.job_type
    settings = json.loads((stage / "run.json").read_text())["config"]
    read = {item.key: json.loads(item.value_json) for item in about.config.update}
    for name, value in settings.items():
        if isinstance(value, (int, float, str, bool)) and read.get(name) != value:
            common.fail(f"{path}: {name} is {read.get(name)}, {value} in run.json")
    expected: dict[int, dict] = {}
    for line in (stage / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        expected.setdefault(row.pop("step"), {}).update({k: v for k, v in row.items() if v is not None})
    found = {}
    for record in all_records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key: json.loads(item.value_json) for item in record.history.item}
            if row.pop("_step") != record.history.step.num:
                common.fail(f"{path}: a step is two numbers")
            found[record.history.step.num] = row
    if found != expected:
        common.fail(f"{path}: other numbers than {stage}/metrics.jsonl")
    return sum(len(row) for row in found.values())


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, output = map(pathlib.Path, sys.argv[1:])
    files = sorted(output.glob("wandb/offline-run-*/run-*.wandb"))
    if not files:
        common.fail(f"{output}: no runs")
    n_values = sum(check(run, path) for path in files)
    common.passed(f"wandb {wandb.__version__} reads {len(files)} runs of {run} ({n_values} values)")


if __name__ == "__main__":
    main()
