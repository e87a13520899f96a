"""RLOO, GRPO and GDPO goldens: advantages, losses and gradients by the lines of TRL's own trainers.

Run: .venv/bin/python -P scripts/goldens/group_rl.py
Needs the packages of scripts/referees/requirements.txt; of trl 1.16.0 only the source is read, as text.

Writes crates/ppo/tests/goldens/groups.safetensors    B = 8 conversations (2 prompts, 4 samples each) of T = 9 columns, K = 3 rewards
  valid [B, T] bool           own tokens; what is not valid holds noise
  rewards [B, K], weights [K] f32    (the weights add up to 1)
  old_logprob, ref_logprob, sampled_logprob, new_logprob [B, T] f32
  rloo.advantage, grpo.advantage, gdpo.advantage [B] f64
      RLOOTrainer with beta 0.3; GRPOTrainer with scale_rewards "group" and multi_objective_aggregation "sum_then_normalize",
      "normalize_then_sum"
  <name>.loss f64, <name>.grad [B, T] f64 by new_logprob, epsilon 0.2:
      rloo.first, rloo.later    at the old log-probabilities, and at the new ones
      grpo.first, grpo.later    loss_type "dapo", beta 0.05
      grpo.weighed              the same, with the importance ratio of "token_truncate", at most 1.5
All in f64 from f32 inputs.
"""

import ast
import importlib.metadata
import pathlib
import sys
import textwrap
import types

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import torch

import common

GOLDENS = common.ROOT / "crates/ppo/tests/goldens"
N, BETA_RLOO, BETA_GRPO, CLIP, CAP = 4, 0.3, 0.05, 0.2, 1.5
VALID = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 1, 0, 0],  # two turns, then padding
        [1, 0, 0, 1, 0, 1, 1, 1, 0],  # three turns
        [1, 0, 0, 0, 0, 0, 0, 0, 0],  # a single token
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
    ],
    dtype=torch.bool,
)


class Trainer:
    """One of TRL's trainers, read as text: importing it needs packages that have nothing to do with these lines."""

    def __init__(self, name: str) -> None:
        distribution = importlib.metadata.distribution("trl")
        assert distribution.version == "1.16.0", distribution.version
        folder = pathlib.Path(distribution.locate_file("trl/trainer"))
        self.lines = (folder / f"{name}_trainer.py").read_text().splitlines()
        utils = (folder / "utils.py").read_text()
        self.functions: dict[str, object] = {"torch": torch}
        for node in ast.parse(utils).body:
            if isinstance(node, ast.FunctionDef) and node.name == "nanstd":
                exec(ast.get_source_segment(utils, node), self.functions)

    def run(self, first: str, last: str, variables: dict[str, object], after: str = "") -> dict[str, object]:
        """Executes the lines from the one that starts with `first` (behind one that starts with `after`) through the next that
        starts with `last`."""

        def find(text: str, begin: int) -> int:
            return next(i for i in range(begin, len(self.lines)) if self.lines[i].strip().startswith(text))

        start = find(first, find(after, 0) if after else 0)
        scope = self.functions | variables
        exec(textwrap.dedent("\n".join(self.lines[start : find(last, start) + 1])), scope)
        return scope


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(61)
    shape = VALID.shape
    old = -random(generator, *shape).abs()
    return {
        "valid": VALID,
        "rewards": random(generator, shape[0], 3) * torch.tensor([1.0, 5.0, 0.2]) + torch.tensor([0.0, 2.0, 0.5]),
        "weights": torch.tensor([0.5, 0.3, 0.2]),
        "old_logprob": old,
        "ref_logprob": old + 0.3 * random(generator, *shape),
        "sampled_logprob": old + 0.4 * random(generator, *shape),
        "new_logprob": old + 0.12 * random(generator, *shape),
    }


def rloo(given: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> None:
    trl = Trainer("rloo")
    wide = {name: tensor.double() for name, tensor in given.items()}
    settings = types.SimpleNamespace(
        beta=BETA_RLOO, normalize_advantages=False, reward_weights=wide["weights"], reward_clip_range=None
    )
    variables = {
        "self": settings,
        "rewards_per_func": wide["rewards"],
        "unscorable_mask": torch.zeros(len(VALID), dtype=torch.bool),
        "device": "cpu",
        "num_generations": N,
        "old_per_token_logps": wide["old_logprob"],
        "ref_per_token_logps": wide["ref_logprob"],
        "completion_mask": VALID.double(),
        "gather": lambda tensor: tensor,
    }
    scope = trl.run("# Apply weights to each reward function's output and sum", "advantages = torch.nan_to_num", variables)
    out["rloo.advantage"] = advantages = scope["advantages"]
    for name, new in [("first", "old_logprob"), ("later", "new_logprob")]:
        logprob = wide[new].clone().requires_grad_()
        loss_variables = {
            "self": types.SimpleNamespace(epsilon_low=CLIP, epsilon_high=CLIP),
            "per_token_logps": logprob,
            "completion_mask": VALID.double(),
            "inputs": {"old_logps": (wide["old_logprob"] * VALID).sum(1), "advantages": advantages},
        }
        first = "logps = (per_token_logps * completion_mask).sum(1)"
        scope = trl.run(first, "loss = per_sequence_loss.mean()", loss_variables, after="def _compute_loss")
        scope["loss"].backward()
        out |= {f"rloo.{name}.loss": scope["loss"], f"rloo.{name}.grad": logprob.grad}
        if name == "later":
            clipped = scope["per_sequence_loss1"] > scope["per_sequence_loss2"]
            assert 0 < clipped.sum() < len(VALID)


def grpo(given: dict[str, torch.Tensor], out: dict[str, torch.Tensor]) -> None:
    trl = Trainer("grpo")
    wide = {name: tensor.double() for name, tensor in given.items()}
    for name, aggregation in [("grpo", "sum_then_normalize"), ("gdpo", "normalize_then_sum")]:
        settings = types.SimpleNamespace(
            scale_rewards="group", multi_objective_aggregation=aggregation, reward_weights=wide["weights"], reward_funcs=[0] * 3
        )
        variables = {
            "self": settings,
            "rewards_per_func": wide["rewards"],
            "device": "cpu",
            "num_generations": N,
        }
        scope = trl.run("unscorable_mask = torch.isnan(rewards_per_func)", "advantages = torch.nan_to_num", variables)
        out[f"{name}.advantage"] = scope["advantages"]
    advantages = out["grpo.advantage"]
    log_ratio = wide["old_logprob"] - wide["sampled_logprob"]
    importance = torch.exp(log_ratio).clamp(max=CAP)
    for name, new, weighed in [
        ("first", "old_logprob", False),
        ("later", "new_logprob", False),
        ("weighed", "new_logprob", True),
    ]:
        logprob = wide[new].clone().requires_grad_()
        args = types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
        settings = types.SimpleNamespace(
            args=args,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            beta=BETA_GRPO,
            loss_type="dapo",
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            use_vllm=weighed,
            vllm_importance_sampling_correction=weighed,
            accelerator=types.SimpleNamespace(num_processes=1),
            model=types.SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
        )
        loss_variables = {
            "self": settings,
            "per_token_logps": logprob,
            "old_per_token_logps": wide["old_logprob"],
            "mask": VALID.double(),
            "entropy_mask": None,
            "advantages": advantages.unsqueeze(1),
            "inputs": {
                "ref_per_token_logps": wide["ref_logprob"],
                "importance_sampling_ratio": importance,
                "num_items_in_batch": VALID.sum(),
            },
        }
        # The comment behind the last branch ends what is executed.
        first, last = "log_ratio = per_token_logps - old_per_token_logps", "# Entropy bonus: add entropy regularization"
        scope = trl.run(first, last, loss_variables, after="def _compute_loss")
        scope["loss"].backward()
        out |= {f"grpo.{name}.loss": scope["loss"], f"grpo.{name}.grad": logprob.grad}


def main() -> None:
    torch.set_num_threads(1)
    out = inputs()
    given = dict(out)
    rloo(given, out)
    grpo(given, out)
    common.save_tensors(GOLDENS / "groups.safetensors", out)


if __name__ == "__main__":
    main()
