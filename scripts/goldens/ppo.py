"""PPO goldens: rewards, advantages, whitening and losses by TRL's own lines, and three steps on tests/fixtures/tiny-chat by PyTorch.

Run: .venv/bin/python -P scripts/goldens/ppo.py
Needs the packages of scripts/referees/requirements.txt but for trl, which has to be 1.12.0: the last release with a
PPOTrainer. Only its source is read (`pip install --no-deps --target DIR trl==1.12.0`, then TRL_1_12=DIR).

Writes
  crates/ppo/tests/goldens/functions.safetensors   B = 4 conversations of T = 9 columns, own tokens by `valid` (holes are user turns)
    logprob, ref_logprob, values [B, T] f32, scores [B] f32, valid [B, T] bool; what is not valid holds noise
    rewards, advantage, returns [B, T] f64   TRL's steps 4 and 6 on each conversation's own tokens alone (kl_coef 0.3,
                                             gamma 0.97, lam 0.9): the last own token is then the last, where TRL pays the score
    whitened, rescaled [B, T] f64            TRL's masked_whiten of `advantage` (shift_mean=True), of `rewards` (False)
    old_logprob, advantages, old_value, target, new_logprob, new_value [B, T] f32    inputs of the losses
    policy_loss, value_loss f64, new_logprob.grad, new_value.grad [B, T] f64, clipfrac, value_clipfrac f64
                                             TRL's loss lines (clip 0.2 and 0.3), gradients by PyTorch's autograd
  crates/ppo/tests/goldens/adapter/          a peft adapter for tiny-chat (r = 4, alpha = 8, all linear layers, B not zero)
  crates/ppo/tests/goldens/steps.safetensors
    token_ids.<i> [S], n_prompt [3], replies [3, turns, 2] i64 (from, to), head [1, D], advantage, returns [n] f32
    old_logprob, old_value, entropy [n] f32  before the first step, temperature 0.7
    policy_loss, value_loss, policy_norm, value_norm [3] f64    of each step; norms before clipping at 1
    approx_kl, clip_fraction, value_clip_fraction, ratio, ratio_variance f64    over the tokens of all steps
    final.<peft key>, final.head             after three AdamW steps (learning rates 0.003 and 0.03, value_coef 0.4)
All in f64 but the model, which is f32 with eager attention.
"""

import ast
import importlib.metadata
import os
import pathlib
import shutil
import sys
import textwrap
import types

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

import common

GOLDENS = common.ROOT / "crates/ppo/tests/goldens"
TINY = common.ROOT / "tests/fixtures/tiny-chat"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVALID_LOGPROB = 1.0


class Trl:
    """TRL 1.12.0's PPOTrainer, read as text: importing it needs packages that have nothing to do with these lines."""

    def __init__(self) -> None:
        folders = [os.environ["TRL_1_12"]] if "TRL_1_12" in os.environ else sys.path
        found = [pathlib.Path(folder) / "trl/experimental/ppo/ppo_trainer.py" for folder in folders]
        path = next(path for path in found if path.is_file())
        versions = [d.version for d in importlib.metadata.distributions(path=[str(path.parents[3])]) if d.name == "trl"]
        assert versions == ["1.12.0"], versions
        self.source = path.read_text()
        self.functions: dict[str, object] = {"torch": torch}
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.FunctionDef) and node.name in ("masked_mean", "masked_var", "masked_whiten"):
                exec(ast.get_source_segment(self.source, node), self.functions)

    def run(self, first: str, last: str, variables: dict[str, object]) -> dict[str, object]:
        """Executes the lines of `train` from the one that starts with `first` through the one that starts with `last`."""
        lines = self.source.splitlines()
        start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
        end = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(last))
        scope = self.functions | {"INVALID_LOGPROB": INVALID_LOGPROB, "empty_cache": lambda: None} | variables
        exec(textwrap.dedent("\n".join(lines[start : end + 1])), scope)
        return scope


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


VALID = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 1, 0, 0],  # two turns, then padding
        [1, 0, 0, 1, 0, 1, 1, 1, 0],  # three turns
        [1, 0, 0, 0, 0, 0, 0, 0, 0],  # a single token
    ],
    dtype=torch.bool,
)


def functions(trl: Trl) -> None:
    generator = torch.Generator().manual_seed(51)
    shape = VALID.shape
    out = {
        "valid": VALID,
        "logprob": -random(generator, *shape).abs(),
        "ref_logprob": -random(generator, *shape).abs(),
        "values": random(generator, *shape),
        "scores": random(generator, shape[0]),
    }
    # `advantages = torch.stack` comes after `rewards` are complete; whitening within a conversation is of no use here.
    args = types.SimpleNamespace(kl_estimator="k1", kl_coef=0.3, whiten_rewards=False, gamma=0.97, lam=0.9)
    for name in ("rewards", "advantage", "returns"):
        out[name] = torch.zeros(shape, dtype=torch.float64)
    for row in range(shape[0]):
        own = VALID[row]
        own_only = {
            theirs: out[ours][row, own].double().unsqueeze(0)
            for ours, theirs in [("logprob", "logprobs"), ("ref_logprob", "ref_logprobs"), ("values", "values")]
        }
        n = int(own.sum())
        variables = own_only | {
            "args": args,
            "scores": out["scores"][row : row + 1].double(),
            "sequence_lengths": torch.tensor([n - 1]),
            "sequence_lengths_p1": torch.tensor([n]),
            "responses": torch.zeros(1, n),
        }
        scope = trl.run("# Formula used by http://joschu.net", "returns = advantages + values", variables)
        for name, found in [("rewards", "rewards"), ("advantage", "advantages"), ("returns", "returns")]:
            out[name][row, own] = scope[found][0]
    whiten = trl.functions["masked_whiten"]
    out["whitened"] = whiten(out["advantage"], VALID).masked_fill(~VALID, 0)
    out["rescaled"] = whiten(out["rewards"], VALID, shift_mean=False).masked_fill(~VALID, 0)

    inputs = {name: random(generator, *shape) for name in ("old_logprob", "advantages", "old_value", "target")}
    inputs["new_logprob"] = inputs["old_logprob"] + 0.3 * random(generator, *shape)
    inputs["new_value"] = inputs["old_value"] + 0.4 * random(generator, *shape)
    out |= inputs
    new_logprob = inputs["new_logprob"].double().requires_grad_()
    new_value = inputs["new_value"].double().requires_grad_()
    ours_in_theirs = {
        "args": types.SimpleNamespace(cliprange=0.2, cliprange_value=0.3, vf_coef=1.0),
        "micro_batch_inds": slice(None),
        "padding_mask": ~VALID,
        "padding_mask_p1": ~VALID,  # TRL also trains the value after the end; we do not
        "mb_values": inputs["old_value"].double(),
        "mb_return": inputs["target"].double(),
        "mb_logprobs": inputs["old_logprob"].double().masked_fill(~VALID, INVALID_LOGPROB),
        "mb_advantage": inputs["advantages"].double().masked_fill(~VALID, 0),
        "new_logprobs": new_logprob.masked_fill(~VALID, INVALID_LOGPROB),
        "vpred": new_value.masked_fill(~VALID, 0),
    }
    scope = trl.run("vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef", ours_in_theirs)
    scope["loss"].backward()
    clipped = (scope["pg_losses2"] > scope["pg_losses"]).double()
    mean = trl.functions["masked_mean"]
    out |= {
        "policy_loss": scope["pg_loss"],
        "value_loss": scope["vf_loss"],
        "new_logprob.grad": new_logprob.grad,
        "new_value.grad": new_value.grad,
        "clipfrac": mean(clipped, VALID),
        "value_clipfrac": scope["vf_clipfrac"].double(),
    }
    assert 0 < out["clipfrac"] < 1 and 0 < out["value_clipfrac"] < 1
    common.save_tensors(GOLDENS / "functions.safetensors", out)


# Prompt tokens, then (own, user's) tokens of each turn.
CONVERSATIONS = [(6, [(5, 3), (4, 2), (3, 0)]), (4, [(2, 2), (7, 3), (1, 0)]), (9, [(3, 2), (2, 2), (6, 0)])]
STEPS = 3
TEMPERATURE, CLIP, VALUE_CLIP, VALUE_COEF = 0.7, 0.2, 0.3, 0.4


def conversations(generator: torch.Generator):
    ids, replies, prompts = [], [], []
    for n_prompt, turns in CONVERSATIONS:
        at, own = n_prompt, []
        for n_own, n_user in turns:
            own.append((at, at + n_own))
            at += n_own + n_user
        ids.append(torch.randint(3, 512, (at,), generator=generator))
        replies.append(own)
        prompts.append(n_prompt)
    return ids, replies, prompts


def make_adapter() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(52)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    shutil.rmtree(GOLDENS / "adapter", ignore_errors=True)
    model.save_pretrained(GOLDENS / "adapter")
    common.tidy_adapter(GOLDENS / "adapter", "tests/fixtures/tiny-chat")


def steps() -> None:
    make_adapter()
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, GOLDENS / "adapter", is_trainable=True)
    generator = torch.Generator().manual_seed(53)
    ids, replies, prompts = conversations(generator)
    own = [torch.cat([torch.arange(a, b) for a, b in turns]) for turns in replies]
    n = sum(map(len, own))
    head = (0.1 * random(generator, 1, base.config.hidden_size)).requires_grad_()
    advantage, returns = random(generator, n), random(generator, n)
    out = {f"token_ids.{i}": row for i, row in enumerate(ids)}
    out |= {
        "n_prompt": torch.tensor(prompts),
        "replies": torch.tensor(replies),
        "head": head.detach().clone(),
        "advantage": advantage,
        "returns": returns,
    }

    def forward():
        """log P, value and entropy of every own token, each conversation in a pass of its own."""
        parts = []
        for row, at in zip(ids, own):
            hidden = model.base_model.model.model(row.unsqueeze(0)).last_hidden_state[0]  # [S, D]
            state = hidden[at - 1]
            logs = torch.log_softmax(base.lm_head(state) / TEMPERATURE, -1)
            parts.append((logs.gather(1, row[at].unsqueeze(1)).squeeze(1), (state @ head.t()).squeeze(1), -(logs.exp() * logs).sum(-1)))
        return [torch.cat(part) for part in zip(*parts)]

    with torch.no_grad():
        old_logprob, old_value, entropy = forward()
    out |= {"old_logprob": old_logprob, "old_value": old_value, "entropy": entropy}
    policy = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(policy) == 2 * 7 * base.config.num_hidden_layers
    adamw = lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimisers = [adamw([p for _, p in policy], 0.003), adamw([head], 0.03)]
    losses = {name: [] for name in ("policy_loss", "value_loss", "policy_norm", "value_norm")}
    ratios, squares, clipped, value_clipped = [], [], [], []
    for _ in range(STEPS):
        logprob, value, _ = forward()
        ratio = torch.exp(logprob - old_logprob)
        plain, near = -advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)
        policy_loss = torch.max(plain, near).mean()
        close = old_value + (value - old_value).clamp(-VALUE_CLIP, VALUE_CLIP)
        far, kept = (value - returns) ** 2, (close - returns) ** 2
        value_loss = 0.5 * torch.max(far, kept).mean()
        for optimiser in optimisers:
            optimiser.zero_grad()
        (policy_loss + VALUE_COEF * value_loss).backward()
        losses["policy_loss"].append(policy_loss.detach())
        losses["value_loss"].append(value_loss.detach())
        losses["policy_norm"].append(torch.nn.utils.clip_grad_norm_([p for _, p in policy], 1.0))
        losses["value_norm"].append(torch.nn.utils.clip_grad_norm_([head], 1.0))
        with torch.no_grad():
            ratios.append(ratio)
            squares.append((logprob - old_logprob) ** 2)
            clipped.append((near > plain).double())
            value_clipped.append((kept > far).double())
        for optimiser in optimisers:
            optimiser.step()
    out |= {name: torch.stack(list(map(torch.Tensor.detach, steps))).double() for name, steps in losses.items()}
    all_ratios = torch.cat(ratios).double()
    out |= {
        "approx_kl": 0.5 * torch.cat(squares).double().mean(),
        "clip_fraction": torch.cat(clipped).mean(),
        "value_clip_fraction": torch.cat(value_clipped).mean(),
        "ratio": all_ratios.mean(),
        "ratio_variance": all_ratios.var(unbiased=False),
    }
    assert out["policy_norm"].max() > 1 and out["value_norm"].max() > 1  # clipping is seen
    assert 0 < out["clip_fraction"] < 1 and 0 < out["value_clip_fraction"] < 1
    out |= {f"final.{name.replace('.default.', '.')}": parameter for name, parameter in policy}
    out["final.head"] = head
    common.save_tensors(GOLDENS / "steps.safetensors", out)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    functions(Trl())
    steps()


if __name__ == "__main__":
    main()
