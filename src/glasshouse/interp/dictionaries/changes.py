"""What changed between two checkpoints, feature by feature, on rows of any length: a small difference-SAE.

The dictionary is trained on ``after - before`` at one site (Aranguri, Drori & Nanda 2025, "SAE on activation
differences"), in memory and in about a second, so that a gate can afford it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.dictionaries.config import DictionaryConfig
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary
from glasshouse.interp.dictionaries.optim import dictionary_optimizer, dictionary_step
from glasshouse.interp.dictionaries.start import fit_start
from glasshouse.model import GPT, Taps

Rows = Sequence[Sequence[int]]
BATCH = 64  # rows in one forward pass
SAMPLE = 4096  # differences that set the scale and the first bias
RATE = 3e-3


@dataclass(frozen=True)
class Encoded:
    """Differences of some rows: ``x`` [positions, d] and ``features`` [positions, S], all rows in turn.

    Row i has the positions ``start[i]`` to ``start[i + 1]``.
    """

    rows: Rows
    start: np.ndarray
    x: Tensor
    features: Tensor

    def peaks(self) -> tuple[Tensor, Tensor]:
        """Each feature's greatest activation on each row [n, S], and at which position of it [n, S]."""
        found = [self.features[a:b].max(0) for a, b in zip(self.start, self.start[1:], strict=False)]
        return torch.stack([f.values for f in found]), torch.stack([f.indices for f in found])

    def energy(self, dictionary: Dictionary) -> Tensor:
        """Share [S] of the differences' squared length that each feature's own part has."""
        sizes = self.features.square().sum(0) * directions(dictionary).square().sum(1)
        return sizes / self.x.square().sum().clamp(min=1e-12)


def directions(dictionary: Dictionary) -> Tensor:
    """What one unit of each feature adds to raw activations [S, d]."""
    return (dictionary.W_dec / dictionary.scale_out).detach()


def unit_directions(dictionary: Dictionary) -> Tensor:
    """The same at length 1."""
    return torch.nn.functional.normalize(directions(dictionary), dim=1)


@torch.no_grad()
def differences(
    before: GPT, after: GPT, rows: Rows, sites: Sequence[str]
) -> tuple[dict[str, Tensor], np.ndarray]:
    """``after - before`` at ``sites`` [positions, d], all rows in turn, and where each begins [n + 1].

    UsageError for models of different widths; VerificationError for NaN or infinity.
    """
    if before.config.d_model != after.config.d_model:
        raise UsageError(
            f"models of widths {before.config.d_model} and {after.config.d_model} have no difference"
        )
    start = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    out = {site: torch.empty(int(start[-1]), after.config.d_model) for site in sites}
    order = np.argsort([len(row) for row in rows], kind="stable")
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        tokens = torch.zeros(len(chosen), max(len(rows[i]) for i in chosen), dtype=torch.int64)
        for k, i in enumerate(chosen):
            tokens[k, : len(rows[i])] = torch.as_tensor(rows[i], dtype=torch.int64)
        new, old = (Taps(read=sites, stop_early=True) for _ in range(2))
        for model, taps in ((after, new), (before, old)):
            with taps:
                model.hidden(tokens.to(model.device), taps)
        for site in sites:
            moved = (new[site].float() - old[site].float()).cpu()
            for k, i in enumerate(chosen):
                out[site][int(start[i]) : int(start[i + 1])] = moved[k, : len(rows[i])]
    for site, x in out.items():
        if not bool(torch.isfinite(x).all()):
            raise VerificationError(f"activations at {site} hold NaN or infinity; nothing was measured")
    return out, start


def learn(
    x: Tensor,
    *,
    width: int = 64,
    k: int = 2,
    steps: int = 150,
    batch: int = 512,
    seed: int = 0,
    start: Dictionary | None = None,
) -> Dictionary:
    """A BatchTopK dictionary of differences ``x`` [n, d], begun from ``start`` when that fits.

    Each feature keeps its number from ``start``. VerificationError when the differences are all zero.
    """
    if float(x.abs().max()) == 0:
        raise VerificationError("the two checkpoints do the same at every position; nothing has changed")
    config = DictionaryConfig(
        architecture="batchtopk", d_in=x.shape[1], d_sae=width, k=k,
        normalize_activations="expected_average_only_in", dead_after=40 * batch,
    )  # fmt: skip
    made, random = Dictionary(config).init_weights(seed), torch.Generator().manual_seed(seed)
    fit_start(made, ActivationBatch(x[torch.randperm(len(x), generator=random)[:SAMPLE]]))
    if start is not None and start.config.model_copy(update={"model_digest": ""}) == config:
        scales = made.scale_in.clone(), made.scale_out.clone()
        made.load_state_dict(start.state_dict())
        made.scale_in.copy_(scales[0])
        made.scale_out.copy_(scales[1])
        made.since_fired.zero_()
    made.train()
    optimizer = dictionary_optimizer(made, RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10, (steps - step) / (0.25 * steps))
        rows = torch.randint(len(x), (batch,), generator=random)
        dictionary_step(made, ActivationBatch(x[rows]), optimizer)
    return made.eval()


@torch.no_grad()
def encoded(dictionary: Dictionary, before: GPT, after: GPT, rows: Rows, site: str) -> Encoded:
    """The differences on new rows at ``site``, in features."""
    x, start = differences(before, after, rows, [site])
    return Encoded(rows, start, x[site], dictionary.encode(x[site]))


@torch.no_grad()
def matched(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """For each feature of ``one`` [n, S] the feature of ``other`` [n, R] it is most correlated with, and how.

    Activations are of the same positions: features are followed from gate to gate by what they do and not by
    their number. A feature that never fires has correlation 0.
    """

    def standard(f: Tensor) -> Tensor:
        f = f.double() - f.double().mean(0)
        return f / f.norm(dim=0).clamp(min=1e-12)

    best = (standard(one).T @ standard(other)).max(1)
    return best.indices, best.values
