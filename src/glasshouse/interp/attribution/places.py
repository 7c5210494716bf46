"""Where in a model something is changed: a site, perhaps one head of it, perhaps one position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from glasshouse.base.errors import UsageError, suggest
from glasshouse.model import GPT

HEADED = ("q", "k", "v", "pattern", "z")  # sites with a head axis: [batch, head, pos, ...]
_NODE = re.compile(r"a(\d+)\.h(\d+)|m(\d+)|(input)")
_SITE = re.compile(r"(.+)\.h(\d+)")


@dataclass(frozen=True)
class Place:
    """An activation of one site, of one ``head`` (None: all of them) and one position (None: all).

    ``k`` and ``v`` have key/value heads, of which several query heads may share one.
    """

    site: str
    head: int | None = None
    pos: int | None = None

    @property
    def layer(self) -> int:
        """The block it is in; -1 for the embedding, a large number after the last block."""
        if self.site == "embed":
            return -1
        return int(self.site.split(".")[1]) if self.site.startswith("blocks.") else 10**6

    @property
    def part(self) -> str:
        """The site without its block: ``z``, ``resid_post``, ``embed``."""
        return self.site.rpartition(".")[2]

    @property
    def node(self) -> str:
        """Its name without the position: MIB's for heads (``a1.h2``), MLPs (``m1``) and the embedding
        (``input``), else the site's, with ``.h2`` for a head.
        """
        if self.part == "z" and self.head is not None:
            return f"a{self.layer}.h{self.head}"
        if self.part == "mlp_out":
            return f"m{self.layer}"
        if self.site == "embed":
            return "input"
        return self.site if self.head is None else f"{self.site}.h{self.head}"

    @property
    def name(self) -> str:
        """``node``, with ``@3`` for one position."""
        return self.node if self.pos is None else f"{self.node}@{self.pos}"

    @property
    def cell(self) -> tuple[str, str]:
        """Row and column of a heat map: layer by head, or node by position."""
        if self.pos is not None:
            return self.node, str(self.pos)
        if self.layer < 0 or self.layer >= 10**6:
            return self.site, "all"
        column = self.part if self.head is None else f"h{self.head}"
        if self.part in ("q", "k", "v") and self.head is not None:
            column = f"{self.part}{self.head}"
        return f"layer {self.layer}", "mlp" if self.part == "mlp_out" else column

    def put(self, x: Tensor, rows: slice, source: Tensor) -> None:
        """Write ``source`` [n, ...] into ``rows`` of ``x`` [batch, ...] at this place."""
        x[(rows, *self._index())] = source[(slice(None), *self._index())].to(x)

    def of(self, x: Tensor) -> Tensor:
        """What stands here in ``x`` [n, ...]: [n, ...] of the same rank, axes of length 1 where one was
        chosen.
        """
        return x[(slice(None), *self._index())]

    def _index(self) -> tuple[slice, ...]:
        whole = slice(None)
        pos = whole if self.pos is None else slice(self.pos, self.pos + 1)
        if self.part not in HEADED:
            return (pos,)
        return whole if self.head is None else slice(self.head, self.head + 1), pos


def node(name: str, model: GPT) -> Place:
    """The place of a name as `Place.name` makes it. UsageError with the nearest name for an unknown one."""
    body, _, at = name.partition("@")
    pos = int(at) if at.isdigit() else None
    found = _NODE.fullmatch(body)
    if found:
        layer, head, mlp, _ = found.groups()
        if layer is not None:
            place = Place(f"blocks.{int(layer)}.z", int(head), pos)
        else:
            place = Place("embed" if mlp is None else f"blocks.{int(mlp)}.mlp_out", None, pos)
    else:
        site, head = body, None
        if named := _SITE.fullmatch(body):
            site, head = named.groups()
        place = Place(site, None if head is None else int(head), pos)
    if (at and pos is None) or not _exists(place, model):
        known = [p.name for p in components(model)] + model.sites()
        raise UsageError(
            f"no place {name!r} in this model.{suggest(name, known)} Names are input, a<layer>.h<head>, "
            "m<layer> or a site of model.sites(), with .h<head> and @<position> where wanted"
        )
    return place


def _exists(place: Place, model: GPT) -> bool:
    if place.site not in model.sites():
        return False
    if place.head is None:
        return True
    heads = model.config.kv_heads if place.part in ("k", "v") else model.config.n_head
    return place.part in HEADED and place.head < heads


def resolve(places: Iterable[Place | str] | None, model: GPT, n_pos: int) -> list[Place]:
    """Places by name or as they are (None: every head and MLP), checked against the model and the rows."""
    if isinstance(places, str):
        places = [places]
    chosen = components(model) if places is None else list(places)
    found = [node(p if isinstance(p, str) else p.name, model) for p in chosen]
    for p in found:
        if p.pos is not None and not p.pos < n_pos:
            raise UsageError(f"{p.name}: the rows have positions 0 to {n_pos - 1}")
    if not found:
        raise UsageError("no place was named; leave `places` out for every head and MLP")
    return found


def components(model: GPT, positions: Sequence[int] | None = None) -> list[Place]:
    """Every head's output and every MLP's, in the order of computation; at each of ``positions`` if given."""
    at: Sequence[int | None] = [None] if positions is None else positions
    found = []
    for layer in range(model.config.n_layer):
        nodes = [(f"blocks.{layer}.z", h) for h in range(model.config.n_head)]
        found += [Place(*n, pos) for n in [*nodes, (f"blocks.{layer}.mlp_out", None)] for pos in at]
    return found


def stream(model: GPT, positions: Sequence[int]) -> list[Place]:
    """The residual stream at each of ``positions``: the embedding, then after every layer."""
    sites = ["embed", *(f"blocks.{i}.resid_post" for i in range(model.config.n_layer))]
    return [Place(site, None, pos) for site in sites for pos in positions]


def attention_inputs(model: GPT) -> list[Place]:
    """Queries of every head, keys and values of every key/value head."""
    heads = {"q": model.config.n_head, "k": model.config.kv_heads, "v": model.config.kv_heads}
    layers = range(model.config.n_layer)
    return [Place(f"blocks.{i}.{s}", h) for i in layers for s, count in heads.items() for h in range(count)]
