"""Speed of two processes with one core each beside one process with one core: steps of reward training.

    python3 scripts/bench/ranks.py MODEL [--rounds N] [--cores 0,1] [--steps N]

Rounds of both, one after the other, so that what else the machine does falls on both; the ratio is of the medians of the steps after the
first, with the range of the rounds' own ratios. Wall times need two idle cores. CPU times of a step do not: theirs is the ratio that two idle
cores would give if no process ever waited for the other; with one core named (`--cores 0`) both processes share it and only that is told.
MODEL: a directory or GGUF file. Needs taskset.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "target" / "release"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(process):
    """CPU seconds of a process so far."""
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(words, n_ranks, cores):
    """Processes of one stage, each with one core, as torchrun would start them."""
    processes, port = [], free_port()
    for rank in range(n_ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if n_ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = ["taskset", "-c", cores[rank % len(cores)], *map(str, words)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
    return processes


def measured(words, output, n_ranks, cores, n_steps):
    """Of each step (or iteration) but the first: CPU seconds of the process that took most. And the lines of timings.jsonl. What would
    follow the steps is not waited for."""
    processes, seen = start([*words, "--output", output], n_ranks, cores), []
    path = output / "metrics.jsonl"
    while len(seen) < n_steps:
        if any(process.poll() is not None for process in processes):
            sys.exit(f"{words[0]}: ended by itself after {len(seen)} steps, exit codes {[process.wait() for process in processes]}")
        n_now = path.read_bytes().count(b"\n") if path.is_file() else 0
        if n_now > len(seen):
            seen += [[cpu_s(process) for process in processes]] * (n_now - len(seen))
        time.sleep(0.02)
    time.sleep(1)  # timings.jsonl follows
    for process in processes:
        process.kill()
        process.wait()
    steps = [max(b - a for a, b in zip(before, after)) for before, after in zip(seen, seen[1:])]
    timings = [json.loads(line) for line in (output / "timings.jsonl").read_text().splitlines()]
    return steps, timings


def of(timings, what, field="seconds"):
    """A field of every line of that kind but the first."""
    return [line[field] for line in timings if line["what"] == what][1:]


def reward_training(model, pairs, batch_size, *more):
    flags = ["--batch-size", batch_size, *"--eval-every 0 --checkpoint-every 0 --threads 1 --stats-samples 0".split()]
    return [PROGRAMS / "arete-reward", "train", "--pairs", pairs, "--model", model, *flags, *more]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--cores", default="0,1")
    args = parser.parse_args()
    cores, median = args.cores.split(","), statistics.median
    words = reward_training(args.model, ROOT / "data/virtues/pairs.jsonl", 16)
    walls, cpus, ratios, network = {1: [], 2: []}, {1: [], 2: []}, [], []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            for n_ranks in (1, 2):
                cpu, timings = measured(words, pathlib.Path(scratch) / f"{n_ranks}-{turn}", n_ranks, cores, args.steps)
                cpus[n_ranks] += cpu
                walls[n_ranks].append(of(timings, "training step"))
            network += of(timings, "communication")
            sent = of(timings, "communication", "n_bytes")
            ratios.append(median(walls[1][-1]) / median(walls[2][-1]))
    print(f"CPU seconds a step: one process {median(cpus[1]):.2f}, the slower of two {median(cpus[2]):.2f}, ratio {median(cpus[1]) / median(cpus[2]):.2f}")
    print(f"sent by a process: {median(sent) / 1e6:.1f} MB a step")
    if len(cores) == 1:
        return
    one, two = (median([seconds for turn in walls[n] for seconds in turn]) for n in (1, 2))
    print(f"one process, one core: {one:.2f} s a step")
    print(f"two processes, one core each: {two:.2f} s, of which {median(network):.3f} s communication")
    print(f"ratio {one / two:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
