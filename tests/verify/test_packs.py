"""What ships is found by name, parses, and is documented to the last key."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from glasshouse.base.errors import RecipeError
from glasshouse.evals.prompts import GENERATORS
from glasshouse.verify import load_constraints
from glasshouse.verify.packs import FOLDER, pack_file, shipped
from glasshouse.verify.schema import (
    REGISTRY,
    AppliesWhen,
    Asked,
    Bound,
    Budget,
    Constraint,
    Control,
    PromptSpec,
    SubjectSpec,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "constraints.md").read_text("utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", DOCUMENT))
ROWS = [line for line in DOCUMENT.splitlines() if line.startswith("|")]


def spoken_of(name: str) -> bool:
    """Whether a name stands in code font somewhere, alone or within a line of a file."""
    return any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", code) for code in CODE)


@pytest.mark.parametrize("pack", shipped().values(), ids=shipped())
def test_every_shipped_pack_parses_and_says_what_it_cannot_see(pack: Path) -> None:
    assert load_constraints(pack)
    head = pack.read_text("utf-8").split("[[constraint]]")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert pack.stem == "library" or ("Sees:" in head and "Does not see:" in head)


@pytest.mark.parametrize("name", ["refusal", "refusal.toml", "packs/refusal.toml"])
def test_a_shipped_pack_is_found_by_name_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_constraints(Path(name)) == load_constraints(FOLDER / "refusal.toml")


def test_a_file_of_ones_own_comes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packs").mkdir()
    own = Path("packs/refusal.toml")
    own.write_text((FOLDER / "secrets.toml").read_text("utf-8"), encoding="utf-8")
    assert pack_file(own) == own
    assert [c.id for c in load_constraints(own)] == ["no-secret-extracted"]


@pytest.mark.parametrize("name", ["refusals", "elsewhere/refusal.toml", "/refusal.toml", "refusal.json"])
def test_what_is_neither_a_file_nor_a_pack_is_an_error_that_names_the_packs(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no such constraint file.*refusal, "):
        load_constraints(Path(name))


def test_packs_and_their_prompts_are_part_of_the_package() -> None:
    """A wheel holds what the patterns in pyproject.toml name, and nothing else that is not Python."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    (given,) = patterns["package-data"].values()
    for file in FOLDER.rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            inside = file.relative_to(ROOT / "src" / "glasshouse").as_posix()
            assert any(fnmatch(inside, pattern) for pattern in given), f"{inside} is left out of the wheel"


@pytest.mark.parametrize(
    "table",
    [Constraint, SubjectSpec, PromptSpec, Bound, Control, AppliesWhen, Budget],
    ids=lambda t: t.__name__,
)
def test_every_key_is_documented(table: type[Constraint]) -> None:
    missing = [key for key in table.model_fields if not spoken_of(key)]
    assert not missing, f"docs/constraints.md does not speak of {missing}"


@pytest.mark.parametrize("statistic", REGISTRY)
def test_every_statistic_is_documented_with_its_control_and_its_blind_spot(statistic: str) -> None:
    about = REGISTRY[statistic]
    rows = [row for row in ROWS if f"`{statistic}`" in row.split("|")[1] and f"`{about.control}`" in row]
    assert len(rows) == 1, f"{statistic} has no row with its control {about.control!r} in docs/constraints.md"
    _, _, _, sees, blind, _ = rows[0].split("|")
    assert len(sees) > 12 and len(blind) > 8
    for key in about.keys:
        assert spoken_of(key)


def test_every_generator_and_action_and_method_is_documented() -> None:
    methods = Constraint.model_fields["methods"].annotation
    words = [*GENERATORS, *re.findall(r"'(\w+)'", f"{Asked} {methods}")]
    assert len(words) > len(GENERATORS) + 8
    assert not [w for w in words if not spoken_of(w)]


def test_the_document_speaks_of_no_statistic_that_is_not_there() -> None:
    known = set(REGISTRY)
    first = {name for row in ROWS for name in re.findall(r"`([a-z_]+)`", row.split("|")[1]) if "_" in name}
    keys = {key for table in (Constraint,) for key in table.model_fields}
    assert first <= known | keys, first - known - keys


def test_the_library_table_names_every_shipped_constraint() -> None:
    for c in load_constraints(FOLDER / "library.toml"):
        rows = [row for row in ROWS if f"`{c.id}`" in row]
        assert rows, f"docs/constraints.md: the library table has no `{c.id}`"
        limit = "/".join(f"{x:g}" for x in c.bound.limits)
        assert any(limit in row for row in rows), (
            f"docs/constraints.md: {c.id} has another limit than {limit}"
        )
