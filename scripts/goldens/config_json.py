"""Asks transformers what it makes of the `config.json` files this project writes.

    python -P scripts/goldens/config_json.py     # run it with transformers 4 and with transformers 5; torch is not needed

The files in `crates/model/tests/goldens/config/` are what `ModelConfig::to_json` writes, to the byte (a unit test says so). They
were read alike by 4.57.1 and 5.23.0.
"""

import pathlib
import tempfile

import transformers
from transformers import AutoConfig

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "crates/model/tests/goldens/config"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "vocab_size": 96,
    "hidden_act": "silu",
}
EXPECTED = {
    "llama3": COMMON | {"head_dim": 64, "eos_token_id": [2, 5], "tie_word_embeddings": True},
    "mistral_reward": COMMON
    | {
        "head_dim": 8,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_labels": 1,
        "score_mean": 0.1,
        "score_std": 0.3,
    },
}
ROPE = {"llama3": (500000.0, LLAMA3), "mistral_reward": (1000000.0, None)}


def read(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "config.json"
        target.write_text((GOLDENS / f"{name}.json").read_text())
        config = AutoConfig.from_pretrained(folder)
    for key, value in EXPECTED[name].items():
        assert getattr(config, key) == value, (name, key, getattr(config, key), value)
    theta, scaling = ROPE[name]
    if transformers.__version__.startswith("4."):
        assert config.rope_theta == theta, config.rope_theta
        assert config.rope_scaling == scaling, config.rope_scaling
    else:
        parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
        assert config.rope_parameters == parameters, config.rope_parameters
    dtype = {"llama3": "bfloat16", "mistral_reward": "float32"}[name]
    assert str(config.dtype).endswith(dtype), config.dtype


if __name__ == "__main__":
    for name in EXPECTED:
        read(name)
        print(f"{name}: as expected by transformers {transformers.__version__}")
