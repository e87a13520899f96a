#!/usr/bin/env python3
"""Which of the recommended settings matter? One change at a time, up to the reward models and the best of sixteen samples.

    python3 scripts/experiments/ablate.py PROMPTS YARDSTICK [RUNS] [NAME …] [--ppo NAME …]

PROMPTS    hub id, file or directory of prompts (hh-rlhf, say)
YARDSTICK  a reward model of human pairs (make yardstick)
RUNS       where to write, default runs/ablate; stages that a change does not concern are copied from the first run
NAME       only these variants (the first is needed by all)
--ppo      variants to carry on through PPO and scoring, and to compare then

Prints a line a variant: accuracy of the three reward models on validation pairs with 95 % interval, what the best of 16 gains
by the ensemble's own standardised score, and what the same favourites gain by the yardstick. Stopped and repeated, it continues.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys

BASE = pathlib.Path("recipes/compare/recommended.toml")
ASKED = {"conversations.personas": '"none"', "preferences.method": '"pairwise-logits"'}
# Name, settings changed, first stage that they concern.
VARIANTS = {
    "recommended": ({}, "prompts"),
    # The report's limit a reply, and its habit to keep what that cuts.
    "cut-replies": (
        {"conversations.max_new_tokens": "32", "preferences.truncated": '"keep"', "scoring.max_new_tokens": "32"},
        "conversations",
    ),
    "no-sft": ({"sft.enabled": "false", "conversations.personas": '"contrast"'}, "sft"),
    # Labels by the model as judge instead of by construction: each pair shown in both orders, and in one.
    "judge-both-orders": ({**ASKED, "preferences.orders": '"both"'}, "conversations"),
    "judge-one-order": ({**ASKED, "preferences.orders": '"one"'}, "preferences"),
    "report-rate": ({"reward.learning_rate": "1.41e-5"}, "reward"),
    # Scores as the heads give them; only what chooses between samples changes.
    "not-standardised": ({}, "reward"),
}
STAGES = ["prompts", "demonstrations", "sft", "conversations", "preferences", "reward"]
# Whose earlier stages a variant may take over.
PARENT = {"judge-one-order": "judge-both-orders"}


def recipe(changes: dict[str, str]) -> str:
    """The base recipe with these values put in."""
    lines, table = [], ""
    left = dict(changes)
    for line in BASE.read_text().splitlines():
        if heading := re.match(r"\[(\w+)\]", line):
            lines += [f"{key.split('.')[1]} = {left.pop(key)}" for key in list(left) if key.startswith(f"{table}.")]
            table = heading[1]
        key = re.match(r"(\w+) *=", line)
        if key and f"{table}.{key[1]}" in left:
            line = f"{key[1]} = {left.pop(f'{table}.{key[1]}')}"
        lines.append(line)
    if left:
        sys.exit(f"ablate: no table for {', '.join(left)}")
    return "\n".join(lines) + "\n"


def run(name: str, runs: pathlib.Path, prompts: str, yardstick: str) -> None:
    changes, first = VARIANTS[name]
    out, parent = runs / name, runs / PARENT.get(name, "recommended")
    out.mkdir(parents=True, exist_ok=True)
    settings = runs / f"{name}.toml"
    if not settings.exists() or settings.read_text() != recipe(changes):
        settings.write_text(recipe(changes))
    copied = STAGES if name == "not-standardised" else STAGES[: STAGES.index(first)]
    for stage in copied:
        if out != parent and not (out / stage).exists() and (parent / stage).exists():
            shutil.copytree(parent / stage, out / stage, symlinks=True)
    if name == "not-standardised":
        for stats in out.glob("reward/*/score_stats.json"):
            stats.write_text(json.dumps({**json.loads(stats.read_text()), "mean": 0.0, "std": 1.0}))
    else:
        subprocess.run(["make", "reward", f"RECIPE={settings}", f"RUN={out}", f"PROMPTS={prompts}"], check=True)
    base = [] if "sft.enabled" not in changes else ["--base", re.search(r'^model = "(.*?)"', settings.read_text(), re.M)[1]]
    command = ["target/release/arete-scoring", "doctor", "--run", out, "--best-of", "16", "--recipe", settings]
    subprocess.run([*map(str, command), "--yardstick", yardstick, *base], check=True)


def interval(value: dict[str, float], scale: float, digits: int) -> str:
    return f"{scale * value['estimate']:.{digits}f} [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"


def row(name: str, out: pathlib.Path) -> str:
    cells = [name]
    for aspect in ["action", "motivation", "consequence"]:
        file = out / "reward" / aspect / "evaluation.json"
        report = json.loads(file.read_text()) if file.exists() else None
        cells.append(f"{interval(report['accuracy'], 100, 0)} (n = {report['n']})" if report else "–")
    best = json.loads((out / "best-of/best_of.json").read_text())
    return "| " + " | ".join([*cells, interval(best["gain"], 1, 2), interval(best["yardstick_gain"], 1, 2)]) + " |"


def tune(name: str, runs: pathlib.Path, prompts: str, yardstick: str) -> str:
    """PPO and scoring of a variant whose reward models are there; the run as `arete-scoring compare` takes it."""
    settings, out = runs / f"{name}.toml", runs / name
    variables = {"RECIPE": settings, "RUN": out, "PROMPTS": prompts, "YARDSTICK": yardstick}
    subprocess.run(["make", "all", *(f"{key}={value}" for key, value in variables.items())], check=True)
    return f"{name}={out}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("yardstick")
    parser.add_argument("runs", nargs="?", default="runs/ablate", type=pathlib.Path)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(VARIANTS))
    parser.add_argument("--ppo", nargs="+", default=[], metavar="NAME", choices=[*VARIANTS])
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}, expected some of {', '.join(VARIANTS)}")
    lines = []
    for name in arguments.names or VARIANTS:
        try:
            run(name, arguments.runs, arguments.prompts, arguments.yardstick)
            lines.append(row(name, arguments.runs / name))
        except subprocess.CalledProcessError as error:
            lines.append(f"| {name} | stopped with exit code {error.returncode}, see above | – | – | – | – |")
    print("| variant | action | motivation | consequence | best of 16, ensemble | best of 16, yardstick |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    tuned = [tune(name, arguments.runs, arguments.prompts, arguments.yardstick) for name in arguments.ppo]
    if tuned:
        subprocess.run(["target/release/arete-scoring", "compare", *tuned], check=True)


if __name__ == "__main__":
    main()
