"""Varied texts for comparing tokenizers: the same ones in every run."""

import random

WORDS = (
    "the quick brown fox jumps over a lazy dog while honesty prudence compassion humility respect "
    "don't can't I'll we've they're you'd it's O'Neill's naïve café Übermaß señor façade coöperate "
    "internationalisation antidisestablishmentarianism CamelCaseWord snake_case_word kebab-case-word "
    "GPT-2 SmolLM2 Mistral7B iPhone15 3rd 21st v0.2 e.g. i.e. etc. U.S.A. Ph.D. C++ C# F# .NET 2nd"
).split()

FOREIGN = [
    "Добродетель есть середина между двумя пороками.",
    "Мужество — это знание того, чего следует бояться.",
    "美德即知识，没有人自愿作恶。",
    "徳は得なり。善を行うことは幸せである。",
    "덕은 외롭지 않으니 반드시 이웃이 있다.",
    "الفضيلة وسط بين رذيلتين.",
    "המידה הטובה היא דרך האמצע.",
    "ἡ ἀρετὴ μεσότης τίς ἐστιν.",
    "सदाचार ही सबसे बड़ा धर्म है।",
    "คุณธรรมคือความรู้",
    "Đức hạnh là con đường trung dung.",
    "Erdem, iki aşırılığın ortasıdır.",
    "Dyd er en middelvej; ærlighed varer længst.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "სათნოება არის ოქროს შუალედი.",
    "առաքինությունը ոսկե միջինն է։",
    "நற்பண்பு நடுநிலையில் உள்ளது.",
    "ሥነ ምግባር መካከለኛ መንገድ ነው።",
]

EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "🤷🏻‍♂️", "1️⃣", "☕", "🧑‍🚀", "🫶", "✨", "💯", "🀄", "𝒜"]

CODE = [
    "def f(x):\n    return x ** 2 + 1  # square\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    "fn main() -> Result<(), Box<dyn Error>> { println!(\"{:?}\", vec![1, 2, 3]); Ok(()) }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"role": "user", "content": "hi\\n", "n": [1, 2.5, -3e10, null, true]}',
    "<div class=\"a b\"><p>1 &lt; 2</p></div>\n<!-- end -->",
    "#!/bin/sh\nset -eu\nls -la | grep -E '^d' > out.txt 2>&1\n",
    "$E = mc^2$, \\frac{a}{b}, \\alpha_{i,j} \\leq \\sum_{k=0}^{\\infty} x^k",
    "https://example.org/a/b?q=1&r=%20#frag user@example.org 192.168.0.1:8080",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done\n- [ ] open\n\n```py\nprint('x')\n```",
    "x = {'a': 1}\n\n\n\nclass A:\n\n    pass\n\t\t# tab\n",
]

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<filename>", "<jupyter_text>",
    "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<|im_end", "im_end|>", "<|", "<0x0A>", "<empty_output>",
]

BLANKS = [
    " ", "  ", "   ", "        ", " " * 33, "\t", "\t\t\t", "\n", "\n\n", "\n\n\n\n", "\r\n", "\r\n\r\n", " \n ",
    "\n ", " \t \n\t ", "\u00a0", "\u2003\u2003", "\u3000", "\u200b", "\ufeff", "\x0b\x0c", "\u2028", " " * 257,
]

ODD = [
    "", "\x00", "\x01\x02\x7f", "e\u0301", "ﬁ ﬂ ①② Ⅷ ½ ² ³ ٣٤٥ ४५६ 四十二", "A\u0300\u0301\u0302\u0303", "\u202eabc\u202c",
    "ﷺ", "Ǆ ǅ ǆ ẞ ſ", "▁", "▁▁the", " ▁ ", "Ġthe Ċ", "�", "'s 'S 'T 't 'LL 'll 're'RE", "''''", "----====____",
    "a" * 300, "ab" * 150, "!" * 100, "?!" * 40, "1" * 100, "Zeitgeist" * 20, "İstanbul ıI", "ΣΑΣ σας", "x²+y³≥∑∫∞",
]


def number(rng):
    kind = rng.randrange(8)
    n = rng.randrange(10 ** rng.randrange(1, 13))
    return [
        str(n), f"{n:,}", f"{n / 1000:.3f}", f"-{n}", f"{n:x}", f"${n}.99", f"{n % 24:02}:{n % 60:02}", f"{n}e-{n % 9}",
    ][kind]


def rune(rng):
    ranges = [
        (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x1100, 0x1200), (0x2000, 0x2C00),
        (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xE010), (0xFE00, 0xFFFE), (0x1D400, 0x1D800),
        (0x1F300, 0x1FAFF), (0x20000, 0x20100),
    ]
    low, high = rng.choice(ranges)
    return chr(rng.randrange(low, high))


def varied(n=1000, seed=20240726):
    """`n` distinct texts: hand-written ones first, then random mixtures of them."""
    rng = random.Random(seed)
    texts = ODD + BLANKS + SPECIAL + EMOJI + CODE + FOREIGN
    texts += [f"a{blank}b" for blank in BLANKS] + [f"{blank}1{blank}23" for blank in BLANKS]
    texts += [
        f"<|im_start|>user\n{foreign}<|im_end|>\n<|im_start|>assistant\n{emoji}<|im_end|>\n"
        for foreign, emoji in zip(FOREIGN, EMOJI)
    ]
    pieces = [
        lambda: rng.choice(WORDS), lambda: rng.choice(WORDS).upper(), lambda: number(rng), lambda: rng.choice(FOREIGN)[:12],
        lambda: rng.choice(EMOJI), lambda: rng.choice(CODE)[: rng.randrange(4, 40)], lambda: rng.choice(SPECIAL),
        lambda: rng.choice(BLANKS[:20]), lambda: "".join(rune(rng) for _ in range(rng.randrange(1, 6))),
        lambda: rng.choice(".,;:!?…\"'()[]{}<>«»—–-/\\|@#%^&*_+=~`"),
    ]
    seen, out = set(), []
    for text in texts:
        if text not in seen:
            seen.add(text)
            out.append(text)
    while len(out) < n:
        weights = [8, 1, 4, 2, 1, 1, 0.6, 2, 1, 3]
        parts = [piece() for piece in rng.choices(pieces, weights, k=rng.randrange(1, 16))]
        text = rng.choice([" ", " ", "", "\n"]).join(parts)
        if text not in seen:
            seen.add(text)
            out.append(text)
    return out[:n]
