#!/usr/bin/env python3
"""How much of a yardstick's gain is more than shorter, finished replies?

    .venv/bin/python scripts/experiments/at_equal_length.py RUN …          (.venv: make referees)

People who label pairs like shorter replies, a reward model of their labels does too, and a policy finds that out. For each run that was
scored with a yardstick this fits, over the replies of the original and the final model together,

    yardstick = aspect + a · tokens + b · (cut by the limit) + c · (final model)

over answers, by least squares, and prints the plain gain beside c: the gain that is left at equal length and equal truncation. Intervals: 95 %,
prompts redrawn 2,000 times, seed 0. A straight line is a rough picture of length; where the two models' lengths hardly
overlap, c is a guess, and its interval shows it.
"""

import pathlib
import sys

import numpy as np
import pyarrow.parquet as pq

DRAWS = 2000


def design(rows: list[dict], aspects: list[str]) -> np.ndarray:
    """One row a reply: a constant for each aspect, tokens, cut, final."""
    return np.array(
        [
            [float(row["aspect"] == aspect) for aspect in aspects]
            + [row["n_tokens"], float(row["finish_reason"] == "length"), float(row["model"] == "final")]
            for row in rows
        ]
    )


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(x, y, rcond=None)[0]


def gain(x: np.ndarray, y: np.ndarray) -> float:
    final = x[:, -1] == 1.0
    return y[final].mean() - y[~final].mean()


def describe(run: pathlib.Path) -> str:
    file = run / "scoring/scores.parquet"
    if not file.exists():
        sys.exit(f"at_equal_length: {file}: expected a run that was scored, found no file: run make all RUN={run}")
    rows = pq.read_table(file).to_pylist()
    # The yardstick reads answers alone; runs scored before that have its scores of all three turns.
    rows = [row for row in rows if row["model"] in ("original", "final") and row["aspect"] == "action"]
    if any(row["yardstick"] is None for row in rows):
        sys.exit(f"at_equal_length: {run}: expected scores of a yardstick, found none: score it with YARDSTICK=DIR")
    x = design(rows, sorted({row["aspect"] for row in rows}))
    y = np.array([row["yardstick"] for row in rows])
    prompts = np.array([row["prompt_id"] for row in rows])
    places = [np.flatnonzero(prompts == prompt) for prompt in sorted(set(prompts))]
    random = np.random.default_rng(0)
    redrawn = []
    for _ in range(DRAWS):
        chosen = np.concatenate([places[i] for i in random.integers(len(places), size=len(places))])
        redrawn.append((gain(x[chosen], y[chosen]), fit(x[chosen], y[chosen])[-1]))
    low, high = np.percentile(redrawn, [2.5, 97.5], axis=0)
    found = fit(x, y)
    cells = [f"{value:+.2f} [{low[i]:.2f}, {high[i]:.2f}]" for i, value in enumerate((gain(x, y), found[-1]))]
    tokens = " → ".join(f"{x[x[:, -1] == model, -3].mean():.1f}" for model in (0.0, 1.0))
    cut = " → ".join(f"{100 * x[x[:, -1] == model, -2].mean():.0f}" for model in (0.0, 1.0))
    return f"| {run.name} | {cells[0]} | {cells[1]} | {tokens} | {cut} |"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("| run | gain | gain at equal length | tokens a reply | cut, % |\n|---|---|---|---|---|")
    for run in sys.argv[1:]:
        print(describe(pathlib.Path(run)))


if __name__ == "__main__":
    main()
