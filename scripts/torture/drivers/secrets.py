"""Tokens and keys that must not show: in what programs say at trace level, in files, in command lines, to other hosts."""

import http.server
import ssl
import subprocess
import threading
import time

from common import TINY, last_words
from listening import REPOSITORY, TOKEN, Hub, Judge, status

AMOUNT = 10_000  # cases; there are fewer
KEY = "sk-canary-0secret0key0123456789"
PASSWORD = "hunter2secret"


def drive(bench, report, amount):
    cases = list(Secrets(bench).cases())
    bench.rng("secrets").shuffle(cases)
    for name, case in cases[:amount]:
        report.case(name, case())


class Secrets:
    def __init__(self, bench):
        self.bench, self.home = bench, bench.work / "secrets-home"
        self.files = {path.name: path.read_bytes() for path in TINY.iterdir()}
        self.inspect = [bench.program("model"), "inspect", "--model", REPOSITORY]
        self.pushing = [bench.program("arete"), "push", "--repository", REPOSITORY, "--directory", "run/sft/merged", "--base-model", "a/b"]

    def cases(self):
        """Names and what to do; each says what it found."""
        for what, part in (("weights", "/resolve/"), ("revision", "/revision/"), ("tree", "/tree/")):
            for host in ("127.0.0.1", "localhost"):
                yield f"download, {what} led to {host}", lambda part=part, host=host: self.led_astray(self.inspect, part, host)
        for what in ("repos/create", "commit", "preupload"):
            yield f"push, {what} led elsewhere", lambda what=what: self.led_astray(self.pushing, f"/{what}", "localhost")
        for code in (302, 307, 308):
            yield f"judge, led elsewhere by {code}", lambda code=code: self.judge_led_astray(code)
        yield "download and push at trace level", self.hub_at_trace_level
        yield "judge at trace level", self.judge_at_trace_level
        yield "the hub echoes the token", self.echoed_by_the_hub
        yield "password in an address", lambda: self.password(None)
        yield "password in an address that refuses", lambda: self.password(status(403, b"no"))
        yield "a certificate that nobody knows", self.unknown_certificate
        yield "the command line and the files of a run", self.command_line

    def environment(self, url, **more):
        more = {"HF_ENDPOINT": url, "HF_HOME": self.home, "HF_TOKEN": TOKEN, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "0"} | more
        return self.bench.environment(**more)

    def conversations(self, url, **more):
        """A stage that asks a server; how it ended, with where it wrote."""
        folder = self.bench.prepare("secrets", ["prompts"])
        command = self.asking(url, "--attempts", "1")
        return self.bench.run(command, folder, 60, self.environment("http://127.0.0.1:9", **more)), folder

    def asking(self, url, *flags):
        command = self.bench.command("conversations", "--engine-url", url, *flags)
        command[command.index("--model") + 1] = "served"
        return command

    def shown(self, ended, *folders):
        """Where the secrets are seen."""
        found = [f"{name} in what it says: {last_words(ended.err)}" for name, secret in _SECRETS.items() if secret in ended.err + ended.out]
        for folder in folders:
            for path in folder.rglob("*"):
                if path.is_file():
                    content = path.read_bytes()
                    found += [f"{name} in {path.name}" for name, secret in _SECRETS.items() if secret.encode() in content]
        return found + ended.faults()

    def led_astray(self, command, part, host):
        """Another port of one host is another origin as well."""
        with Hub(self.files, token=None) as other:
            leads = lambda request: status(307, location=f"http://{host}:{other.port}{request.path}") if part in request.path else None
            with Hub(None if command is self.pushing else self.files, leads) as hub:
                ended = self.bench.run(command, self.bench.reference, 60, self.environment(hub.url, RUST_LOG="trace"))
            told = [request.line for request in other.requests if TOKEN in str(request.headers)]
        return self.shown(ended) + [f"the token went along: {line}" for line in told[:1]]

    def judge_led_astray(self, code):
        with Judge() as other, Judge(lambda _: status(code, location=f"{other.url}/v1/chat/completions")) as server:
            ended, folder = self.conversations(server.url, RUST_LOG="trace")
            told = [request.line for request in other.requests if KEY in str(request.headers)]
        return self.shown(ended, folder / "run") + [f"the key went along: {line}" for line in told[:1]]

    def hub_at_trace_level(self):
        found = []
        for command, files in ((self.inspect, self.files), (self.pushing, None)):
            with Hub(files) as hub:
                ended = self.bench.run(command, self.bench.reference, 60, self.environment(hub.url, RUST_LOG="trace"))
            found += self.shown(ended, self.home)
            if ended.code != 0:
                found.append(f"exit code {ended.code}: {last_words(ended.err)}")
        return found

    def judge_at_trace_level(self):
        with Judge() as server:
            ended, folder = self.conversations(server.url, RUST_LOG="trace")
            sent = any(KEY in str(request.headers) for request in server.requests)
        return self.shown(ended, folder / "run") + ([] if sent else ["the key was not sent where it belongs"])

    def echoed_by_the_hub(self):
        echo = lambda request: status(400, f'{{"error":"bad: authorization: {request.headers.get("authorization")}"}}'.encode())
        found = []
        for command, files in ((self.inspect, self.files), (self.pushing, None)):
            with Hub(files, echo) as hub:
                found += self.shown(self.bench.run(command, self.bench.reference, 60, self.environment(hub.url)))
        return found

    def password(self, fault):
        with Judge(lambda _: fault) as server:
            ended, folder = self.conversations(server.url.replace("http://", f"http://bob:{PASSWORD}@"))
        return self.shown(ended, folder / "run")

    def unknown_certificate(self):
        """Nothing is told to a server whose certificate is its own."""
        folder = self.bench.work / "tls"
        folder.mkdir(exist_ok=True)
        made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
        subprocess.run(made, check=True, capture_output=True)
        told = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                told.append(self.path)
                self.send_response(200)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}"
        endings = [self.bench.run(self.inspect, self.bench.reference, 60, self.environment(url)), self.conversations(url)[0]]
        server.shutdown()
        found = [f"asked without a certificate: {path}" for path in told[:1]]
        return found + [f"exit code {ended.code}: {last_words(ended.err)}" for ended in endings if ended.code != 69]

    def command_line(self):
        folder = self.bench.prepare("secrets", ["prompts"])
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with Judge(lambda _: ("hang", 5)) as server:
            environment = self.environment("http://127.0.0.1:9")
            child = subprocess.Popen(self.asking(server.url), cwd=folder, env=environment, **quiet)
            while not server.requests and child.poll() is None:
                time.sleep(0.02)
            with open(f"/proc/{child.pid}/cmdline", "rb") as line:
                found = ["the key is in the command line"] if KEY.encode() in line.read() else []
            child.kill()
            child.wait()
        return found + [f"the key is in {path.name}" for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


_SECRETS = {"the token": TOKEN, "the key": KEY, "the password": PASSWORD}
