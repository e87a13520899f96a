"""A hostile file: its kind, how it is made, the command that meets it, and how that may end."""

import json
import shutil

from common import STAGES, TINY

REFUSED = (65,)
REFUSED_OR_SYSTEM = (65, 74)
REFUSED_OR_DONE = (65, 0)


class Case:
    """`make(folder)` writes the file into an empty folder and returns the command, to be run there."""

    def __init__(self, kind, name, make, may_end=REFUSED):
        self.kind, self.name, self.make, self.may_end = kind, f"{kind}-{name}", make, may_end


NAMES = {
    "config": "config.json",
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "template": "chat_template.jinja",
    "weights": "model.safetensors",
    "index": "model.safetensors.index.json",
    "generation": "generation_config.json",
}


class Maker:
    """What the makers of cases share: the programs, and the tiny model to change."""

    def __init__(self, bench):
        self.bench = bench
        self.config = json.loads((TINY / "config.json").read_text())
        self.tokenizer = json.loads((TINY / "tokenizer.json").read_text())

    def model(self, folder, **files):
        """A copy of the tiny model in which files have other contents (None: are missing)."""
        model = folder / "model"
        shutil.copytree(TINY, model)
        for path in model.iterdir():
            path.chmod(0o644)
        for name, content in files.items():
            path = model / NAMES.get(name, name)
            if content is None:
                path.unlink()
            else:
                put(path, content)
        return model

    def generate(self, model, *flags):
        return [self.bench.program("model"), "generate", "--model", model, "--prompt", "hi", "--max-new-tokens", "2", *flags]

    def inspect(self, model, *flags):
        return [self.bench.program("model"), "inspect", "--model", model, *flags]

    def prompts(self, *inputs, recipe=None):
        words = [self.bench.program("curation"), "prompts"]
        for path in inputs:
            words += ["--input", path]
        return words + ["--output", "out"] + (["--recipe", recipe] if recipe else [])

    def stage(self, folder, stage, *flags, own=False):
        """The folder prepared for a stage, and its command there."""
        self.bench.prepare(folder / "pipeline", STAGES[stage].reads + ([stage] if own else []))
        return ["env", "-C", "pipeline", *self.bench.command(stage, *flags)]

    def reference_json(self, path):
        return json.loads((self.bench.reference / path).read_text())


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def value(content):
    """Large contents are made when their case has its turn."""
    return content() if callable(content) else content
