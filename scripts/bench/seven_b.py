"""Takes a random model of Mistral-7B's shape through every stage that holds weights, on the CPU, and measures the memory.

    make bench-7b                   or: python3 scripts/bench/seven_b.py MODEL_DIR WORK_DIR [STEP...] [--device cuda]

Steps: generate (load, quantise, decode), quantise (a dense directory of NF4 values, removed again), sft (one step, merged model
written), reward (two steps: batch 2, 100 tokens a side), ppo (one iteration, three reward models over the policy's base). Each is the
program a user runs, with tiny settings; reward and ppo build on the merged model of sft. Prints a Markdown table of wall time and
peak resident memory, and fails if a step takes more than its limit. Without names all steps run, from scratch; with names only
those, on what earlier ones left. Needs 30 GB of disk in all.
Standard library only.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "target/release"
LIMITS_GB = {"generate": 12, "quantise": 12, "sft": 12, "reward": 10, "ppo": 12}
QLORA = ["--nf4", "--recompute"]

PARAGRAPH = (
    "I would tell her the truth, but first I would ask what she already knows, because a person hears best what answers her own "
    "question. Then I would say what happened in plain words, without excuses and without more detail than she needs, name what I "
    "did wrong, and ask what would help. If she is angry I would let her be angry. An apology is not a trade, and she owes me "
    "nothing for it, least of all her forgiveness today."
)
OTHER = (
    "It does not matter what you say as long as she stops asking, so find out what she wants to hear and say exactly that. People "
    "forget quickly. If it comes out later you can still claim that you were misunderstood, or that you meant to protect her from "
    "something worse, or that everyone would have done the same in your place. Nobody can prove what you thought at the time, and "
    "she will be glad to have it behind her."
)
QUESTIONS = ["I broke a promise to my sister. What now?", "Should I tell my friend?"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def sft(model, work, device):
    rows = [{"messages": turns(question, PARAGRAPH), "split": "train"} for question in QUESTIONS]
    data = write_lines(work / "demonstrations.jsonl", rows)
    yield ["arete-sft", "train", "--demonstrations", data, "--model", model, "--output", str(work / "sft"), *QLORA, *device,
           "--batch-size", "2", "--max-length", "24", "--max-steps", "1", "--eval-every", "0"]


def reward(model, work, device):
    pairs = [{"chosen": turns(question, PARAGRAPH), "rejected": turns(question, OTHER)} for question in QUESTIONS]
    data = write_lines(work / "pairs.jsonl", pairs)
    yield ["arete-reward", "train", "--pairs", data, "--model", str(work / "sft/merged"), "--output", str(work / "reward"), *QLORA, *device,
           "--batch-size", "2", "--max-length", "100", "--max-steps", "2", "--min-pairs", "2", "--eval-every", "0"]


def ppo(model, work, device):
    rewards = work / "rewards"
    for aspect in ("action", "motivation", "consequence"):  # memory does not ask whether the three differ
        shutil.copytree(work / "reward/adapter", rewards / aspect / "adapter")
        shutil.copy(work / "reward/score_stats.json", rewards / aspect)
    run("arete-curation", "prompts", "--input", str(ROOT / "data/prompts/help.jsonl"), "--limit", "20",
        "--output", str(work / "prompts"))
    yield ["arete-ppo", "train", "--prompts", str(work / "prompts"), "--model", str(work / "sft/merged"), "--reward", str(rewards),
           "--output", str(work / "ppo"), *QLORA, *device, "--rollout", "answer", "--max-new-tokens", "4", "--rollout-size", "2", "--iterations", "1", "--epochs", "1",
           "--value-warmup", "0", "--probe-every", "0", "--probe-prompts", "1", "--merge", "false"]


def generate(model, work, device):
    yield ["arete-model", "generate", "--model", model, "--nf4", *device, "--prompt", QUESTIONS[0], "--max-new-tokens", "8"]


def quantise(model, work, _device):
    yield ["arete-model", "quantize", "--model", model, "--output", str(work / "quantised")]
    shutil.rmtree(work / "quantised")


STEPS = {step.__name__: step for step in (generate, quantise, sft, reward, ppo)}
LEFT_BY = {"sft": ["sft"], "reward": ["reward"], "ppo": ["rewards", "prompts", "ppo"]}


def run(program, *arguments):
    """Seconds and peak resident bytes of a program that must succeed."""
    started = time.monotonic()
    child = subprocess.Popen([PROGRAMS / program, *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"bench-7b: {program} {' '.join(arguments)} failed with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("steps", nargs="*", metavar="step", help=", ".join(STEPS))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_intermixed_args()
    work, device = arguments.work, ["--device", arguments.device]
    work.mkdir(parents=True, exist_ok=True)
    print(f"bench-7b: {shutil.disk_usage(work).free / 1e9:.0f} GB of disk are free", file=sys.stderr)
    print("| step | seconds | peak GB | limit GB |\n|---|---|---|---|", flush=True)
    over = []
    for name in arguments.steps or STEPS:
        for left in LEFT_BY.get(name, []):
            shutil.rmtree(work / left, ignore_errors=True)
        for command in STEPS[name](arguments.model, work, device):
            seconds, peak = run(*command)
        # On a GPU the weights are not in this process's resident memory, and the limit says nothing.
        limit = LIMITS_GB[name] if arguments.device == "cpu" else None
        print(f"| {name} | {seconds:.0f} | {peak / 1e9:.2f} | {limit or '–'} |", flush=True)
        over += [name] if limit and peak > limit * 1e9 else []
    if over:
        sys.exit(f"bench-7b: over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
