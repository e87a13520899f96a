"""SIGKILL at random moments, the same command again until it is done: the bytes of an uninterrupted run, nothing left behind."""

import signal
import subprocess

from common import STAGES, last_words

AMOUNT = 1000  # kills
MAX_KILLS = (3, 5, 8, 12)  # of one run, after which it may end


def drive(bench, report, amount):
    rng = bench.rng("kills")
    kills = dict.fromkeys(STAGES, 0)
    n_runs = 0
    while sum(kills.values()) < amount:
        stage = min(kills, key=kills.get)
        folder = bench.prepare("kills", STAGES[stage].reads)
        n_killed, found = _one_run(bench, stage, folder, rng, min(rng.choice(MAX_KILLS), amount - sum(kills.values())))
        kills[stage] += n_killed
        n_runs += 1
        report.case(f"{stage}, {n_killed} kills", found, keep=folder, count=n_killed, kills=n_killed)
        if n_killed == 0:  # it was done before every moment chosen: others are waiting
            kills[stage] += 1
    report.note(f"{report.n_cases} kills in {n_runs} runs of {len(STAGES)} commands")


def _one_run(bench, stage, folder, rng, max_kills):
    """Kills and repeats until the command is done; how many kills, and what is wrong with what it leaves."""
    n_killed = 0
    while True:
        delay = rng.uniform(0, bench.took_s(stage) * 1.05) if n_killed < max_kills else bench.patient(120)
        child = bench.start(bench.command(stage), folder, start_new_session=True)
        try:
            code = child.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            if n_killed >= max_kills:
                return n_killed, [f"no end within {delay:.0f} s"]
            n_killed += 1
            continue
        if code != 0:
            return n_killed, [f"exit code {code}: {last_words((folder / 'stderr').read_text(errors='replace'))}"]
        return n_killed, bench.compared(stage, folder)
