"""Loads one of our model directories in transformers: every tensor used, template and tokenizer there, values finite.

Run: .venv/bin/python scripts/referees/check_model.py DIR [--logprobs FILE] [--scores FILE --conversations FILE] [--tolerance 1e-4]

--logprobs   output of `arete-model logprobs --model DIR --dtype f32 --jsonl …` (language models)
--scores     output of `arete-reward score --model DIR --dtype f32 --input CONVERSATIONS` (reward models)
"""

import argparse
import pathlib

import torch
import transformers

import common


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--logprobs", type=pathlib.Path)
    parser.add_argument("--scores", type=pathlib.Path)
    parser.add_argument("--conversations", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    folder = arguments.folder

    reward = common.is_reward_model(folder)
    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True, **common.OPTIONS)
    problems = {key: value for key, value in info.items() if value}
    if problems:
        common.fail(f"{folder}: {problems}")
    model.eval()
    for module in model.modules():
        # Where the CPU has AVX-512 BF16, bitsandbytes rounds the scales of four-bit matrices to bf16 before it multiplies.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well, thank you."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = model(ids).logits
    if not torch.isfinite(logits).all():
        common.fail(f"{folder}: values that are not finite")
    if reward:
        pad, eos = model.config.pad_token_id, model.config.eos_token_id
        if pad is None or pad == eos:
            common.fail(f"{folder}: pad_token_id is {pad}, eos_token_id {eos}: they must differ")
        padded = torch.cat([ids, torch.full((1, 5), pad)], 1)
        common.require_within(f"score of {folder} with padding", (model(padded).logits - logits).abs().max().item(), 1e-4)
    if arguments.logprobs:
        common.compare_logprobs(model, arguments.logprobs, arguments.tolerance)
    if arguments.scores:
        common.compare_scores(model, tokenizer, arguments.conversations, arguments.scores, arguments.tolerance)
    common.passed(f"transformers loads {folder} ({type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters)")


if __name__ == "__main__":
    main()
