"""Hostile files of every kind: each ends by itself, typed, within 30 s and 1 GiB, with one error that does not fill the screen."""

import re
import shutil

from common import leftovers, last_words, spread
from files import inputs, stages, text, weights
from files.case import Maker

AMOUNT = 10_000  # files; there are fewer
NEEDS_REFERENCE = False  # most files do not: it is made when one does
MAX_S, MAX_MIB, MAX_SAID = 30, 1024, 5000


def drive(bench, report, amount):
    cases = [case for family in (weights, text, inputs, stages) for case in family.cases(Maker(bench))]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    cases = [case for case in cases if re.search(bench.only, case.name)]
    slowest, largest = 0, 0
    for case in spread(cases, amount, bench.rng("hostile"), of=lambda case: case.kind):
        folder = bench.work / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = [str(word) for word in case.make(folder)]
        ended = bench.run(command, folder, MAX_S + 2)
        found = _judged(case, ended, folder, bench.patient(MAX_S))
        slowest, largest = max(slowest, ended.wall_s), max(largest, ended.peak_mib)
        figures = {"code": ended.code, "wall_s": round(ended.wall_s, 2), "peak_mib": round(ended.peak_mib)}
        report.case(case.name, found, keep=folder, **figures, said=last_words(ended.err))
    report.note(f"slowest {slowest:.1f} s, largest {largest:.0f} MiB")


def _judged(case, ended, folder, max_s):
    found = ended.faults()
    if not found and ended.code not in case.may_end:
        found.append(f"exit code {ended.code}, not one of {case.may_end}: {last_words(ended.err)}")
    if ended.wall_s > max_s and not ended.hung:
        found.append(f"{ended.wall_s:.0f} s")
    if ended.peak_mib > MAX_MIB:
        found.append(f"{ended.peak_mib:.0f} MiB")
    n_errors = sum(line.startswith("error") for line in ended.err.splitlines())
    if ended.code > 0 and n_errors != 1:
        found.append(f"{n_errors} lines of error: {last_words(ended.err)}")
    if len(ended.err) > MAX_SAID:
        found.append(f"a message of {len(ended.err)} bytes")
    found += [f"left behind: {path}" for path in leftovers(folder)[:2]]
    if ended.code != 0 and (folder / "out/run.json").exists():
        found.append("run.json despite the failure")
    return found
