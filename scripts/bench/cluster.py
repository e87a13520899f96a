"""The simulated clock of `arete plan --cluster` beside measured small cases: steps of reward training and iterations of PPO.

    python3 scripts/bench/cluster.py MODEL [--cores 0,1]

Rates come from one process; the clock is then asked about batches twice as large, with one process and with two, and the same is run. The
first batches are not tiny: a product of few rows takes longer a token, which the clock, whose rates are those of full passes, does not know. Times are CPU seconds of the process that took most, so that other work on the machine does not count: what a core of its own
would take. Bytes are those that `timings.jsonl` tells. All pairs are cut at `max_length`, and prompts have one length, as the clock has it.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import tempfile

from ranks import PROGRAMS, measured, of, reward_training

LENGTH, NEW_TOKENS = 64, 24
BATCH = 16  # pairs and prompts that the rates come from
LINKS = {"bytes_per_s": 1e9, "latency_s": 5e-5}  # a loopback's; next to nothing here


def made_up_pairs(path):
    """Pairs whose sides have nothing in common and are longer than the cut."""
    words = "river stone lamp winter bread garden letter window morning bridge forest paper silver market harbour evening".split()
    rng = random.Random(7)
    side = lambda name: f"{name} " + " ".join(rng.choice(words) for _ in range(2 * LENGTH))
    # Questions of their own: pairs of one question are of one split.
    pair = lambda i: {name: f"\n\nHuman: Tell me of {i}.\n\nAssistant: {side(word)}" for name, word in (("chosen", "yes"), ("rejected", "no"))}
    rows = [pair(i) for i in range(256)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(scratch):
    """Prompts of one length, and how many tokens that is with the template."""
    rng = random.Random(7)
    words = ["red", "two", "old", "new", "big", "far"]
    texts = {" ".join(rng.choice(words) for _ in range(12)) for _ in range(200)}
    path = scratch / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in sorted(texts)))
    output = scratch / "prompts"
    subprocess.run([PROGRAMS / "arete-curation", "prompts", "--input", path, "--output", output], check=True, stderr=subprocess.DEVNULL)
    return output


def ppo(model, prompts, size):
    flags = f"--iterations 9 --rollout-size {size} --max-new-tokens {NEW_TOKENS} --rollout answer --value-warmup 0 --probe-every 0 " \
        "--probe-prompts 2 --stats-samples 8 --merge false --threads 1 --programmed-reward letter:e --checkpoint-every 0 --keep-graph-tokens 0"
    return [PROGRAMS / "arete-ppo", "train", "--model", model, "--prompts", prompts, *flags.split()]


def clock(model, rates, n, batch_size, rollout_size, prompt_tokens, scratch):
    """What the clock says: seconds and bytes by stage and number of processes."""
    tables = {"trainers": {"n": n, **rates}, "links": LINKS}
    text = "".join(f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in table.items()) for name, table in tables.items())
    (scratch / "cluster.toml").write_text(text)
    settings = {
        "reward.max_length": LENGTH, "reward.batch_size": batch_size, "ppo.rollout_size": rollout_size, "ppo.max_new_tokens": NEW_TOKENS,
        "ppo.rollout": "answer", "ppo.keep_graph_tokens": 0,
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [PROGRAMS / "arete", "plan", "--model", model, "--prompt-tokens", str(prompt_tokens), "--cluster", scratch / "cluster.toml", "--json", *sets]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {(line["stage"], line["n_ranks"]): (dict(line["phases"]), line["sent_bytes"]) for line in told["cluster"]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--cores", default="0,1")
    args = parser.parse_args()
    cores, model, median = args.cores.split(","), args.model, statistics.median
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        pairs, asked = made_up_pairs(scratch / "pairs.jsonl"), prompts(scratch)
        reward = lambda size: reward_training(model, pairs, size, "--max-length", LENGTH)

        steps, _ = measured(reward(BATCH), scratch / "rate-reward", 1, cores, 4)
        rates = {"trained_tokens_per_s": BATCH * 2 * LENGTH / median(steps)}
        iterations, timings = measured(ppo(model, asked, BATCH), scratch / "rate-ppo", 1, cores, 3)
        # Phases are told in wall time; the share of each is taken for its share of the CPU's.
        walls = {what: of(timings, what) for what in ("sampling", "reference", "first pass", "update")}
        share = median(iterations) / median(of(timings, "iteration"))
        n_tokens = {what: median(of(timings, what, "n_tokens")) for what in walls}
        prompt_tokens = round(n_tokens["reference"] / BATCH - NEW_TOKENS)
        rates["sampled_tokens_per_s"] = n_tokens["sampling"] / (median(walls["sampling"]) * share)
        rates["forward_tokens_per_s"] = n_tokens["reference"] / (median(walls["reference"]) * share)
        told = clock(model, rates, 2, 2 * BATCH, 2 * BATCH, prompt_tokens, scratch)
        ppo_rates = {**rates, "trained_tokens_per_s": n_tokens["update"] / (median(walls["update"]) * share)}
        told |= {key: value for key, value in clock(model, ppo_rates, 2, 2 * BATCH, 2 * BATCH, prompt_tokens, scratch).items() if key[0] == "ppo"}

        print("rates of one process: " + ", ".join(f"{name} {value:.0f}" for name, value in rates.items())
              + f"; PPO's updates {ppo_rates['trained_tokens_per_s']:.0f}")
        print("| | processes | clock | measured (CPU) | sent, counted | sent, measured |\n|---|---|---|---|---|---|")
        for stage, words, n_steps in (("reward", reward(2 * BATCH), 4), ("ppo", ppo(model, asked, 2 * BATCH), 3)):
            for n_ranks in (1, 2):
                seconds, timings = measured(words, scratch / f"{stage}-{n_ranks}", n_ranks, cores, n_steps)
                phases, sent = told[stage, n_ranks]
                phases.pop("scoring", None)  # a programmed reward scores at once
                bytes_sent = of(timings, "communication", "n_bytes")
                seen = f"{median(bytes_sent) / 1e6:.2f} MB" if bytes_sent else "0"
                print(f"| {stage} | {n_ranks} | {sum(phases.values()):.2f} s | {median(seconds):.2f} s | {sent / 1e6:.2f} MB | {seen} |", flush=True)


if __name__ == "__main__":
    main()
