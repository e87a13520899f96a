"""Reads our TensorBoard event files with tensorboard and compares every value with metrics.jsonl beside them.

Run: .venv/bin/python scripts/referees/check_tfevents.py DIR...
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, TENSORS
from tensorboard.plugins.hparams import plugin_data_pb2

import common


def as_f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def check(folder: pathlib.Path) -> None:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, TENSORS: 0})
    reader.Reload()
    read = {(tag, e.step): e.value for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)}
    texts = {tag: reader.Tensors(tag)[0].tensor_proto.string_val for tag in reader.Tags()["tensors"] if tag.endswith("/text_summary")}
    settings(folder, reader, texts)
    for tag in reader.Tags()["tensors"]:
        if tag in texts:
            continue
        for event in reader.Tensors(tag):
            proto = event.tensor_proto
            read[tag, event.step] = (proto.float_val or struct.unpack("<f", proto.tensor_content))[0]
    written = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        written |= {(tag, row["step"]): value for tag, value in row.items() if tag != "step" and value is not None}
    read = {key: value for key, value in read.items() if value == value and abs(value) != float("inf")}
    if not written:
        common.fail(f"{folder}: metrics.jsonl holds no values")
    if set(read) != set(written):
        common.fail(f"{folder}: only one side has {sorted(set(read) ^ set(written))[:4]}")
    wrong = [key for key, value in written.items() if as_f32(value) != as_f32(read[key])]
    if wrong:
        common.fail(f"{folder}: {wrong[0]} is {read[wrong[0]]} in the event file, {written[wrong[0]]} in metrics.jsonl")
    common.passed(f"tensorboard reads {folder} ({len(written)} values under {len({tag for tag, _ in written})} tags)")


def settings(folder: pathlib.Path, reader: EventAccumulator, texts: dict) -> None:
    """The settings, as TensorBoard's tabs Text and HParams get them, against run.json."""
    config = json.loads((folder / "run.json").read_text())["config"]
    rows = [text.decode() for text in texts.get("settings/text_summary", [])]
    if not rows:
        common.fail(f"{folder}: no text of the settings")
    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    held = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    for name, value in config.items():
        if not isinstance(value, (int, float, str, bool)):
            continue
        if f"| {name} |" not in rows[0]:
            common.fail(f"{folder}: {name} is not in the text of the settings")
        kind = held[name].WhichOneof("kind")
        if kind is None or getattr(held[name], kind) != value:
            common.fail(f"{folder}: hparams has {held[name]} for {name}, run.json {value}")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for folder in sys.argv[1:]:
        check(pathlib.Path(folder))


if __name__ == "__main__":
    main()
