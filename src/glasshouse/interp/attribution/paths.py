"""Path patching: what one component tells another directly, everything else kept as it was.

Goldowsky-Dill et al. (2023), after Wang et al. (2022). Three runs: (1) clean and corrupt, kept; (2) the base
run with the sender exchanged and every other head and MLP held at its base value, so that the sender reaches
the receivers along the residual stream alone; what the receivers compute from it is kept; (3) the base run
with the receivers given that. Run 2 is a forward pass with its outputs held, so norms that read the stream
(and norms on what a sub-layer writes) act on it as they do in the model. With ``value_residual`` the first
layer's values are read by later ones directly, and count as part of what a receiver's values read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.interp.attribution.effects import Effects, effects
from glasshouse.interp.attribution.patch import WAYS, Direction, check_way
from glasshouse.interp.attribution.places import Place, components, resolve
from glasshouse.interp.attribution.rerun import (
    SEQUENCES,
    Base,
    base_run,
    check_rows,
    cut,
    in_turn,
    put_edits,
    read,
    resume,
    row_chunks,
    rule_of,
    times,
)
from glasshouse.interp.metric import Contrast
from glasshouse.model import GPT, Taps
from glasshouse.model.attend import attention_pattern
from glasshouse.model.taps import Edit

_RECEIVER = re.compile(r"a(\d+)\.h(\d+)(?:<([qkv])>)?|m(\d+)|logits")
LOGITS = 10**6  # the layer of the logits: after every block


@dataclass(frozen=True)
class Receiver:
    """What is told: inputs of one head ("q", "k", "v"; a query head's own, where several share a key), an
    MLP (``head`` None), or the logits.
    """

    layer: int
    head: int | None = None
    inputs: tuple[str, ...] = ()

    def reads(self, parallel: bool) -> int:
        """Its place in the order of the stream: what was written before is read."""
        return 2 * self.layer + (0 if self.head is not None or parallel else 1)


def receiver(name: str, model: GPT) -> Receiver:
    """``logits``, ``m2``, ``a2.h1`` (queries, keys and values) or ``a2.h1<q>``; UsageError otherwise."""
    found, config = _RECEIVER.fullmatch(name), model.config
    if found and name == "logits":
        return Receiver(LOGITS)
    if found and found[4] is not None and int(found[4]) < config.n_layer:
        return Receiver(int(found[4]))
    if found and found[1] is not None and int(found[1]) < config.n_layer and int(found[2]) < config.n_head:
        return Receiver(int(found[1]), int(found[2]), (found[3],) if found[3] else ("q", "k", "v"))
    heads = [f"a{i}.h{h}" for i in range(config.n_layer) for h in range(config.n_head)]
    known = ["logits", *(f"m{i}" for i in range(config.n_layer)), *heads]
    known += [f"{h}<{letter}>" for h in heads for letter in "qkv"]
    raise UsageError(
        f"no receiver {name!r} in this model.{suggest(name, known)} Receivers are logits, m<layer>, "
        "a<layer>.h<head>, and a<layer>.h<head><q> (or <k>, <v>)"
    )


@torch.no_grad()
def path_patching(
    model: GPT,
    contrast: Contrast,
    receivers: Sequence[str] | str,
    senders: Iterable[Place | str] | None = None,
    *,
    direction: Direction = "noise",
    through_mlps: bool = False,
    sequences: int = SEQUENCES,
) -> Effects:
    """The effect of each sender on the metric through its direct paths to ``receivers`` alone.

    ``senders`` (None: the embedding and every head and MLP that some receiver reads): heads, MLPs, ``input``,
    perhaps at a position (``a0.h1@3``). ``through_mlps``: MLPs between are computed, not held, as Wang et al.
    have it. ``direction`` and shares of the gap as in `patch_activations`. UsageError for an unknown name,
    "logits" beside other receivers, or a sender that no receiver comes after.
    """
    check_way(direction)
    names = [receivers] if isinstance(receivers, str) else list(receivers)
    told = [receiver(name, model) for name in names]
    if not told or (any(r.layer == LOGITS for r in told) and len(told) > 1):
        raise UsageError("name one or more receivers; logits stand alone")
    clean, corrupt = check_rows(model, contrast.clean), check_rows(model, contrast.corrupt)
    chosen = _senders(model, senders, told, names, clean.shape[1])
    moved, gaps = [], []
    for rows in row_chunks(len(contrast), sequences):
        good = base_run(model, clean[rows], contrast.metric, rows)
        bad = base_run(model, corrupt[rows], contrast.metric, rows)
        base, giver, sign = (bad, good, 1) if direction == "denoise" else (good, bad, -1)
        found = _Paths(model, contrast, told, through_mlps, base, giver).all(chosen, sequences)
        moved.append(sign * (found - base.values))
        gaps.append(good.values - bad.values)
    held = "heads held, MLPs computed" if through_mlps else "heads and MLPs held"
    method = f"path patching to {', '.join(names)}, {WAYS[direction]} (interchange, exact; {held})"
    return effects(chosen, torch.cat(moved, 1), method, contrast.metric, torch.cat(gaps))


def _senders(
    model: GPT, senders: Iterable[Place | str] | None, told: list[Receiver], names: list[str], n_pos: int
) -> list[Place]:
    last = max(r.reads(model.config.parallel) for r in told)
    given = [Place("embed"), *components(model)] if senders is None else senders
    chosen = resolve(given, model, n_pos)
    for p in chosen:
        if p.part not in ("embed", "z", "mlp_out") or (p.part == "z" and p.head is None):
            raise UsageError(f"{p.name} is no sender: senders are input, heads (a1.h2) and MLPs (m1)")
    reached = [p for p in chosen if _writes(p) < last]
    if len(reached) < len(chosen) and senders is not None:
        late = next(p.name for p in chosen if _writes(p) >= last)
        raise UsageError(f"nothing leads from {late} to {', '.join(names)}: every receiver reads before it")
    return reached


def _writes(sender: Place) -> int:
    """Its place in the order of the stream."""
    return -1 if sender.layer < 0 else 2 * sender.layer + (sender.part == "mlp_out")


class _Paths:
    """Runs 2 and 3 for one chunk of rows."""

    def __init__(
        self, model: GPT, contrast: Contrast, told: list[Receiver], through: bool, base: Base, giver: Base
    ):
        self.model, self.metric, self.told, self.base = model, contrast.metric, told, base
        layers = range(model.config.n_layer)
        self.held_sites = [f"blocks.{i}.z" for i in layers]
        if not through:
            self.held_sites += [f"blocks.{i}.mlp_out" for i in layers]
        outputs = ["embed", *(f"blocks.{i}.{s}" for i in layers for s in ("z", "mlp_out"))]
        self.held = read(model, base.tokens, outputs)
        self.source = read(model, giver.tokens, outputs)

    def all(self, senders: list[Place], sequences: int) -> Tensor:
        """The metric [sender, n] of run 3."""
        n = len(self.base.tokens)
        found = torch.empty(len(senders), n, device=self.base.values.device, dtype=self.base.values.dtype)
        order = sorted(range(len(senders)), key=lambda i: senders[i].layer)
        for some in cut(order, max(1, sequences // n)):
            found[some] = self._some([senders[i] for i in some]).view(len(some), n)
        return found

    def _some(self, senders: list[Place]) -> Tensor:
        """The metric [sender * n] for senders in one batch."""
        logits, kept = self._send(senders)
        if self.told[0].layer != LOGITS:
            logits = self._receive(kept, len(senders))
        return self.metric(logits, self.base.rows.repeat(len(senders)))

    def _send(self, senders: list[Place]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run 2: logits, and what the receivers computed, by site."""
        k, kept = len(senders), {}
        exchange = put_edits(in_turn(senders, len(self.base.tokens)), self.source)

        def edit(site: str) -> Edit:
            def change(x: Tensor) -> Tensor:
                kept[site] = x
                if site in self.held_sites:
                    x = times(self.held[site], k)
                return exchange[site](x) if site in exchange else x

            return change

        wanted = {f"blocks.{r.layer}.{s}" for r in self.told for s in r.inputs}
        wanted |= {f"blocks.{r.layer}.mlp_out" for r in self.told if r.head is None and r.layer != LOGITS}
        first = max(0, min([p.layer for p in senders] + [r.layer for r in self.told]))
        sites = wanted | exchange.keys() | set(self.held_sites)
        taps = Taps(edit={s: edit(s) for s in sites if s == "embed" or int(s.split(".")[1]) >= first})
        return self._run(first, k, taps), kept

    def _receive(self, kept: Mapping[str, Tensor], k: int) -> Tensor:
        """Run 3: logits of the base run with the receivers given what they computed in run 2."""
        edits: dict[str, Edit] = {}
        now: dict[str, Tensor] = {}
        for layer in {r.layer for r in self.told}:
            heads = [r for r in self.told if r.layer == layer and r.head is not None]
            if len(heads) < sum(r.layer == layer for r in self.told):
                site = f"blocks.{layer}.mlp_out"
                edits[site] = _given(kept[site])
            if heads:
                edits |= {f"blocks.{layer}.{s}": _noted(now, f"blocks.{layer}.{s}") for s in "qkv"}
                edits[f"blocks.{layer}.z"] = self._attend_again(layer, heads, now, kept)
        return self._run(min(r.layer for r in self.told), k, Taps(edit=edits))

    def _attend_again(
        self, layer: int, heads: list[Receiver], now: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> Edit:
        """Compute the chosen heads' outputs from the queries, keys and values they are given."""
        config, rule = self.model.config, rule_of(self.model, layer)
        groups = config.n_head // config.kv_heads

        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            full, local = self.model.where(z.shape[2])
            mask = (local if config.windowed(layer) else full).mask
            for head in sorted({r.head for r in heads if r.head is not None}):
                given = {s for r in heads if r.head == head for s in r.inputs}
                side = {}
                for s in "qkv":
                    site, at = f"blocks.{layer}.{s}", head if s == "q" else head // groups
                    side[s] = (kept if s in given else now)[site][:, at : at + 1]
                pattern = attention_pattern(side["q"], side["k"], mask, rule)
                z[:, head : head + 1] = pattern @ side["v"]
            return z

        return edit

    def _run(self, layer: int, k: int, taps: Taps) -> Tensor:
        first_v = None if self.base.first_v is None else times(self.base.first_v, k)
        with taps:
            return resume(self.model, times(self.base.before[layer], k), layer, taps, first_v)


def _given(value: Tensor) -> Edit:
    return lambda x: value


def _noted(store: dict[str, Tensor], site: str) -> Edit:
    def note(x: Tensor) -> Tensor:
        store[site] = x
        return x

    return note
