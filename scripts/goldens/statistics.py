#!/usr/bin/env python3
"""Statistics of statsmodels and scipy, and a bag of words of scikit-learn, for the tests of records and chain.

    pip install numpy==2.4.6 scipy==1.17.1 statsmodels==0.15.0 scikit-learn==1.9.1
    python scripts/goldens/statistics.py

Writes crates/records/tests/data/statistics.json:
  pairs           [score, tokens, cut] of 80 pairs of replies
  linear, logit   intercept of score (of its sign) ~ 1 + tokens + cut, standard error HC0 · √(n / (n − 1)), t interval of n − 1 degrees
  clustered       values, their clusters, mean and interval of least squares on a constant, cov_type="cluster", use_t=True
  welch           two samples, difference and interval of scipy.stats.ttest_ind(equal_var=False)
  mean            one sample, mean and interval of scipy.stats.t
and crates/chain/tests/data/words.json:
  train, held_out pairs of texts, the better first; margins: of LogisticRegression on the pairs' differences
"""

import json
import pathlib
import re

import numpy as np
import scipy.stats
import statsmodels.api as sm
from sklearn.linear_model import LogisticRegression

ROOT = pathlib.Path(__file__).resolve().parents[2]


def interval(estimate: float, error: float, degrees: float) -> list[float]:
    half = scipy.stats.t.ppf(0.975, degrees) * error
    return [float(estimate), float(estimate - half), float(estimate + half)]


def statistics() -> dict:
    random = np.random.default_rng(16)
    n = 80
    tokens = np.round(random.normal(-2, 6, n))
    cut = random.choice([-1.0, 0.0, 0.0, 0.0, 1.0], n)
    score = np.round(0.3 - 0.08 * tokens - 0.5 * cut + random.normal(0, 1, n), 3)
    x = sm.add_constant(np.column_stack([tokens, cut]))
    linear = sm.OLS(score, x).fit(cov_type="HC0")
    logit = sm.Logit((score > 0).astype(float), x).fit(cov_type="HC0", disp=0, tol=1e-14)
    scale = np.sqrt(n / (n - 1))
    values = np.round(random.normal(0.1, 1, 60), 3)
    clusters = random.integers(0, 23, 60)
    clustered = sm.OLS(values, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    first, last = np.round(random.normal(0, 1, 5), 3), np.round(random.normal(0.6, 0.4, 3), 3)
    welch = scipy.stats.ttest_ind(last, first, equal_var=False)
    low, high = welch.confidence_interval(0.95)
    return {
        "pairs": np.column_stack([score, tokens, cut]).tolist(),
        "linear": interval(linear.params[0], linear.bse[0] * scale, n - 1),
        "logit": interval(logit.params[0], logit.bse[0] * scale, n - 1),
        "clustered": {
            "values": values.tolist(),
            "clusters": clusters.tolist(),
            "interval": [float(clustered.params[0]), *map(float, clustered.conf_int()[0])],
        },
        "welch": {
            "first": first.tolist(),
            "last": last.tolist(),
            "interval": [float(last.mean() - first.mean()), float(low), float(high)],
        },
        "mean": {"values": first.tolist(), "interval": interval(first.mean(), scipy.stats.sem(first), len(first) - 1)},
    }


OPENINGS = ["I would ask her first", "That is wrong, don't", "Sure, here is how", "Take what you want", "I can't help with that", "Maybe"]
ENDINGS = ["and tell the truth.", "because nobody will know!", "and it's fair to all.", "it isn't yours.", "as a friend would.", "who cares?"]
STRENGTH, FEWEST = 0.02, 5


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower()))


def bag_of_words() -> dict:
    random = np.random.default_rng(4)
    good = [1.0, 0.5, -0.5, -1.0, 0.7, 0.0, 0.8, -1.0, 0.9, 0.2, 0.6, -0.9]
    pairs = []
    for _ in range(160):
        sides = []
        for _ in range(2):
            a, b, twice = random.integers(6), random.integers(6), random.integers(1, 4)
            text = " ".join([OPENINGS[a], *[ENDINGS[b]] * twice])
            sides.append((good[a] + good[6 + b] + random.normal(0, 0.5), text))
        sides.sort(reverse=True)
        pairs.append([sides[0][1], sides[1][1]])
    train, held_out = pairs[:120], pairs[120:]
    counts: dict[str, int] = {}
    for text in (text for pair in train for text in pair):
        for word in words(text):
            counts[word] = counts.get(word, 0) + 1
    vocabulary = sorted(word for word, count in counts.items() if count >= FEWEST)

    def features(text: str) -> np.ndarray:
        found = words(text)
        return np.array([float(word in found) for word in vocabulary] + [len(text) / 100])

    difference = lambda some: np.array([features(better) - features(worse) for better, worse in some])
    x = difference(train)
    # Each pair both ways round: scikit-learn wants two classes. So half the strength.
    model = LogisticRegression(C=STRENGTH / 2, fit_intercept=False, tol=1e-12, max_iter=10_000)
    model.fit(np.vstack([x, -x]), [1] * len(x) + [0] * len(x))
    return {"train": train, "held_out": held_out, "margins": (difference(held_out) @ model.coef_[0]).tolist()}


def main() -> None:
    for name, found in (("records/tests/data/statistics.json", statistics()), ("chain/tests/data/words.json", bag_of_words())):
        path = ROOT / "crates" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
