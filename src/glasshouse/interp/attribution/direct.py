"""Direct logit attribution: what every component writes straight into the logits, adding up exactly.

The final stream is a sum: embedding, heads (each through its columns of the output matrix), MLPs, biases.
With the final norm's scale of this very run held fixed, a logit is linear in it, and so splits into one
number for each part (Elhage et al. 2021; nostalgebraist 2020). Held fixed in the same way: norms on what a
sub-layer writes (OLMo-2, Gemma-2), and a cap on the logits, as the ratio of capped to uncapped logit. The
parts then add up to the logit itself, not to an approximation of it; how far rounding takes them from it is
in every result.

Shape legend: n rows, m positions looked at, T positions, D d_model, H heads, K d_head, F d_mlp, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from markupsafe import Markup
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.draw import esc
from glasshouse.interp.attribution.effects import Effects
from glasshouse.interp.attribution.rerun import block as block_of
from glasshouse.interp.attribution.rerun import check_rows
from glasshouse.interp.metric import LogitDifference
from glasshouse.model import GPT, Taps
from glasshouse.model.gpt import Block
from glasshouse.model.norm import RMSNorm
from glasshouse.model.taps import Edit


@dataclass(frozen=True)
class DirectAttribution(Effects):
    """Parts of a logit or logit difference, in logits: ``per_row`` [part, n] adds up to ``total`` [n].

    Parts: ``input`` (token embedding), ``position``, heads ``a1.h2``, MLPs ``m1``, and biases ``a1.bias``,
    ``m1.bias``, ``norm.bias``. ``inexact``: the largest difference between sum and total, from rounding.
    ``sources`` [head, n, T] (if asked for): each head's part split by the position it was moved from, in the
    order of ``heads``.
    """

    total: Tensor = field(default_factory=lambda: torch.empty(0))
    inexact: float = 0.0
    sources: Tensor | None = None
    heads: tuple[str, ...] = ()

    def _drawn(self) -> Markup:
        about = f"The parts add up to the whole within {self.inexact:.1g} logits."
        return super()._drawn() + Markup("<p>{}</p>").format(esc(about))


@torch.no_grad()
def direct_logit_attribution(
    model: GPT,
    tokens: Tensor,
    right: Tensor,
    wrong: Tensor | None = None,
    at: Tensor | int = -1,
    *,
    sources: bool = False,
) -> DirectAttribution:
    """Split the logit of ``right`` (less that of ``wrong``) at one position of every row into parts.

    ``tokens`` int64 [n, pos]; ``right``, ``wrong`` int64 [n] or [n, k] (the mean of k); ``at`` int64 [n] or
    one position. ``sources``: split heads by source position too. UsageError for rows, tokens or positions
    that the model does not have.
    """
    tokens = check_rows(model, tokens)
    n, T = tokens.shape
    places = torch.as_tensor(at).expand(n).to(model.device)
    places = torch.where(places < 0, places + T, places)
    if int(places.min()) < 0 or int(places.max()) >= T:
        raise UsageError(f"at must be positions 0 to {T - 1} (or negative, from the end)")
    run = _Run(model, tokens, places[:, None], sources)
    target = run.weights(right.reshape(n, 1, -1), None if wrong is None else wrong.reshape(n, 1, -1))
    names, parts, total = run.split(target)
    sizes = run.source_parts() if sources else None
    about = "logit" if wrong is None else "logit difference"
    capped = ", cap at this run's ratio" if model.config.logit_softcap is not None else ""
    heads = tuple(name for name in names if ".h" in name)
    return DirectAttribution(
        tuple(names),
        parts[:, :, 0].double(),
        f"direct logit attribution (norms at this run's scale{capped})",
        about,
        tuple(_cell(name) for name in names),
        total=total[:, 0],
        inexact=float((parts.sum(0) - total).abs().max()),
        sources=sizes,
        heads=heads,
    )


def attribution_of(model: GPT, tokens: Tensor, metric: LogitDifference, **more: bool) -> DirectAttribution:
    """`direct_logit_attribution` of a data set's own metric."""
    return direct_logit_attribution(model, tokens, metric.right, metric.wrong, metric.at, **more)


@torch.no_grad()
def attribution_by_position(
    model: GPT, tokens: Tensor, targets: Tensor | None = None
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Parts [part, n, pos] of the logit of ``targets`` [n, pos] at every position, their names, and the
    logits [n, pos] that they add up to. Default: the token that follows (positions are then all but the
    last).
    """
    tokens = check_rows(model, tokens)
    if targets is None:
        if tokens.shape[1] < 2:
            raise UsageError("rows of one token have none that follows; give targets")
        targets = tokens[:, 1:]
    n, m = targets.shape
    run = _Run(model, tokens, torch.arange(m, device=tokens.device).expand(n, m), False)
    names, parts, total = run.split(run.weights(targets[..., None], None))
    return tuple(names), parts, total


def frozen_scale(norm: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """``norm`` at ``x`` [..., D] as a linear map: pull(d), with d . norm(y) = pull(d) . y + d . bias for all
    y of the same scale as x; and its bias [D]. UsageError for a norm that is none of the model's.
    """
    x = x.float()
    if isinstance(norm, nn.Identity):
        return lambda d: d, None
    if isinstance(norm, RMSNorm):
        gain = norm.weight.float() + (1.0 if norm.offset else 0.0)
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return lambda d: d * gain * scale, None
    if isinstance(norm, nn.LayerNorm):
        weight, scale = norm.weight.float(), (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()

        def pull(d: Tensor) -> Tensor:
            d = d * weight * scale
            return d - d.mean(-1, keepdim=True)  # centring is symmetric

        return pull, norm.bias.float()
    raise UsageError(f"a {type(norm).__name__} is not known to be linear at a fixed scale")


class _Run:
    """One forward pass, of which only the positions looked at are kept."""

    def __init__(self, model: GPT, tokens: Tensor, at: Tensor, sources: bool):
        if model.config.roles is not None:
            raise UsageError("roles add to the stream what none of the parts writes: they would not add up")
        self.model, self.tokens, self.at = model, tokens, at
        self.kept: dict[str, Tensor] = {}
        layers = range(model.config.n_layer)
        sites = [f"blocks.{i}.{s}" for i in layers for s in ("z", "mlp_post")]
        edits: dict[str, Edit] = {site: self._keep(site) for site in sites}
        edits[f"blocks.{layers[-1]}.resid_post"] = self._keep("final")
        read = [f"blocks.{i}.{s}" for i in layers for s in ("pattern", "v")] if sources else []
        with Taps(read=read, edit=edits) as taps:
            hidden = model.hidden(tokens, taps)
        self.acts = taps.acts
        self.raw = hidden.gather(1, at[..., None].expand(*at.shape, hidden.shape[-1])).float()
        self.directions: list[Tensor] = []

    def _keep(self, name: str) -> Edit:
        def edit(x: Tensor) -> Tensor:
            headed = x.ndim == 4
            if headed:
                x_at = x.transpose(1, 2).flatten(2)  # [n, T, H * K]
            else:
                x_at = x
            self.kept[name] = x_at.gather(
                1, self.at[..., None].expand(*self.at.shape, x_at.shape[-1])
            ).float()
            return x

        return edit

    def weights(self, right: Tensor, wrong: Tensor | None) -> tuple[Tensor, Tensor]:
        """Direction [n, m, D] in the normed stream whose product with it is the target; the target [n, m].

        Tokens are [n, m, k]. With a cap, each token's direction carries its ratio of capped to raw logit.
        """
        W, cap = self.model.head_weight.float(), self.model.config.logit_softcap
        direction, total = torch.zeros_like(self.raw), torch.zeros(self.raw.shape[:2], device=W.device)
        for tokens, sign in ((right, 1), (wrong, -1)):
            if tokens is None:
                continue
            tokens = tokens.to(W.device)
            if int(tokens.min()) < 0 or int(tokens.max()) >= len(W):
                raise UsageError(f"target tokens must be ids 0 to {len(W) - 1}")
            rows = W[tokens]  # [n, m, k, D]
            logits = (rows * self.raw[:, :, None]).sum(-1)
            if cap is not None:
                capped = cap * torch.tanh(logits / cap)
                ratio = torch.where(logits.abs() < 1e-6, torch.ones_like(logits), capped / logits)
                rows, logits = rows * ratio[..., None], capped
            direction += sign * rows.mean(2)
            total += sign * logits.mean(2)
        return direction, total

    def split(self, target: tuple[Tensor, Tensor]) -> tuple[list[str], Tensor, Tensor]:
        """Names, parts [part, n, m] and their sum [n, m]."""
        model, (normed, total) = self.model, target
        pull, bias = frozen_scale(model.norm, self.kept["final"])
        stream = pull(normed)
        parts: dict[str, Tensor] = {"input": (self._embedded() * stream).sum(-1)}
        if model.config.position == "learned":
            parts["position"] = (model.pos(self.at).float() * stream).sum(-1)
        for layer in range(model.config.n_layer):
            block = block_of(model, layer)
            self._attention(parts, layer, block, stream)
            post = self.kept[f"blocks.{layer}.mlp_post"]
            down = block.mlp.down
            self._sublayer(parts, f"m{layer}", block.post2, down, post, stream)
        if bias is not None:
            parts["norm.bias"] = (normed * bias).sum(-1)
        return list(parts), torch.stack(list(parts.values())), total

    def _embedded(self) -> Tensor:
        x = self.model.embed(self.tokens.gather(1, self.at)).float()
        return x if self.model.config.embed_scale is None else x * self.model.config.embed_scale

    def _sublayer(
        self, parts: dict[str, Tensor], name: str, norm: nn.Module, out: nn.Linear, x: Tensor, stream: Tensor
    ) -> Tensor:
        """Add a sub-layer's part and its biases; return its direction [n, m, in] before ``out``."""
        pull, bias = frozen_scale(norm, nn.functional.linear(x, out.weight.float(), _float(out.bias)))
        written = pull(stream)
        inner = written @ out.weight.float()
        parts[name] = (inner * x).sum(-1)
        fixed = torch.zeros_like(parts[name])
        if out.bias is not None:
            fixed = fixed + written @ out.bias.float()
        if bias is not None:
            fixed = fixed + stream @ bias
        if out.bias is not None or bias is not None:
            parts[f"{name}.bias"] = fixed
        return inner

    def _attention(self, parts: dict[str, Tensor], layer: int, block: Block, stream: Tensor) -> None:
        z, H = self.kept[f"blocks.{layer}.z"], self.model.config.n_head
        whole: dict[str, Tensor] = {}
        inner = self._sublayer(whole, "a", block.post1, block.attn.o, z, stream)
        inner = inner.unflatten(-1, (H, -1))  # [n, m, H, K]
        each = (inner * z.unflatten(-1, (H, -1))).sum(-1)
        parts.update({f"a{layer}.h{h}": each[..., h] for h in range(H)})
        if "a.bias" in whole:
            parts[f"a{layer}.bias"] = whole["a.bias"]
        self.directions.append(inner)

    def source_parts(self) -> Tensor:
        """Heads' parts by source position [layer * head, n, T], for one position looked at."""
        found = []
        groups = self.model.config.n_head // self.model.config.kv_heads
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        for layer, inner in enumerate(self.directions):
            pattern = self.acts[f"blocks.{layer}.pattern"][rows, :, self.at[:, 0]].float()  # [n, H, T]
            v = self.acts[f"blocks.{layer}.v"].float().repeat_interleave(groups, 1)  # [n, H, T, K]
            found.append((pattern * torch.einsum("nhtk,nhk->nht", v, inner[:, 0])).transpose(0, 1))
        return torch.cat(found)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _cell(name: str) -> tuple[str, str]:
    body, _, column = name.partition(".")
    if body[0] in "am" and body[1:].isdigit():
        kind = "attn" if body[0] == "a" else "mlp"
        return f"layer {body[1:]}", column if column.startswith("h") else f"{kind} {column}".strip()
    return name, "all"
