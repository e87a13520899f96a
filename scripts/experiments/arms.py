#!/usr/bin/env python3
"""Do three reward models move a policy, by a judge that taught none of them, and further than DPO on their pairs? SmolLM2-135M.

    python3 scripts/experiments/arms.py --hh FILE [STEP …] [--runs DIR] [--results FILE]

--hh       human pairs (hh-rlhf's form); they are parted in two halves and not kept
STEP       the steps to do, in this order; none: all of them, in the order that decides most (--list names them)
--runs     where everything goes, default runs/arms
--results  JSON lines, a line a finished step, default docs/results/arms.jsonl

Stopped and repeated, it continues: a step whose line is in the results is done. Needs the programs (make build) and Python with
numpy, scipy and pyarrow. What was named before the runs:

Base        SFT of virtue_signal.py: answers alone (a constitution of one turn), the template's default system prompt taken out.
Halves      Human pairs, by a hash of the opening question (letters and digits alone). Prompts of training and of probes are openings of half A
            and our own (data/prompts), by their splits; 120 openings of half B are the test prompts.
Rewards     honesty, prudence, compassion: each on 150 answer pairs of its own virtue in data/virtues (split train), two epochs. Standardised
            on 64 replies of the base at validation prompts.
Arms        rloo: four samples a prompt, mean of the three reward models. dpo: arete-dpo on the very pairs that taught them, one epoch. Both
            from the same base, weights of the last step, seeds 1, 2, 3 (dpo: as time allows). A pilot (seed 9) tries the rate on prompts of half A.
Judges      Two bags of words (arete-reward train --folds 3), neither of which saw a pair or a question that taught: "people", of the human
            pairs of half B, each prompt by the fold that never saw it; "virtue", of every pair of data/virtues whose question taught no
            reward model. The reward models of their folds are left at one step: more of them takes hours here, and no step uses them.
Primary     final - sft, test prompts of half B, at equal length, crossed seeds and prompts; of rloo, then of rloo less dpo: by people's words,
            and, a question of its own, by virtue's words; two looks each, corrected (Bonferroni). Everything else is context.
            What varies between seeds is the policy's training; reward models and judges are one draw.
"""

import gzip
import hashlib
import json
import pathlib
import re
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from study import ENSEMBLE, POLICY, Study, at_equal_length, bag_score, crossed, flags_of, follow, paired, program, share, within_correlation
from study import PAIRS as VIRTUE_FILE

VIRTUE_PAIRS = 150
TEST_PROMPTS = 120
MAX_NEW_TOKENS = 48
REWARD = {
    "epochs": 2,
    "batch-size": 8,
    "learning-rate": 5e-4,
    "label": "hard",
    "max-length": 128,
    "eval-every": 0,
    "checkpoint-every": 20,
}
RLOO = {
    **POLICY,
    "algorithm": "rloo",
    "samples-per-prompt": 4,
    "rollout-size": 32,
    "n-minibatches": 4,
    "iterations": 10,
    "virtual-shards": 1,
    # The ratio is a whole reply's: within 0.2 of 1 it would be cut at nearly every step but the first of a rollout.
    "clip-range": 1.0,
    "max-new-tokens": MAX_NEW_TOKENS,
    "probe-prompts": 16,
}
DPO = {
    "epochs": 1,
    "batch-size": 8,
    "learning-rate": 2e-4,
    "virtual-shards": 1,
    "beta": 0.1,
    "label": "hard",
    "max-length": 128,
    "eval-every": 0,
    "checkpoint-every": 20,
}
SEEDS = [1, 2, 3]
JUDGES = ["people", "virtue", "ensemble", *ENSEMBLE]


class Arms(Study):
    name = "arms"
    judges = JUDGES
    reward_settings, rloo_settings, dpo_settings = REWARD, RLOO, DPO
    max_new_tokens = MAX_NEW_TOKENS
    temperature = 1
    rollout_prompts = "prompts-A"

    # Data.

    def data(self):
        """Both halves, the prompts, and which human pairs teach."""
        human = {"A": [], "B": []}
        with gzip.open(self.options.hh, "rt") as file:
            for line in file:
                row = json.loads(line)
                human[half(opening(row))].append(row)
        for name, rows in human.items():
            self.write(f"human-{name}.jsonl", rows)
        self.prompts("prompts-A", self.runs / "human-A.jsonl", "data/prompts")
        self.prompts("prompts-B", self.runs / "human-B.jsonl")
        ours, theirs = (pq.read_table(self.runs / name / "prompts.parquet") for name in ("prompts-A", "prompts-B"))
        keys = [{key_of(row["prompt"][0]["content"]) for row in table.to_pylist()} for table in (ours, theirs)]
        taught = {key_of(row["question"]) for row in self.pairs()}
        if both := (keys[0] | taught) & keys[1]:
            raise SystemExit(f"arms: expected no question in both halves, found {sorted(both)[:3]}")
        by_hash = sorted(theirs.to_pylist(), key=lambda row: digest(row["prompt"][0]["content"]))[:TEST_PROMPTS]
        self.as_test("prompts-test", by_hash, theirs.schema)
        split = {row["prompt"][0]["content"]: row["split"] for row in ours.to_pylist()}
        wrong = [row for row in human["A"] if split.get(opening(row), split_of(opening(row))) != split_of(opening(row))]
        if wrong:
            raise SystemExit(f"arms: expected the splits of arete_records, found others for {len(wrong)} pairs")
        return {
            "human_pairs": {name: len(rows) for name, rows in human.items()},
            "prompts": {own: sum(row["split"] == own for row in ours.to_pylist()) for own in ("train", "validation")},
            "test_prompts": len(by_hash),
        }

    def prompts(self, name, *inputs):
        flags = {"max-chars": 300}
        self.run(program("arete-curation"), "prompts", "--input", *inputs, output=self.runs / name, **flags)

    def as_test(self, name, rows, schema):
        """Prompts that scoring answers: it takes those of split test."""
        (self.runs / name).mkdir(exist_ok=True)
        rows = [{**row, "split": "test"} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows, schema), self.runs / name / "prompts.parquet")

    # Reward models.

    def teaching(self, virtue):
        rows = self.pairs(virtue, held_out=("train",))
        return sorted(rows, key=lambda row: digest(row["question"]))[:VIRTUE_PAIRS]

    def examining(self, virtue):
        return self.pairs(virtue, held_out=("validation", "test"))

    def reward(self, virtue):
        """A reward model of the pairs of one virtue, examined on those that are held out."""
        pairs = self.write(f"pairs-{virtue}.jsonl", [*self.teaching(virtue), *self.examining(virtue)])
        output = self.runs / f"reward/{virtue}"
        seed = 1 + ENSEMBLE.index(virtue)
        self.run(program("arete-reward"), "train", pairs=pairs, model=self.base, output=output, seed=seed, **self.reward_settings)
        # Without score_stats.json, which is of the pairs' sides.
        bare = self.runs / "rewards" / virtue
        bare.mkdir(parents=True, exist_ok=True)
        shutil.copytree(output / "adapter", bare / "adapter", dirs_exist_ok=True)
        shutil.copy(output / "reading.json", bare)
        shutil.copy(self.runs / "answer.toml", bare / "constitution.toml")
        evaluation = json.loads((output / "evaluation.json").read_text())
        counts = json.loads((output / "run.json").read_text())["counts"]
        keep = ("split", "n", "accuracy", "null_rulers")
        return {"virtue": virtue, "counts": counts, **{key: evaluation[key] for key in keep}}

    def held_out(self):
        """Every reward model on the held-out pairs of each virtue, and on human pairs of half A with short replies."""
        rows = [
            {"about": row["virtue"], "prompt": row["question"], "chosen": row["better"], "rejected": row["worse"]}
            for virtue in ENSEMBLE
            for row in self.pairs(virtue, held_out=("validation", "test"))
        ]
        human = [json.loads(line) for line in (self.runs / "human-A.jsonl").read_text().splitlines()]
        short = [row for row in human if max(len(row["chosen"]), len(row["rejected"])) <= 400]
        rows += [{"about": "people", **row} for row in short]
        about = np.array([row.pop("about") for row in rows])
        path = self.write("held-out.jsonl", rows)
        margins = {}
        for virtue in ENSEMBLE:
            output = self.runs / f"held-out-{virtue}.jsonl"
            adapter = self.runs / f"reward/{virtue}/adapter"
            self.run(program("arete-reward"), "score", model=self.base, adapter=adapter, input=path, output=output)
            lines = [json.loads(line) for line in output.read_text().splitlines()]
            margins[virtue] = np.array([line["score_chosen"] - line["score_rejected"] for line in lines])
        margins["ensemble"] = sum(own / own.std() for own in margins.values())
        longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows])
        kinds = [*ENSEMBLE, "people"]
        right = {name: {own: share((margin > 0)[about == own]) for own in kinds} for name, margin in margins.items()}
        rulers = {"shorter": longer < 0, "longer": longer > 0}
        for name, outcome in rulers.items():
            right[name] = {own: share(outcome[about == own]) for own in kinds}
        lead = {}
        for own in kinds:
            best = max(rulers, key=lambda name: rulers[name][about == own].mean())
            outcome = (margins["ensemble"] > 0)[about == own].astype(float) - rulers[best][about == own]
            half = 1.96 * outcome.std(ddof=1) / len(outcome) ** 0.5
            lead[own] = {"best_null_ruler": best, "ensemble_leads_by": outcome.mean(), "low": outcome.mean() - half, "high": outcome.mean() + half}
        names = list(ENSEMBLE)
        correlation = {
            f"{a}, {b}": {
                kind: float(np.corrcoef(margins[a][rows], margins[b][rows])[0, 1])
                for kind, rows in (("virtue pairs", about != "people"), ("people", about == "people"))
            }
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        }
        return {"right": right, "lead": lead, "correlation_of_margins": correlation}

    def preferences(self):
        """The pairs that taught the reward models, each once, as DPO reads them."""
        pairs = [self.runs / f"pairs-{virtue}.jsonl" for virtue in ENSEMBLE]
        self.run(program("arete-curation"), "labelled", "--pairs", *pairs, output=self.runs / "preferences")
        return {"counts": json.loads((self.runs / "preferences/run.json").read_text())["counts"]}

    # Policies.

    def rloo(self, name, seed, rewards="rewards", **changes):
        output = self.runs / f"{name}-{seed}"
        flags = {**self.rloo_settings, **changes}
        places = {"prompts": self.runs / self.rollout_prompts, "rewards": self.runs / rewards, "model": self.base}
        self.run(program("arete-ppo"), "train", output=output, seed=seed, **places, **flags)
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curve = ("objective/scores", "objective/kl", "policy_grad_norm", "policy/clipfrac_avg", "length_action", "truncated_action")
        steps = [line for line in metrics if line["step"] > 0 and "objective/scores" in line]
        return {
            "seed": seed,
            "changes": changes,
            "optimiser_steps": sum(line.get("optimiser_steps", 0) for line in steps),
            "curve": {key: [round(line[key], 4) for line in steps] for key in curve if key in steps[0]},
            "probes": [
                {key: line[key] for key in ("step", "probe/scores", "probe/z_mean", "probe/kl") if key in line}
                for line in metrics
                if "probe/z_mean" in line
            ],
            **self.moved(output),
            **self.gained(output),
            "within_prompt": self.within_prompt(output),
        }

    def coin(self, seed):
        """RLOO on a coin: where does a policy drift that learns nothing?"""
        output = self.runs / f"coin-{seed}"
        places = {"prompts": self.runs / self.rollout_prompts, "constitution": self.runs / "answer.toml", "model": self.base}
        flags = {**self.rloo_settings, "programmed-reward": "coin"}
        self.run(program("arete-ppo"), "train", output=output, seed=seed, **places, **flags)
        return {"seed": seed, **self.moved(output)}

    def control(self, output):
        """What a control gained over the base, by every judge."""
        before, after = self.replies(self.scored("sft", self.temperature)), self.replies(output)
        gained = {key: (after[key] - before[key])[None] for key in before}
        return {judge: looked_at(gained, judge) for judge in self.judges} | {"tokens": crossed(gained["tokens"])}

    def less_coin(self):
        """What rloo's seeds gained more than the coin's one."""
        coin = self.replies(self.scored("coin-1", 1))
        runs = [self.replies(self.scored(f"rloo-{seed}", 1)) for seed in SEEDS]
        return {judge: crossed(np.array([run[judge] for run in runs]), coin[judge][None]) for judge in [*self.judges, "tokens"]}

    def statistics(self):
        """What the reward models are standardised by, of the pilot's 64 replies of the base, for every run from here on."""
        stats = json.loads((self.runs / "pilot-rloo-9/score_stats.json").read_text())
        for virtue in ENSEMBLE:
            (self.runs / f"rewards/{virtue}/score_stats.json").write_text(json.dumps(stats[virtue], indent=2) + "\n")
        return {virtue: {key: stats[virtue][key] for key in ("mean", "std", "n")} for virtue in ENSEMBLE}

    def dpo(self, name, seed, **changes):
        output = self.runs / f"{name}-{seed}"
        places = {"preferences": self.runs / "preferences", "model": self.base}
        self.run(program("arete-dpo"), "train", output=output, seed=seed, **places, **{**self.dpo_settings, **changes})
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in metrics if "loss" in line]
        evaluation = output / "evaluation.json"
        counts = json.loads((output / "run.json").read_text())["counts"]
        found = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
        quarter = max(len(losses) // 4, 1)
        return {
            "seed": seed,
            "changes": changes,
            "loss": [float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))],
            "counts": counts,
            "held_out": {key: found[key] for key in ("n", "accuracy") if key in found},
        }

    # Measuring.

    def words(self, judge):
        """A judge's bags of words, and how often they are right on the pairs of the fold that they did not see."""
        if judge == "people":
            pairs = self.runs / "human-B.jsonl"
        else:
            taught = {key_of(row["question"]) for virtue in ENSEMBLE for row in self.teaching(virtue)}
            rows = [json.loads(line) for line in VIRTUE_FILE.read_text().splitlines()]
            pairs = self.write("virtue-others.jsonl", [row for row in rows if key_of(row["question"]) not in taught])
        output = self.runs / f"words/{judge}"
        flags = {**REWARD, "max-steps": 1, "max-length": 8, "folds": 3, "seed": 1}
        self.run(program("arete-reward"), "train", pairs=pairs, model=self.original, output=output, **flags)
        card = json.loads((output / "yardstick.json").read_text())
        return {"judge": judge, "n_pairs": card["n_pairs"], "bag_of_words": card["bag_of_words"]}

    def bags(self, judge):
        return [json.loads(path.read_text()) for path in sorted((self.runs / f"words/{judge}").glob("fold-*/words.json"))]

    def agreement(self):
        """Among the samples of a prompt in all rollouts of rloo: do the reward models and the judges like the same ones?"""
        groups, bags = {}, {judge: self.bags(judge) for judge in ("people", "virtue")}
        for seed in SEEDS:
            for path in sorted((self.runs / f"rloo-{seed}/rollouts").glob("*.scores.jsonl")):
                rows = pq.read_table(str(path).replace(".scores.jsonl", ".parquet")).to_pylist()
                for line, row in zip(path.read_text().splitlines(), rows):
                    z, text = json.loads(line)["z"], row["messages"][-1]["content"]
                    own = [z[virtue] for virtue in ENSEMBLE]
                    judged = [bag_score(bags[judge], text) for judge in bags]
                    key = (seed, path.name, row["prompt_id"])
                    groups.setdefault(key, []).append([sum(own) / len(own), *own, *judged, row["n_tokens_action"]])
        return agreement(list(groups.values()))

    def cooler(self, n_prompts=48, n_samples=4):
        """The same of the base's replies at temperature 0.7, where they are more of a piece than at the 1 of training."""
        table = pq.read_table(self.runs / "prompts-A/prompts.parquet")
        rows = [row for row in table.to_pylist() if row["split"] == "validation"]
        rows = sorted(rows, key=lambda row: digest(row["prompt"][0]["content"]))[:n_prompts]
        (self.runs / "prompts-cooler").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, table.schema), self.runs / "prompts-cooler/prompts.parquet")
        output = self.runs / "cooler"
        places = {"prompts": self.runs / "prompts-cooler", "model": self.base, "constitution": self.runs / "answer.toml"}
        flags = {"temperature": 0.7, "samples-per-prompt": n_samples, "personas": "none", "max-new-tokens": MAX_NEW_TOKENS, "seed": 1}
        self.run(program("arete-curation"), "conversations", output=output, **places, **flags)
        samples, z = pq.read_table(output / "conversations.parquet").to_pylist(), []
        for virtue in ENSEMBLE:
            scores = self.runs / f"cooler-{virtue}.jsonl"
            files = {"adapter": self.runs / f"reward/{virtue}/adapter", "input": output / "conversations.parquet", "output": scores}
            self.run(program("arete-reward"), "score", model=self.base, **files)
            stats = json.loads((self.runs / f"rewards/{virtue}/score_stats.json").read_text())
            z.append([(json.loads(line)["score"] - stats["mean"]) / stats["std"] for line in scores.read_text().splitlines()])
        bags = {judge: self.bags(judge) for judge in ("people", "virtue")}
        groups = {}
        for at, row in enumerate(samples):
            own, text = [values[at] for values in z], row["messages"][-1]["content"]
            judged = [bag_score(bags[judge], text) for judge in bags]
            groups.setdefault(row["prompt_id"], []).append([sum(own) / len(own), *own, *judged, row["n_tokens_action"]])
        return agreement(list(groups.values()))

    def score(self, name, temperature=1):
        """A policy's replies to the test prompts, by the reward models and people's words."""
        output = self.scored(name, temperature)
        output.parent.mkdir(exist_ok=True)
        flags = {"temperature": temperature, "max-new-tokens": self.max_new_tokens, "seed": 1, **self.yardstick()}
        flags["sft" if name == "sft" else "final"] = self.base if name == "sft" else self.runs / name
        places = {"prompts": self.runs / "prompts-test", "base": self.base, "rewards": self.runs / "rewards"}
        self.run(program("arete-scoring"), "score", output=output, **places, **flags)
        summary = json.loads((output / "summary.json").read_text())
        replies = self.replies(output)
        return {
            "n_prompts": summary["n_prompts"],
            "kl": summary["models"][0]["kl"],
            "coherence": summary["models"][0]["coherence"],
            "tokens": float(replies["tokens"].mean()),
            "cut": float(replies["cut"].mean()),
            **{name: float(replies[name].mean()) for name in self.judges},
        }

    def yardstick(self):
        return {"yardstick": self.runs / "words/people"}

    def scored(self, name, temperature):
        return self.runs / ("scored" if temperature == 1 else f"scored-{temperature}") / name

    def replies(self, output):
        """What is said of each prompt's reply, by the order of prompts' ids."""
        by_prompt = {}
        for row in pq.read_table(output / "scores.parquet").to_pylist():
            own = by_prompt.setdefault(row["prompt_id"], {})
            own[row["aspect"]] = row["z"]
            own["tokens"], own["cut"] = row["n_tokens"], float(row["finish_reason"] == "length")
            if row["yardstick_words"] is not None:
                own["people"] = row["yardstick_words"]
                own["gold"] = row["yardstick"]
        (file,) = (output / "replies").glob("*.parquet")
        texts = {}
        for row in pq.read_table(file).to_pylist():
            question, reply = (message["content"] for message in row["messages"][-2:])
            if own := by_prompt.get(row["prompt_id"]):
                texts[row["prompt_id"]] = question, whole_sentences(reply) if own["cut"] else reply
        for judge, scores in self.judged(list(texts.values())).items():
            for key, score in zip(texts, scores):
                by_prompt[key][judge] = score
        ordered = [by_prompt[key] for key in sorted(by_prompt)]
        out = {name: np.array([own[name] for own in ordered], float) for name in ordered[0]}
        out["ensemble"] = sum(out[virtue] for virtue in ENSEMBLE) / len(ENSEMBLE)
        return out

    def judged(self, replies):
        """What each judge that is no reward model says of pairs of a question and a reply."""
        bags = self.bags("virtue")
        return {"virtue": [bag_score(bags, reply) for _, reply in replies]}

    def compare(self, arms, temperature=1):
        """What the arms (and how many seeds of each) gained, and by how much they differ."""
        before = self.replies(self.scored("sft", temperature))
        after = {arm: [self.replies(self.scored(f"{arm}-{seed}", temperature)) for seed in SEEDS[:n]] for arm, n in arms.items()}
        gained = {arm: {key: np.array([run[key] - before[key] for run in runs]) for key in before} for arm, runs in after.items()}
        figures = {arm: {judge: looked_at(own, judge) for judge in self.judges} for arm, own in gained.items()}
        for arm, own in gained.items():
            figures[arm]["tokens"] = crossed(own["tokens"])
            figures[arm]["cut"] = crossed(own["cut"])
        for at, last in enumerate(arms):
            for first in list(arms)[:at]:
                # At equal length replies are paired, the first run of one arm with the first of the other.
                n = min(arms[first], arms[last])
                own = {key: gained[last][key][:n] - gained[first][key][:n] for key in before}
                between = figures[f"{last} - {first}"] = {}
                for judge in self.judges:
                    between[judge] = {
                        "mean": crossed(gained[last][judge], gained[first][judge]),
                        "equal_length": at_equal_length(own[judge], own["tokens"], own["cut"]),
                        "equal_length_two_looks": at_equal_length(own[judge], own["tokens"], own["cut"], 0.025),
                    }
        return {"seeds": arms, "figures": figures, **self.checked(arms, figures, temperature)}

    def checked(self, arms, figures, temperature):
        return {"arete_compare": self.arete_compare(arms, figures, temperature)}

    def arete_compare(self, arms, figures, temperature):
        """`arete compare` on people's words of the same replies, a run an arm and seed; this script's figures must be its.

        It compares what stands in the column of the yardstick's reward models, so the words are put there.
        """
        runs = []
        for arm, n in arms.items():
            for seed in SEEDS[:n]:
                source = self.scored(f"{arm}-{seed}", temperature)
                place = self.runs / f"compared/{source.parent.name}/{arm}-{seed}/scoring"
                place.mkdir(parents=True, exist_ok=True)
                for name in ("run.json", "constitution.toml"):
                    shutil.copy(source / name, place)
                summary = json.loads((source / "summary.json").read_text())
                summary["models"] += json.loads((self.scored("sft", temperature) / "summary.json").read_text())["models"]
                (place / "summary.json").write_text(json.dumps(summary))
                tables = [pq.read_table(own / "scores.parquet") for own in (self.scored("sft", temperature), source)]
                table = pa.concat_tables(tables)
                words = table.column("yardstick_words").cast(table.schema.field("yardstick").type)
                table = table.set_column(table.schema.get_field_index("yardstick"), table.schema.field("yardstick"), words)
                pq.write_table(table, place / "scores.parquet")
                runs.append(f"{arm}={place.parent}")
        flags = {"first": "sft", "last": "final", "format": "json"}
        found = json.loads(self.run(program("arete-scoring"), "compare", *runs, **flags))
        for own in found["within"] + found["between"]:
            ours = figures[own["name"].replace("−", "-")]["people"]
            for key, figure in (("mean", own["mean"]), ("equal_length", own["equal_length"])):
                for part in ("value", "low", "high"):
                    if figure[part] is not None and abs(figure[part] - ours[key][part]) > 1e-4:
                        raise SystemExit(f"arms: {own['name']}, {key}, {part}: arete has {figure[part]}, this script {ours[key][part]}")
        return {key: found[key] for key in ("within", "between", "n_looks")}


def agreement(groups, judges=("people", "virtue")):
    """Of [groups, samples, figures]: correlations among the samples of a prompt, and what the ensemble's favourite gains by each judge."""
    values = np.array(groups)
    names = ["ensemble", *ENSEMBLE, *judges, "tokens"]
    column = {name: values[:, :, i] for i, name in enumerate(names)}
    best = column["ensemble"].argmax(1)[:, None]
    of_best = {
        name: paired((np.take_along_axis(own, best, 1)[:, 0] - own.mean(1)))
        for name, own in column.items()
        if name in ("ensemble", *judges, "tokens")
    }
    return {
        "groups": len(values),
        "correlation_with": {
            judge: {name: within_correlation(column[name], column[judge]) for name in names if name != judge}
            for judge in judges
        },
        "best": of_best,
    }


def looked_at(gained, judge):
    """By one judge: the gain, what is left of it at equal length, and how often the last reply is the better one."""
    own = gained[judge]
    wins = np.where(own == 0, 0.5, own > 0)
    return {
        "mean": crossed(own),
        "equal_length": at_equal_length(own, gained["tokens"], gained["cut"]),
        "equal_length_two_looks": at_equal_length(own, gained["tokens"], gained["cut"], 0.025),
        "win_rate": crossed(wins),
    }


def whole_sentences(text):
    """What a judge reads of a reply that was cut: through its last full sentence, if it has one."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end >= 0 else text


def opening(row):
    """The first question of a pair, as arete_records normalises it."""
    text = re.split(r"\n\n(?:Human|Assistant):", row["chosen"])[1]
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").strip()


def key_of(text):
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def half(question):
    return "AB"[int(digest(key_of(question))[:2], 16) % 2]


def split_of(question):
    """crates/records/src/message.rs: 80, 10 and 10 of a hundred."""
    text = json.dumps([{"role": "user", "content": question}], ensure_ascii=False, separators=(",", ":"))
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "train" if place < 80 else "validation" if place < 90 else "test"


def steps(study):
    out = {"sft": study.sft, "data": study.data}
    for virtue in ENSEMBLE:
        out[f"reward-{virtue}"] = lambda virtue=virtue: study.reward(virtue)
    for judge in ("people", "virtue"):
        out[f"words-{judge}"] = lambda judge=judge: study.words(judge)
    out["preferences"] = study.preferences
    out["pilot-rloo-9"] = lambda: study.rloo("pilot-rloo", 9, iterations=4, schedule="constant", **{"probe-prompts": 32})
    out["statistics"] = study.statistics
    # DPO first: then the tables say rloo - dpo. Its runs take longest here, so that those of rloo come before its second.
    for name, seed in [("rloo", 1), ("dpo", 1), ("rloo", 2), ("rloo", 3)]:
        out[f"{name}-{seed}"] = lambda name=name, seed=seed: getattr(study, name)(name, seed)
    for name in ("sft", "rloo-1", "rloo-2", "rloo-3", "dpo-1"):
        out[f"scored-{name}"] = lambda name=name: study.score(name)
    out["compare-1-3"] = lambda: study.compare({"dpo": 1, "rloo": 3})
    # Controls: replies of the base that are as odd, and a policy that learned nothing.
    out["scored-hot-sft"] = lambda: study.score("sft", 1.3)
    out["control-hot"] = lambda: study.control(study.scored("sft", 1.3))
    out["coin-1"] = lambda: study.coin(1)
    out["scored-coin-1"] = lambda: study.score("coin-1")
    out["control-coin"] = lambda: study.control(study.scored("coin-1", 1))
    out["rloo-less-coin"] = study.less_coin
    # Context: where a reply is more of a piece than at the temperature of training.
    for name in ("sft", "rloo-1", "rloo-2", "rloo-3", "dpo-1"):
        out[f"scored-cooler-{name}"] = lambda name=name: study.score(name, 0.7)
    out["compare-cooler-1-3"] = lambda: study.compare({"dpo": 1, "rloo": 3}, 0.7)
    out["agreement"] = study.agreement
    out["cooler"] = study.cooler
    for name, seed in [("dpo", 2), ("dpo", 3)]:
        out[f"{name}-{seed}"] = lambda name=name, seed=seed: getattr(study, name)(name, seed)
        out[f"scored-{name}-{seed}"] = lambda name=name, seed=seed: study.score(f"{name}-{seed}")
        seeds = {"dpo": seed, "rloo": 3}
        out[f"compare-{seeds['dpo']}-{seeds['rloo']}"] = lambda seeds=seeds: study.compare(seeds)
    out["held-out"] = study.held_out
    return out


def main():
    parser = flags_of(Arms, __doc__)
    parser.add_argument("--hh", type=pathlib.Path, required=True)
    follow(Arms, steps, parser.parse_args())


if __name__ == "__main__":
    main()
