"""What a dictionary can say about the change between two models: activations of both, at the same tokens.

* "difference": ``after - before``. An autoencoder on it is a difference-SAE (Aranguri, Drori & Nanda 2025,
  "SAE on activation differences"): its features are what changed.
* "paired": both side by side, [before, after]. An autoencoder on it is a crosscoder (Lindsey et al. 2024,
  "Sparse crosscoders"); with BatchTopK in place of an L1 penalty fewer of its features only seem to be of one
  model (Minder, Dumas et al. 2025, arXiv 2504.02922). `sides` says how much of a feature each model has.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError
from glasshouse.interp.dictionaries.core import Dictionary
from glasshouse.interp.dictionaries.stream import LiveStream

Mode = Literal["difference", "paired"]


class DifferenceStream:
    """Activations of two models at one or more sites on the same ``rows``, as their difference or as pairs.

    Further arguments are `LiveStream`'s. UsageError when the models have other widths at a site, or are the
    same model, whose difference is zero.
    """

    def __init__(
        self, before: Any, after: Any, rows: Tensor | np.ndarray, sites: Any, *, mode: Mode, **how: Any
    ):
        self.mode = mode
        self.before = LiveStream(before, rows, sites, **how)
        self.after = LiveStream(after, rows, sites, **how)
        if dict(self.before.widths) != dict(self.after.widths):
            raise UsageError(
                f"the models have different widths: {self.before.widths} and {self.after.widths}; compare "
                "checkpoints of one model"
            )
        if self.before.model_digest == self.after.model_digest:
            raise UsageError("both models have the same weights: there is no difference to train on")
        if mode not in ("difference", "paired"):
            raise UsageError(f"mode is 'difference' or 'paired', not {mode!r}")
        times = 2 if mode == "paired" else 1
        self.batch_size = self.after.batch_size
        self.widths = {site: times * width for site, width in self.after.widths.items()}
        self.model_digest = digest_of([mode, self.before.model_digest, self.after.model_digest])

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step``: {site: [batch_size, width]}, twice as wide for pairs."""
        a, b = self.before.batch(step), self.after.batch(step)
        if self.mode == "paired":
            return {site: torch.cat([a[site], b[site]], dim=1) for site in b}
        return {site: b[site] - a[site] for site in b}

    def digests(self) -> dict[str, str]:
        return {"activations": digest_of([self.mode, self.before.digests(), self.after.digests()])}


@torch.no_grad()
def sides(crosscoder: Dictionary) -> Tensor:
    """The share of each feature's decoder norm that ``after`` has, float [d_sae], for a dictionary of pairs.

    0 is only in ``before``, 0.5 in both alike, 1 only in ``after`` (Lindsey et al. 2024, relative norms).
    UsageError when the width is odd: no pairs.
    """
    if crosscoder.config.out % 2:
        raise UsageError(f"a dictionary of pairs has an even width, not {crosscoder.config.out}")
    before, after = (part.norm(dim=1) for part in crosscoder.W_dec.chunk(2, dim=1))
    return after / (before + after).clamp(min=1e-12)
