"""A constraint as data: read strictly, so that a key without effect is an error and never a silent wish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from glasshouse.base.config import Frozen, parse
from glasshouse.base.errors import RecipeError, suggest

Kind = Literal["behaviour", "representation", "circuit", "feature", "weights", "data"]
Status = Literal["pass", "fail", "undecided", "not_applicable", "error"]
Asked = Literal["log", "warn", "hold", "rollback", "stop"]  # of a gate, ever stronger


@dataclass(frozen=True)
class Statistic:
    """What a statistic says and which keys it reads. A bound lies strictly between ``low`` and ``high``.

    ``control`` is what it measures as its control; ``keys`` are those that mean something only for it and
    its like; ``worst`` marks the worst of many values, of which only a limit from above means something;
    ``random`` a control for which about a half is right; ``asks`` whether it puts prompts to the model.
    """

    kind: Kind
    says: str
    control: str
    keys: tuple[str, ...] = ()
    worst: bool = False
    random: bool = False
    low: float = 0.0
    high: float = 1.0
    asks: bool = True


REGISTRY: dict[str, Statistic] = {
    "compliance_rate": Statistic(
        "behaviour", "share of harmful requests the model's written answer complies with", "harmless"
    ),
    "refusal_rate": Statistic("behaviour", "share of requests the model's written answer refuses", "harmful"),
    "accuracy": Statistic(
        "behaviour", "share of requests decided as the grammar's label says", "random-labels", random=True
    ),
    "grid_hole": Statistic(
        "behaviour",
        "highest compliance rate of any harmful action-object pair, all pairs asked",
        "harmless",
        worst=True,
    ),
    "probe_auroc": Statistic(
        "representation",
        "held-out AUROC of a linear probe for the concept, on pairs outside its training",
        "random-labels",
        ("sites",),
        random=True,
    ),
    "ablation_effect": Statistic(
        "circuit",
        "share of refusals lost when the read-out's direction is removed at the sites",
        "random-direction",
        ("sites",),
    ),
    "suppression": Statistic(
        "circuit",
        "highest share of refusals that one inserted word turns into compliance",
        "random-word",
        ("words", "baseline", "passes"),
        worst=True,
    ),
}
# The same by kind and by key: what is said to a person who wrote something that has no effect.
STATISTICS: dict[str, dict[str, str]] = {
    kind: {name: s.says for name, s in REGISTRY.items() if s.kind == kind} for kind in get_args(Kind)
}
ONLY_FOR: dict[str, tuple[str, ...]] = {
    key: tuple(name for name, s in REGISTRY.items() if key in s.keys)
    for key in dict.fromkeys(k for s in REGISTRY.values() for k in s.keys)
}
CONTROL_OF: dict[str, str] = {name: s.control for name, s in REGISTRY.items()}


class SubjectSpec(Frozen):
    """What is looked at: a read-out and, for statistics that read activations, the sites."""

    readout: Literal["refusal"] = "refusal"
    sites: tuple[str, ...] | None = None


class PromptSpec(Frozen):
    """Where prompts come from: a generator by name, or a JSONL file with its digest."""

    generator: str | None = None
    path: str | None = None
    sha256: str | None = None
    n_max: int = Field(default=400, ge=8, description="most prompts one check may use")

    @model_validator(mode="after")
    def _one_source(self) -> PromptSpec:
        if (self.generator is None) == (self.path is None):
            raise ValueError("give either `generator` or `path`, not both and not neither")
        if self.path is not None and self.sha256 is None:
            raise ValueError("a prompt file needs its `sha256`: it is part of what is declared")
        return self


class Bound(Frozen):
    """The claim's limit on the statistic."""

    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Bound:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give exactly one of `at_most` and `at_least`")
        return self

    @property
    def side(self) -> Literal["at_most", "at_least"]:
        """Which of the two is given."""
        return "at_most" if self.at_most is not None else "at_least"

    @property
    def value(self) -> float:
        """The limit itself."""
        return self.at_most if self.at_most is not None else float(self.at_least or 0)

    def within(self, low: float, high: float, what: str) -> None:
        """ValueError unless the limit lies strictly between ``low`` and ``high``."""
        if not low < self.value < high:
            raise ValueError(f"{what} lies strictly between {low:g} and {high:g}, not {self.value:g}")

    def keeps(self, x: float) -> bool:
        """Whether a value keeps the bound."""
        return x <= self.value if self.at_most is not None else x >= self.value


class Control(Frozen):
    """What must *not* move, or must fail, for the check to mean anything."""

    subject: str
    bound: Bound


class AppliesWhen(Frozen):
    """The behaviour constraint that must hold first, as a share."""

    behaviour: str
    at_least: float = Field(gt=0, le=1)


class Constraint(Frozen):
    """A claim about a model, its statistic, its bound and what happens when it does not hold."""

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    kind: Kind
    claim: str = Field(min_length=1)
    subject: SubjectSpec = SubjectSpec()
    prompts: PromptSpec
    statistic: str
    bound: Bound
    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    control: Control | None = None
    applies_when: AppliesWhen | None = None
    required_from: str | None = Field(default=None, description="stage from which not_applicable blocks")
    every: int = Field(default=1, ge=0, description="in gates; 0: only at promotion")
    words: Literal["training-text"] | None = None
    passes: int | None = Field(
        default=None, ge=200, description="most forward passes of a gate's search; None: no limit"
    )
    baseline: Literal["output-scan"] | None = None
    on_fail: Asked = "hold"
    on_undecided: Literal["log", "hold"] = "hold"

    @model_validator(mode="after")
    def _effective(self) -> Constraint:
        known = STATISTICS[self.kind]
        if self.statistic not in known:
            raise ValueError(
                f"unknown statistic {self.statistic!r} for kind {self.kind!r}."
                f"{suggest(self.statistic, list(known))} Known: {', '.join(known)}"
            )
        given = {
            "words": self.words,
            "baseline": self.baseline,
            "passes": self.passes,
            "sites": self.subject.sites,
        }
        for key, value in given.items():
            if value is not None and self.statistic not in ONLY_FOR[key]:
                raise ValueError(
                    f"`{key}` has no effect on {self.statistic!r} (only on {', '.join(ONLY_FOR[key])})"
                )
        self._check_control()
        about = REGISTRY[self.statistic]
        if about.worst and self.bound.at_least is not None:
            raise ValueError(f"{self.statistic!r} is the worst of many rates: its bound is an `at_most`")
        self.bound.within(about.low, about.high, f"the bound of {self.statistic!r}")
        if self.statistic == "grid_hole" and self.prompts.generator != "workshop.harmful":
            raise ValueError("'grid_hole' asks every harmful pair: its generator is 'workshop.harmful'")
        return self

    def _check_control(self) -> None:
        fitting = CONTROL_OF[self.statistic]
        if self.control is None:
            limit = 0.75 if REGISTRY[self.statistic].random else 0.25  # dealt at random: half is right
            example = f'control = {{ subject = "{fitting}", bound = {{ at_most = {limit} }} }}'
            raise ValueError(
                "no `control`, and a check that could not fail proves nothing; "
                f"for {self.statistic!r}: {example}"
            )
        if self.control.subject != fitting:
            raise ValueError(
                f"the control of {self.statistic!r} is {fitting!r}, not {self.control.subject!r}"
            )
        self.control.bound.within(0, 1, "a control's bound")


def read_constraints(rows: list[dict[str, Any]], where: str) -> tuple[Constraint, ...]:
    """Constraints from parsed TOML tables. RecipeError names the entry, the key and the remedy."""
    found: list[Constraint] = []
    for number, row in enumerate(rows, start=1):
        name = row.get("id", f"number {number}") if isinstance(row, dict) else f"number {number}"
        found.append(parse(Constraint, row, f"{where}: constraint {name}"))
    ids = [c.id for c in found]
    for c in found:
        if ids.count(c.id) > 1:
            raise RecipeError(
                f"{where}: two constraints are called {c.id!r}; an id names one evidence folder"
            )
        if c.applies_when is not None:
            behaviours = [b.id for b in found if b.kind == "behaviour"]
            if c.applies_when.behaviour not in behaviours:
                asked = c.applies_when.behaviour
                raise RecipeError(
                    f"{where}: constraint {c.id}: applies_when names {asked!r}, which is no behaviour "
                    f"constraint of this file.{suggest(asked, behaviours)}"
                )
    return tuple(found)


def load_constraints(path: Path) -> tuple[Constraint, ...]:
    """Constraints of a TOML file holding nothing but ``[[constraint]]`` tables."""
    import tomllib

    if not path.is_file():
        raise RecipeError(f"{path}: no such constraint file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: not valid TOML: {problem}") from problem
    extra = sorted(set(data) - {"constraint"})
    if extra:
        raise RecipeError(
            f"{path}: unknown key {extra[0]!r}; a constraint file holds [[constraint]] tables only"
        )
    if not data.get("constraint"):
        raise RecipeError(f"{path}: no [[constraint]] in this file")
    if not isinstance(data["constraint"], list):
        raise RecipeError(f"{path}: constraints are written as [[constraint]] tables")
    return read_constraints(data["constraint"], str(path))
