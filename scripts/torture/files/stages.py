"""Hostile files in the place of what other stages wrote."""

import json

from common import BASE, DATA, RECIPE
from files import parquet
from files.case import REFUSED, REFUSED_OR_DONE, Case, put, value

_ACTION = "run/reward/action"


def cases(maker):
    return [*_inputs(maker), *_reports(maker), *_adapters(maker)]


def _inputs(maker):
    def replaced(path, content, stage, own=False):
        def make(d):
            command = maker.stage(d, stage, own=own)
            put(d / "pipeline" / path, value(content))
            return command

        return make

    def stats(**change):
        return lambda: json.dumps(maker.reference_json(f"{_ACTION}/score_stats.json") | change)

    other = parquet.strings(["what is fair?", "who is right?"] * 50)
    meta = {"base_model": "x", "base_sha256": "y", "quantization": "zzz", "task": "SEQ_CLS"}
    inputs = [
        ("prompts-empty", "run/prompts/prompts.parquet", b"", "conversations", REFUSED),
        ("prompts-of-others", "run/prompts/prompts.parquet", other, "conversations", REFUSED),
        ("demonstrations-of-others", "run/demonstrations/demonstrations.parquet", other, "sft", REFUSED),
        ("conversations-of-others", "run/conversations/conversations.parquet", other, "preferences", REFUSED),
        ("preferences-of-others", "run/preferences/action/train.parquet", other, "reward", REFUSED),
        ("preferences-of-others-to-dpo", "run/preferences/action/train.parquet", other, "dpo", REFUSED),
        ("pairs-deep", "pairs.jsonl", "[" * 10**6, "yardstick", REFUSED),
        ("pairs-empty", "pairs.jsonl", "", "yardstick", REFUSED),
        ("pairs-of-numbers", "pairs.jsonl", '{"chosen":1,"rejected":2}\n' * 40, "yardstick", REFUSED),
        ("stats-nan", f"{_ACTION}/score_stats.json", '{"mean": NaN, "std": 1, "n": 1, "split": "x", "base_sha256": "x"}', "ppo", REFUSED),
        ("stats-of-0", f"{_ACTION}/score_stats.json", stats(std=0.0), "ppo", REFUSED),
        ("stats-negative", f"{_ACTION}/score_stats.json", stats(std=-1.0), "ppo", REFUSED),
        ("stats-1e-308", f"{_ACTION}/score_stats.json", stats(std=1e-308), "ppo", (65, 1)),
        ("stats-1e308", f"{_ACTION}/score_stats.json", stats(mean=1e308), "ppo", (65, 1)),
        ("adapter-unknown", f"{_ACTION}/adapter/arete_adapter.json", json.dumps(meta), "ppo", REFUSED),
        ("constitution-dev-zero", "recipe.toml", RECIPE.replace(f"{DATA}/constitution.toml", "/dev/zero"), "demonstrations", (65, 74)),
        ("constitution-empty", "recipe.toml", RECIPE.replace(f"{DATA}/constitution.toml", "/dev/null"), "demonstrations", (65, 74)),
        ("exemplars-dev-zero", "recipe.toml", RECIPE.replace(f"{DATA}/demonstrations/exemplars.jsonl", "/dev/zero"), "demonstrations", (65, 74)),
        ("merged-config-huge", f"{BASE}/config.json", '{"num_hidden_layers": 2147483647}', "conversations", REFUSED),
    ]
    for name, path, content, stage, may_end in inputs:
        yield Case("stage", name, replaced(path, content, stage), may_end)
    # One's own files from before: refused by name, or made anew.
    own = {
        "run-json-of-another": ("run/sft/run.json", '{"stage":"sft"}'),
        "run-json-deep": ("run/sft/run.json", "[" * 10**5),
        "run-json-empty": ("run/sft/run.json", b""),
        "run-json-array": ("run/sft/run.json", "[]"),
        "stage-json-of-another": ("run/sft/stage.json", '{"stage":"sft"}'),
        "stage-json-deep": ("run/sft/stage.json", "[" * 10**5),
        "stage-json-empty": ("run/sft/stage.json", b""),
    }
    for name, (path, content) in own.items():
        yield Case("stage", name, replaced(path, content, "sft", own=True), REFUSED_OR_DONE)


def _reports(maker):
    """The page and the doctor read everything in a run."""
    def metrics(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    extreme = [{"step": i, "ppo/mean_scores": 1e308 * (-1) ** i, "objective/scores": 1e308, "loss/policy_avg": 1e308} for i in range(5)]
    files = {
        "metrics-garbage": ("run/ppo/metrics.jsonl", "x\n"),
        "metrics-deep": ("run/ppo/metrics.jsonl", "[" * 10**6 + "\n"),
        "metrics-types": ("run/ppo/metrics.jsonl", '{"step":"a","loss":[1]}\n'),
        "metrics-1e308": ("run/ppo/metrics.jsonl", metrics(extreme)),
        "metrics-steps": (
            "run/ppo/metrics.jsonl",
            metrics([{"step": 2**64 - 1, "objective/scores": 1.0}, {"step": 0, "objective/scores": -1.0}]),
        ),
        "metrics-empty": ("run/ppo/metrics.jsonl", ""),
        "metrics-65MB": ("run/sft/metrics.jsonl", lambda: '{"step":1,"x":"' + "x" * (65 << 20) + '"}\n'),
        "evaluation-negative": (f"{_ACTION}/evaluation.json", '{"accuracy":{"estimate":-5,"low":9,"high":-9},"n":-1}'),
        "evaluation-array": (f"{_ACTION}/evaluation.json", "[]"),
        "run-json-types": ("run/ppo/run.json", '{"stage":1}'),
        "run-json-deep": ("run/ppo/run.json", "[" * 10**5),
        "run-json-counts": (
            "run/sft/run.json",
            lambda: json.dumps(maker.reference_json("run/sft/run.json") | {"counts": {"a": {"b": [1e308] * 1000}}}),
        ),
        "summary-empty": ("run/scoring/summary.json", "{}"),
        "summary-deep": ("run/scoring/summary.json", "[" * 10**5),
        "scores-of-others": ("run/scoring/scores.parquet", parquet.strings(["a"])),
        "scores-empty": ("run/scoring/scores.parquet", b""),
        "preferences-of-others": ("run/preferences/action/train.parquet", parquet.strings(["a"])),
        "conversations-of-others": ("run/conversations/conversations.parquet", parquet.strings(["a"])),
    }
    for program in ("report", "doctor"):
        for name, (path, content) in files.items():

            def make(d, program=program, path=path, content=content):
                command = maker.stage(d, "report")
                put(d / "pipeline" / path, value(content))
                return command if program == "report" else [*command[:3], maker.bench.program("scoring"), "doctor", "--run", "run"]

            yield Case(program, name, make, REFUSED_OR_DONE)


def _adapters(maker):
    """adapter_config.json, read by an allow-list."""
    def changed(change):
        def make(d):
            maker.bench.prepare(d / "pipeline", ["sft"])
            path = d / "pipeline/run/sft/adapter/adapter_config.json"
            config = json.loads(path.read_text())
            path.write_text(change if isinstance(change, str) else json.dumps(config | change))
            words = [maker.bench.program("model"), "merge", "--model", maker.model(d), "--adapter", "run/sft/adapter", "--output", "o"]
            return ["env", "-C", "pipeline", *words]

        return make

    changes = {
        "rank-0": {"r": 0},
        "rank-2^31": {"r": 2**31},
        "rank-negative": {"r": -1},
        "alpha-1e300": {"lora_alpha": 1e300},
        "alpha-text": {"lora_alpha": "x"},
        "targets-empty": {"target_modules": []},
        "targets-unknown": {"target_modules": ["evil"]},
        "targets-regex": {"target_modules": "(" * 1000},
        "kind-other": {"peft_type": "IA3"},
        "task-other": {"task_type": "SEQ_2_SEQ_LM"},
        "rank-pattern": {"rank_pattern": {"q_proj": 2**31}},
        "alora": {"alora_invocation_tokens": [1, 2]},
        "replication": {"layer_replication": [[0, 2**31]]},
        "unknown-key": {"changes_the_formula": True},
        "use-dora": {"use_dora": True},
        "bias-all": {"bias": "all"},
        "fan-in-fan-out": {"fan_in_fan_out": True},
    }
    for name, change in changes.items():
        yield Case("adapter", name, changed(change))
    for name, text in {"deep": "[" * 10**5, "empty": "", "null": "null", "rank-1e9": '{"r": 1000000000}'}.items():
        yield Case("adapter", name, changed(text))

    def dots(d):
        command = changed({"base_model_name_or_path": "../../../../etc/passwd"})(d)
        return ["../../../../etc/passwd" if str(word).endswith("/model") and "/" in str(word) else word for word in command]

    yield Case("adapter", "base-outside", dots, (65, 74, 2, 0))
