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

import hashlib
import json
import os
import pathlib

import numpy as np
import scipy.sparse

from study import ENSEMBLE, LORA_STEPS, PAIRS, POLICY, VIRTUES, Study, bag_score, flags_of, follow, program, share

# Controls: replies end where they like (limit 96), nothing but the programmed reward and the KL term presses.
CONTROL = {"max-new-tokens": 96, "missing-eos-penalty": 0, "iterations": 8}
ARM = {"max-new-tokens": 48, "iterations": 6, "probe-prompts": 49}


class VirtueSignal(Study):
    name = "virtue_signal"

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
            **self.gained(output, self.peoples_words()),
            **({"within_prompt": self.within_prompt(output)} if algorithm != "ppo" else {}),
        }

    def peoples_words(self):
        """The yardstick's bags of words, which no reward model here learned from; none without them."""
        bags = [json.loads(path.read_text()) for path in sorted((self.runs / "yardstick").glob("fold-*/words.json"))]
        return [("people's words", lambda text: bag_score(bags, text))] if bags else []

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
    parser = flags_of(VirtueSignal, __doc__)
    parser.add_argument("--hh", type=pathlib.Path)
    parser.add_argument("--virtue-bench", type=pathlib.Path)
    follow(VirtueSignal, steps, parser.parse_args())


if __name__ == "__main__":
    main()
