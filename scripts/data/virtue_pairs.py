"""Checks data/virtues/pairs.jsonl and measures what can be told without reading: null rulers and a bag of words.

    python3 scripts/data/virtue_pairs.py [FILE]

Needs Python's standard library alone. Exits with 1 if a pair breaks a rule of data/virtues/README.md.
"""

import collections
import hashlib
import json
import math
import random
import re
import sys
import unicodedata

KEYS = ["question", "turn", "context", "virtue", "better", "worse", "vice", "split"]
VIRTUES = ["honesty", "prudence", "compassion", "humility", "respect"]
TURNS = ["action", "motivation", "consequence"]
VICES = ["deficiency", "excess"]
FOLDS = 5


def words(text):
    return re.findall(r"[\w']+", text.lower())


def five_grams(text):
    found = words(text)
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)} or {tuple(found)}


def split_of(question):
    """The split of a question, as `split_of` in crates/records/src/message.rs has it."""
    text = unicodedata.normalize("NFC", question).replace("\r\n", "\n").strip()
    canonical = json.dumps([{"role": "user", "content": text}], ensure_ascii=False, separators=(",", ":"))
    number = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") % 100
    return "train" if number < 80 else "validation" if number < 90 else "test"


def faults_of(pairs):
    for n, pair in enumerate(pairs, 1):
        if list(pair) != KEYS:
            yield f"line {n}: expected the keys {KEYS}, got {list(pair)}"
            continue
        for key, allowed in [("virtue", VIRTUES), ("turn", TURNS), ("vice", VICES)]:
            if pair[key] not in allowed:
                yield f"line {n}: {key}: expected one of {allowed}, got {pair[key]}"
        if len(pair["context"]) != TURNS.index(pair["turn"]):
            yield f"line {n}: context: expected {TURNS.index(pair['turn'])} replies, got {len(pair['context'])}"
        if pair["split"] != split_of(pair["question"]):
            yield f"line {n}: split: expected {split_of(pair['question'])}, got {pair['split']}"
        lengths = sorted(len(pair[side]) for side in ("better", "worse"))
        if lengths[0] < 0.8 * lengths[1]:
            yield f"line {n}: expected sides of like length, got {lengths} characters"
    for side in ("better", "worse"):
        index = collections.defaultdict(list)
        grams = [five_grams(pair[side]) for pair in pairs]
        for n, own in enumerate(grams):
            others = {m for gram in own for m in index[gram]}
            for m in others:
                jaccard = len(own & grams[m]) / len(own | grams[m])
                if jaccard > 0.5:
                    yield f"lines {m + 1} and {n + 1}: `{side}` are alike ({jaccard:.2f} of their word 5-grams)"
            for gram in own:
                index[gram].append(n)


def fold_of(question):
    return int(hashlib.sha256(b"fold" + question.strip().lower().encode()).hexdigest(), 16) % FOLDS


def bag_of_words(pairs):
    """Whether the better side of each pair is told by a logistic regression on its words that never saw its question."""

    def difference(pair):
        better, worse = set(words(pair["better"])), set(words(pair["worse"]))
        return {word: 1.0 for word in better - worse} | {word: -1.0 for word in worse - better}

    data = [(fold_of(pair["question"]), difference(pair)) for pair in pairs]
    right = [False] * len(pairs)
    for fold in range(FOLDS):
        order = [x for at, x in data if at != fold]
        weights = collections.defaultdict(float)
        shuffler = random.Random(fold)
        for epoch in range(8):
            shuffler.shuffle(order)
            rate = 0.1 / (1 + epoch)
            for x in order:
                gradient = 1 / (1 + math.exp(min(30, sum(weights[word] * value for word, value in x.items()))))
                for word, value in x.items():
                    weights[word] += rate * (gradient * value - 0.01 * weights[word])
        for n, (at, x) in enumerate(data):
            if at == fold:
                right[n] = sum(weights[word] * value for word, value in x.items()) > 0
    return [1.0 if r else 0.0 for r in right]


def wilson(rate, n):
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def row(name, scores):
    n = len(scores)
    rate = sum(scores) / n if n else float("nan")
    low, high = wilson(rate, n)
    return f"| {name} | {n} | {100 * rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] |"


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else "data/virtues/pairs.jsonl"
    with open(path, encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file if line.strip()]
    faults = list(faults_of(pairs))
    for fault in faults:
        print(fault, file=sys.stderr)

    print(f"{len(pairs)} pairs, {len({pair['question'].strip().lower() for pair in pairs})} questions\n")
    print("| virtue | action | motivation | consequence | excess | train | validation | test |")
    print("|---|---|---|---|---|---|---|---|")
    for virtue in VIRTUES:
        own = [pair for pair in pairs if pair["virtue"] == virtue]
        count = lambda key, value: sum(pair[key] == value for pair in own)
        cells = [count("turn", turn) for turn in TURNS] + [count("vice", "excess")]
        cells += [count("split", split) for split in ("train", "validation", "test")]
        print(f"| {virtue} | " + " | ".join(map(str, cells)) + " |")

    def share(ruler):
        return [0.5 if a == b else float(a > b) for a, b in ((ruler(p["better"]), ruler(p["worse"])) for p in pairs)]

    hedges = {"might", "may", "perhaps", "could", "possibly", "seem", "seems", "probably", "maybe"}
    first_shown = [float(hashlib.sha256((p["question"] + p["better"] + p["worse"]).encode()).digest()[0] & 1) for p in pairs]
    print("\n| told right by | pairs | share |\n|---|---|---|")
    print(row("shorter is better", share(lambda text: -len(text))))
    print(row("first shown is better (sides shown in an order by hash)", first_shown))
    print(row("more hedges is better", share(lambda text: sum(word in hedges for word in words(text)))))
    told = bag_of_words(pairs)
    print(row(f"bag of words, {FOLDS} folds by question", told))
    for virtue in VIRTUES:
        print(row(f"bag of words: {virtue}", [right for right, pair in zip(told, pairs) if pair["virtue"] == virtue]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
