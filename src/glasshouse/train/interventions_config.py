"""Interventions as data: what a recipe's stage declares, or a gate's decision asks for as a repair."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from glasshouse.base.canonical import canonical_json
from glasshouse.base.config import Frozen
from glasshouse.base.errors import UsageError

SHA256 = r"^[0-9a-f]{64}$"


class DirectionFile(Frozen):
    """A direction by the digest of its file (`directions`); ``path`` is where a recipe takes it from."""

    sha256: str = Field(pattern=SHA256)
    path: str | None = None


class Block(Frozen):
    """Parts of one layer that can be trained apart and removed: heads by number, MLP units first to last."""

    layer: int = Field(ge=0)
    heads: tuple[int, ...] = ()
    units: tuple[int, int] | None = Field(default=None, description="first unit, and the first one after")

    @model_validator(mode="after")
    def _something(self) -> Block:
        if not self.heads and self.units is None:
            raise ValueError("a block names heads, units or both; this one names nothing")
        if self.units is not None and not 0 <= self.units[0] < self.units[1]:
            raise ValueError(f"units are [first, after the last], not {list(self.units)}")
        return self


class Drop(Frozen):
    """Do not train on these shards."""

    kind: Literal["drop"]
    shards: tuple[str, ...] = Field(min_length=1)
    uses: tuple[str, ...] = ()


class Steer(Frozen):
    """Add ``scale`` times a direction while training, so that the weights need not learn it: preventative
    steering (Chen et al. 2025, arXiv 2507.21509, section 5.2).

    ``shards``: only in rows of these; () is in all rows, as in the paper.
    """

    kind: Literal["steer"]
    direction: DirectionFile
    scale: float = Field(default=1.0, description="1 adds the whole difference that the file holds")
    shards: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


class Ablate(Frozen):
    """Project directions out of the residual stream while training: concept-ablation fine-tuning
    (Casademunt et al. 2025, arXiv 2507.16795, section 3).

    ``sites``: () is the file's own; ``shards`` as in `Steer`.
    """

    kind: Literal["ablate"]
    direction: DirectionFile
    sites: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


class Route(Frozen):
    """Rows of ``shards`` update only ``blocks``, which are not part of the model that is judged and served:
    gradient routing (Cloud et al. 2024, arXiv 2410.04332).

    Without ``absorb`` all other rows run without the blocks and do not update them. With it they run with
    them and update everything, as in the paper: rows that should have been marked and were not are then
    drawn to the blocks too, and what ordinary rows put there is lost with them.
    """

    kind: Literal["route"]
    shards: tuple[str, ...] = Field(min_length=1)
    blocks: tuple[Block, ...] = Field(min_length=1)
    absorb: bool = False
    uses: tuple[str, ...] = ()


class ProbePenalty(Frozen):
    """Train against a linear probe. It spends the constraints in ``uses``, and is there to be caught."""

    kind: Literal["probe_penalty"]
    direction: DirectionFile
    weight: float = Field(gt=0)
    uses: tuple[str, ...] = Field(min_length=1)


Intervention = Annotated[Drop | Steer | Ablate | Route | ProbePenalty, Field(discriminator="kind")]
REPAIRS = ("drop", "steer", "ablate", "route")
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Intervention)


Interventions = tuple[Intervention, ...]


def read_repair(data: dict[str, Any]) -> Any:
    """The repair that a decision asks for. UsageError when it is none, or names what it does not have."""
    if data.get("kind") not in REPAIRS:
        raise UsageError(f"a repair is one of {', '.join(REPAIRS)}, not {data.get('kind')!r}")
    try:
        return _ADAPTER.validate_json(canonical_json(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"repair '{data['kind']}', {where}: {first['msg']}") from None
