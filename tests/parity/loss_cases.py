"""Our losses on the cases that ``peers/trl_side.py`` wrote: value and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from glasshouse.align.kl import kl_k3
from glasshouse.align.losses import bradley_terry, dpo, entropy_of, mean_over, ppo_clip
from parity.format_cases import distance


def loss_distance(case: Path) -> float:
    """The larger of the distances of loss and gradient."""
    x = load_file(case / "case.safetensors")
    settings = json.loads((case / "settings.json").read_text("utf-8"))
    kind = case.name.split("_")[0]
    wrt = x[{"dpo": "logp", "grpo": "logp", "reward": "scores", "entropy": "logits"}[kind]].requires_grad_(
        True
    )
    loss = {"dpo": _dpo, "grpo": _grpo, "reward": _reward, "entropy": _entropy}[kind](x, settings)
    (gradient,) = torch.autograd.grad(loss, [wrt])
    return max(distance(loss.detach()[None], x["loss"]), distance(gradient, x["grad0"]))


def _dpo(x: dict[str, Tensor], settings: dict[str, float]) -> Tensor:
    both, ref = x["logp"].sum(dim=1).chunk(2), x["ref"].sum(dim=1).chunk(2)
    return dpo(*both, *ref, settings["beta"], x.get("p", 1.0)).mean()


def _grpo(x: dict[str, Tensor], settings: dict[str, float]) -> Tensor:
    mask, over = x["mask"], settings["over"]
    advantages = x["advantages"][:, None] * mask
    high = settings["clip_high"]
    loss = ppo_clip(x["logp"], x["old"], advantages, mask, clip_high=high, over=over).loss  # type: ignore[arg-type]
    apart = mean_over(kl_k3(x["logp"], x["ref"]), mask, over)  # type: ignore[arg-type]
    return loss + settings["beta"] * apart


def _reward(x: dict[str, Tensor], settings: dict[str, float]) -> Tensor:
    return bradley_terry(*x["scores"].chunk(2), x.get("p", 1.0)).mean()


def _entropy(x: dict[str, Tensor], settings: dict[str, float]) -> Tensor:
    return entropy_of(x["logits"]).mean()
