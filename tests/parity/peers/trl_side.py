"""TRL's side: its trainers' own loss methods on random log-probabilities, with gradients.

The methods are called with a stand-in for the trainer that holds settings only and a "model" that gives the
numbers of the case; all arithmetic is TRL's. Soft labels, which it has none of, are its hard loss of both
orders of a pair. Needs torch, safetensors and trl alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

sys.path.insert(0, str(Path(__file__).parent))

import torch
from exchange import main
from safetensors.torch import save_file
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RewardTrainer
from trl.trainer.utils import entropy_from_logits

N, T, V = 6, 7, 11


def stand_in(**settings: Any) -> Any:
    """What a trainer's loss method reads: settings, and an accelerator of one process."""
    made = MagicMock()
    made.accelerator.gather = made.accelerator.gather_for_metrics = lambda x: x
    made.accelerator.reduce = lambda x, reduction: x
    made.accelerator.device, made.accelerator.num_processes = torch.device("cpu"), 1
    made.model.training = False
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(seed: int) -> Tensor:
    """Answers of 1 to T tokens."""
    lengths = torch.randint(1, T + 1, (N,), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(T) < lengths[:, None]).float()


def keep(folder: Path, settings: dict[str, Any], loss: Tensor, wrt: list[Tensor], **tensors: Tensor) -> None:
    """A case: its numbers, the loss [1] and the gradients by ``wrt``."""
    gradients = torch.autograd.grad(loss, wrt)
    every = {**tensors, "loss": loss[None]} | {f"grad{i}": g for i, g in enumerate(gradients)}
    folder.mkdir(parents=True)
    save_file({k: v.detach().float().contiguous() for k, v in every.items()}, folder / "case.safetensors")
    (folder / "settings.json").write_text(json.dumps(settings))


def dpo_loss(logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """TRL's mean loss of [chosen, rejected] rows of token log-probabilities [2n, T]."""
    trainer = stand_in(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], beta=beta, use_weighting=False,
        ref_model=lambda **given: SimpleNamespace(log_probs=ref, logits=None, loss=None),
    )  # fmt: skip
    n = len(logp)
    inputs = {"input_ids": torch.ones(n, T + 1).long(), "attention_mask": torch.ones(n, T + 1)}
    inputs["completion_mask"] = torch.ones(n, T + 1)

    def model(**given: Any) -> Any:
        zeros = torch.zeros(n, T)  # for metrics that nobody looks at
        return SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def write_dpo(root: Path) -> None:
    for seed, beta in enumerate((0.1, 0.5, 2.0)):
        logp, ref = -drawn(seed, 2 * N, T).abs(), -drawn(50 + seed, 2 * N, T).abs()
        p = drawn(90 + seed, N).sigmoid()
        logp.requires_grad_(True)
        keep(root / f"dpo_{beta}", {"beta": beta}, dpo_loss(logp, ref, beta), [logp], logp=logp, ref=ref)
        rows = []
        for i in range(N):
            order = [i, N + i]
            there, back = (dpo_loss(logp[o], ref[o], beta) for o in (order, order[::-1]))
            rows.append(p[i] * there + (1 - p[i]) * back)
        soft = torch.stack(rows).mean()
        keep(root / f"dpo_soft_{beta}", {"beta": beta}, soft, [logp], logp=logp, ref=ref, p=p)


def write_grpo(root: Path) -> None:
    for seed, (kind, beta, high) in enumerate(
        [("grpo", 0.0, 0.2), ("grpo", 0.3, 0.2), ("bnpo", 0.0, 0.2), ("bnpo", 0.1, 0.28)]
    ):
        logp = (-drawn(seed, N, T).abs()).requires_grad_(True)
        old, ref = logp.detach() + 0.3 * drawn(20 + seed, N, T), -drawn(30 + seed, N, T).abs()
        mask, advantages = masks(40 + seed), drawn(60 + seed, N)
        trainer = stand_in(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level="token", beta=beta, loss_type=kind, epsilon_low=0.2, epsilon_high=high,
            use_vllm=False, _entropy_bonus_enabled=False,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
            _get_per_token_logps_and_entropies=lambda *a, logp=logp, **k: (logp, torch.zeros(N, T), None),
        )  # fmt: skip
        inputs = {
            "prompt_ids": torch.ones(N, 2).long(), "prompt_mask": torch.ones(N, 2),
            "completion_ids": torch.ones(N, T).long(), "completion_mask": mask, "advantages": advantages,
            "old_per_token_logps": old, "ref_per_token_logps": ref,
        }  # fmt: skip
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        over = "sequences" if kind == "grpo" else "tokens"
        keep(
            root / f"grpo_{over}_{beta}", {"beta": beta, "clip_high": high, "over": over}, loss, [logp],
            logp=logp, old=old, ref=ref, mask=mask, advantages=advantages,
        )  # fmt: skip


def write_reward(root: Path) -> None:
    def loss_of(scores: Tensor) -> Tensor:
        trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
        given = {"attention_mask": torch.ones(len(scores), 3)}
        return RewardTrainer.compute_loss(trainer, lambda **k: SimpleNamespace(logits=scores[:, None]), given)

    scores = drawn(7, 2 * N).requires_grad_(True)
    keep(root / "reward", {}, loss_of(scores), [scores], scores=scores)
    p = drawn(8, N).sigmoid()
    pairs = [(scores[[i, N + i]], scores[[N + i, i]]) for i in range(N)]
    soft = [q * loss_of(there) + (1 - q) * loss_of(back) for q, (there, back) in zip(p, pairs, strict=True)]
    keep(root / "reward_soft", {}, torch.stack(soft).mean(), [scores], scores=scores, p=p)
    logits = drawn(9, N, V).requires_grad_(True)
    keep(root / "entropy", {}, entropy_from_logits(logits).mean(), [logits], logits=logits)


def write(root: Path) -> None:
    writers: list[Callable[[Path], None]] = [write_dpo, write_grpo, write_reward]
    for one in writers:
        one(root)


if __name__ == "__main__":
    main(["trl"], write, None)
