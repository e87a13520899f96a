"""Two processes beside each other against one after the other, as a ratio: what spinning threads cost.

usage: side_by_side.py [--rounds N] COMMAND [ARGUMENT]...

COMMAND runs twice one after the other, then twice at the same time, N times (3); `{}` in an argument becomes a fresh directory. Prints the
time of both kinds and their ratio: 1 means that two processes lose nothing beside each other, 0.8 is the least that docs/numerics.md
wants on two cores. The median of the rounds counts; on a busy machine each kind suffers alike.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time


def start(command):
    output = tempfile.mkdtemp(prefix="side-by-side-")
    arguments = [argument.replace("{}", f"{output}/out") for argument in command]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def finish(process):
    if process.wait() != 0:
        sys.exit(f"{process.args} ended with {process.returncode}")


def seconds(work):
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def one_after_the_other(command):
    for _ in range(2):
        finish(start(command))


def at_the_same_time(command):
    both = [start(command), start(command)]
    for process in both:
        finish(process)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("which command?")
    ratios = []
    for _ in range(arguments.rounds):
        apart = seconds(lambda: one_after_the_other(arguments.command))
        together = seconds(lambda: at_the_same_time(arguments.command))
        ratios.append(apart / together)
        print(f"one after the other {apart:.2f} s, at the same time {together:.2f} s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
