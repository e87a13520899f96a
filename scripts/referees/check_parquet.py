"""Loads our Parquet files with `datasets`: splits found, columns as design names them, all readers agree on the rows.

Run: .venv/bin/python scripts/referees/check_parquet.py DIR|FILE...

A directory is loaded as `load_dataset(DIR)`, a file as `load_dataset("parquet", data_files=FILE)`.
"""

import pathlib
import sys
import tempfile

import datasets
import pyarrow.parquet

import common

datasets.disable_progress_bars()
MESSAGES = [{"role": "string", "content": "string"}]
# The columns others read; files may have more.
COLUMNS = {
    "prompts": ["prompt_id", "split", "source", "prompt"],
    "demonstrations": ["prompt_id", "split", "source", "initial", "rounds", "messages"],
    "conversations": ["prompt_id", "split", "sample", "messages", "action", "motivation", "consequence"],
    "judgements": ["prompt_id", "split", "aspect", "virtue", "method", "judge", "p_ab", "p_ba", "p_sample0", "vote"],
    "train": ["prompt", "chosen", "rejected", "score_chosen", "score_rejected", "chosen_prob", "prompt_id"],
    "scores": ["model", "prompt_id", "aspect", "score", "z", "n_tokens", "finish_reason"],
}
COLUMNS["validation"] = COLUMNS["test"] = COLUMNS["train"]


def is_messages(feature) -> bool:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    return isinstance(inner, dict) and {k: v.dtype for k, v in inner.items()} == MESSAGES[0]


def check_file(path: pathlib.Path, cache: str) -> None:
    table = pyarrow.parquet.read_table(path)
    if not table.num_rows:
        if path.stem in ("train", "validation", "test"):
            common.fail(f"{path} has no rows: load_dataset then refuses the whole folder, so the file must not be written")
        common.skipped(f"{path}: no rows")
        return
    data = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache)
    if data.num_rows != table.num_rows or data.to_list() != table.to_pylist():
        common.fail(f"{path}: datasets and pyarrow read different rows")
    missing = [name for name in COLUMNS.get(path.stem, []) if name not in data.column_names]
    if missing:
        common.fail(f"{path}: columns {missing} are missing, found {data.column_names}")
    for name in ("messages", "prompt", "chosen", "rejected"):
        if name in data.features and not is_messages(data.features[name]):
            common.fail(f"{path}: {name} is {data.features[name]}, expected a list of role and content")
    common.passed(f"datasets reads {path} ({data.num_rows} rows, {len(data.column_names)} columns)")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as cache:
        for argument in map(pathlib.Path, sys.argv[1:]):
            if argument.is_file():
                check_file(argument, cache)
                continue
            files = sorted(argument.glob("*.parquet"))
            if not files:
                common.fail(f"{argument}: no Parquet files")
            for path in files:
                check_file(path, cache)
            splits = argument / "splits"
            if splits.is_dir():
                found = {name: split.num_rows for name, split in datasets.load_dataset(str(argument), cache_dir=cache).items()}
                rows = {path.stem: pyarrow.parquet.read_metadata(path).num_rows for path in splits.glob("*.parquet")}
                if found != rows or sum(rows.values()) != sum(pyarrow.parquet.read_metadata(path).num_rows for path in files):
                    common.fail(f"{argument}: load_dataset finds {found}, the files of splits/ hold {rows}")
                common.passed(f"load_dataset({str(argument)!r}) finds {found}")
            stems = {path.stem for path in files}
            if {"train", "validation", "test"} & stems:
                data = datasets.load_dataset(str(argument), cache_dir=cache)
                rows = {path.stem: pyarrow.parquet.read_metadata(path).num_rows for path in files}
                found = {name: split.num_rows for name, split in data.items()}
                if {k: v for k, v in rows.items() if v} != {k: v for k, v in found.items() if v}:
                    common.fail(f"{argument}: load_dataset finds {found}, the files hold {rows}")
                common.passed(f"load_dataset({str(argument)!r}) finds {found}")


if __name__ == "__main__":
    main()
