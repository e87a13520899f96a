"""Two processes at once with one output: one at least is done, the other says who holds the lock or finds the work done; same bytes."""

import time

from common import STAGES, last_words

AMOUNT = 100  # races


def drive(bench, report, amount):
    rng, folder, stages = bench.rng("races"), bench.work / "races", list(STAGES)
    for idx in range(amount):
        stage = stages[idx % len(stages)]
        bench.prepare(folder, STAGES[stage].reads)
        racing = []
        for number in range(2):
            racing.append(bench.start(bench.command(stage), folder, f"stderr-{number}"))
            time.sleep(rng.choice((0, 0, 0.01, 0.1)))
        codes = [child.wait() for child in racing]
        said = [(folder / f"stderr-{number}").read_text(errors="replace") for number in range(2)]
        found = [] if 0 in codes else ["no one was done"]
        for code, text in zip(codes, said):
            if code not in (0, 1):
                found.append(f"exit code {code}: {last_words(text)}")
            elif code == 1 and not any(str(child.pid) in text for child in racing):
                found.append(f"the loser does not say who won: {last_words(text)}")
        report.case(f"{stage}, two at once", found + bench.compared(stage, folder), keep=folder, codes=codes)
