"""Activations for training dictionaries, as pure functions of (seed, step): read from a model when needed.

`LiveStream` draws rows of tokens without replacement, reads a block of them, shuffles the block's positions
and cuts it into batches; then the next block. Neighbouring positions of a text are alike, and batches of
neighbours train badly (Bricken et al. 2023, "Towards Monosemanticity"; SAELens mixes a buffer for the same
reason). Nothing is carried from block to block, so batch ``step`` is the same whether a run came to it or
was resumed at it, and memory is one block, whatever the data's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from glasshouse.base.digest import digest_of, sha256_bytes
from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.base.rng import generator
from glasshouse.interp.reading.fill import sites_of
from glasshouse.interp.reading.shuffle import Shuffle
from glasshouse.interp.reading.store import ActivationStore
from glasshouse.model import Taps
from glasshouse.model.digest import weights_digest

BLOCK_BYTES = 128 * 2**20  # of activations in memory at most, unless one batch needs more
BLOCK_BATCHES = 64  # a block of more batches is shuffled no better
ROWS_AT_ONCE = 32  # rows in one forward pass
HEADS = ("q", "k", "v", "z")  # sites with a dimension for heads: these are put side by side


class Source(Protocol):
    """Where activations come from: a live model, a store, the difference of two."""

    batch_size: int
    widths: dict[str, int]  # of each site
    model_digest: str  # of the model that they were read from

    def batch(self, step: int) -> dict[str, Tensor]:
        """Activations [batch_size, width] of every site at the same positions; the same for the same step."""

    def digests(self) -> dict[str, str]:
        """What the batches are made from: name -> SHA-256. A resumed run must find the same."""


def capture(model: Any, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
    """Activations [batch, pos, width] of ``sites`` for ``tokens`` int64 [batch, pos], without gradients.

    Heads stand side by side in one width. ``blocks.<l>.mlp_in``, what an MLP reads (for transcoders), is
    the norm of the residual stream before it. UsageError for a site that does not exist, or a pattern.
    """
    real = {site: read_from(model, site) for site in sites}
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), Taps(read=set(real.values()), stop_early=True) as taps:
            model(tokens, taps)
            return {site: shaped(model, site, taps[at]) for site, at in real.items()}
    finally:
        model.train(was)


def named(model: Any, site: str) -> str:
    """``site`` as the model calls it: a TransformerLens name is one of its own sites' (`model.aliases`)."""
    return sites_of(model, site)[0] if "hook_" in site else site


def read_from(model: Any, site: str) -> str:
    """The site of the model's own that ``site`` is computed from: itself but for ``mlp_in``."""
    known, site = model.sites(), named(model, site)
    layer, _, kind = site.rpartition(".")
    if kind == "pattern":
        raise UsageError(f"{site}: attention patterns are as wide as the text; no dictionary fits them")
    if site in known:
        return site
    if kind == "mlp_in" and f"{layer}.resid_mid" in known and hasattr(model, "blocks"):
        return f"{layer}.resid_pre" if model.config.parallel else f"{layer}.resid_mid"
    raise UsageError(f"no site {site!r} in this model.{suggest(site, known)} model.sites() lists all")


def shaped(model: Any, site: str, x: Tensor) -> Tensor:
    """What is at `read_from` as the activation [batch, pos, width] of ``site``."""
    site = named(model, site)
    kind = site.rpartition(".")[2]
    if kind in HEADS and x.ndim == 4:
        return x.transpose(1, 2).flatten(2)
    if kind == "mlp_in" and site not in model.sites():
        made: Tensor = model.blocks[int(site.split(".")[1])].norm2(x)
        return made
    return x


def unshaped(x: Tensor, like: Tensor) -> Tensor:
    """``x`` [batch, pos, width] in the shape of the activation ``like`` that it stands for."""
    if like.ndim == 4:
        return x.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2).to(like.dtype)
    return x.to(like.dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


class LiveStream:
    """Activations of ``model`` at ``sites`` on ``rows`` int64 [n, pos], shuffled.

    ``valid`` bool [n, pos] says which positions count (padding does not); None: all. ``block_rows``: how
    many rows' activations are in memory; None: as many as `BLOCK_BATCHES` batches or `BLOCK_BYTES` need.
    The model must not change while batches are drawn. DataError when there are no rows or nothing counts.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor | np.ndarray,
        sites: str | Sequence[str],
        *,
        batch_size: int = 4096,
        seed: int = 0,
        valid: Tensor | np.ndarray | None = None,
        block_rows: int | None = None,
    ):
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
        self.rows = torch.as_tensor(rows).long()
        if self.rows.ndim != 2 or not self.rows.numel():
            raise DataError(f"activations need rows of tokens [n, pos]; got {list(self.rows.shape)}")
        self.valid = torch.ones_like(self.rows, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
        if self.valid.shape != self.rows.shape or not self.valid.any():
            raise DataError(
                f"valid {list(self.valid.shape)} must have the rows' shape {list(self.rows.shape)} and count "
                "at least one position"
            )
        first = capture(model, self.rows[:1].to(device_of(model)), self.sites)
        self.widths = {site: x.shape[-1] for site, x in first.items()}
        self.model_digest = weights_digest(model)
        self._plan_blocks(block_rows)
        self._block = -1
        self._acts: dict[str, Tensor] = {}

    def _plan_blocks(self, block_rows: int | None) -> None:
        """How many rows make a block and how many batches it is cut into, the same for all blocks."""
        per_row = float(self.valid.sum()) / len(self.rows)
        per_batch = self.batch_size / per_row  # rows
        if block_rows is None:
            row_bytes = 4 * self.rows.shape[1] * sum(self.widths.values())
            block_rows = int(min(BLOCK_BATCHES * per_batch, BLOCK_BYTES / row_bytes))
        self.block_rows = max(block_rows, int(np.ceil(per_batch)), 1)
        self.batches_per_block = max(1, int(self.block_rows / per_batch))

    def rows_of(self, block: int) -> np.ndarray:
        """The row numbers [block_rows] of a block: each row once, in random order, before one comes again."""
        n, at = len(self.rows), np.arange(block * self.block_rows, (block + 1) * self.block_rows)
        orders = {int(e): generator("epoch", self.seed, int(e)).permutation(n) for e in np.unique(at // n)}
        return np.array([orders[int(i // n)][i % n] for i in at])

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step``: {site: [batch_size, width]}. DataError if an activation is not finite."""
        block, within = divmod(step, self.batches_per_block)
        if block != self._block:
            self._acts = {}  # before the next is read: memory holds one block
            self._acts, self._block = self._read(block), block
        some = next(iter(self._acts.values()))
        order = torch.from_numpy(generator("block", self.seed, block).permutation(len(some)))
        # A block with less that counts than the mean begins again.
        at = torch.arange(within * self.batch_size, (within + 1) * self.batch_size) % len(some)
        return {site: x[order[at].to(x.device)] for site, x in self._acts.items()}

    def _read(self, block: int) -> dict[str, Tensor]:
        numbers = torch.from_numpy(self.rows_of(block))
        found: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        device = device_of(self.model)
        for part in numbers.split(ROWS_AT_ONCE):
            counts = self.valid[part].to(device)
            if not counts.any():
                continue
            for site, x in capture(self.model, self.rows[part].to(device), self.sites).items():
                found[site].append(x[counts].float())
        if not found[self.sites[0]]:
            raise DataError(f"block {block} of the stream has no position that counts; give it more rows")
        acts = {site: torch.cat(parts) for site, parts in found.items()}
        for site, x in acts.items():
            check_finite(x, f"{site}, block {block} of the stream (rows {numbers[:4].tolist()}...)")
        return acts

    def digests(self) -> dict[str, str]:
        rows = sha256_bytes(self.rows.numpy().tobytes() + self.valid.numpy().tobytes())
        plan = [self.batch_size, self.seed, self.block_rows, list(self.sites)]
        return {"activations": digest_of([self.model_digest, rows, *plan])}


def check_finite(x: Tensor, where: str) -> None:
    """Raise DataError, naming the first bad row, when ``x`` [n, width] holds NaN or infinity."""
    if torch.isfinite(x.sum()):  # one pass; only a sum that is not finite is worth a second
        return
    bad = (~torch.isfinite(x)).any(dim=-1).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"{where}: {len(bad)} of {len(x)} activations hold NaN or infinity, the first at {int(bad[0])}; "
            "a dictionary trained on them would be NaN. Look at the model or the rows that they came from"
        )


class TensorStream:
    """Activations in memory: {site: [n, width]}, row i of every site read at the same position."""

    def __init__(
        self, acts: Mapping[str, Tensor], *, batch_size: int = 4096, seed: int = 0, model_digest: str = ""
    ):
        if not acts or len({len(x) for x in acts.values()}) != 1 or any(x.ndim != 2 for x in acts.values()):
            shapes = {site: list(x.shape) for site, x in acts.items()}
            raise DataError(f"activations [n, width] of equal n are needed; got {shapes}")
        self.acts, self.batch_size, self.seed = dict(acts), batch_size, seed
        self.widths = {site: x.shape[1] for site, x in acts.items()}
        self.model_digest = model_digest
        self.n = len(next(iter(acts.values())))
        if self.n < 1:
            raise DataError("there is no activation to train on")
        for site, x in acts.items():
            check_finite(x, site)
        self._order = Shuffle([self.n], batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step``: every activation once before any comes again."""
        at = torch.from_numpy(self._order(step))
        return {site: x[at.to(x.device)].float() for site, x in self.acts.items()}

    def digests(self) -> dict[str, str]:
        whole = {
            s: sha256_bytes(x.detach().cpu().contiguous().numpy().tobytes()) for s, x in self.acts.items()
        }
        return {"activations": digest_of([whole, self.batch_size, self.seed, self.model_digest])}


class StoreStream:
    """Activations of an `ActivationStore` at some of its sites (None: all), in its shuffled order."""

    def __init__(
        self,
        store: ActivationStore,
        sites: str | Sequence[str] | None = None,
        *,
        batch_size: int = 4096,
        seed: int = 0,
    ):
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites or store.sites)
        for site in self.sites:
            if site not in store.widths:
                raise UsageError(f"no site {site!r} in {store.folder}.{suggest(site, store.sites)}")
        self.widths = {site: store.widths[site] for site in self.sites}
        self.model_digest = store.model_digest
        self._order = store.shuffle(batch_size, seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch ``step``: {site: [batch_size, width]} float32. DataError if one is not finite."""
        at = self._order(step)
        acts = {site: self.store.read(site, at) for site in self.sites}
        for site, x in acts.items():
            check_finite(x, f"{self.store.folder}, {site}, step {step}")
        return acts

    def digests(self) -> dict[str, str]:
        return {"activations": digest_of([self.store.digest, self.batch_size, self.seed, list(self.sites)])}
