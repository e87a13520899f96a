"""Servers on the loopback interface that misbehave on request: one that speaks as OpenAI's do, and a hub that keeps what it is sent.

A fault is a function of the request that returns None (behave) or a pair: what to do, and with what. See `Listening.send`.
"""

import base64
import hashlib
import json
import math
import socketserver
import threading
import time

REPOSITORY = "someone/thing"
TOKEN = "hf_canary0secret0token0123456789"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Request:
    def __init__(self, line, headers, body, number):
        words = line.split()
        self.line, self.method, self.path = line, words[0], words[1].split("?")[0]
        self.headers, self.body, self.number = headers, body, number


class Listening:
    """A server in a thread; `requests` are those that came."""

    def __init__(self, fault=None):
        self.fault, self.requests, self.lock = fault, [], threading.Lock()
        self.sent_bytes, self.limit_bytes = 0, 1 << 30
        owner = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                try:
                    owner._answer(self)
                except (OSError, ValueError, IndexError):
                    pass  # the other side went away, or spoke no HTTP

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, handler):
        line = handler.rfile.readline(65536).decode("latin1").strip()
        if not line:
            return
        headers = {}
        while header := handler.rfile.readline(65536).decode("latin1").strip():
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        if "chunked" in headers.get("transfer-encoding", ""):
            while n := int(handler.rfile.readline().strip(), 16):
                body += handler.rfile.read(n + 2)[:n]
            handler.rfile.readline()
        with self.lock:
            request = Request(line, headers, body, len(self.requests) + 1)
            self.requests.append(request)
            fault = self.fault(request) if self.fault else None
            status, extra, content = (200, {}, b"")
            if fault is None or fault[0] in ("cut", "flip", "slow"):
                status, extra, content = self.respond(request)
        self.send(handler, request, fault, status, extra, content)

    def send(self, handler, request, fault, status, extra, content):
        what, argument = fault or ("", None)
        if what == "drop":
            return
        if what == "hang":
            time.sleep(argument)
            return
        if what == "raw":
            handler.wfile.write(argument)
            return
        if what == "endless":
            handler.wfile.write(argument)
            while self.sent_bytes < self.limit_bytes:
                handler.wfile.write(b"x" * 65536)
                self.sent_bytes += 65536
            return
        if what == "chunks":  # without an end
            handler.wfile.write(argument)
            while self.sent_bytes < self.limit_bytes:
                handler.wfile.write(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
                self.sent_bytes += 1 << 20
            return
        if what == "status":
            status, extra, content = argument
        if isinstance(content, (dict, list)):
            content, extra = json.dumps(content).encode(), {"content-type": "application/json"} | extra
        if what == "flip" and len(content) > argument:
            content = content[:argument] + bytes([content[argument] ^ 1]) + content[argument + 1 :]
        extra = self.usual_headers() | {"content-length": len(content), "connection": "close"} | extra
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in extra.items()) + "\r\n"
        handler.wfile.write(head.encode())
        if request.method == "HEAD":
            return
        if what == "cut":
            content = content[:argument]
        if what == "slow":
            for idx in range(len(content)):
                handler.wfile.write(content[idx : idx + 1])
                handler.wfile.flush()
                time.sleep(argument)
            return
        handler.wfile.write(content)

    def usual_headers(self):
        return {}

    def respond(self, request):
        raise NotImplementedError


def status(code, content=b"", **headers):
    """The fault of answering with a status; `_` in headers' names stands for `-`."""
    return "status", (code, {name.replace("_", "-"): value for name, value in headers.items()}, content)


class Judge(Listening):
    """Speaks as OpenAI's servers do: replies and verdicts are functions of the request."""

    def respond(self, request):
        asked = json.loads(request.body)
        usage = {"completion_tokens": 6}
        if asked.get("logprobs"):
            mass = 0.05 + 0.85 * self._number(asked["messages"]) / 0xFFFFFF
            top = [{"token": "A", "logprob": math.log(mass)}, {"token": "B", "logprob": math.log(0.96 - mass)}]
            logprobs = {"content": [{"token": "A", "logprob": math.log(mass), "top_logprobs": top}]}
            choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "A"}, "logprobs": logprobs}
            return 200, {}, {"choices": [choice], "usage": usage}
        text = f"I would listen. {self._number([asked['messages'], asked.get('seed')]):06x}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return 200, {}, {"choices": [choice], "usage": usage}

    @staticmethod
    def _number(value):
        return int(hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6], 16)


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(Listening):
    """A repository with a branch; large files go the way of Xet."""

    def __init__(self, files=None, fault=None, token=TOKEN):
        super().__init__(fault)
        self.files, self.token, self.n_commits, self.n_created = dict(files or {}), token, 0, 0
        self.base = COMMIT if files is not None else None

    def usual_headers(self):
        return {"x-repo-commit": self.head(), "etag": '"abc"'}

    def head(self):
        return COMMIT if self.n_commits == 0 and self.base else f"{self.n_commits + 1:040x}"

    def state(self):
        """Path → hash, or hash and size of a large file."""
        return {path: file if isinstance(file, tuple) else hashlib.sha256(file).hexdigest() for path, file in self.files.items()}

    def listing(self):
        out = []
        for path, file in sorted(self.files.items()):
            if isinstance(file, tuple) or path.endswith((".safetensors", ".parquet")):
                sum, size = file if isinstance(file, tuple) else (hashlib.sha256(file).hexdigest(), len(file))
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sum}\nsize {size}\n".encode()
                large = {"oid": sum, "size": size, "pointerSize": len(pointer)}
                out.append({"type": "file", "path": path, "size": size, "oid": git_id(pointer), "lfs": large})
            else:
                out.append({"type": "file", "path": path, "size": len(file), "oid": git_id(file)})
        return out

    def respond(self, request):
        path = request.path
        if path.startswith("/v1/xorbs/"):
            return 200, {}, {"was_inserted": True}
        if path == "/v1/shards":
            return 200, {}, {"result": 1}
        if path.startswith(("/v1/", "/v2/")):
            return 404, {}, {}
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}" and "/resolve/" not in path:
            return 401, {}, {"error": "no"}
        if path == "/api/repos/create":
            self.n_created += 1
            return 200 if self.n_created == 1 else 409, {}, {"url": f"{self.url}/{REPOSITORY}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {}, {"transfer": "xet", "objects": []}
        if "/resolve/" in path:
            file = self.files.get(path.split("/resolve/", 1)[1].split("/", 1)[1])
            return (200, {}, file) if isinstance(file, bytes) else (404, {}, {})
        if f"/{REPOSITORY}/" not in path:
            return 404, {}, {}
        action = path.split(f"/{REPOSITORY}/", 1)[1].split("/")[0]
        if action == "revision":
            return 200, {}, {"id": REPOSITORY, "sha": self.head()}
        if action == "tree":
            return 200, {}, self.listing()
        if action == "xet-write-token":
            return 200, {}, {"accessToken": "t", "exp": 4000000000, "casUrl": self.url}
        if action == "preupload":
            asked = json.loads(request.body)["files"]
            large = (".safetensors", ".parquet")
            modes = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(large) else "regular"} for file in asked]
            return 200, {}, {"files": modes}
        if action == "commit":
            return self._commit(request.body)
        return 404, {}, {}

    def _commit(self, body):
        new = dict(self.files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, self.head()):
                return 412, {}, {"error": "a commit has happened since"}
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = (value["oid"], value["size"])
        self.files = new
        self.n_commits += 1
        return 200, {}, {"commitOid": self.head(), "commitUrl": "x"}
