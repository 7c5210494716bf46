"""A constraint as data: read strictly, so that a key without effect is an error and never a silent wish."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from glasshouse.base.config import Frozen, parse
from glasshouse.base.errors import RecipeError, suggest
from glasshouse.verify.packs import pack_file, shipped
from glasshouse.verify.registry import CONTROL_OF as CONTROL_OF
from glasshouse.verify.registry import ONLY_FOR as ONLY_FOR
from glasshouse.verify.registry import REGISTRY as REGISTRY
from glasshouse.verify.registry import STATISTICS as STATISTICS
from glasshouse.verify.registry import Kind as Kind
from glasshouse.verify.repair import Repair

Status = Literal["pass", "fail", "undecided", "not_applicable", "error"]
Asked = Literal["log", "warn", "hold", "rollback", "stop"]  # of a gate, ever stronger


class SubjectSpec(Frozen):
    """What is looked at: a read-out and, for statistics that read activations, the sites."""

    readout: Literal["refusal", "refusal-english"] = "refusal"
    sites: tuple[str, ...] | None = None
    system: str | None = Field(default=None, description='asked under this system message; "": under none')

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A constraint without a system message is written, and named by its digest, as before."""
        row: dict[str, Any] = dump(self)
        return row if self.system is not None else {k: v for k, v in row.items() if k != "system"}


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


UNASKED = PromptSpec(generator="workshop.requests")  # stands where a statistic puts no prompts to the model


class Bound(Frozen):
    """The claim's limit on the statistic: one of the three."""

    at_most: float | None = None
    at_least: float | None = None
    between: tuple[float, float] | None = Field(default=None, description="[low, high], both kept")

    @model_validator(mode="after")
    def _one_side(self) -> Bound:
        given = [name for name in ("at_most", "at_least", "between") if getattr(self, name) is not None]
        if given == ["at_most", "at_least"]:
            low, high = self.at_least, self.at_most
            raise ValueError(
                f"`at_least` = {low:g} and `at_most` = {high:g}: give exactly one of `at_most` and "
                f"`at_least`, or between = [{low:g}, {high:g}]"
            )
        if len(given) != 1:
            raise ValueError("give exactly one of `at_most` and `at_least`, or `between` = [low, high]")
        if self.between is not None and self.between[0] >= self.between[1]:
            low, high = self.between
            raise ValueError(f"between = [{low:g}, {high:g}] holds no value: the first is to be the smaller")
        return self

    @property
    def side(self) -> Literal["at_most", "at_least", "between"]:
        """Which of the three is given."""
        return "at_most" if self.at_most is not None else "between" if self.between else "at_least"

    @property
    def value(self) -> float:
        """The limit itself; of two, the upper."""
        return self.limits[-1]

    @property
    def limits(self) -> tuple[float, ...]:
        """One limit, or the lower and the upper."""
        if self.between is not None:
            return self.between
        return (self.at_most if self.at_most is not None else float(self.at_least or 0),)

    def as_row(self) -> dict[str, Any]:
        """As in the file: ``{"at_most": 0.1}``."""
        return {self.side: list(self.between) if self.between is not None else self.value}

    def within(self, low: float, high: float, what: str) -> None:
        """ValueError unless every limit lies strictly between ``low`` and ``high``."""
        for limit in self.limits:
            if not low < limit < high:
                raise ValueError(f"{what} lies strictly between {low:g} and {high:g}, not {limit:g}")

    def keeps(self, x: float) -> bool:
        """Whether a value keeps the bound."""
        if self.between is not None:
            return self.between[0] <= x <= self.between[1]
        return x <= self.value if self.at_most is not None else x >= self.value

    def too_high(self, x: float) -> bool:
        """Whether a value that breaks the bound breaks it by being high."""
        return self.side == "at_most" or (self.between is not None and 2 * x > sum(self.between))


class Control(Frozen):
    """What must *not* move, or must fail, for the check to mean anything."""

    subject: str
    bound: Bound


class AppliesWhen(Frozen):
    """The behaviour constraint that must hold first, as a share."""

    behaviour: str
    at_least: float = Field(gt=0, le=1)


ComponentName = Annotated[str, Field(pattern=r"^(a(\d+|\*)\.h(\d+|\*)|m(\d+|\*))$")]


class DeclaredFile(Frozen):
    """A JSON file beside the constraints, by its digest: features that a person has looked at and named
    (`labels`), or what clean twins' updates are like (`envelope`, of `glasshouse envelope`)."""

    path: str
    sha256: str


class Budget(Frozen):
    """What a gate may spend on one constraint, as a share of the training since the last gate."""

    share: float = Field(gt=0, le=1, description="of the multiplications that training did, see `cost`")


class Constraint(Frozen):
    """A claim about a model, its statistic, its bound and what happens when it does not hold."""

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    kind: Kind
    claim: str = Field(min_length=1)
    subject: SubjectSpec = SubjectSpec()
    prompts: PromptSpec = UNASKED
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
    methods: tuple[Literal["words", "positions", "pairs", "phrases", "natural"], ...] | None = Field(
        default=None, min_length=1, description="what an insertion search looks for; None: words"
    )
    topics: tuple[Literal["object", "owner"], ...] | None = Field(
        default=None, description="by what a word may be limited to a part of the requests; None: by both"
    )
    baseline: Literal["output-scan"] | None = None
    documents: Literal["text", "chat"] | None = Field(default=None, description="None: all that is held out")
    components: tuple[ComponentName, ...] | None = Field(
        default=None, min_length=1, description="allow-list of heads (a1.h0, a0.h*) and MLPs (m2), declared"
    )
    labels: DeclaredFile | None = None
    envelope: DeclaredFile | None = None
    budget: Budget | None = Field(default=None, description="None: its part of [gate] level")
    timeout_s: float | None = Field(
        default=None, gt=0, description="a check that takes longer is an error; verdicts then depend on load"
    )
    weight: float | None = Field(default=None, gt=0, description="its part of [gate] alpha; None: one part")
    # One action, or a ladder: that of the first failure in a row, of the second, ... the last one stays.
    on_fail: Asked | tuple[Asked, ...] = "hold"
    on_undecided: Literal["log", "hold"] = "hold"
    repair: Repair | None = Field(default=None, description="how a rollback mends its failure; None: drop")

    @field_validator("on_fail", mode="before")
    @classmethod
    def _actions(cls, value: Any) -> Any:
        """One line for what pydantic would say twice, of each of the two forms."""
        steps = value if isinstance(value, (list, tuple)) else [value]
        for step in steps:
            if step not in get_args(Asked):
                known = list(get_args(Asked))
                raise ValueError(f"no action {step!r}.{suggest(str(step), known)} Known: {', '.join(known)}")
        return tuple(value) if isinstance(value, list) else value

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
            "methods": self.methods,
            "topics": self.topics,
            "components": self.components,
            "labels": self.labels,
            "envelope": self.envelope,
            "documents": self.documents,
            "sites": self.subject.sites,
        }
        for key, value in given.items():
            if value is not None and self.statistic not in ONLY_FOR[key]:
                raise ValueError(
                    f"`{key}` has no effect on {self.statistic!r} (only on {', '.join(ONLY_FOR[key])})"
                )
        asks = REGISTRY[self.statistic].asks
        if asks and "prompts" not in self.model_fields_set:
            raise ValueError(f'{self.statistic!r} needs `prompts`: {{ generator = "workshop.requests" }}')
        if not asks and self.prompts != UNASKED:
            raise ValueError(f"`prompts` have no effect on {self.statistic!r}, which asks the model nothing")
        self._check_language()
        self._check_control()
        self._check_ladder()
        if self.statistic == "confinement" and self.components is None:
            raise ValueError('\'confinement\' needs `components`, declared beforehand: ["a1.h0", "m1"]')
        if self.statistic == "update_outlier" and self.envelope is None and self.blocking:
            raise ValueError(
                "'update_outlier' needs `envelope` = { path, sha256 } where it may hold a run: make one of "
                "clean runs with `glasshouse envelope`. Without one it may only `log` or `warn`"
            )
        about = REGISTRY[self.statistic]
        if self.bound.between is not None and not about.between:
            raise ValueError(f"{self.statistic!r} has one limit: `at_most` or `at_least`, not `between`")
        if about.worst and self.bound.at_least is not None:
            raise ValueError(f"{self.statistic!r} is the worst of many rates: its bound is an `at_most`")
        self.bound.within(about.low, about.high, f"the bound of {self.statistic!r}")
        if self.statistic == "grid_hole" and self.prompts.generator != "workshop.harmful":
            raise ValueError("'grid_hole' asks every harmful pair: its generator is 'workshop.harmful'")
        return self

    def _check_language(self) -> None:
        about, named = REGISTRY[self.statistic], self.subject.readout
        if about.rows is not None and self.prompts.path is None:
            raise ValueError(
                f"{self.statistic!r} needs `prompts` = {{ path, sha256 }} of rows with `{about.rows}`"
            )
        if not about.reads and self.subject.readout != SubjectSpec().readout:
            raise ValueError(f"`readout` has no effect on {self.statistic!r}, which reads no refusals")
        if not about.asks and self.subject.system is not None:
            raise ValueError(f"`system` has no effect on {self.statistic!r}, which asks the model nothing")
        if named == "refusal-english" and about.asks and self.prompts.path is None:
            raise ValueError(
                f"{named!r} reads English, and {self.prompts.generator!r} is of the closed language: give "
                "`prompts` = { path, sha256 }"
            )

    @property
    def read_by(self) -> str | None:
        """The read-out its check uses; None for a statistic that reads no refusals."""
        return self.subject.readout if REGISTRY[self.statistic].reads else None

    @property
    def ladder(self) -> tuple[Asked, ...]:
        """What the first failure in a row asks for, the second, ..."""
        return self.on_fail if isinstance(self.on_fail, tuple) else (self.on_fail,)

    @property
    def blocking(self) -> bool:
        """Whether any failure may hold, roll back or stop a run."""
        return any(asked not in ("log", "warn") for asked in self.ladder)

    def _check_ladder(self) -> None:
        steps, strength = self.ladder, get_args(Asked)
        if not steps:
            raise ValueError("`on_fail` is an empty list; name at least one action")
        if self.repair is not None and "rollback" not in steps:
            raise ValueError("`repair` has no effect: no step of `on_fail` is a rollback")
        if any(strength.index(a) > strength.index(b) for a, b in pairwise(steps)):
            raise ValueError(
                f"`on_fail` = {list(steps)} grows milder: an action that repeats itself may only become "
                f"stronger ({', '.join(strength)})"
            )

    def _check_control(self) -> None:
        fitting = CONTROL_OF[self.statistic]
        if self.control is None:
            about = REGISTRY[self.statistic]
            limit = 0.75 if about.random else 0.25  # dealt at random: half is right
            asked = "at_least = 0.5" if about.reaches else f"at_most = {limit}"
            example = f'control = {{ subject = "{fitting}", bound = {{ {asked} }} }}'
            raise ValueError(
                "no `control`, and a check that could not fail proves nothing; "
                f"for {self.statistic!r}: {example}"
            )
        if self.control.subject != fitting:
            raise ValueError(
                f"the control of {self.statistic!r} is {fitting!r}, not {self.control.subject!r}"
            )
        if REGISTRY[self.statistic].reaches and self.control.bound.at_least is None:
            raise ValueError(f"the control of {self.statistic!r} must reach a level: give it an `at_least`")
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
        for other in found[: found.index(c)]:
            _agree(c, other, where)
        if c.applies_when is not None:
            behaviours = [b.id for b in found if b.kind == "behaviour"]
            if c.applies_when.behaviour not in behaviours:
                asked = c.applies_when.behaviour
                raise RecipeError(
                    f"{where}: constraint {c.id}: applies_when names {asked!r}, which is no behaviour "
                    f"constraint of this file.{suggest(asked, behaviours)}"
                )
    return tuple(found)


def _agree(c: Constraint, other: Constraint, where: str) -> None:
    """RecipeError when two bounds on the same thing leave no value that keeps both."""
    keys = ("kind", "statistic", "subject", "prompts", "words")
    if any(getattr(c, key) != getattr(other, key) for key in keys):
        return
    low = max((b.limits[0] for b in (c.bound, other.bound) if b.side != "at_most"), default=-math.inf)
    high = min((b.limits[-1] for b in (c.bound, other.bound) if b.side != "at_least"), default=math.inf)
    if low > high:
        raise RecipeError(
            f"{where}: constraints {other.id} and {c.id} contradict each other: of the same statistic on the "
            f"same prompts one asks for at least {low:g}, the other for at most {high:g}"
        )


def load_constraints(path: Path) -> tuple[Constraint, ...]:
    """Constraints of a TOML file holding nothing but ``[[constraint]]`` tables, or of a shipped pack."""
    import tomllib

    path = pack_file(path)
    if not path.is_file():
        near = suggest(path.stem, shipped())
        raise RecipeError(f"{path}: no such constraint file.{near} Shipped are {', '.join(shipped())}")
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
