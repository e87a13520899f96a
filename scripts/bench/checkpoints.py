"""What checkpoints cost: their share of the time of training steps and PPO iterations, from the timings of runs that were made.

usage: checkpoints.py RUN...   (directories that hold stages at any depth)
"""

import json
import sys
from pathlib import Path

_WORK = ("training step", "iteration")


def main():
    for run in sys.argv[1:]:
        for path in sorted(Path(run).rglob("timings.jsonl")):
            seconds, n_written = {}, 0
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                seconds[entry["what"]] = seconds.get(entry["what"], 0) + entry["seconds"]
                n_written += entry["what"] == "checkpoint"
            work = sum(seconds.get(what, 0) for what in _WORK)
            if n_written and work:
                cost = seconds["checkpoint"]
                print(f"{path.parent}: {n_written} checkpoints in {cost:.2f} s, work {work:.1f} s: {100 * cost / work:.2f} %")


if __name__ == "__main__":
    main()
