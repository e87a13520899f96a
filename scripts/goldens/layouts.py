"""Tables and labelled pairs in the layouts of public data sets, and what others read in them.

Writes, into tests/fixtures/cases/layouts/:
  tables.*          the same three records as JSON lines, a JSON array, CSV, TSV, text and Parquet in five codecs, with what is
                    awkward in each: quotes, line ends inside cells, a byte order mark, NaN, gzip
  tables.json       per file the rows that `datasets.load_dataset` gives (what is no number is null)
  NAME.jsonl        a few records in the layout of a public data set
  pairs.json        per file the pairs: both conversations, the better first

Pairs written as chosen and rejected: TRL's `maybe_extract_prompt`, prompt and side put together again. The others follow
the recipe that the data set's card gives (the highest mark against the lowest, the reply named better, rank 0 against the
last rank), written out here in Python.

Versions: datasets 5.2.0, trl 1.16.0, pyarrow 26.0.1, pandas 3.1.1. CPU, no network.
"""
import gzip, json, math, os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import pyarrow as pa, pyarrow.parquet as pq
from datasets import load_dataset
from trl.data_utils import is_conversational, maybe_extract_prompt

OUT = Path(__file__).resolve().parents[2] / "tests/fixtures/cases/layouts"
def u(text): return {"role": "user", "content": text}
def a(text): return {"role": "assistant", "content": text}
def s(text): return {"role": "system", "content": text}
def lines(name, rows): (OUT / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def tables():
    rows = [{"question": 'Is it "fair", then?', "score": 1.5, "n": 3}, {"question": "Two\nlines; a,b", "score": None, "n": 4},
            {"question": "42", "score": -2.0, "n": 5}]
    lines("tables.jsonl", rows)
    (OUT / "tables_nan.jsonl").write_text('{"question": "NaN, not a number", "score": NaN, "n": 1}\n{"question": "x", "score": 2.0, "n": 2}\n')
    (OUT / "tables_array.json").write_text(json.dumps(rows, indent=1))
    with gzip.GzipFile(OUT / "tables_gzip.jsonl.gz", "wb", mtime=0) as f: f.write((OUT / "tables.jsonl").read_bytes())
    cells = [["question", "score", "n"]] + [[r["question"], "" if r["score"] is None else str(r["score"]), str(r["n"])] for r in rows]
    quoted = lambda cell: '"' + cell.replace('"', '""') + '"' if any(c in cell for c in ',"\n\t') else cell
    (OUT / "tables.csv").write_bytes(("\ufeff" + "".join(",".join(map(quoted, row)) + "\r\n" for row in cells)).encode())
    (OUT / "tables.tsv").write_bytes("".join("\t".join(map(quoted, row)) + "\n" for row in cells).encode())
    (OUT / "tables.txt").write_text("Is it fair?\nMay I, then?\n")
    for codec in ("gzip", "lz4", "brotli", "snappy", "zstd"):
        pq.write_table(pa.Table.from_pylist(rows), OUT / f"tables_{codec}.parquet", compression=codec)
    kinds = {".jsonl": ("json", {}), ".json": ("json", {}), ".gz": ("json", {}), ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}),
             ".txt": ("text", {}), ".parquet": ("parquet", {})}
    plain = lambda v: None if isinstance(v, float) and math.isnan(v) else v
    want = {}
    for path in sorted(OUT.glob("tables*")):
        if path.name == "tables.json": continue
        kind, more = kinds[path.suffix]
        found = load_dataset(kind, data_files=str(path), split="train", **more)
        want[path.name] = [{k: plain(v) for k, v in row.items()} for row in found]
    (OUT / "tables.json").write_text(json.dumps(want, indent=1, ensure_ascii=False) + "\n")


def trl(name, rows, prompt=None):
    """Pairs that TRL itself reads; `prompt` gives the question where TRL takes it from a column of another name."""
    lines(name, rows)
    pairs = []
    for row in rows:
        row = {k: row[k] for k in ("prompt", "chosen", "rejected") if k in row} | ({"prompt": prompt(row)} if prompt else {})
        assert is_conversational(row), name
        row = maybe_extract_prompt(row)
        pairs.append([row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]])
    return pairs


def dialogue(text):
    """hh-rlhf's texts as messages: speakers come after a blank line."""
    turns = []
    for part in ("\n\n" + text.strip()).split("\n\nHuman:")[1:]:
        human, *replies = part.split("\n\nAssistant:")
        turns.append(u(human.strip()))
        turns += [a(r.strip()) for r in replies]
    return turns


def pairs():
    want = {}
    hh = [("\n\nHuman: Is it fair?\n\nAssistant: Why?\n\nHuman: I need it.\n\nAssistant:", " Ask first.", " Take it.")]
    lines("hh_rlhf.jsonl", [{"chosen": p + c, "rejected": p + r} for p, c, r in hh])
    lines("full_hh_rlhf.jsonl", [{"prompt": p, "response": c, "chosen": c, "rejected": r} for p, c, r in hh])
    want["hh_rlhf.jsonl"] = want["full_hh_rlhf.jsonl"] = [[dialogue(p + c), dialogue(p + r)] for p, c, r in hh]
    side = lambda text: [u("Is it fair?"), a(text)]
    want["trl_explicit.jsonl"] = trl("trl_explicit.jsonl", [{"prompt": [s("Be brief."), u("Is it fair?")], "chosen": [a("Ask first.")], "rejected": [a("Take it.")]}])
    want["trl_implicit.jsonl"] = trl("trl_implicit.jsonl", [{"chosen": side("Ask first."), "rejected": side("Take it.")}])
    binarized = [{"prompt": "Is it fair?", "prompt_id": "0", "chosen": side("Ask first."), "rejected": side("Take it."), "messages": side("Ask first."), "score_chosen": 8.0, "score_rejected": 2.0}]
    lines("ultrafeedback_binarized.jsonl", binarized)
    got = [maybe_extract_prompt({k: r[k] for k in ("chosen", "rejected")}) for r in binarized]  # TRL's own, of the whole sides
    want["ultrafeedback_binarized.jsonl"] = [[r["prompt"] + r["chosen"], r["prompt"] + r["rejected"]] for r in got]
    parts = lambda text: [{"type": "text", "text": t} for t in text]
    lines("parts.jsonl", [{"prompt": [{"role": "user", "content": parts(["Is it ", "fair?"])}], "chosen": [{"role": "assistant", "content": parts(["Ask first."])}], "rejected": [{"role": "assistant", "content": parts(["Take it."])}]}])
    want["parts.jsonl"] = [[side("Ask first."), side("Take it.")]]
    lines("sharegpt.jsonl", [{"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Is it fair?"}], "chosen": {"from": "gpt", "value": "Ask first."}, "rejected": {"from": "gpt", "value": "Take it."}}])
    want["sharegpt.jsonl"] = [[[s("Be brief.")] + side(t) for t in ("Ask first.", "Take it.")]]
    lines("alpaca.jsonl", [{"instruction": "Translate.", "input": "Hund", "system": "", "chosen": "dog", "rejected": "cat"}])
    want["alpaca.jsonl"] = [[[u("Translate.\nHund"), a("dog")], [u("Translate.\nHund"), a("cat")]]]
    reply = lambda text, mark: {"model": "m", "response": text, "overall_score": mark, "annotations": {}}
    ultra = [{"source": "x", "instruction": "Is it fair?", "models": [], "completions": [reply("Perhaps.", 5.0), reply("Ask first.", 8.5), reply("Take it.", 1.0), reply("Ask!", 8.5)]},
             {"source": "x", "instruction": "Tie?", "models": [], "completions": [reply("a", 3.0), reply("b", 3.0)]}]
    lines("ultrafeedback.jsonl", ultra)
    best = lambda items, mark: (max(items, key=mark), min(items, key=mark))  # the first of equals, both ways
    want["ultrafeedback.jsonl"] = [[[u(r["instruction"]), a(x["response"])] for x in best(r["completions"], lambda c: c["overall_score"])] for r in ultra[:1]]
    nectar = [{"prompt": "\n\nHuman: Is it fair?\n\nAssistant: ", "answers": [{"answer": "Take it.", "model": "m", "rank": 3.0}, {"answer": "Ask first.", "model": "n", "rank": 1.0}, {"answer": "Hm.", "model": "o", "rank": 2.0}], "turns": 1, "num_responses": 3, "source": ["x"], "good_natured": True}]
    lines("nectar.jsonl", nectar)
    want["nectar.jsonl"] = [[side(x["answer"]) for x in best(r["answers"], lambda c: -c["rank"])] for r in nectar]
    pku = [{"prompt": "Is it fair?", "response_0": "Take it.", "response_1": "Ask first.", "is_response_0_safe": False, "is_response_1_safe": True, "better_response_id": 1, "safer_response_id": 1},
           {"prompt": "Is it fair?", "response_0": "Ask him.", "response_1": "No.", "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1}]
    lines("pku_saferlhf.jsonl", pku)
    want["pku_saferlhf.jsonl"] = [[side(r[f"response_{r['better_response_id']}"]), side(r[f"response_{1 - r['better_response_id']}"])] for r in pku]
    steer = [{"prompt": p, "response": t, "helpfulness": h, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1} for p, t, h in
             (("Is it fair?", "Take it.", 1), ("Is it fair?", "Ask first.", 4), ("Tie?", "a", 2), ("Tie?", "b", 2), ("One?", "c", 3))]
    lines("helpsteer.jsonl", steer)
    want["helpsteer.jsonl"] = [[side("Ask first."), side("Take it.")]]
    lines("helpsteer2_preference.jsonl", [{"split": "train", "prompt": "Is it fair?", "response_1": "Take it.", "response_2": "Ask first.", "preference_strength": 2}, {"split": "train", "prompt": "Tie?", "response_1": "a", "response_2": "b", "preference_strength": 0}, {"split": "train", "prompt": "Is it fair?", "response_1": "Ask him.", "response_2": "No.", "preference_strength": -1}])
    want["helpsteer2_preference.jsonl"] = [[side("Ask first."), side("Take it.")], [side("Ask him."), side("No.")]]
    lines("helpsteer3_preference.jsonl", [{"domain": "general", "language": "en", "context": side("Why?") + [u("I need it.")], "response1": "Ask first.", "response2": "Take it.", "overall_preference": -3}])
    want["helpsteer3_preference.jsonl"] = [[side("Why?") + [u("I need it."), a(t)] for t in ("Ask first.", "Take it.")]]
    node = lambda i, p, role, text, rank: {"message_id": i, "parent_id": p, "user_id": "x", "text": text, "role": role, "lang": "en", "rank": rank, "message_tree_id": "1"}
    oasst = [node("1", None, "prompter", "Is it fair?", None), node("2", "1", "assistant", "Why?", 0.0), node("3", "1", "assistant", "Take it.", 2.0), node("4", "1", "assistant", "Hm.", 1.0),
             node("5", "2", "prompter", "I need it.", None), node("6", "5", "assistant", "Steal it.", 1.0), node("7", "5", "assistant", "Ask first.", 0.0), node("8", "5", "assistant", "Unranked.", None)]
    lines("oasst.jsonl", oasst)
    by = {n["message_id"]: n for n in oasst}
    def path(n): return (path(by[n["parent_id"]]) if n["parent_id"] else []) + [{"role": {"prompter": "user"}.get(n["role"], n["role"]), "content": n["text"]}]
    found = []
    for n in oasst:
        own = [c for c in oasst if c["parent_id"] == n["message_id"] and c["role"] == "assistant" and c["rank"] is not None]
        if len(own) > 1: found.append([path(min(own, key=lambda c: c["rank"])), path(max(own, key=lambda c: c["rank"]))])
    want["oasst.jsonl"] = found
    def tree(n): return {k: n[k] for k in ("message_id", "text", "role", "rank")} | {"replies": [tree(c) for c in oasst if c["parent_id"] == n["message_id"]]}
    lines("oasst_trees.jsonl", [{"message_tree_id": "1", "prompt": tree(oasst[0])}])
    want["oasst_trees.jsonl"] = found
    (OUT / "pairs.json").write_text(json.dumps(want, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    tables()
    pairs()
