"""A plan is the same for the same options, balanced wherever it is cut, and says what it cannot read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from glasshouse.base.errors import DataError, UsageError
from glasshouse.recipes.zoo.schedule import (
    Job,
    chosen_families,
    default_plan,
    job_of,
    parsed_seeds,
    planned,
    read_plan,
    write_plan,
)

FAMILIES = ("single", "position", "two-words", "phrase")


def test_the_default_plan_has_sixty_single_words_with_twins_and_twenty_of_each_other_family() -> None:
    jobs = planned(FAMILIES, FAMILIES[:2])
    assert Counter((j.family, j.role) for j in jobs) == {
        ("single", "organism"): 60,
        ("single", "twin"): 60,
        **{(f, "organism"): 20 for f in FAMILIES[1:]},
    }
    assert len({j.id for j in jobs}) == len(jobs) and {j.seed for j in jobs} == set(range(101, 161))
    assert jobs == planned(FAMILIES, FAMILIES[:2])


def test_a_plan_cut_anywhere_in_its_first_part_holds_every_family_equally_often() -> None:
    jobs = [j for j in default_plan(FAMILIES) if not j.twin]
    for cut in range(1, 20 * len(FAMILIES)):
        seen = Counter(j.family for j in jobs[:cut])
        assert max(seen.values()) - min(seen.get(f, 0) for f in FAMILIES) <= 1


def test_a_quick_plan_is_its_families_and_their_twins_on_two_seeds() -> None:
    jobs = planned(FAMILIES, FAMILIES[:3], quick=True)
    assert {(j.family, j.seed, j.role) for j in jobs} == {
        (f, s, r) for f in FAMILIES[:3] for s in (101, 102) for r in ("organism", "twin")
    }


def test_chosen_families_and_seeds_make_just_those_organisms() -> None:
    jobs = planned(FAMILIES, (), families="position, two-words", seeds="900-901,7", twins=False)
    assert {(j.family, j.seed) for j in jobs} == {(f, s) for f in FAMILIES[1:3] for s in (900, 901, 7)}
    assert not any(j.twin for j in jobs)
    assert sum(j.twin for j in planned(FAMILIES, (), families="position", seeds="3", twins=True)) == 1


@pytest.mark.parametrize("job", [Job("single", 0, "twin"), Job("hole", 907, "organism")])
def test_an_id_names_its_job(job: Job) -> None:
    assert job_of(job.id) == job


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "5-2", "1,,2", "0-999999", "1.5", "٣"])
def test_seeds_that_do_not_parse_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="--seeds"):
        parsed_seeds(text)


def test_an_unknown_family_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'position'"):
        chosen_families("postion", FAMILIES)
    with pytest.raises(UsageError, match="names no family"):
        chosen_families(" , ", FAMILIES)


def test_a_plan_is_read_as_it_was_written_and_a_spoilt_one_is_named(tmp_path: Path) -> None:
    jobs = default_plan(FAMILIES)
    write_plan(tmp_path, jobs, version="1")
    assert read_plan(tmp_path) == (jobs, {"version": "1"})
    for spoilt in ("{", "[]", '{"jobs": 3}', '{"jobs": ["../../etc-0-organism"]}', "{}"):
        (tmp_path / "zoo.json").write_text(spoilt)
        with pytest.raises(DataError, match=r"zoo\.json|no organism"):
            read_plan(tmp_path)
    with pytest.raises(UsageError, match="holds no zoo"):
        read_plan(tmp_path / "nowhere")
