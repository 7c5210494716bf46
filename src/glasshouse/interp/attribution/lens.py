"""Logit lens and tuned lens: what the model would say if it stopped after each layer.

Logit lens (nostalgebraist 2020): the final norm and head applied to the stream of an earlier layer. Tuned
lens (Belrose et al. 2023, arXiv 2303.08112): the same after an affine map of each layer's own, trained so
that its prediction is near the model's final one (KL from final to lens, in nats).

Shape legend: n rows, T positions, L places in the stream (embedding, then after every layer), D d_model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor, nn

from glasshouse.base.atomic import atomic_dir, write_json
from glasshouse.base.errors import CheckpointError, TrainingError, UsageError
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import Axes, Series, line_chart
from glasshouse.draw.svg import el, figure, shorten, styled, text
from glasshouse.interp.attribution.rerun import check_rows, row_chunks
from glasshouse.interp.reading.gradients import frozen
from glasshouse.model import GPT, Taps
from glasshouse.model.digest import weights_digest
from glasshouse.model.weights import read_safetensors, write_safetensors
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import Loss, TensorBatch
from glasshouse.train.optim import Optimizers
from glasshouse.train.schedule import warmup_stable_decay

WEIGHTS, ABOUT = "lens.safetensors", "lens.json"
DRAWN = 14  # positions that a picture has room for


def stream_sites(model: GPT) -> list[str]:
    """The stream after the embedding and after every layer."""
    return ["embed", *(f"blocks.{i}.resid_post" for i in range(model.config.n_layer))]


class TunedLens(nn.Module):
    """One affine map a place but the last: x + x A' + b, beginning as nothing (A = 0, b = 0).

    ``weight`` [L - 1, D, D] and ``bias`` [L - 1, D]. The model it belongs to is held, never trained, and not
    part of its parameters.
    """

    def __init__(self, model: GPT):
        super().__init__()
        places, width = model.config.n_layer, model.config.d_model
        self.weight = nn.Parameter(torch.zeros(places, width, width, device=model.device))
        self.bias = nn.Parameter(torch.zeros(places, width, device=model.device))
        self._model = (model,)  # in a tuple: a module's attribute would become part of this one

    @property
    def model(self) -> GPT:
        """The model it was made for."""
        return self._model[0]

    def forward(self, x: Tensor, place: int) -> Tensor:
        """The stream [..., D] of ``place`` (0: embedding) as if it were the last; the last stays as it is."""
        if place == len(self.bias):
            return x
        return x + F.linear(x, self.weight[place].to(x), self.bias[place].to(x))

    def save(self, folder: str | Path) -> None:
        """Write ``lens.safetensors`` and ``lens.json``, with the digest of the model, into a new folder."""
        about = {"kind": "tuned lens", "model_digest": weights_digest(self.model)}
        about |= {"sites": json.dumps(stream_sites(self.model)[:-1])}
        with atomic_dir(folder) as inside:
            write_safetensors(inside / WEIGHTS, {"weight": self.weight, "bias": self.bias})
            write_json(inside / ABOUT, about)

    @classmethod
    def load(cls, folder: str | Path, model: GPT) -> TunedLens:
        """Read a lens for ``model``. CheckpointError when it is damaged or was made for other weights."""
        folder, lens = Path(folder), cls(model)
        try:
            about = json.loads((folder / ABOUT).read_text("utf-8"))
            digest = about["model_digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / ABOUT} is missing or damaged: {error}") from error
        if digest != weights_digest(model):
            raise CheckpointError(
                f"{folder} was fitted on other weights ({str(digest)[:12]}) than this model's "
                f"({weights_digest(model)[:12]}); fit a lens on this model"
            )
        shapes = {"weight": tuple(lens.weight.shape), "bias": tuple(lens.bias.shape)}
        with torch.no_grad():
            for name, value in read_safetensors(folder / WEIGHTS, shapes).items():
                getattr(lens, name).copy_(value)
        return lens


def tuned_lens_loss(lens: TunedLens, batch: TensorBatch) -> Loss:
    """Objective: mean over places and weighted positions of KL(final || lens), in nats."""
    model = lens.model
    with torch.no_grad(), Taps(read=stream_sites(model)) as taps:
        final = model(batch.tokens, taps).float().log_softmax(-1)
    weight = batch.weight / batch.weight.sum()
    parts: dict[str, Tensor] = {}
    with frozen(model):
        for place, site in enumerate(stream_sites(model)[:-1]):
            kl = divergence(final, _said(model, lens(taps[site], place)))
            parts[site] = (kl * weight).sum() / len(lens.bias)
    total = torch.stack(list(parts.values())).sum()
    return Loss(total, parts, {"tokens": float(batch.tokens.numel())})


def fit_tuned_lens(
    model: GPT, tokens: Tensor, *, steps: int = 250, batch_size: int = 8, lr: float = 1e-3, seed: int = 0
) -> TunedLens:
    """Train a tuned lens on rows ``tokens`` int64 [n, pos], drawn by ``seed``; the model is left as it was.

    AdamW at ``lr``, falling to 0 over the last two fifths, no weight decay (Belrose et al. use SGD or Adam).
    TrainingError when the loss is not finite; UsageError for rows that do not fit the model.
    """
    tokens, lens = check_rows(model, tokens), TunedLens(model)
    numbers = {"steps": steps, "batch_size": batch_size, "adam_lr": lr, "weight_decay": 0.0}
    config = StageConfig.model_validate({"name": "tuned-lens", "optimizer": "adamw", **numbers})
    optimizers, drawn = Optimizers(lens, config), torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = tokens[torch.randint(len(tokens), (batch_size,), generator=drawn)]
        loss = tuned_lens_loss(lens, TensorBatch(rows, rows, torch.ones(rows.shape, device=rows.device), 0))
        if not torch.isfinite(loss.total):
            raise TrainingError(f"tuned lens, step {step}: the loss is not finite; lower lr (now {lr})")
        optimizers.zero_grad()
        torch.autograd.backward(loss.total)
        optimizers.clip()
        warm, decay = config.warmup_share, config.decay_share
        optimizers.step(warmup_stable_decay(step, steps, warmup_share=warm, decay_share=decay))
    return lens.eval()


def divergence(final: Tensor, said: Tensor) -> Tensor:
    """KL(final || said) in nats, of log-probabilities [..., vocab]."""
    return F.kl_div(said, final, reduction="none", log_target=True).sum(-1)


def _said(model: GPT, x: Tensor) -> Tensor:
    """Log-probabilities of a stream as if it were the last."""
    return model.unembed(model.norm(x)).float().log_softmax(-1)


@dataclass(frozen=True)
class LensReading:
    """What each place in the stream says, on rows ``tokens`` [n, T].

    ``kl`` [L, n, T]: nats from the final prediction; ``loss`` [L, n, T - 1]: nats of the token that follows;
    ``top`` [L, n, T] and ``share`` [L, n, T]: the likeliest token and its probability.
    """

    lens: str
    sites: tuple[str, ...]
    tokens: Tensor
    kl: Tensor
    loss: Tensor
    top: Tensor
    share: Tensor
    words: Sequence[str] = field(default=())

    def kl_scores(self) -> dict[str, Score]:
        """Mean KL to the final prediction by site, interval over rows (positions of a row hang together)."""
        return {s: bootstrap(self.kl[i].mean(-1).numpy()) for i, s in enumerate(self.sites)}

    def loss_scores(self) -> dict[str, Score]:
        """Mean loss on the next token by site, interval over rows."""
        return {s: bootstrap(self.loss[i].mean(-1).numpy()) for i, s in enumerate(self.sites)}

    def gain_over(self, other: LensReading) -> dict[str, Score]:
        """By how many nats of KL this lens is nearer to the final prediction than ``other``, row by row."""
        if self.sites != other.sites or not torch.equal(self.tokens, other.tokens):
            raise UsageError("two lenses are compared on the same rows and sites")
        gained = (other.kl - self.kl).mean(-1).numpy()
        return {s: bootstrap(gained[i]) for i, s in enumerate(self.sites)}

    def __str__(self) -> str:
        lines = [f"  {site:24s} KL {score}" for site, score in self.kl_scores().items()]
        return "\n".join([f"{self.lens}, nats from the final prediction", *lines])

    def _repr_html_(self) -> str:
        points = [(float(i), s.value) for i, s in enumerate(self.kl_scores().values())]
        bars = [(float(i), s.low, s.high) for i, s in enumerate(self.kl_scores().values())]
        curve = Series(self.lens, points, style="both", intervals=bars)
        chart = line_chart(
            [curve],
            self.lens,
            f"KL from the final prediction, in nats, n = {len(self.tokens)} rows",
            Axes("place in the stream (0: embedding)", "KL to final, nats"),
        )
        return styled(chart, self.grid(0))

    def grid(self, row: int) -> Markup:
        """Likeliest token at every place (bottom: embedding) and (the first `DRAWN`) position of
        one row, shaded by its share."""
        top, share = self.top[:, row, :DRAWN], self.share[:, row, :DRAWN]
        size, tall, left = 62.0, 22.0, 60.0
        parts: list[Markup] = []
        L, T = top.shape
        for i in range(L):
            y = (L - 1 - i) * tall
            parts.append(text(left - 6, y + 15, "input" if i == 0 else f"layer {i - 1}", anchor="end"))
            for t in range(T):
                x, p, word = left + t * size, float(share[i, t]), self._word(int(top[i, t]))
                tip = el("title", f"{word}: {p:.2f}")
                box = {"x": x + 1, "y": y + 1, "width": size - 2, "height": tall - 2}
                parts.append(el("rect", tip, **box, class_="cell", fill_opacity=f"{p:.3f}"))
                ink = "on" if p > 0.55 else "value"
                parts.append(text(x + size / 2, y + 15, shorten(word, size - 6), ink, "middle"))
        for t in range(T):
            word = self._word(int(self.tokens[row, t]))
            parts.append(
                text(left + (t + 0.5) * size, L * tall + 15, shorten(word, size - 4), anchor="middle")
            )
        about = f"{self.lens}: likeliest next token after each layer, shaded by its probability"
        return figure(left + T * size + 4, (L + 1) * tall, about, about, *parts)

    def _word(self, token: int) -> str:
        return str(self.words[token]) if token < len(self.words) else f"#{token}"


@torch.no_grad()
def logit_lens(
    model: GPT,
    tokens: Tensor,
    lens: TunedLens | None = None,
    *,
    decode: Callable[[int], str] | None = None,
    sequences: int = 16,
) -> LensReading:
    """Read the stream after every layer, through ``lens`` if one is given, on rows int64 [n, pos].

    ``decode``: the text of a token id, for display. UsageError for rows that do not fit the model, or a lens
    made for another.
    """
    tokens = check_rows(model, tokens)
    if lens is not None and lens.model is not model:
        raise UsageError("this lens was made for another model; load it for this one with TunedLens.load")
    sites = stream_sites(model)
    found: dict[str, list[Tensor]] = {"kl": [], "loss": [], "top": [], "share": []}
    for rows in row_chunks(len(tokens), sequences):
        some = tokens[rows]
        with Taps(read=sites) as taps:
            final = model(some, taps).float().log_softmax(-1)
        each: dict[str, list[Tensor]] = {name: [] for name in found}
        for place, site in enumerate(sites):
            said = _said(model, taps[site] if lens is None else lens(taps[site], place))
            share, top = said.max(-1)
            following = some[:, 1:, None]
            each["kl"].append(divergence(final, said))
            each["loss"].append(-said[:, :-1].gather(-1, following)[..., 0])
            each["top"].append(top)
            each["share"].append(share.exp())
        for name, values in each.items():
            found[name].append(torch.stack(values).cpu())
    name = "logit lens" if lens is None else "tuned lens"
    words = [decode(i) for i in range(model.config.vocab_size)] if decode else ()
    parts = {k: torch.cat(v, 1) for k, v in found.items()}
    if not torch.isfinite(parts["kl"]).all():
        raise UsageError(f"{name}: predictions are not finite; look for NaN in the model's weights")
    return LensReading(name, tuple(sites), tokens.cpu(), **parts, words=words)
