"""What a zoo holds and in which order it is grown: a plan is a list of ids, the same for the same options.

An id is ``family-seed-organism`` or ``family-seed-twin``. The order goes round the families, seed by seed, so
that a zoo stopped at any time has seen every family about equally often.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glasshouse.base.atomic import write_json
from glasshouse.base.errors import DataError, UsageError, suggest

Role = Literal["organism", "twin"]

SINGLE = "single"  # the family with enough organisms and twins to bound both misses and alarms
N_SINGLE, N_OTHER = 60, 20
# Seeds 0 to 4 of the families were looked at while limits and searches were chosen, as were those from 900
# on; seeds of another hundred share no world with them.
FIRST_SEED = 101
QUICK_SEEDS = 2
MOST_SEED = 99_999
FILE = "zoo.json"
_ID = re.compile(r"^([a-z0-9]+(?:-[a-z0-9]+)*)-(\d+)-(organism|twin)$")


@dataclass(frozen=True, order=True)
class Job:
    """One model to grow and examine."""

    family: str
    seed: int
    role: Role

    @property
    def id(self) -> str:
        """``family-seed-organism`` or ``family-seed-twin``."""
        return f"{self.family}-{self.seed}-{self.role}"

    @property
    def twin(self) -> bool:
        """Whether nothing is planted."""
        return self.role == "twin"


def job_of(name: str) -> Job:
    """The job that an id names. DataError for any other text."""
    match = _ID.match(name)
    if match is None:
        raise DataError(f"{name!r} is no organism's id; one looks like {SINGLE}-0-organism")
    role: Role = "twin" if match[3] == "twin" else "organism"
    return Job(match[1], int(match[2]), role)


def default_plan(families: Sequence[str], twins_of: Sequence[str] = (SINGLE,)) -> tuple[Job, ...]:
    """The whole zoo: 60 of `SINGLE` and 20 of each other family, and as many twins for ``twins_of``."""
    return ordered(
        {f: seeds_from(N_SINGLE if f == SINGLE else N_OTHER) for f in families}, twins_of=frozenset(twins_of)
    )


def seeds_from(n: int) -> range:
    """The first ``n`` seeds that a table may count."""
    return range(FIRST_SEED, FIRST_SEED + n)


def ordered(seeds: Mapping[str, Sequence[int]], *, twins_of: frozenset[str] = frozenset()) -> tuple[Job, ...]:
    """Jobs round the families: every family's first seed, then every family's second, and so on."""
    most = max((len(s) for s in seeds.values()), default=0)
    jobs = []
    for turn in range(most):
        for family, own in seeds.items():
            if turn < len(own):
                jobs.append(Job(family, own[turn], "organism"))
                if family in twins_of:
                    jobs.append(Job(family, own[turn], "twin"))
    return tuple(jobs)


def chosen_families(text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """Families from ``a,b``; all of them for None. UsageError offers the nearest name."""
    if text is None:
        return tuple(known)
    names = [n.strip() for n in text.split(",") if n.strip()]
    if not names:
        raise UsageError(f"--families {text!r} names no family; there are: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UsageError(
                f"--families: there is no family {name!r}.{suggest(name, known)} "
                f"There are: {', '.join(known)}"
            )
    return tuple(dict.fromkeys(names))


def parsed_seeds(text: str | None) -> tuple[int, ...] | None:
    """Seeds from ``7``, ``0-19`` or ``1,4,900-903``; None for None. UsageError says what does not parse."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)
        if match is None:
            raise UsageError(f"--seeds {text!r}: {part.strip()!r} is no seed; give for example 0-19 or 1,4,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"--seeds {text!r}: {part.strip()!r} runs backwards; write {last}-{first}")
        if last > MOST_SEED:
            raise UsageError(f"--seeds {text!r}: {last} is above the largest seed, {MOST_SEED}")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def planned(
    known: Sequence[str],
    quick_families: Sequence[str],
    *,
    families: str | None = None,
    seeds: str | None = None,
    quick: bool = False,
    twins: bool | None = None,
) -> tuple[Job, ...]:
    """The plan that a command line asks for.

    ``known`` are all families in their order, ``quick_families`` those of ``--quick``. With neither families
    nor seeds it is the default plan; ``twins`` adds a twin for every organism (default: of `SINGLE` only,
    and of all in a quick zoo).
    """
    default = quick_families if quick else known
    names = chosen_families(families, known) if families is not None else tuple(default)
    own = parsed_seeds(seeds)
    if own is None and quick:
        own = tuple(seeds_from(QUICK_SEEDS))
    with_twins = names if (twins if twins is not None else quick) else [] if twins is False else [SINGLE]
    if own is None:
        return default_plan(names, with_twins)
    return ordered({f: own for f in names}, twins_of=frozenset(with_twins))


def write_plan(folder: Path, jobs: Sequence[Job], **about: Any) -> None:
    """Write the plan, with what else is fixed at the beginning."""
    write_json(folder / FILE, {**about, "jobs": [j.id for j in jobs]})


def read_plan(folder: Path) -> tuple[tuple[Job, ...], dict[str, Any]]:
    """A zoo's jobs in order, and what else its plan says.

    UsageError when the folder holds no zoo, DataError when its plan cannot be read.
    """
    import json

    path = folder / FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no zoo (there is no {FILE}); `glasshouse zoo build {folder}` makes one"
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        jobs = tuple(job_of(name) for name in about.pop("jobs"))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DataError(f"{path} is no zoo's plan ({problem}); restore it, or build another zoo") from problem
    return jobs, about
