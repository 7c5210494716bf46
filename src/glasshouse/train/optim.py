"""Optimisers: Muon for hidden matrices, AdamW for the rest, with the parameter groups in plain sight.

| group            | optimiser       | rate    | decay | why                                             |
|------------------|-----------------|---------|-------|-------------------------------------------------|
| hidden matrices  | Muon (or AdamW) | muon_lr | yes   | they map activations to activations: Muon's case|
| embeddings       | AdamW           | adam_lr | no    | rows of rare tokens would decay without updates |
| head (if untied) | AdamW           | adam_lr | yes   | a matrix, but its output is a distribution      |
| norms and biases | AdamW           | adam_lr | no    | decay would pull a norm's gain to zero          |

State goes to flat tensors (safetensors), never through pickle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError
from glasshouse.train.average import TailAverage
from glasshouse.train.config import StageConfig

# Keller Jordan's quintic: steepest at zero, ends with singular values in about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Group:
    """Parameters that share an optimiser, a peak learning rate and a weight decay.

    Gradients of all groups with the same ``clipped_with`` are clipped by their common norm: modules that
    train side by side and have nothing to do with each other are clipped apart.
    """

    name: str
    optimizer: str  # "muon" | "adamw"
    lr: float
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]
    clipped_with: str = ""


def parameter_groups(model: nn.Module, config: StageConfig) -> list[Group]:
    """Every trainable parameter of ``model`` in exactly one group (see the table above); empty groups left
    out.

    A shared (tied) parameter is listed once, under its first name.
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p in embeddings:
            group = "embeddings"
        elif p.ndim < 2:
            group = "norms and biases"
        elif p.ndim == 2 and name.startswith("blocks."):
            group = "hidden matrices"
        else:
            group = "head"
        members.setdefault(group, []).append((name, p))
    hidden_lr = config.muon_lr if config.optimizer == "muon" else config.adam_lr
    layout = [
        ("hidden matrices", config.optimizer, hidden_lr, config.weight_decay),
        ("embeddings", "adamw", config.adam_lr, 0.0),
        ("head", "adamw", config.adam_lr, config.weight_decay),
        ("norms and biases", "adamw", config.adam_lr, 0.0),
    ]
    return [
        Group(name, kind, lr, wd, tuple(members[name])) for name, kind, lr, wd in layout if name in members
    ]


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace each matrix [n, rows, cols] by (nearly) the nearest semi-orthogonal one, by Newton-Schulz.

    Singular values end in about [0.7, 1.2] and the singular vectors stay (Jordan et al. 2024).
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalised_apart(matrix: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonalise` of the masked entries of one matrix and of the others, neither seeing the other.

    The mask is of whole rows or columns, which stay zero where they are zero.
    """
    parts = orthogonalise(torch.stack([matrix.masked_fill(mask, 0), matrix.masked_fill(~mask, 0)]), dtype)
    return torch.where(mask, parts[1], parts[0])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), update for update that of `torch.optim.Muon`, with two differences.

    Matrices of one shape are orthogonalised together (one batched product instead of many small ones), and
    the iteration's dtype can be chosen: torch's is bfloat16 always, which on a CPU without bf16 instructions
    costs seconds a step, where fp32 costs a tenth of one.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        # Entries of a matrix (whole rows or columns) that are orthogonalised apart from its others.
        self.apart: Mapping[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is called
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                moved = [self._nesterov(p, group["momentum"]) for p in parameters]
                steps = orthogonalise(torch.stack(moved), self.dtype)
                for i, p in enumerate(parameters):
                    if p in self.apart:
                        steps[i] = orthogonalised_apart(moved[i], self.apart[p], self.dtype)
                # A tall matrix is stretched so that its update is as large as a square one's (Jordan et al.).
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, step in zip(parameters, steps.float(), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-rate)

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


class Optimizers:
    """The optimisers of one stage, stepped together. ``groups``: None for those of a GPT."""

    def __init__(
        self,
        model: nn.Module,
        config: StageConfig,
        muon_dtype: str = "fp32",
        groups: Sequence[Group] | None = None,
    ):
        self.groups = parameter_groups(model, config) if groups is None else list(groups)
        self.clip_norm = config.clip_norm
        self._named = {name: p for group in self.groups for name, p in group.parameters}
        self.average = TailAverage(self._named, config.steps, config.average_share)
        self._inner: list[torch.optim.Optimizer] = []
        for group in self.groups:
            parameters = [p for _, p in group.parameters]
            if group.optimizer == "muon":
                dtype = torch.bfloat16 if muon_dtype == "bf16" else torch.float32
                self._inner.append(
                    Muon(parameters, group.lr, group.weight_decay, config.muon_momentum, dtype)
                )
            else:
                betas = (config.adam_beta1, config.adam_beta2)
                self._inner.append(
                    torch.optim.AdamW(
                        parameters, group.lr, betas, config.adam_eps, group.weight_decay, fused=True
                    )
                )

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self._named.values():
            p.grad = None

    def norms(self) -> list[float]:
        """The norm of every gradient, in the order of `names`; 0 where there is none."""
        present = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        found = torch.stack([n.float() for n in torch._foreach_norm(list(present.values()))]).tolist()
        norms = dict(zip(present, found, strict=True))
        return [norms.get(name, 0.0) for name in self._named]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that are updated."""
        return tuple(self._named)

    def clip(self, norm: float | None = None) -> float:
        """Scale gradients to global norm ``clip_norm`` at most; return the norm before that (may be inf or
        NaN). ``norm``: that norm, where it is known already.
        """
        norm = math.hypot(*self.norms()) if norm is None else norm
        if self.clip_norm is None or not norm > self.clip_norm:
            return norm  # no part of it can be longer
        if len({group.clipped_with for group in self.groups}) == 1:
            self._shorten([p for p in self._named.values() if p.grad is not None], norm)
            return norm
        apart: dict[str, list[nn.Parameter]] = {}
        for group in self.groups:
            apart.setdefault(group.clipped_with, []).extend(p for _, p in group.parameters)
        for parameters in apart.values():
            present = [p for p in parameters if p.grad is not None]
            norms = torch._foreach_norm([p.grad for p in present if p.grad is not None])
            part = math.hypot(*torch.stack([n.float() for n in norms]).tolist()) if norms else 0.0
            if part > self.clip_norm:
                self._shorten(present, part)
        return norm

    def _shorten(self, parameters: list[nn.Parameter], norm: float) -> None:
        assert self.clip_norm is not None
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.clip_norm / (norm + 1e-6))

    @property
    def inner(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser of each group, whose state may be changed between updates."""
        return tuple(self._inner)

    def step(self, lr_factor: float) -> None:
        """Update all parameters with every group's peak rate times ``lr_factor``."""
        for group, inner in zip(self.groups, self._inner, strict=True):
            inner.param_groups[0]["lr"] = group.lr * lr_factor
            inner.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors named ``<parameter>/<what>``; empty before the first step."""
        state: dict[str, Tensor] = {}
        for group, inner in zip(self.groups, self._inner, strict=True):
            for name, p in group.parameters:
                state |= {f"{name}/{what}": value for what, value in inner.state[p].items()}
        return state | self.average.state_tensors()

    def scalars(self) -> list[dict[str, Any]]:
        """What each group was made with, as JSON, for checking on load."""
        return [
            {"name": g.name, "optimizer": g.optimizer, "lr": g.lr, "weight_decay": g.weight_decay,
             "parameters": [name for name, _ in g.parameters]}
            for g in self.groups
        ]  # fmt: skip

    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Restore `state_tensors`. Raises CheckpointError if names or shapes are not this model's."""
        left = dict(tensors)
        self.average.load(left, where)
        for group, inner in zip(self.groups, self._inner, strict=True):
            for name, p in group.parameters:
                kinds = (
                    ("momentum_buffer",) if group.optimizer == "muon" else ("step", "exp_avg", "exp_avg_sq")
                )
                for what in kinds:
                    value = left.pop(f"{name}/{what}", None)
                    if value is None or value.shape != (torch.Size() if what == "step" else p.shape):
                        found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                        raise CheckpointError(
                            f"{where}: optimiser state '{name}/{what}' is {found}; it belongs to another "
                            "model or recipe; resume with the recipe that wrote it"
                        )
                    inner.state[p][what] = value.to(p.device, copy=True)
        if left:
            raise CheckpointError(
                f"{where}: optimiser state for unknown parameter '{min(left)}'; "
                "resume with the recipe that wrote it"
            )
