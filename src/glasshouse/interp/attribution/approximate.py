"""Attribution patching: every place's effect at once, from two forward passes and one backward pass.

Nanda (2023): effect = (activation put in - activation there) . d metric / d activation. Exact where the
model is linear between the two; a query or key acts through a softmax, where it is worst, and ``qk_fix``
(AtP*, Kramar et al. 2024, arXiv 2403.00745, sec. 3.1.1) computes the changed attention pattern exactly and is
linear only after it.

Shape legend: n rows, H query heads, G key/value heads, T = S positions, K d_head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from glasshouse.interp.attribution.effects import Effects, effects
from glasshouse.interp.attribution.gradients import activation_gradients
from glasshouse.interp.attribution.patch import WAYS, Direction, check_way
from glasshouse.interp.attribution.places import Place, resolve
from glasshouse.interp.attribution.rerun import SEQUENCES, check_rows, row_chunks, rule_of, seen_by
from glasshouse.interp.metric import Contrast
from glasshouse.model import GPT, Taps

Acts = Mapping[str, Tensor]


def attribution_patching(
    model: GPT,
    contrast: Contrast,
    places: Iterable[Place | str] | None = None,
    *,
    direction: Direction = "denoise",
    qk_fix: bool = True,
    sequences: int = SEQUENCES,
) -> Effects:
    """The linear estimate of `patch_activations` (same arguments, same places, same signs).

    ``qk_fix`` concerns places in ``q`` and ``k`` only. How far to trust it on a model:
    ``estimate.correlation(patch_activations(...))``. Errors as there.
    """
    check_way(direction)
    clean, corrupt = check_rows(model, contrast.clean), check_rows(model, contrast.corrupt)
    chosen = resolve(places, model, clean.shape[1])
    fixed = {p for p in chosen if qk_fix and p.part in ("q", "k")}
    sites = {p.site for p in chosen}
    for p in fixed:
        sites |= {f"blocks.{p.layer}.{s}" for s in ("q", "k", "pattern")}
    estimates, gaps = [], []
    for rows in row_chunks(len(contrast), sequences):
        there, put = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        sign = 1 if direction == "denoise" else -1
        value, acts, grads = activation_gradients(model, there[rows], contrast.metric, rows, sorted(sites))
        with torch.no_grad(), Taps(read=sites) as taps:
            other = contrast.metric(model(put[rows], taps), rows)
        gaps.append(sign * (other - value))
        found = [
            _through_softmax(model, p, acts, taps.acts, grads[f"blocks.{p.layer}.pattern"])
            if p in fixed
            else _linear(p, acts, taps.acts, grads)
            for p in chosen
        ]
        estimates.append(sign * torch.stack(found))
    how = "attribution patching" + (" with the QK fix" if fixed else "")
    method = f"{how}, {WAYS[direction]} (interchange, linear estimate)"
    return effects(chosen, torch.cat(estimates, 1), method, contrast.metric, torch.cat(gaps))


def _linear(place: Place, here: Acts, other: Acts, grads: Acts) -> Tensor:
    """First-order change of the metric [n]."""
    change = place.of(other[place.site]) - place.of(here[place.site])
    return (change * place.of(grads[place.site])).flatten(1).double().sum(1)


@torch.no_grad()
def _through_softmax(model: GPT, place: Place, here: Acts, other: Acts, grad: Tensor) -> Tensor:
    """Change of the metric [n], linear in the pattern, when a query or key head is exchanged.

    In fp64: what a key loses is divided among the others, and both can be small differences.
    """
    layer, groups = place.layer, model.config.n_head // model.config.kv_heads
    per_query = groups if place.part == "k" else 1
    heads = slice(None) if place.head is None else slice(place.head * per_query, (place.head + 1) * per_query)

    def side(acts: Acts, part: str) -> Tensor:
        x = acts[f"blocks.{layer}.{part}"].double()
        return (x.repeat_interleave(groups, 1) if part == "k" else x)[:, heads]

    q, k = side(here, "q"), side(here, "k")
    new_q, new_k = (side(other, "q"), k) if place.part == "q" else (q, side(other, "k"))
    g = grad[:, heads].double()
    seen = seen_by(model, layer, q.shape[2])
    was = _scores(model, layer, q, k).masked_fill(~seen, -torch.inf).log_softmax(-1)
    scores = _scores(model, layer, new_q, new_k)
    if place.part == "k" and place.pos is not None:
        change = scores[..., place.pos] - _scores(model, layer, q, k)[..., place.pos]
        return _one_key(was, g, change, place.pos).flatten(1).sum(1)
    moved = g * (scores.masked_fill(~seen, -torch.inf).softmax(-1) - was.exp())
    if place.pos is not None:
        moved = moved[:, :, place.pos]
    return moved.flatten(1).sum(1)


def _one_key(log_p: Tensor, g: Tensor, change: Tensor, pos: int) -> Tensor:
    """Change of g . pattern [n, H, T] when every query's score of key ``pos`` grows by ``change`` [n, H, T].

    With p' the pattern after: p'_j = p_j / Z for other keys, p'_pos = p_pos e^change / Z, where
    Z = 1 - p_pos + p_pos e^change.
    """
    p = log_p.exp()
    mine, old, mine_g = log_p[..., pos], p[..., pos], g[..., pos]
    others = -torch.expm1(mine)
    new = torch.exp(mine + change)
    Z = others + new
    mixed = (g * p).sum(-1) - mine_g * old  # of the other keys
    return mixed * (1 / Z - 1) + mine_g * (new / Z - old)


def _scores(model: GPT, layer: int, q: Tensor, k: Tensor) -> Tensor:
    rule = rule_of(model, layer)
    scores = (q * rule.scale) @ k.transpose(-1, -2)
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)
