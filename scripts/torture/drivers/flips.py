"""One bit flips in a file that a stage reads, its own or another's: refused by name, or made anew; never used in silence."""

import collections
import os
import shutil
import signal
import time

from common import STAGES, error_of, is_timed, last_words, spread

AMOUNT = 700  # flips
# Stages that are interrupted to find what they go on from: (stage, files that must be there, how many).
UNFINISHED = [
    ("demonstrations", "shards/*", 1),
    ("conversations", "shards/*", 1),
    ("preferences", "shards/*", 1),
    ("sft", "checkpoint-*/MANIFEST.json", 2),
    ("reward", "*/checkpoint-*/MANIFEST.json", 1),
    ("dpo", "checkpoint-*/MANIFEST.json", 1),
    ("ppo", "checkpoint-*/MANIFEST.json", 1),
]


def drive(bench, report, amount):
    rng = bench.rng("flips")
    cases = []
    for stage, of in STAGES.items():
        for read in of.reads:
            cases += [("input", stage, path) for path in _files(bench.reference / "run" / STAGES[read].output, bench.reference)]
        cases += [("finished", stage, path) for path in _files(bench.reference / "run" / of.output, bench.reference)]
    kinds = list(UNFINISHED)
    rng.shuffle(kinds)
    for stage, pattern, n_files in kinds[: max(1, amount // 20)]:
        seed = _interrupt(bench, stage, pattern, n_files)
        output = seed / "run" / STAGES[stage].output
        cases += [("unfinished", stage, path) for path in _files(output, seed)]
    verdicts = collections.Counter()
    # Small files first come round often: every kind of file has its turn, and then the next of each.
    chosen = spread(cases, min(amount, len(cases)), rng, of=lambda case: (case[0], case[1], _kind(case[2])))
    while len(chosen) < amount:
        chosen += rng.sample(cases, min(len(cases), amount - len(chosen)))
    for state, stage, path in chosen:
        verdict, found, details = _one(bench, rng, state, stage, path)
        verdicts[verdict] += 1
        report.case(f"{stage}, {state} {path}", found, keep=bench.work / "flips", verdict=verdict, **details)
    report.note(", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common()))


def _one(bench, rng, state, stage, path):
    """Flips a bit, gives the command, and says what became of the damage."""
    if state == "unfinished":
        folder = bench.work / "flips"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bench.work / f"flips-{stage}", folder, symlinks=True)
    else:
        folder = bench.prepare("flips", STAGES[stage].reads + ([stage] if state == "finished" else []))
    file = folder / path
    content = bytearray(file.read_bytes())
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    file.chmod(0o644)
    file.write_bytes(bytes(content))
    ended = bench.run(bench.command(stage), folder, 90)
    found = ended.faults()
    details = {"at": at, "bit": bit, "code": ended.code, "said": last_words(ended.err)}
    if ended.code != 0:
        if ended.code not in (65, 74):
            found.append(f"refused with exit code {ended.code}: {last_words(ended.err)}")
        if not _names(ended.err, path):
            found.append(f"the message does not name the file: {last_words(ended.err)}")
        return "refused", found, details
    compared = bench.compared(stage, folder, may_set_aside=state != "input")
    # A damaged input that is not read, or one's own that was made anew, leaves no trace.
    if not compared:
        return "made anew or not read", found, details
    return "used", found + [f"used (byte {at}, bit {bit}): {'; '.join(compared)}"], details


def _names(err, path):
    """Whether the error names the file, or what holds it (a checkpoint, a model)."""
    said = error_of(err)
    return path in said or os.path.basename(path) in said or os.path.dirname(path) in said


def _kind(path):
    """Files of one kind have one name but for numbers."""
    return "".join("#" if char.isdigit() else char for char in os.path.basename(path))


def _files(below, root):
    found = []
    for folder, _, names in os.walk(below):
        for name in names:
            path = os.path.join(folder, name)
            if not is_timed(name) and name != ".lock" and os.path.getsize(path):
                found.append(os.path.relpath(path, root))
    return sorted(found)


def _interrupt(bench, stage, pattern, n_files):
    """A run of the stage that was killed once it had so many files of the pattern."""
    name = f"flips-{stage}"
    for _ in range(100):
        folder = bench.prepare(name, STAGES[stage].reads)
        output = folder / "run" / STAGES[stage].output
        child = bench.start(bench.command(stage), folder)
        while child.poll() is None and len(list(output.glob(pattern))) < n_files:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        if child.wait() != 0:
            return folder
    raise SystemExit(f"{stage} was always done before {pattern} was there: nothing to flip")
