"""Hostile config.json, tokenizers and chat templates."""

import copy
import json

from common import REPOSITORY
from files.case import REFUSED, REFUSED_OR_DONE, Case, put, value


def cases(maker):
    return [*_config(maker), *_generation(maker), *_tokenizer(maker), *_tokenizer_config(maker), *_templates(maker)]


def _config(maker):
    # A number that is not finite or makes numbers that are not: 1 as well, where the forward pass finds it.
    diverges = (65, 1)
    changes = {
        "hidden-1e9": {"hidden_size": 10**9},
        "hidden-0": {"hidden_size": 0},
        "hidden-negative": {"hidden_size": -64},
        "hidden-float": {"hidden_size": 64.5},
        "hidden-text": {"hidden_size": "64"},
        "intermediate-0": {"intermediate_size": 0},
        "intermediate-2^63": {"intermediate_size": 2**63},
        "layers-0": {"num_hidden_layers": 0},
        "layers-negative": {"num_hidden_layers": -1},
        "layers-1e6": {"num_hidden_layers": 10**6},
        "layers-2^31": {"num_hidden_layers": 2**31 - 1},
        "vocab-0": {"vocab_size": 0},
        "vocab-2^31": {"vocab_size": 2**31 - 1},
        "vocab-2^64": {"vocab_size": 2**64},
        "heads-0": {"num_attention_heads": 0},
        "heads-2^63": {"num_attention_heads": 2**63 - 1},
        "kv-heads-7": {"num_key_value_heads": 7},
        "kv-heads-0": {"num_key_value_heads": 0},
        "head-dim-odd": {"head_dim": 7},
        "head-dim-0": {"head_dim": 0},
        "head-dim-1e9": {"head_dim": 10**9},
        "architecture": {"architectures": ["EvilForCausalLM"]},
        "architecture-long": {"architectures": ["x" * 10**6]},
        "architecture-escapes": {"architectures": ["\x1b[2J\x07"]},
        "activation": {"hidden_act": "exec"},
        "quantised-otherwise": {"quantization_config": {"quant_method": "gptq"}},
        "quantised-list": {"quantization_config": []},
        "epsilon-text": {"rms_norm_eps": "NaN"},
        "rope-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 1e300}},
        "rope-list": {"rope_scaling": [1]},
        "rope-deep": {"rope_parameters": {"full_attention": {"rope_theta": {}}}},
        "tied-text": {"tie_word_embeddings": "yes"},
        "eos-negative": {"eos_token_id": -1},
        "eos-2^40": {"eos_token_id": 2**40},
    }
    for name, change in changes.items():
        yield _changed(maker, name, change, REFUSED)
    changes = {
        "epsilon-negative": ({"rms_norm_eps": -1e9}, diverges),
        "epsilon-1e308": ({"rms_norm_eps": 1e308}, diverges),
        "theta-0": ({"rope_theta": 0}, diverges),
        "theta-negative": ({"rope_theta": -1.0}, diverges),
        "architectures-none": ({"architectures": []}, REFUSED_OR_DONE),
        "theta-1e308": ({"rope_theta": 1e308}, (65, 1, 0)),
        "rope-factor-0": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, diverges),
        "rope-factor-negative": ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, diverges),
        "positions-0": ({"max_position_embeddings": 0}, (65, 2)),
        "positions-1e9": ({"max_position_embeddings": 10**9}, (65, 71, 0)),
        "positions-8e6": ({"max_position_embeddings": 2**23}, (65, 0, 71)),
        "eos-200000": ({"eos_token_id": list(range(200_000))}, REFUSED_OR_DONE),
        "window-1": ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1}, REFUSED_OR_DONE),
        "window-0": ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 0}, REFUSED_OR_DONE),
    }
    for name, (change, may_end) in changes.items():
        yield _changed(maker, name, change, may_end)
    texts = {
        "empty": b"",
        "null": "null",
        "array": "[]",
        "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "5MB": '{"a":"' + "x" * 5_000_000 + '"}',
        "utf16": json.dumps(maker.config).encode("utf-16"),
        "nan": json.dumps(maker.config | {"rms_norm_eps": float("nan")}),
        "infinity": json.dumps(maker.config | {"rope_theta": float("inf")}),
        "1e999": json.dumps(maker.config | {"rope_theta": 7}).replace('"rope_theta": 7', '"rope_theta": 1e999'),
        "cut": json.dumps(maker.config)[:-10],
        "key-twice": json.dumps(maker.config)[:-1] + ', "hidden_size": 128}',
        "surrogate": '{"architectures":["\\ud800"]}',
    }
    for name, text in texts.items():
        may_end = (65, 1) if name in ("nan", "infinity") else REFUSED
        yield Case("config", name, lambda d, text=text: maker.generate(maker.model(d, config=text)), may_end)

    def plan(d, **change):
        put(d / "c/config.json", json.dumps(maker.config | change))
        return [maker.bench.program("arete"), "plan", "--model", d / "c", "--recipe", REPOSITORY / "recipes/recommended.toml"]

    huge = dict.fromkeys(
        ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2**30
    )
    yield Case("config", "plan-of-2^30", lambda d: plan(d, **huge), REFUSED_OR_DONE)
    yield Case("config", "plan-of-2^31-layers", lambda d: plan(d, num_hidden_layers=2**31 - 1), REFUSED_OR_DONE)


def _changed(maker, name, change, may_end):
    return Case("config", name, lambda d: maker.generate(maker.model(d, config=json.dumps(maker.config | change))), may_end)


def _generation(maker):
    texts = {
        "deep": "[" * 100_000,
        "eos-text": '{"eos_token_id": "x"}',
        "eos-2^40": json.dumps({"eos_token_id": [2**40]}),
        "eos-negative": '{"eos_token_id": [-1]}',
        "5MB": '{"a":"' + "x" * 5_000_000 + '"}',
        "temperature-nan": '{"temperature": NaN}',
    }
    for name, text in texts.items():
        may_end = REFUSED_OR_DONE if name == "temperature-nan" else REFUSED
        yield Case("generation", name, lambda d, text=text: maker.generate(maker.model(d, generation=text)), may_end)


def _tokenizer(maker):
    def changed(change):
        tokenizer = copy.deepcopy(maker.tokenizer)
        other = change(tokenizer)
        tokenizer = tokenizer if other is None else other
        return tokenizer if isinstance(tokenizer, (str, bytes)) else json.dumps(tokenizer)

    def with_part(part, content):
        return lambda tokenizer: tokenizer.__setitem__(part, content)

    def with_model(**content):
        return lambda tokenizer: tokenizer["model"].update(content)

    def with_token(name, number):
        return lambda tokenizer: tokenizer["model"]["vocab"].update({name: number})

    def with_unigram(**content):
        return lambda tokenizer: tokenizer | {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]} | content}

    def split(regex):
        return with_part("pre_tokenizer", {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})

    def added(**content):
        token = {"id": 0, "content": "zzz", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return with_part("added_tokens", [token | content])

    def padding(**content):
        usual = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
        return with_part("padding", usual | content)

    def truncation(**content):
        return with_part("truncation", {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"} | content)

    def template(single, special=None):
        return with_part("post_processor", {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special or {}})

    def many_added(tokenizer):
        for idx in range(100_000):
            added(id=600 + idx, content=f"<x{idx}>", normalized=True)(scratch := {})
            tokenizer["added_tokens"] += scratch["added_tokens"]

    def deep_sequence(tokenizer):
        deep = '{"type":"Sequence","pretokenizers":[' * 60 + '{"type":"Whitespace"}' + "]}" * 60
        return json.dumps(tokenizer).replace('"pre_tokenizer":', f'"pre_tokenizer":{deep},"x":', 1)

    grow = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 16}
    refused = {
        "not-json": lambda _: b"x",
        "empty-object": lambda _: {},
        "deep": lambda _: '{"a":' + "[" * 200_000 + "]" * 200_000 + "}",
        "65MB": lambda _: '{"a":"' + "x" * (65 << 20) + '"}',
        "merge-long": with_model(merges=["aaaa " + "b" * 10**6]),
        "merge-no-blank": with_model(merges=["x"]),
        "merges-number": with_model(merges=[7]),
        "id-2^40": with_token("zz", 2**40),
        "id-2^32-1": with_token("zz", 2**32 - 1),
        "id-twice": with_token("zz", 1),
        "id-negative": with_token("zz", -1),
        "id-float": with_token("zz", 1.5),
        "vocab-list": with_model(vocab=[["a", 0.0]]),
        "unigram-unknown": with_unigram(unk_id=99),
        "unigram-nan": lambda tokenizer: json.dumps(with_unigram()(tokenizer)).replace("-1.0", "NaN"),
        "unigram-empty": with_unigram(vocab=[]),
        "model-type": with_model(type="Evil"),
        "model-list": with_part("model", []),
        "fixed-length-0": with_part("pre_tokenizer", {"type": "FixedLength", "length": 0}),
        "fixed-length-0-inside": with_part(
            "pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]}
        ),
        "regex-repeats": split("((a{0,1000}){0,1000}){0,1000}"),
        "regex-bad": split("((("),
        "added-id-2^31": added(id=2**31),
        "added-id-2^32-1": added(id=2**32 - 1),
        "added-empty": added(content=""),
        "template-unknown": template([{"SpecialToken": {"id": "nope", "type_id": 0}}]),
    }
    for name, change in refused.items():
        yield Case("tokenizer", name, lambda d, change=change: maker.generate(maker.model(d, tokenizer=changed(change))))
    either = {
        "word-level": lambda tokenizer: tokenizer | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
        "precompiled": with_part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "precompiled-8GB": with_part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////////w=="}),
        "regex-backtracks": split("(?=(a+)+$)(x+x+)+y|(h|hi|h)*(hh|hi)+z"),
        "regex-empty": split(""),
        "regex-lookbehind": split("(?<=a{1,1000}.{1,1000})b"),
        "normaliser-grows": with_part("normalizer", {"type": "Sequence", "normalizers": [grow] * 12}),
        "normaliser-prepends": with_part("normalizer", {"type": "Prepend", "prepend": "a" * 10**7}),
        "normaliser-replaces-nothing": with_part("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 10**6}),
        "sequence-deep": deep_sequence,
        "added-100000": many_added,
        "template-100000": template([{"Sequence": {"id": "A", "type_id": 0}}] * 100_000),
        "truncation-0": truncation(max_length=0, stride=10),
        "truncation-stride": truncation(stride=2),
        "padding-1e9": padding(strategy={"Fixed": 10**9}),
        "padding-multiple-0": padding(pad_to_multiple_of=0),
        "prefix-not-ascii": with_model(continuing_subword_prefix="éé"),
        "dropout": with_model(dropout=1.5),
        "unknown-missing": with_model(unk_token="nonesuch", byte_fallback=False),
        "decoder-strip": with_part("decoder", {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}),
        "decoder-ctc": with_part("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
        "decoder-replace-empty": with_part("decoder", {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 10**6}),
    }
    for name, change in either.items():
        may_end = (65, 0, 71, 1)
        yield Case("tokenizer", name, lambda d, change=change: maker.generate(maker.model(d, tokenizer=changed(change))), may_end)


def _tokenizer_config(maker):
    texts = {
        "deep": ("[" * 100_000, REFUSED),
        "number": ("7", REFUSED),
        "bos-number": ('{"bos_token": 7}', REFUSED_OR_DONE),
        "bos-unknown": ('{"bos_token": "<nonesuch>", "add_bos_token": true}', REFUSED_OR_DONE),
        "template-number": ('{"chat_template": 7}', REFUSED_OR_DONE),
        "template-list": ('{"chat_template": [{"name": "default"}]}', REFUSED_OR_DONE),
        "length-1e30": ('{"model_max_length": 1e30}', REFUSED_OR_DONE),
        "length-negative": ('{"model_max_length": -5}', REFUSED_OR_DONE),
        "100MB": ('{"a":"' + "x" * 100_000_000 + '"}', REFUSED),
    }
    for name, (text, may_end) in texts.items():
        yield Case("tokenizer_config", name, lambda d, text=text: maker.generate(maker.model(d, tokenizer_config=text)), may_end)


def _templates(maker):
    grow = "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    nest = "{% set ns = namespace(x=[]) %}{% for i in range(60000) %}{% set ns.x = [ns.x] %}{% endfor %}"
    ring, ring_in_list = "{% set ns = namespace() %}{% set ns.x = ns %}", "{% set ns = namespace() %}{% set ns.x = [ns] %}"
    refused = {
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}",
        "loops-silent": "{% for a in range(25000) %}{% for b in range(25000) %}{% endfor %}{% endfor %}",
        "text-times": "{{ 'a' * 1000000000 }}",
        "list-times": "{{ ([0] * 1000000000)|length }}",
        "doubles": grow + "{{ ns.s|length }}",
        "range": "{{ range(1000000000)|list|length }}",
        "range-huge": "{{ range(0, 9999999999999, 1)|length }}",
        "macro-recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "macros-in-turn": "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "loop-recursion": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
        "nests": nest + "{{ ns.x }}",
        "nests-and-forgets": nest.replace("60000", "90000") + "a",
        "class": "{{ ''.__class__.__mro__ }}",
        "globals": "{{ messages.__class__.__init__.__globals__ }}",
        "include": "{% include '/etc/passwd' %}",
        "import": "{% import '/etc/passwd' as x %}",
        "extends": "{% extends '/etc/passwd' %}",
        "raises-escapes": "{{ raise_exception('no\x1b[2J\x07') }}",
        "raises-1MB": "{{ raise_exception('a' * 1000000) }}",
        "syntax": "{% for %}",
        "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "minuses": "{{ " + "-" * 100_000 + "1 }}",
        "nots": "{{ " + "not " * 50_000 + "1 }}",
        "filters": "{{ 'a'" + "|upper" * 50_000 + " }}",
        "additions": "{{ 1" + " + 1" * 50_000 + " }}",
        "attributes": "{{ a" + ".a" * 50_000 + " }}",
        "ifs": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
        "elifs": "{% if 0 %}" + "{% elif 0 %}" * 20_000 + "{% endif %}",
        "fors": "{% for a in [1] %}" * 2000 + "{% endfor %}" * 2000,
        "300kB": "x" * 300_000,
        "power": "{{ 9**9**9**9 }}",
        "by-zero": "{{ 1 // 0 }}",
        "replaces": "{{ ('a'*100000)|replace('a', 'b'*100000) }}",
        "formats": "{{ '%999999999d' % 1 }}",
        "centers": "{{ 'a'.center(1000000000) }}",
        "joins": "{{ (['a'*1000]*100000)|join('x') }}",
        "indents": "{{ ('a\n'*100000)|indent(100000) }}",
        "to-json": "{{ (['a'*100000]*10000)|tojson }}",
        "not-utf8": b"\xff\xfe{{ messages }}",
    }
    for name, text in refused.items():
        yield Case("template", name, lambda d, text=text: maker.generate(maker.model(d, template=value(text))))
    either = {
        "to-json-indented": "{{ [1]|tojson(indent=1000000000) }}",
        "date": "{{ strftime_now('%Y' * 100000) }}",
        "date-unknown": "{{ strftime_now('%Q%!%\x00') }}",
        "splits": "{{ ('a'*1000000).split('a')|length }}",
        "splits-by-nothing": "{{ 'aaa'.split('') }}",
        "batches": "{{ range(100000)|batch(1)|list|length }}",
        "batches-of-0": "{{ range(10)|batch(0)|list|length }}",
        "slices-of-0": "{{ range(10)|slice(0)|list|length }}",
        "step-min": "{{ 'a'[::-9223372036854775808] }}",
        "step-0": "{{ 'a'[::0] }}",
        "slice-min": "{{ [1,2,3][-9223372036854775808:9223372036854775807:-1] }}",
        "divides-min": "{{ (-9223372036854775807 - 1) // -1 }}",
        "remainder-min": "{{ (-9223372036854775807 - 1) % -1 }}",
        "abs-min": "{{ (-9223372036854775807 - 1)|abs }}",
        "sums": "{{ [9223372036854775807, 9223372036854775807]|sum }}",
        "multiplies": "{{ 9223372036854775807 * 9223372036854775807 }}",
        "rounds": "{{ 1.5|round(2147483647) }}",
        "nan-sorts": "{{ [('nan'|float), 1.0, ('nan'|float)]|sort }}",
        "int-of-text": "{{ ('9' * 10000)|int }}",
        "ring": ring + "{{ ns }}",
        "ring-to-json": ring_in_list + "{{ ns.x|tojson }}",
        "ring-compares": ring_in_list + "{{ ns.x == ns.x }}{{ ns.x|string|length }}",
        "ring-sorts": ring_in_list + "{{ [ns.x, ns.x]|sort|length }}{{ [ns.x, ns.x]|unique|list|length }}",
        "sorts-many": "{{ range(100000)|sort(reverse=true)|length }}",
        "sets-messages": "{% set messages = 7 %}{{ messages }}",
    }
    for name, text in either.items():
        yield Case("template", name, lambda d, text=text: maker.generate(maker.model(d, template=text)), REFUSED_OR_DONE)


