"""PPO for so many seconds: memory and open files are the same at the end as after the first quarter, and a signal ends it."""

import os
import re
import signal
import statistics
import time
from pathlib import Path

from common import STAGES, last_words

AMOUNT = 7200  # seconds
_WARM = 11  # iterations, with two checkpoints and two probes among them
_WARM_S = 300
_SHORT_S = 300  # below that, memory that is still being taken for the first time looks like a leak
_MIB_PER_MINUTE = 0.1
_MIB_AT_LEAST = 4  # pages come and go
_OPEN_FILES = 2  # a file that is being written is open at one look and not at the next


def drive(bench, report, amount):
    folder = bench.work / "soak"
    bench.prepare(folder, STAGES["ppo"].reads)
    command = bench.command("ppo", "--iterations", "1000000", "--checkpoint-every", "5", "--probe-every", "10")
    child = bench.start(command, folder)
    rollouts, samples = folder / "run/ppo/rollouts", []
    ends = time.monotonic() + bench.patient(_WARM_S)
    while time.monotonic() < ends and child.poll() is None and len(list(rollouts.glob("*.parquet"))) < _WARM:
        time.sleep(0.1)
    ends = time.monotonic() + amount
    while time.monotonic() < ends and child.poll() is None:
        time.sleep(min(2, amount / 40))
        samples += _sample(child.pid)
    child.send_signal(signal.SIGTERM)
    code = child.wait(timeout=bench.patient(60))
    said = last_words((folder / "stderr").read_text(errors="replace"))
    found = [] if code == 143 else [f"exit code {code}: {said}"]
    n_done = len(list(rollouts.glob("*.parquet")))
    if len(samples) >= 8:
        early, late = (samples[len(samples) * part // 4 : len(samples) * (part + 1) // 4] for part in (1, 3))
        grown = statistics.median(mib for mib, _ in late) - statistics.median(mib for mib, _ in early)
        more = statistics.median(n for _, n in late) - statistics.median(n for _, n in early)
        if amount >= _SHORT_S and grown > max(_MIB_AT_LEAST, _MIB_PER_MINUTE * amount / 60 / 2):
            found.append(f"{grown:.1f} MiB more after {n_done} iterations")
        if more > _OPEN_FILES:
            found.append(f"{more:.0f} more open files after {n_done} iterations")
        report.note(f"{n_done} iterations, {grown:+.1f} MiB, {more:+.0f} open files from the second quarter to the last")
    report.case(f"ppo, {amount} s", found, keep=folder, code=code, said=said)


def _sample(pid):
    """MiB of memory and open files of a process; none of one that has ended."""
    try:
        resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return [(int(resident.group(1)) / 1024, len(os.listdir(f"/proc/{pid}/fd")))]
    except (OSError, AttributeError):
        return []
