#!/usr/bin/env python3
"""The gold protocol (Gao et al. 2022, arXiv:2210.10760; Coste et al. 2023, arXiv:2310.02743): a gold judge stands for people.

    python3 scripts/experiments/gold.py --model BASE --gold GOLD --prompts PROMPTS [--out runs/gold] [--recipe FILE] …

It labels pairs of the base's own answers, proxies of several seeds learn from its labels, policies climb the proxies, and what they
gain is measured by the gold judge, against the square root of the KL from the base: best of n, RLOO and PPO over one proxy and over
their ensemble (mean, mean_minus_std, min), and DPO on the same labels. The gold judge is never seen in training.

BASE     the model that answers and is tuned (directory, GGUF file or hub id)
GOLD     a reward model, `adapter/` over a base of its own or `merged/`: of human pairs, as `arete-reward train --pairs` leaves it
PROMPTS  files, directories or hub ids of prompts
RECIPE   settings of the stages (tables prompts, conversations, reward, ppo, dpo, scoring); this script sets the temperature to 1, at
         which KL and samples belong together, and what the arms differ in

Every step is a stage of its own that is up to date, goes on, or begins anew: stopped and repeated, the script continues. It leaves
OUT/gold/rows.csv (a point a row) and OUT/gold/gold.json, from which `arete report --run OUT` draws the picture. Needs no packages.
"""

import argparse
import csv
import json
import math
import pathlib
import random
import subprocess
import sys

FIELDS = ["arm", "seed", "at", "prompts", "kl", "sqrt_kl", "gold", "gold_low", "gold_high", "proxy", "n"]
# What an arm tunes by: algorithm, proxies (one, or all of them), ensemble.
ARMS = {
    "ppo": ("ppo", "one", "mean"),
    "rloo": ("rloo", "one", "mean"),
    "ppo, mean": ("ppo", "all", "mean"),
    "rloo, mean": ("rloo", "all", "mean"),
    "rloo, mean_minus_std": ("rloo", "all", "mean_minus_std"),
    "rloo, min": ("rloo", "all", "min"),
}
CONSTITUTION = """# One turn: what is judged is the answer alone.
[[turn]]
name = "action"

[virtues]
good = "Which answer is better?"
"""


def read(path: pathlib.Path):
    return json.loads(path.read_text())


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file unless it says so already; nothing half-written under its name."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


class Protocol:
    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, pathlib.Path(args.out)
        self.constitution = self.out / "constitution.toml"
        self.recipe = ["--recipe", args.recipe] if args.recipe else []
        self.gold = pathlib.Path(args.gold)
        write(self.constitution, CONSTITUTION)

    def run(self, program: str, *words: object) -> None:
        command = [str(pathlib.Path(self.args.programs) / f"arete-{program}"), *map(str, words)]
        print(" ".join(command), file=sys.stderr)
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if code != 0:
            sys.exit(code if code > 0 else 128 - code)

    def samples(self) -> list[pathlib.Path]:
        """The base's answers, several a prompt and draw."""
        a = self.args
        self.run("curation", "prompts", "--input", *a.prompts, "--output", self.out / "prompts", *self.recipe)
        draws = []
        for draw in range(a.draws):
            place = self.out / ("conversations" if draw == 0 else f"samples/{draw}")
            self.run("curation", "conversations", "--prompts", self.out / "prompts", "--model", a.model,
                     "--constitution", self.constitution, "--personas", "none", "--samples-per-prompt", a.samples,
                     "--temperature", 1, "--seed", draw, "--output", place, *self.recipe)  # fmt: skip
            draws.append(place)
        return draws

    def score(self, model: list[str], by: str, samples: pathlib.Path) -> list[dict]:
        """A reward model's scores of these answers, in their order."""
        print_of = read(samples / "run.json")["fingerprint"][:12]
        path = self.out / "gold" / "scores" / f"{by}-{samples.name}-{print_of}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            self.run("reward", "score", *model, "--input", samples / "conversations.parquet", "--output", part,
                     "--copy", "split", "messages", *self.compute())  # fmt: skip
            part.replace(path)
        return [json.loads(line) for line in path.read_text().splitlines()]

    def compute(self) -> list[str]:
        return ["--dtype", self.args.dtype, "--threads", str(self.args.threads)]

    def gold_model(self) -> list[str]:
        if (self.gold / "merged").is_dir():
            return ["--model", str(self.gold / "merged")]
        adapter = self.gold / "adapter"
        base = read(adapter / "adapter_config.json")["base_model_name_or_path"]
        return ["--model", self.args.gold_base or base, "--adapter", str(adapter)]

    def proxy_model(self, member: int) -> list[str]:
        return ["--model", self.args.model, "--adapter", str(self.proxy(member) / "adapter")]

    def proxy(self, member: int) -> pathlib.Path:
        return self.out / "proxies" / str(member) / "action"

    def label(self, rows: list[dict]) -> None:
        """Pairs of samples 0 and 1, 2 and 3, … of a prompt as the gold judge has them, some of them flipped (Coste et al.: a quarter)."""
        a, lines = self.args, []
        coin = random.Random(a.seed)
        for start in range(0, len(rows), a.samples):
            of_prompt = rows[start : start + a.samples]
            for one, two in zip(of_prompt[::2], of_prompt[1::2]):
                is_flipped = coin.random() < a.noise
                better, worse = (one, two) if (one["score"] > two["score"]) != is_flipped else (two, one)
                if one["score"] == two["score"] or better["messages"] == worse["messages"]:
                    continue
                pair = {"prompt": better["messages"][:-1], "chosen": better["messages"][-1:], "rejected": worse["messages"][-1:]}
                lines.append(json.dumps(pair, ensure_ascii=False))
        pairs = self.out / "gold" / "pairs.jsonl"
        write(pairs, "\n".join(lines) + "\n")
        preferences = self.out / "preferences"
        self.run("curation", "labelled", "--pairs", pairs, "--min-pairs", a.min_pairs, "--output", preferences)
        write(preferences / "constitution.toml", CONSTITUTION)

    def learn(self) -> None:
        for member in range(self.args.members):
            self.run("reward", "train", "--preferences", self.out / "preferences", "--model", self.args.model,
                     "--conversations", self.out / "conversations", "--seed", member,
                     "--output", self.out / "proxies" / str(member), *self.recipe)  # fmt: skip

    def climb(self) -> dict[tuple[str, int], pathlib.Path]:
        """A policy an arm and seed."""
        a, policies = self.args, {}
        for arm in a.arms:
            algorithm, whose, ensemble = ARMS[arm]
            members = range(a.members if whose == "all" else 1)
            proxies = [word for k in members for word in ("--reward", f"proxy{k}={self.proxy(k)}")]
            for seed in range(a.seeds):
                place = self.out / "policies" / f"{arm.replace(', ', '-')}-{seed}"
                group = ["--samples-per-prompt", a.group] if algorithm == "rloo" else []
                self.run("ppo", "train", "--prompts", self.out / "prompts", "--model", a.model, *proxies,
                         "--yardstick", self.gold, "--constitution", self.constitution, "--rollout", "answer",
                         "--algorithm", algorithm, *group, "--ensemble", ensemble, "--temperature", 1,
                         "--seed", seed, "--output", place, *self.recipe)  # fmt: skip
                policies[arm, seed] = place
        for beta in a.betas:
            for seed in range(a.seeds):
                place = self.out / "dpo" / f"{beta}-{seed}"
                self.run("dpo", "train", "--preferences", self.out / "preferences", "--model", a.model, "--beta", beta,
                         "--seed", seed, "--output", place, *self.recipe)  # fmt: skip
                policies[f"dpo, beta {beta}", seed] = place
        return policies

    def scored(self, policies: dict[tuple[str, int], pathlib.Path]) -> dict:
        """Every policy's answers to the test prompts, by the gold judge and the first proxy."""
        models = []
        for (arm, seed), place in policies.items():
            models += ["--model", f"{name_of(arm, seed)}={place}"]
        self.run("scoring", "score", "--prompts", self.out / "prompts", "--base", self.args.model,
                 "--original", self.args.model, *models, "--reward", self.out / "proxies" / "0",
                 "--yardstick", self.gold, "--temperature", 1, "--output", self.out / "scoring", *self.recipe)  # fmt: skip
        return read(self.out / "scoring" / "summary.json")

    def scale(self) -> tuple[float, float]:
        """Mean and deviation that the gold judge's scores are standardised by, as in probes and Scores."""
        stats = self.gold / "score_stats.json"
        if not stats.exists():
            return 0.0, 1.0
        own = read(stats)
        return own["mean"], own["std"]

    def best_of_n(self, draws: list[pathlib.Path]) -> list[dict]:
        """What the gold judge says of the proxies' favourite of n of the base's answers to held-out prompts."""
        a = self.args
        held_out: dict[str, list[tuple[list[float], float]]] = {}
        mean, std = self.scale()
        stats = [read(self.proxy(k) / "score_stats.json") for k in range(a.members)]
        for draw in draws:
            gold = self.score(self.gold_model(), "gold", draw)
            proxies = [self.score(self.proxy_model(k), self.proxy_name(k), draw) for k in range(a.members)]
            for at, row in enumerate(gold):
                if row["split"] != "train":
                    z = [(of[at]["score"] - own["mean"]) / own["std"] for of, own in zip(proxies, stats)]
                    held_out.setdefault(row["prompt_id"], []).append((z, (row["score"] - mean) / std))
        ensembles = {
            "one": lambda z: z[0],
            "mean": lambda z: sum(z) / len(z),
            "mean_minus_std": lambda z: mean_minus_std(z, a.std_weight),
            "min": min,
        }
        rows, n_samples = [], a.samples * a.draws
        for ensemble, combine in ensembles.items():
            n = 1
            while n <= n_samples:
                gains, proxy = [], []
                for samples in held_out.values():
                    scored = sorted((combine(z), gold) for z, gold in samples)
                    weights = chances(len(scored), n)
                    average = sum(gold for _, gold in scored) / len(scored)
                    gains.append(sum(w * gold for w, (_, gold) in zip(weights, scored)) - average)
                    proxy.append(sum(w * z for w, (z, _) in zip(weights, scored)))
                low, high = bootstrap(gains, a.seed)
                kl = math.log(n) - (n - 1) / n
                arm = "best of n" if ensemble == "one" else f"best of n, {ensemble}"
                rows.append(point(arm, 0, n, "held out", kl, sum(gains) / len(gains), low, high, sum(proxy) / len(proxy), len(gains)))
                n *= 2
        return rows

    def proxy_name(self, member: int) -> str:
        return f"proxy{member}-{read(self.proxy(member) / 'run.json')['fingerprint'][:12]}"

    def rows(self) -> list[dict]:
        draws = self.samples()
        self.label(self.score(self.gold_model(), "gold", draws[0]))
        self.learn()
        rows = self.best_of_n(draws)
        policies = self.climb()
        for (arm, seed), place in policies.items():
            if arm.startswith("dpo"):
                continue
            lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
            probes = [line for line in lines if "probe/yardstick" in line]
            for line in probes:
                gain = line["probe/yardstick"] - probes[0]["probe/yardstick"]
                rows.append(point(arm, seed, line["step"], "validation", line["probe/kl"], gain, None, None, line["probe/z_mean"], None))
        summary = self.scored(policies)
        base = summary["models"][0]["name"]
        for (arm, seed), _ in policies.items():
            model = next(own for own in summary["models"] if own["name"] == name_of(arm, seed))
            gain = difference(summary, base, model["name"], "yardstick")
            proxy = difference(summary, base, model["name"], "standardised")
            family, at = ("dpo", arm.split()[-1]) if arm.startswith("dpo") else (arm, "end")
            rows.append(point(family, seed, at, "test", model["kl"]["estimate"], gain["estimate"], gain["low"], gain["high"],
                              proxy["estimate"], summary["n_prompts"]))  # fmt: skip
        return rows


def name_of(arm: str, seed: int) -> str:
    return f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def difference(summary: dict, first: str, last: str, scale: str) -> dict:
    """The mean's difference in the answer, with its paired interval."""
    for own in summary["differences"]:
        if (own["first"], own["last"], own["scale"], own["scope"]) == (first, last, scale, "action"):
            return own["mean"]["interval"]
    sys.exit(f"gold: summary.json has no difference {last} - {first} by {scale}: the gold judge did not score the answers")


def mean_minus_std(z: list[float], weight: float) -> float:
    mean = sum(z) / len(z)
    return mean - weight * math.sqrt(sum((value - mean) ** 2 for value in z) / len(z))


def chances(total: int, n: int) -> list[float]:
    """How likely each of `total` values in ascending order is the largest of n of them, drawn without replacement."""
    n = min(n, total)
    return [math.comb(at, n - 1) / math.comb(total, n) for at in range(total)]


def bootstrap(values: list[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of a mean, prompts redrawn."""
    coin, n = random.Random(seed), len(values)
    means = sorted(sum(coin.choices(values, k=n)) / n for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def point(arm, seed, at, prompts, kl, gold, low, high, proxy, n) -> dict:
    values = [arm, seed, at, prompts, kl, math.sqrt(max(kl, 0.0)), gold, low, high, proxy, n]
    return dict(zip(FIELDS, values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gold", required=True)
    parser.add_argument("--gold-base", help="base of the gold judge's adapter, default: what it names")
    parser.add_argument("--prompts", required=True, nargs="+")
    parser.add_argument("--out", default="runs/gold")
    parser.add_argument("--recipe")
    parser.add_argument("--programs", default="target/release")
    parser.add_argument("--members", type=int, default=4, help="proxies of the ensemble")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every policy")
    parser.add_argument("--samples", type=int, default=8, help="answers of the base a prompt and draw, 2 to 8")
    parser.add_argument("--draws", type=int, default=4, help="draws of answers: best of n goes to samples * draws")
    parser.add_argument("--group", type=int, default=4, help="samples of a prompt that RLOO compares")
    parser.add_argument("--betas", type=float, nargs="*", default=[0.05, 0.1, 0.5])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--noise", type=float, default=0.0, help="part of the labels that are flipped (Coste et al.: 0.25)")
    parser.add_argument("--std-weight", type=float, default=0.5, help="of mean_minus_std in best of n, as [ppo] ensemble_std_weight")
    parser.add_argument("--min-pairs", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of flipped labels and intervals")
    args = parser.parse_args()
    if not 2 <= args.samples <= 8 or args.members < 1 or args.draws < 1:
        parser.error("--samples is 2 to 8, --members and --draws at least 1")
    protocol = Protocol(args)
    rows = protocol.rows()
    out = protocol.out / "gold"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".rows.csv.part", "w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    (out / ".rows.csv.part").replace(out / "rows.csv")
    write(out / "gold.json", json.dumps({"points": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['arm']:<28} {row['seed']} {row['at']!s:>6}  √KL {row['sqrt_kl']:6.3f}  gold {row['gold']:+.3f}  proxy {row['proxy']:+.3f}")


if __name__ == "__main__":
    main()
