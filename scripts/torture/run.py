"""Tortures the programs: kills, faults, damage, hostile files and servers; one table at the end, exit code 1 if anything was found.

usage: run.py [--programs DIR] [--work DIR] [--seed N] [--patience TIMES] [--only REGEX] [DRIVER[:AMOUNT]]...

Without a driver all of them run, in full; `run.py --list` says which there are. What was found stays in WORK/findings, each case in WORK/results.
"""

import argparse
import importlib
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import REPOSITORY, Bench, Report

DRIVERS = ["kills", "steps", "power", "faults", "flips", "hostile", "servers", "hub", "limits", "signals", "races", "secrets", "soak"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--programs", type=Path, default=REPOSITORY / "target/release", help="folder of the programs")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "target/torture", help="scratch folder, which is emptied")
    parser.add_argument("--seed", type=int, default=1, help="of every choice")
    parser.add_argument("--patience", type=float, default=1, help="times every limit of time: how slow the machine may be")
    parser.add_argument("--only", default="", metavar="REGEX", help="hostile files of such names only")
    parser.add_argument("--list", action="store_true", help="name the drivers and their full amounts")
    parser.add_argument("drivers", nargs="*", metavar="DRIVER[:AMOUNT]", help="none: all, in full")
    arguments = parser.parse_args()
    wanted = [_wanted(parser, word) for word in ",".join(arguments.drivers).split(",") if word] or [(name, None) for name in DRIVERS]
    if arguments.list:
        for name, _ in wanted:
            module = _module(name)
            print(f"{name}:{module.AMOUNT}  {' '.join(module.__doc__.split())}")
        return 0
    shutil.rmtree(arguments.work, ignore_errors=True)
    bench = Bench(arguments.programs, arguments.work, arguments.seed, arguments.only, arguments.patience)
    reports = []
    for name, amount in wanted:
        module = _module(name)
        if getattr(module, "NEEDS_REFERENCE", True):
            assert bench.reference, "made before the driver's clock starts"
        report = Report(bench, name)
        module.drive(bench, report, module.AMOUNT if amount is None else amount)
        report.end()
        reports.append(report)
        print(_row(report), flush=True)
    return _table(reports)


def _wanted(parser, word):
    name, _, amount = word.partition(":")
    if name not in DRIVERS:
        parser.error(f"there is no driver {name!r}: {', '.join(DRIVERS)}")
    if amount and (not amount.isdecimal() or int(amount) == 0):
        parser.error(f"the amount in {word!r} is no number above 0")
    return name, int(amount) if amount else None


def _module(name):
    return importlib.import_module(f"drivers.{name}")


def _row(report):
    return f"| {report.driver} | {report.n_cases} | {report.seconds:.0f} | {len(report.findings)} | {'; '.join(report.notes)} |"


def _table(reports):
    """Prints it, and the findings; the exit code."""
    print("\n| driver | cases | seconds | findings | |\n|---|--:|--:|--:|---|")
    for report in reports:
        print(_row(report))
    findings = [f"- {report.driver}: {finding}" for report in reports for finding in report.findings]
    print("\n" + ("\n".join(findings) if findings else "nothing was found"))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
