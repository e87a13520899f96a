"""Signals at random moments: the exit code of the signal, soon, and the same command goes on to the same bytes."""

import signal
import subprocess
import time

from common import STAGES, last_words

AMOUNT = 200  # signals
# Seconds until the end of a step of the tiny model, on a machine that is busy.
ANSWERS_S = 10
MODES = {
    "INT": (130, -signal.SIGINT),
    "TERM": (143, -signal.SIGTERM),
    "HUP": (129, -signal.SIGHUP),
    "INT twice": (130, -signal.SIGINT),
    "STOP and CONT": (0,),
}


def drive(bench, report, amount):
    rng, folder, stages = bench.rng("signals"), bench.work / "signals", list(STAGES)
    n_done, slowest = 0, 0.0
    for idx in range(amount):
        stage, mode = stages[idx % len(stages)], list(MODES)[(idx + idx // len(stages)) % len(MODES)]
        bench.prepare(folder, STAGES[stage].reads)
        child = bench.start(bench.command(stage), folder, start_new_session=True)
        found = []
        try:
            code, took = child.wait(timeout=rng.uniform(0.02, bench.took_s(stage) * 0.95)), 0.0
            n_done += 1
        except subprocess.TimeoutExpired:
            code, took = _send(bench, child, mode, rng)
        slowest = max(slowest, took)
        said = (folder / "stderr").read_text(errors="replace")
        if code is None:
            found.append(f"no end within {bench.patient(3 * ANSWERS_S):.0f} s")
        elif code != 0 and code not in MODES[mode]:
            found.append(f"exit code {code}: {last_words(said)}")
        if took > bench.patient(ANSWERS_S):
            found.append(f"ended {took:.1f} s after the signal")
        if "panicked at" in said:
            found.append("a panic")
        report.case(f"{stage}, {mode}", found + bench.again(stage, folder), keep=folder)
    report.note(f"{n_done} were done before; slowest end {slowest:.1f} s after the signal")


def _send(bench, child, mode, rng):
    start = time.monotonic()
    if mode == "STOP and CONT":
        for _ in range(3):
            child.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            child.send_signal(signal.SIGCONT)
            time.sleep(0.02)
    else:
        number = getattr(signal, "SIG" + mode.split()[0])
        child.send_signal(number)
        if mode.endswith("twice"):
            time.sleep(rng.uniform(0, 0.02))
            child.send_signal(number)
    try:
        # A stage that was only stopped has all its work before it.
        code = child.wait(timeout=bench.patient(90 if mode == "STOP and CONT" else 3 * ANSWERS_S))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        code = None
    return code, 0.0 if mode == "STOP and CONT" else time.monotonic() - start
