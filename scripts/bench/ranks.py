"""Speed of two processes with one core each beside one process with one core: steps of reward training.

    python3 scripts/bench/ranks.py MODEL [ROUNDS]

Rounds of both, one after the other, so that what else the machine does falls on both; the ratio is of the medians of the steps after the
first, with the range of the rounds' own ratios. Needs two idle cores and taskset. MODEL: a directory or GGUF file.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "target" / "release"


def steps(output, model, launcher, cores):
    """Seconds of the steps but the first, and of what of them went to communication."""
    command = ["taskset", "-c", cores, *launcher, PROGRAMS / "arete-reward", "train", "--pairs", ROOT / "data/virtues/pairs.jsonl"]
    flags = "--batch-size 16 --max-steps 7 --eval-every 0 --checkpoint-every 0 --threads 1 --stats-samples 0".split()
    command += ["--model", model, "--output", output, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=env, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    lines = [json.loads(line) for line in (output / "timings.jsonl").read_text().splitlines()]
    of = lambda what: [line["seconds"] for line in lines if line["what"] == what][1:]
    sent = [line["n_bytes"] for line in lines if line["what"] == "communication"][1:]
    return of("training step"), of("communication"), sent


def main():
    model, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    one, two, network, ratios, sent = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            alone, _, _ = steps(pathlib.Path(scratch) / f"one-{turn}", model, [], "0")
            launcher = [PROGRAMS / "arete", "launch", "--processes", "2", "--"]
            both, spent, sent = steps(pathlib.Path(scratch) / f"two-{turn}", model, launcher, "0,1")
            ratios.append(statistics.median(alone) / statistics.median(both))
            one += alone
            two += both
            network += spent
    print(f"one process, one core: {statistics.median(one):.2f} s a step")
    print(f"two processes, one core each: {statistics.median(two):.2f} s, of which {statistics.median(network):.3f} s communication")
    print(f"sent by a process: {statistics.median(sent) / 1e6:.1f} MB a step")
    ratio = statistics.median(one) / statistics.median(two)
    print(f"ratio {ratio:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
