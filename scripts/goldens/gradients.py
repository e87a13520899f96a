"""Gradient goldens: PyTorch autograd through transformers and peft on a two-layer Llama, dense and over NF4 weights.

Run: .venv/bin/python -P scripts/goldens/gradients.py

Writes, under crates/model/tests/goldens/gradients:
  base/                  the frozen Llama (hidden 64, untied) as a Hugging Face directory; bf16 file, values exact in f32
  inputs.safetensors     ids [3, 20] i64; target [3, 20] bool (tokens the cross-entropy counts, as predicted tokens;
                         position 0 never); chosen_ids [14] i64, rejected_ids [11] i64; head [1, 64] f32
  adapter/               peft directory of the LoRA (r = 4, alpha = 8, all seven linear layers, B not zero)
  dense.safetensors, nf4.safetensors   results over the dense f32 base, and over the base whose fourteen linear layers
                         were quantised to NF4 (blocks of 64, single quantisation) and dequantised to f32:
    cross_entropy.loss [] f32                   mean over target tokens of -log P(token | everything before it)
    cross_entropy.grad.<peft key>               its gradient for every LoRA tensor
    bradley_terry.loss [] f32                   -log sigmoid(score(chosen) - score(rejected)), scores at the last token
    bradley_terry.scores [2] f32
    bradley_terry.grad.<peft key>, bradley_terry.grad.head
All in f32 with eager attention. The three sequences of `ids` have equal length, so no padding is involved.
"""

import pathlib
import shutil
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common

FOLDER = common.GOLDENS / "gradients"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base() -> None:
    config = LlamaConfig(
        vocab_size=common.VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        bos_token_id=common.BOS,
        eos_token_id=common.EOS,
        pad_token_id=common.UNKNOWN,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    common.randomise(model, 21, std=0.15)
    model.bfloat16().save_pretrained(FOLDER / "base")
    common.tokenizer().save_pretrained(FOLDER / "base")
    common.report(FOLDER / "base/model.safetensors")


def load_base(nf4: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER / "base", dtype=torch.float32, attn_implementation="eager"
    )
    quantised = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if nf4 and "_proj" in name:
                codes, state = bnb.quantize_4bit(
                    parameter.data, blocksize=64, compress_statistics=False, quant_type="nf4"
                )
                parameter.copy_(bnb.dequantize_4bit(codes, state))
                quantised += 1
    assert quantised == (14 if nf4 else 0)
    return model


def make_adapter() -> None:
    model = get_peft_model(
        load_base(False),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(22)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(FOLDER / "adapter")
    common.tidy_adapter(FOLDER / "adapter", "gradients/base")


def make_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(23)
    inputs = {
        "ids": torch.cat([common.token_ids(20, seed) for seed in (24, 25, 26)]),
        "target": torch.rand(3, 20, generator=generator) < 0.5,
        "chosen_ids": common.token_ids(14, 27)[0],
        "rejected_ids": common.token_ids(11, 28)[0],
        "head": 0.2 * torch.randn(1, 64, generator=generator),
    }
    inputs["target"][:, 0] = False
    common.save_tensors(FOLDER / "inputs.safetensors", inputs)
    return inputs


def gradients(nf4: bool, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load_base(nf4), FOLDER / "adapter", is_trainable=True)
    head = inputs["head"].clone().requires_grad_()
    lora = {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert len(lora) == 28

    ids, target = inputs["ids"], inputs["target"]
    logprobs = torch.log_softmax(model(ids).logits[:, :-1], -1)  # [3, 19, V]
    logprob = logprobs.gather(2, ids[:, 1:, None])[..., 0]  # [3, 19]
    loss = -logprob[target[:, 1:]].mean()
    loss.backward()
    results = {"cross_entropy.loss": loss}
    for name, parameter in lora.items():
        results[f"cross_entropy.grad.{name}"] = parameter.grad.clone()
        parameter.grad = None
    assert head.grad is None

    scores = torch.cat([
        model(sequence[None], output_hidden_states=True).hidden_states[-1][0, -1:] @ head[0]
        for sequence in (inputs["chosen_ids"], inputs["rejected_ids"])
    ])  # [2]; the last of `hidden_states` is after the final norm
    loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
    loss.backward()
    results |= {"bradley_terry.loss": loss, "bradley_terry.scores": scores, "bradley_terry.grad.head": head.grad}
    for name, parameter in lora.items():
        results[f"bradley_terry.grad.{name}"] = parameter.grad
    for name, value in results.items():
        assert value.abs().max() > 0, f"{name} is zero"
    return results


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make_base()
    make_adapter()
    inputs = make_inputs()
    for name, nf4 in (("dense", False), ("nf4", True)):
        results = gradients(nf4, inputs)
        print(name, {k: v.tolist() for k, v in results.items() if ".grad." not in k})
        common.save_tensors(FOLDER / f"{name}.safetensors", results)


if __name__ == "__main__":
    main()
