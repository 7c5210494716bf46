"""Activations whose true features are known: sparse sums of unit vectors. Needs torch alone, so that every
contestant can read it in an environment of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

D_IN, TRUE_FEATURES = 256, 4096
# Features in an activation, drawn evenly with replacement; their strengths are even in 0.5 to 1.5.
ACTIVE = 4
FOUND = 0.9  # a true feature is recovered when a decoder row has this cosine with it
# Far from the seeds of weights, so that no initialisation ever holds the truth.
TRUTH_SEED, DATA_SEED = 1_000_000, 2_000_000


class Toy:
    """Batches [n, D_IN] of one truth; batch ``step`` of a seed is the same for every contestant."""

    def __init__(self, seed: int, n: int, active: int = ACTIVE):
        self.seed, self.n, self.active = seed, n, active
        rows = torch.randn(TRUE_FEATURES, D_IN, generator=torch.Generator().manual_seed(TRUTH_SEED + seed))
        self.truth = F.normalize(rows, dim=1)

    def __call__(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(DATA_SEED + self.seed * 100_000 + step)
        which = torch.randint(TRUE_FEATURES, (self.n, self.active), generator=generator)
        strength = 0.5 + torch.rand(self.n, self.active, generator=generator)
        return F.embedding_bag(which, self.truth, per_sample_weights=strength, mode="sum")

    def recovered(self, decoder: Tensor) -> float:
        """Share of true features with a row of ``decoder`` [n_features, D_IN] at cosine above `FOUND`."""
        rows = F.normalize(decoder.detach().float(), dim=1)
        return float(((self.truth @ rows.T).amax(1) > FOUND).float().mean())
