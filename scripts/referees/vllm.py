"""Holds our programs against a real vLLM on the CPU: conversations, judging, PPO, scoring and reward models on servers.

    bash scripts/referees/vllm.sh [STEP…]      steps: conversations judge judges ppo restart stale scoring rewards (all of them, in order)

SmolLM2-135M in bf16: some ten minutes on two cores, on those that it may use (`taskset -c 0` before it for one). Servers run on loopback
ports of their own; a proxy of ours stands before one of them and gives it the adapter before in place of the new one. What is seen is
printed as a table of Markdown; what should not be ends it with exit code 1.
"""

import argparse
import http.client
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = ROOT / "target/release"
PORT = 8765
PATIENCE = ["--timeout-s", 600, "--engine-wait-s", 1200]
STEPS = ["conversations", "judge", "judges", "ppo", "restart", "stale", "scoring", "rewards"]


class Server:
    """A vLLM process, and its process group."""

    def __init__(self, args, port, extra=()):
        self.args, self.port, self.extra = args, port, list(extra)
        self.url = f"http://127.0.0.1:{port}"
        self.log = args.work / f"vllm-{port}.log"
        self.log.unlink(missing_ok=True)
        self.process = None

    def start(self, patience=1200):
        environment = dict(
            os.environ,
            VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0)))),
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        command = [
            str(args_venv(self.args) / "bin/vllm"), "serve", str(self.args.model), "--served-model-name", "smol",
            "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "1024", "--enable-lora", "--max-lora-rank", "16",
            # With chunks it ends ("CPU Generator does not use offset") where a request with a seed is cut into two.
            "--max-loras", "4", "--no-enable-chunked-prefill", "--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(self.port), *self.extra,
        ]
        log = self.log.open("ab")
        started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        while not answers(self.port):
            if self.process.poll() is not None or time.monotonic() - started > patience:
                self.kill()
                sys.exit(f"referee-vllm: no server at {self.url}, see {self.log}")
            time.sleep(0.5)
        return time.monotonic() - started

    def kill(self):
        """As a machine that is gone: the whole group at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


    def n_asked(self):
        """Conversations that it was asked to continue so far."""
        return self.log.read_text(errors="replace").count("POST /v1/chat/completions") if self.log.is_file() else 0


def args_venv(args):
    return args.venv if args.venv.is_absolute() else ROOT / args.venv


def answers(port):
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


class Stale(http.server.BaseHTTPRequestHandler):
    """Passes everything on, but loads the adapter before in place of the third and later ones (before the second there is only the base)."""

    behind = PORT
    loaded = []
    protocol_version = "HTTP/1.0"

    def pass_on(self, body):
        if self.path.endswith("/load_lora_adapter"):
            wanted = json.loads(body)
            type(self).loaded.append(wanted["lora_path"])
            # A copy, because the directory itself goes when the next is proved.
            keep = pathlib.Path(wanted["lora_path"])
            aside = keep.parent.parent / f"stale-{len(self.loaded)}"
            shutil.copytree(keep, aside, dirs_exist_ok=True)
            if len(self.loaded) > 2:
                wanted["lora_path"] = str(keep.parent.parent / f"stale-{len(self.loaded) - 1}")
            body = json.dumps(wanted).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=300)
        connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.pass_on(None)

    def do_POST(self):
        self.pass_on(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, *_):
        pass


def check(holds, what):
    if not holds:
        sys.exit(f"referee-vllm: {what}")


def run(name, program, *words, expect=0, watch=None):
    """Runs one of our programs; its stderr as text. `watch` gets the process once it has begun."""
    command = [str(BIN / program), *map(str, words)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    thread = threading.Thread(target=watch, args=(process,)) if watch else None
    if thread:
        thread.start()
    _, log = process.communicate()
    if thread:
        thread.join()
    if process.returncode != expect:
        sys.exit(f"referee-vllm: {name}: expected exit code {expect}, got {process.returncode}\n{log[-3000:]}")
    return log, time.monotonic() - started


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def series(path, name, digits=4):
    return ", ".join(f"{line[name]:.{digits}f}" for line in lines(path) if name in line)


def phases(output, what, field, digits=4):
    found = [line[field] for line in lines(output / "timings.jsonl") if line.get("what") == what and field in line]
    return ", ".join(f"{value:.{digits}f}" for value in found)


class Referee:
    def __init__(self, args):
        self.args, self.work, self.model = args, args.work, args.model
        self.rows = []

    def say(self, step, what, seen):
        self.rows.append((step, what, seen))
        print(f"| {step} | {what} | {seen} |", flush=True)

    def prompts(self, name, n):
        """A directory of so many prompts, made once."""
        output = self.work / name
        inputs = [word for name in ("advice", "help") for word in ("--input", ROOT / f"data/prompts/{name}.jsonl")]
        run("prompts", "arete-curation", "prompts", *inputs, "--limit", n, "--output", output)
        return output

    def counts(self, name):
        return json.loads((self.work / name / "run.json").read_text())["counts"]

    def conversations(self, server):
        n, n_texts = 16, server.n_asked()
        words = ["conversations", "--prompts", self.prompts("few", n), "--model", self.model, "--engine-urls", server.url,
                 "--personas", "contrast", "--max-new-tokens", 24, "--dtype", "bf16", *PATIENCE]
        _, seconds = run("conversations", "arete-curation", *words, "--output", self.work / "conversations")
        counts = self.counts("conversations")
        n_tokens = sum(value for name, value in counts.items() if name.startswith("n_tokens_"))
        self.say("conversations", f"{counts['conversations']} of three turns", f"{seconds:.0f} s, {n_tokens} tokens sampled")
        check(counts["conversations"] == 2 * n, f"conversations: expected two of each of {n} prompts: {counts}")
        check(server.n_asked() == n_texts, "conversations: asked for as text, not as tokens")
        run("preferences", "arete-curation", "preferences", "--conversations", self.work / "conversations", "--method", "contrast",
            "--truncated", "keep", "--min-pairs", 1, "--output", self.work / "preferences")

    def judged(self, name, urls, watch=None):
        log, seconds = run(name, "arete-curation", "preferences", "--conversations", self.work / "conversations", "--judge", "smol",
                           "--judge-url", urls, "--ties", "probability", "--truncated", "keep", "--min-pairs", 0,
                           *PATIENCE[:2], "--output", self.work / name, watch=watch)
        check("every label's own probability" in log, f"{name}: expected the labels' own probabilities (logprob_token_ids)\n{log[-3000:]}")
        return log, seconds

    def judge(self, server):
        before = server.n_asked()
        _, seconds = self.judged("judge", server.url)
        n, n_asked = self.counts("judge")["judgements"], server.n_asked() - before
        self.say("judge", "verdicts from logprob_token_ids", f"{n}, {seconds:.0f} s")
        check(n > 0 and n_asked >= 2 * n, f"judge: expected each verdict in two orders, got {n_asked} requests for {n}")

    def judges(self, server):
        """Two servers share the questions; one is killed among them."""
        other = Server(self.args, PORT + 1, server.extra)
        other.start()

        def kill_after_some(process):
            while process.poll() is None and other.n_asked() < 60:
                time.sleep(0.05)
            other.kill()

        before = server.n_asked()
        try:
            log, seconds = self.judged("judges", f"{server.url},{other.url}", kill_after_some)
        finally:
            other.kill()
        n, alone = self.counts("judges")["judgements"], self.counts("judge")["judgements"]
        of = [server.n_asked() - before, other.n_asked()]
        self.say("judges", "two servers, one killed among the questions", f"{n} verdicts, {seconds:.0f} s, requests {of[0]} and {of[1]}")
        check(n == alone, f"judges: expected {alone} verdicts as of one server, got {n}")
        check(other.url in log and "left out until it comes back" in log, f"judges: the killed server was not missed\n{log[-3000:]}")

    def ppo(self, name, urls, *more, expect=0, watch=None, reward=("--programmed-reward", "letter:e"), rollout="answer",
            dtype="bf16"):
        output = self.work / name
        words = ["train", "--prompts", self.prompts("prompts", 48), "--model", self.model, *reward, "--output", output,
                 "--engine-urls", urls, "--iterations", 3, "--rollout-size", 8, "--max-new-tokens", 16, "--rollout", rollout,
                 "--value-warmup", 0, "--learning-rate", 1e-4, "--rank", 16, "--probe-prompts", 4, "--stats-samples", 8,
                 "--dtype", dtype, "--merge", "false", "--probe-every", 0, *PATIENCE, *more]
        return (output, *run(name, "arete-ppo", *words, expect=expect, watch=watch))

    def learn(self, server):
        output, _, seconds = self.ppo("ppo", server.url)
        self.figures("ppo", output, seconds)

    def figures(self, step, output, seconds):
        metrics = output / "metrics.jsonl"
        self.say(step, "three iterations", f"{seconds:.0f} s")
        self.say(step, "canary: mean difference, step from the weights before (nats)",
                 f"{phases(output, 'load', 'canary_difference')}; {phases(output, 'load', 'canary_step')}")
        self.say(step, "engine/difference_avg, sampler_trainer_difference (nats)",
                 f"{series(metrics, 'engine/difference_avg')}; {series(metrics, 'sampler_trainer_difference', 3)}")
        self.say(step, "engine/ess", series(metrics, "engine/ess"))
        self.say(step, "first_log_ratio", series(metrics, "first_log_ratio", 1))
        n = sum("engine/difference_avg" in line for line in lines(metrics))
        check(n == 3, f"{step}: expected three iterations of a server's replies, got {n}")

    def restart(self, server):
        journal = self.work / "restarted/rollouts/iteration-000002.partial.jsonl"

        def kill_in_the_second_rollout(process):
            while process.poll() is None and not (journal.is_file() and journal.stat().st_size > 0):
                time.sleep(0.01)
            server.kill()
            server.start()

        # Three at once: most of the rollout is not there when the first reply is.
        output, log, seconds = self.ppo("restarted", server.url, "--concurrency", 3, watch=kill_in_the_second_rollout)
        check("left out until it comes back" in log and "back, with the adapter proved" in log,
              f"restart: the server was not missed\n{log[-3000:]}")
        self.figures("restart", output, seconds)
        self.say("restart", "replies lost with the server", phases(output, "engines", "n_lost", 0))

    def stale(self, server):
        other = Server(self.args, PORT + 1, server.extra)
        other.start()
        Stale.behind = other.port
        front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stale)
        threading.Thread(target=front.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{front.server_port}"
        try:
            _, log, _ = self.ppo("stale", f"{server.url},{url}", "--engine-adapter-dir", self.work / "adapters/here", expect=69)
        finally:
            front.shutdown()
            other.kill()
        told = [line for line in log.splitlines() if "stale" in line and url in line]
        check(told, f"stale: the stale server was not named\n{log[-3000:]}")
        self.say("stale", "two servers, one stale", told[-1].strip().replace(url, "the stale one").replace("|", "/"))

    def scoring(self, server):
        for aspect in ("action", "motivation", "consequence"):
            run("reward", "arete-reward", "train", "--aspect", aspect, "--preferences", self.work / "preferences",
                "--model", self.model, "--output", self.work / "reward", "--max-steps", 24, "--batch-size", 4, "--epochs", 24,
                "--min-pairs", 1, "--stats-samples", 32, "--dtype", "bf16", "--merge", "false")
        _, seconds = run("scoring", "arete-scoring", "score", "--prompts", self.work / "prompts", "--base", self.model,
                         "--original", self.model, "--final", self.work / "ppo", "--rewards", self.work / "reward",
                         "--n-prompts", 4, "--max-new-tokens", 16, "--draws", 100, "--engine-urls", server.url, "--dtype", "bf16", *PATIENCE,
                         "--output", self.work / "scoring")
        engines = json.loads((self.work / "scoring/run.json").read_text())["config"].get("engines")
        self.say("scoring", "the base and an adapter, replies by the server", f"{seconds:.0f} s")
        check(engines == "vllm", f"scoring: expected replies by vllm, got {engines}")

    def rewards(self, server):
        # In bf16 scores shift by a part of a standard deviation, ours and the server's: transformers' own do against its f32 (docs/engines.md).
        pooling = Server(self.args, PORT + 2, ["--dtype", "float32", "--runner", "pooling", "--hf-overrides", json.dumps(
            {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1})])
        pooling.start()
        try:
            _, log, seconds = self.ppo("rewarded", server.url, "--reward-urls", pooling.url, rollout="chain",
                                       reward=("--rewards", self.work / "reward"), dtype="f32")
        finally:
            pooling.kill()
        found = [line.split("difference=")[1].split()[0] for line in log.splitlines() if "score as the reward model here" in line]
        self.say("rewards", "servers' scores against ours (standard deviations)", ", ".join(found))
        check(len(found) == 3, f"rewards: expected three reward models held against ours, got {found}\n{log[-3000:]}")
        self.say("rewards", "three iterations", f"{seconds:.0f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--venv", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/referee-vllm")
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], default=[])
    args = parser.parse_args()
    args.model, args.work = args.model.resolve(), args.work.resolve()
    steps = args.steps or STEPS
    if not args.steps and args.work.exists():
        shutil.rmtree(args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "adapters/here").mkdir(parents=True, exist_ok=True)
    referee = Referee(args)
    server = Server(args, PORT, ["--logprobs-mode", "processed_logprobs"])
    print("| step | what | seen |\n|---|---|---|")
    try:
        referee.say("server", "vllm-cpu 0.32.0, SmolLM2-135M in bf16", f"ready after {server.start():.0f} s")
        tasks = {"ppo": referee.learn}
        for step in steps:
            tasks.get(step, getattr(referee, step))(server)
    finally:
        server.kill()


if __name__ == "__main__":
    main()
