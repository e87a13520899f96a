"""OpenAI-compatible servers that lie, hang, echo, never end: exit code 69 in bounded time, and once they behave the same rows as ever."""

import gzip
import json
import signal
import subprocess
import time

from common import STAGES, differing, last_words, leftovers, spread, tree
from listening import Judge, status

AMOUNT = 10_000  # faults at moments; there are fewer
KEY = "sk-canary-0secret0key0123456789"
MAX_S, MAX_MIB = 60, 1024
# Seconds within which a signal ends a stage that waits for a server.
ANSWERS_S = 2.5


def drive(bench, report, amount):
    rng, folder = bench.rng("servers"), bench.work / "servers"
    faults = list(_faults().items())
    cases = [(stage, name, fault, when) for name, fault in faults for stage in _SERVED for when in ("first", "later", "once")]
    cases += [("signal", stage, name, None) for stage in _SERVED for name in ("SIGINT", "SIGTERM")]
    wanted = {}
    for case in spread(cases, amount, rng, of=lambda case: case[1] if case[0] == "signal" else case[:2]):
        if case[0] == "signal":
            report.case(f"{case[1]}, {case[2]} while a server hangs", _signalled(bench, folder, case[1], getattr(signal, case[2])))
            continue
        stage, name, fault, when = case
        if stage not in wanted:
            wanted[stage] = _undisturbed(bench, folder, stage)
        report.case(f"{stage}, {name}, {when}", _disturbed(bench, folder, stage, name, fault, when, wanted[stage]), keep=folder)


def _command(bench, stage, url, *flags):
    command = bench.command(stage)
    option = "--judge" if stage == "preferences" else "--model"
    command[command.index(option) + 1] = "served"
    if stage == "preferences":
        command += ["--judge-url", url, "--method", "pairwise-logits", "--ties", "probability"]
    else:
        command += ["--engine-url", url]
    return [*command, "--attempts", "3", "--backoff-s", "0.05", *(flags or ["--timeout-s", "1"])]


_SERVED = ["conversations", "preferences"]
# Faults that are none where a reply is asked for: whatever its text, and whatever stands in log-probabilities that nobody wanted.
_REPLIES = ["escapes", "logprobs-positive", "logprobs-text"]


def _rows(bench, folder, stage):
    """The stage's results but for run.json, in which the server's address stands."""
    files = tree(folder / "run" / STAGES[stage].output)
    files.pop("run.json", None)
    return files


def _undisturbed(bench, folder, stage):
    bench.prepare(folder, STAGES[stage].reads)
    with Judge() as server:
        ended = bench.run(_command(bench, stage, server.url), folder, 90, bench.environment(OPENAI_API_KEY=KEY))
    if ended.code != 0:
        raise SystemExit(f"{stage} fails with a good server: {ended.err[-800:]}")
    return _rows(bench, folder, stage)


def _disturbed(bench, folder, stage, name, fault, when, wanted):
    first = 1 if when == "first" else 20
    bench.prepare(folder, STAGES[stage].reads)
    environment = bench.environment(OPENAI_API_KEY=KEY)
    with Judge(lambda request: fault if (request.number == first if when == "once" else request.number >= first) else None) as server:
        ended = bench.run(_command(bench, stage, server.url), folder, MAX_S + 15, environment)
        found = ended.faults()
        if not found and ended.code not in (0, 65, 69):
            found.append(f"exit code {ended.code}: {last_words(ended.err)}")
        if ended.wall_s > bench.patient(MAX_S):
            found.append(f"{ended.wall_s:.0f} s")
        if ended.peak_mib > MAX_MIB:
            found.append(f"{ended.peak_mib:.0f} MiB")
        if KEY in ended.err + ended.out:
            found.append("the key is shown")
        found += [f"the key is in {path.name}" for path in (folder / "run").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
        is_reply = stage == "conversations" and name in _REPLIES
        if ended.code == 0 and when != "once" and not is_reply:
            # Passing trouble of one request may be an abstention; of every one it may not be.
            found += [f"exit code 0 with other rows in {', '.join(_other(bench, folder, stage, wanted))}"] * bool(_other(bench, folder, stage, wanted))
        server.fault = None
        if ended.code != 0:
            again = bench.run(_command(bench, stage, server.url), folder, 90, environment)
            if again.code != 0:
                found.append(f"with a good server again: exit code {again.code}: {last_words(again.err)}")
            elif _other(bench, folder, stage, wanted):
                found.append(f"with a good server again: other rows in {', '.join(_other(bench, folder, stage, wanted))}")
    return found + [f"left behind: {path}" for path in leftovers(folder / "run")[:2]]


def _other(bench, folder, stage, wanted):
    return differing(_rows(bench, folder, stage), wanted)[:4]


def _signalled(bench, folder, stage, number):
    """A signal while a server hangs (each request for 30 s) ends the stage soon, by the signal's exit code."""
    bench.prepare(folder, STAGES[stage].reads)
    with Judge(lambda request: ("hang", 60) if request.number > 20 else None) as server:
        child = bench.start(_command(bench, stage, server.url, "--timeout-s", "30"), folder)
        start = time.monotonic()
        while len(server.requests) <= 20 and child.poll() is None and time.monotonic() - start < bench.patient(30):
            time.sleep(0.02)
        time.sleep(0.3)
        child.send_signal(number)
        start = time.monotonic()
        try:
            code = child.wait(timeout=bench.patient(70))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return [f"no end within {bench.patient(70):.0f} s of the signal"]
    took = time.monotonic() - start
    found = [] if code == 128 + number else [f"exit code {code}: {last_words((folder / 'stderr').read_text(errors='replace'))}"]
    return found + ([f"ended {took:.1f} s after the signal"] if took > bench.patient(ANSWERS_S) else [])


def _faults():
    def ok(content, **headers):
        return status(200, content if isinstance(content, bytes) else json.dumps(content).encode(), **headers)

    def reply(**choice):
        return ok({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"} | choice], "usage": {"completion_tokens": 1}})

    def used(n):
        return ok({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"completion_tokens": n}})

    def logprobs(logprob, top):
        content = [{"token": "A", "logprob": logprob, "top_logprobs": [{"token": token, "logprob": value} for token, value in top]}]
        return reply(message={"content": "A"}, finish_reason="length", logprobs={"content": content})

    head = b"HTTP/1.1 200 OK\r\n"
    return {
        "slow": ("slow", 0.3),
        "hangs": ("hang", 30),
        "drops": ("drop", None),
        "cut": ("cut", 10),
        "cut-in-json": ("raw", head + b'content-length: 5000\r\n\r\n{"choices"'),
        "no-http": ("raw", b"SSH-2.0-OpenSSH\r\n"),
        "tls": ("raw", b"\x16\x03\x01\x02\x00\x01"),
        "endless": ("endless", head + b"\r\n"),
        "endless-chunk": ("endless", head + b"transfer-encoding: chunked\r\n\r\nffffffff\r\n"),
        "endless-header": ("endless", head + b"x: "),
        "headers-100000": ("raw", head + b"a: b\r\n" * 100_000 + b"\r\n"),
        "html": ok(b"<html>proxy login</html>"),
        "empty": ok(b""),
        "gzip-bomb": ok(gzip.compress(b'{"a":"' + b"0" * 500_000_000, 9, mtime=0), content_encoding="gzip"),
        "10MB": reply(message={"content": "x" * 10_000_000}),
        "deep": ok(b"[" * 1_000_000),
        "types": reply(message={"content": 5}, finish_reason=7),
        "choices-null": ok({"choices": None}),
        "choices-empty": ok({"choices": []}),
        "content-null": reply(message={"content": None}),
        "finish-unknown": reply(finish_reason="banana"),
        "tokens-negative": used(-(2**63)),
        "tokens-2^64-1": used(2**64 - 1),
        "logprobs-positive": logprobs(5.0, [("A", 1e308), ("B", 1e308)]),
        "logprobs-text": logprobs("x", [("A", None)]),
        "logprobs-nan": ok(b'{"choices":[{"logprobs":{"content":[{"top_logprobs":[{"token":"A","logprob":NaN}]}]}}]}'),
        "escapes": reply(message={"content": "a\x1b[2J\x00\u202e</script><img src=x onerror=alert(1)>"}),
        "error-inside": ok({"error": {"message": "out of memory"}}),
        "redirect": status(302, location="http://127.0.0.1:1/x"),
        "redirect-ring": status(307, location="/v1/chat/completions"),
        "401-echo": status(401, f'{{"error":"Incorrect API key provided: {KEY}"}}'.encode()),
        "400-echo": status(400, f"bad request; Authorization: Bearer {KEY}".encode()),
        "500-echo": status(500, f"trace: headers {{Authorization: Bearer {KEY}}}".encode()),
        "400-escapes": status(400, b"\x1b[2J\x1b]0;owned\x07 bad"),
        "400-1MB": status(400, b"x" * 1_000_000),
        "429-hours": status(429, retry_after="36000"),
        "429-negative": status(429, retry_after="-5"),
        "429-nan": status(429, retry_after="nan"),
        "429-date": status(429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"),
        "429-500s": status(429, retry_after="500"),
        **{f"status-{code}": status(code) for code in (101, 204, 403, 404, 413, 422, 429, 500, 503, 529, 999)},
    }
