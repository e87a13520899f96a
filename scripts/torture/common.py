"""What the drivers share: the tiny pipeline and its reference run, programs run with their memory measured, findings."""

import functools
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TINY = REPOSITORY / "tests/fixtures/tiny-chat"
DATA = REPOSITORY / "data"
BASE = "run/sft/merged"

# Settings for a model of 220 kB: everything small, f32, one thread.
RECIPE = f"""
[run]
seed = 7
device = "cpu"
dtype = "f32"
threads = 1
[prompts]
limit = 48
max_chars = 120
[demonstrations]
source = "mix"
few_shot = 1
max_new_tokens = 24
constitution = "{DATA}/constitution.toml"
exemplars = "{DATA}/demonstrations/exemplars.jsonl"
[sft]
rank = 2
epochs = 1
max_steps = 6
batch_size = 8
max_length = 400
eval_every = 2
checkpoint_every = 1
[conversations]
max_new_tokens = 24
temperature = 1.0
constitution = "{DATA}/constitution.toml"
[preferences]
method = "likelihood"
truncated = "keep"
constitution = "{DATA}/constitution.toml"
exemplars = "{DATA}/demonstrations/exemplars.jsonl"
[reward]
rank = 2
epochs = 1
batch_size = 10
learning_rate = 1e-3
eval_every = 2
checkpoint_every = 1
[dpo]
rank = 2
epochs = 1
batch_size = 10
learning_rate = 1e-3
eval_every = 2
checkpoint_every = 1
[yardstick]
rank = 2
epochs = 1
max_steps = 2
batch_size = 10
[ppo]
rank = 2
iterations = 3
rollout_size = 8
value_warmup = 0
max_new_tokens = 16
temperature = 1.0
learning_rate = 1e-3
probe_every = 1
probe_prompts = 3
checkpoint_every = 1
[scoring]
max_new_tokens = 16
temperature = 1.0
draws = 500
"""


class Stage:
    """A program's command, the folder of run/ that it writes, and the stages whose folders it reads."""

    def __init__(self, program, arguments, output, reads, has_recipe=True):
        self.program, self.arguments, self.output, self.reads = program, [str(word) for word in arguments], output, reads
        self.has_recipe = has_recipe


_CONSTITUTION = ["--constitution", DATA / "constitution.toml", "--exemplars", DATA / "demonstrations/exemplars.jsonl"]
STAGES = {
    "prompts": Stage("curation", ["prompts", "--input", DATA / "prompts"], "prompts", []),
    "demonstrations": Stage("curation", ["demonstrations", "--prompts", "run/prompts", "--model", TINY], "demonstrations", ["prompts"]),
    "sft": Stage("sft", ["train", "--demonstrations", "run/demonstrations", "--model", TINY], "sft", ["demonstrations"]),
    "conversations": Stage("curation", ["conversations", "--prompts", "run/prompts", "--model", BASE], "conversations", ["prompts", "sft"]),
    "preferences": Stage(
        "curation", ["preferences", "--conversations", "run/conversations", "--judge", BASE], "preferences", ["conversations", "sft"]
    ),
    "reward": Stage(
        "reward",
        ["train", "--aspect", "all", "--preferences", "run/preferences", "--conversations", "run/conversations", "--model", BASE],
        "reward",
        ["preferences", "conversations", "sft"],
    ),
    "dpo": Stage("dpo", ["train", "--preferences", "run/preferences", "--model", BASE], "dpo", ["preferences", "sft"]),
    "yardstick": Stage("reward", ["train", "--pairs", "pairs.jsonl", "--model", BASE], "yardstick", ["sft"]),
    "ppo": Stage(
        "ppo",
        ["train", "--prompts", "run/prompts", "--reward", "run/reward", "--yardstick", "run/yardstick", "--model", BASE],
        "ppo",
        ["prompts", "reward", "yardstick", "sft"],
    ),
    "scoring": Stage(
        "scoring",
        ["score", "--prompts", "run/prompts", "--pairs", "pairs.jsonl", "--original", TINY, "--sft", BASE, "--final", "run/ppo"]
        + ["--reward", "run/reward", "--yardstick", "run/yardstick"],
        "scoring",
        # It says which labels the reward models learned from, by what lies beside them.
        ["prompts", "sft", "conversations", "preferences", "ppo", "reward", "yardstick"],
    ),
    "report": Stage(
        "scoring",
        ["report", "--run", "run"],
        "report",
        ["prompts", "demonstrations", "sft", "conversations", "preferences", "reward", "yardstick", "ppo", "scoring"],
    ),
    "calibrate": Stage(
        "curation", ["calibrate", "--pairs", DATA / "demonstrations/exemplars.jsonl", "--model", BASE, *_CONSTITUTION], "calibration", ["sft"]
    ),
    "merge": Stage("model", ["merge", "--model", TINY, "--adapter", "run/sft/adapter", "--dtype", "f32"], "merged", ["sft"], False),
    "quantize": Stage("model", ["quantize", "--model", TINY], "quantized", [], False),
}

# What README.md documents; 0 is success.
EXIT_CODES = {1, 2, 65, 69, 70, 71, 74, 130, 143}
# Files with times in them.
TIMED = ("timings.jsonl", "machine.json")


def is_timed(name):
    return name in TIMED or name.startswith("events.out.tfevents")


def tree(root):
    """Path → hash of every file below `root` but those with times in them and hidden ones."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if not is_timed(name) and not name.startswith("."):
                path = Path(folder) / name
                found[str(path.relative_to(root))] = hashlib.sha256(_without_made(path)).hexdigest()
    return found


def _without_made(path):
    """A file's bytes; of the page without the element that says when and where it was made, of its `run.json` without the page's hash."""
    content = path.read_bytes()
    if path.name == "report.html":
        return re.sub(rb'<aside id="made".*?</aside>', b"", content, flags=re.DOTALL)
    if path.name == "run.json" and path.with_name("report.html").is_file():
        record = json.loads(content)
        record.pop("sha256", None)
        record.get("outputs", {}).pop("report.html", None)
        return json.dumps(record).encode()
    return content


def differing(got, want):
    return sorted(name for name in set(got) | set(want) if got.get(name) != want.get(name))


def leftovers(root):
    """What a killed program may leave for the next one to sweep, and the next one must not leave."""
    marks = (".tmp-", ".old-", ".keep-")
    return [
        str(Path(folder) / name)
        for folder, folders, names in os.walk(root)
        for name in folders + names
        if (name.startswith(".") and any(mark in name for mark in marks)) or name.endswith(".part")
    ]


def set_aside(root):
    """Folders that are kept as NAME.old-N beside their successors."""
    return [str(path.relative_to(root)) for path in sorted(Path(root).rglob("*.old-[0-9]*")) if not path.name.startswith(".")]


def error_of(text):
    """The error that a program ended with: from the last line that begins with `error` on."""
    lines = text.strip().splitlines()
    first = next((idx for idx in reversed(range(len(lines))) if lines[idx].startswith("error")), max(0, len(lines) - 1))
    return "\n".join(lines[first:])


def last_words(text, limit=240):
    """The same on one line, cut."""
    return " | ".join(line.strip() for line in error_of(text).splitlines() if line.strip())[:limit]


class Ended:
    """How a program ended: exit code (negative: by a signal), wall seconds, peak memory in MiB, what it said."""

    def __init__(self, code, hung, wall_s, peak_mib, out, err):
        self.code, self.hung, self.wall_s, self.peak_mib, self.out, self.err = code, hung, wall_s, peak_mib, out, err

    def is_typed(self):
        """Ended by itself, with success or a documented code that is no fault of the program's."""
        return not self.faults()

    def faults(self):
        """What no ending may be, whatever the input."""
        found = []
        if self.hung:
            found.append(f"no end after {self.wall_s:.0f} s")
        elif self.code < 0:
            found.append(f"ended by signal {-self.code}")
        elif self.code != 0 and self.code not in EXIT_CODES:
            found.append(f"exit code {self.code} is not documented")
        elif self.code == 70:
            found.append("exit code 70, a fault of the program")
        if "panicked at" in self.err:
            found.append("a panic")
        if any(ord(char) < 32 and char not in "\n\t" for char in self.err):
            found.append("control characters in what it said")
        return found


def run(command, cwd, timeout_s=60, environment=None, limits=None, stdin=subprocess.DEVNULL):
    """Runs a program to its end, or kills it after `timeout_s`. `limits`: resource limits beside the 6 GiB of addresses."""

    def before():
        os.setsid()
        for what, value in ({resource.RLIMIT_AS: 6 << 30, resource.RLIMIT_CORE: 0} | (limits or {})).items():
            resource.setrlimit(what, (value, value))

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()
        words = [str(word) for word in command]
        child = subprocess.Popen(words, cwd=cwd, env=environment, stdin=stdin, stdout=out, stderr=err, preexec_fn=before)
        peak_kib, hung = 0, False
        while True:
            peak_kib = max(peak_kib, _high_water_kib(child.pid))
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0 and time.monotonic() - start > timeout_s:
                hung = True
                os.killpg(child.pid, signal.SIGKILL)
                pid, status, usage = os.wait4(child.pid, 0)
            if pid != 0:
                break
            time.sleep(0.004)
        child.returncode = os.waitstatus_to_exitcode(status)
        # A child's `ru_maxrss` begins with this process's own size: it says something only above that.
        if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
            peak_kib = max(peak_kib, usage.ru_maxrss)
        wall_s = time.monotonic() - start
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf8", "replace"))
        return Ended(child.returncode, hung, wall_s, peak_kib / 1024, *texts)


def _high_water_kib(pid):
    try:
        with open(f"/proc/{pid}/status") as status:
            return int(re.search(r"VmHWM:\s+(\d+)", status.read()).group(1))
    except (OSError, AttributeError):
        return 0


class Bench:
    """Where the drivers work: programs, scratch folder, the seed of every choice, and the reference run."""

    def __init__(self, programs, work, seed, only="", patience=1):
        self.programs, self.work, self.seed, self.only = Path(programs).resolve(), Path(work).resolve(), seed, only
        self.patience = patience
        self.work.mkdir(parents=True, exist_ok=True)

    def patient(self, seconds):
        """A limit of time, as many times longer as was asked for: on a machine that does other work, slowness is no finding."""
        return seconds * self.patience

    def rng(self, driver):
        return random.Random(f"{self.seed} {driver}")

    def program(self, name):
        return str(self.programs / (name if name == "arete" else f"arete-{name}"))

    def environment(self, **more):
        """This process's, without what would change the programs."""
        unwanted = ("FAULT_", "RUST_", "HF_", "LD_PRELOAD", "OPENAI_", "http_proxy", "HTTP_PROXY", "ALL_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        kept |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.work / "hf-home")}
        return kept | {name: str(value) for name, value in more.items()}

    def run(self, command, cwd, timeout_s=60, environment=None, limits=None):
        return run(command, cwd, self.patient(timeout_s), environment or self.environment(), limits)

    def start(self, command, folder, said="stderr", **more):
        """A program in the background; what it says goes into a file of its folder."""
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        with open(folder / said, "wb") as err:
            return subprocess.Popen(command, cwd=folder, env=self.environment(), stderr=err, **quiet, **more)

    def command(self, stage, *flags):
        of = STAGES[stage]
        recipe = ["--recipe", "recipe.toml"] if of.has_recipe else []
        return [self.program(of.program), *of.arguments, *recipe, "--output", f"run/{of.output}", *flags]

    def prepare(self, folder, stages=()):
        """An empty working folder with recipe, pairs and copies of what those stages left in the reference run."""
        folder = self.work / folder
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "run").mkdir(parents=True)
        (folder / "recipe.toml").write_text(RECIPE)
        (folder / "pairs.jsonl").write_text("\n".join(_pair(idx) for idx in range(40)))
        for stage in stages:
            output = STAGES[stage].output
            shutil.copytree(self.reference / "run" / output, folder / "run" / output, symlinks=True)
        return folder

    @functools.cached_property
    def reference(self):
        """One uninterrupted run of every stage."""
        folder = self.work / "reference"
        if folder.exists():
            shutil.rmtree(folder)
        # `prepare` copies nothing here, so it does not ask for the reference.
        folder = self.prepare("reference")
        took = {}
        for stage in STAGES:
            ended = self.run(self.command(stage), folder, timeout_s=300)
            if ended.code != 0:
                raise SystemExit(f"the reference run failed at {stage} with {ended.code}: {ended.err[-1500:]}")
            took[stage] = ended.wall_s
        self._took = took
        return folder

    def took_s(self, stage):
        """Wall seconds of the stage in the reference run."""
        assert self.reference
        return self._took[stage]

    def wanted(self, stage):
        return tree(self.reference / "run" / STAGES[stage].output)

    @functools.cached_property
    def shim(self):
        """`shim.c`, compiled."""
        library = self.work / "shim.so"
        source = Path(__file__).with_name("shim.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
        return library

    def again(self, stage, folder, timeout_s=90):
        """What is wrong with the same command given once more, undisturbed: it must end well, with the reference's bytes."""
        ended = self.run(self.command(stage), folder, timeout_s)
        if ended.code != 0:
            return [f"again: exit code {ended.code}: {last_words(ended.err)}"]
        return self.compared(stage, folder)

    def compared(self, stage, folder, may_set_aside=False):
        """What differs from the reference, and what lies about."""
        aside = set_aside(folder / "run")
        got = tree(folder / "run" / STAGES[stage].output)
        if may_set_aside:
            got = {name: sum for name, sum in got.items() if ".old-" not in name}
            aside = []
        found = []
        differ = differing(got, self.wanted(stage))
        if differ:
            found.append("other bytes in " + ", ".join(differ[:5]))
        left = leftovers(folder / "run")
        if left:
            found.append("left behind: " + ", ".join(left[:3]))
        if aside:
            found.append("set aside: " + ", ".join(aside[:3]))
        return found


def _pair(idx):
    def say(reply):
        return f"\n\nHuman: Is case {idx} fair?\n\nAssistant: {reply}"

    return json.dumps({"chosen": say("I would ask first and listen."), "rejected": say("Who cares.")})


class Report:
    """What one driver did: cases, seconds, findings; each case is a line of `results/DRIVER.jsonl`."""

    def __init__(self, bench, driver):
        self.bench, self.driver, self.n_cases, self.findings, self.notes = bench, driver, 0, [], []
        self.start = time.monotonic()
        self.path = bench.work / "results" / f"{driver}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("")

    def case(self, name, found, keep=None, count=1, **details):
        """Notes a case; what was found is told at once, and the folder `keep` stays for whoever looks into it."""
        self.n_cases += count
        with open(self.path, "a") as file:
            file.write(json.dumps({"case": name, "found": found, **details}) + "\n")
        if not found:
            return
        self.findings.append(f"{name}: {'; '.join(found)}")
        print(f"finding · {self.driver} · {self.findings[-1]}", flush=True)
        if keep is not None and keep.exists() and len(self.findings) <= 40:
            kept = self.bench.work / "findings" / f"{self.driver}-{len(self.findings)}"
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            shutil.copytree(keep, kept, symlinks=True, ignore_dangling_symlinks=True, ignore=_special)

    def note(self, text):
        """A figure for the table."""
        self.notes.append(text)

    def end(self):
        self.seconds = time.monotonic() - self.start


def _special(folder, names):
    """Pipes and links to devices are not copied."""
    return [name for name in names if not (Path(folder) / name).is_dir() and not os.path.isfile(Path(folder) / name)]


def spread(items, amount, rng, of=lambda item: item):
    """`amount` of the items, of every kind `of` in turn: a short run meets all kinds."""
    kinds = {}
    for item in items:
        kinds.setdefault(of(item), []).append(item)
    for members in kinds.values():
        rng.shuffle(members)
    order = list(kinds)
    rng.shuffle(order)
    chosen, depth = [], 0
    while len(chosen) < amount and any(depth < len(kinds[kind]) for kind in order):
        chosen += [kinds[kind][depth] for kind in order if depth < len(kinds[kind])]
        depth += 1
    return chosen[:amount]
