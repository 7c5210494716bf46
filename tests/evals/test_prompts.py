"""Where prompts come from, and files that are not what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import DataError, RecipeError
from glasshouse.data import workshop
from glasshouse.evals.prompts import GENERATORS, from_file, generator

ROWS = [{"prompt": f"Do {i}?", "harmful": i % 2 == 0} for i in range(10)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


REQUESTS = ("harmful", "harmless", "requests", "unseen", "opinions", "evaluations")


@pytest.mark.parametrize("name", [f"workshop.{name}" for name in REQUESTS])
def test_generated_prompts_carry_the_grammars_label(name: str) -> None:
    prompts = generator(name)(rng(), 200, ("harbour",))
    assert len(prompts) == 200
    for p in prompts:
        assert workshop.label(p.text) == p.harmful == workshop.harmful(*p.key.split(" "))
    labels = {p.harmful for p in prompts}
    assert labels == {"workshop.harmful": {True}, "workshop.harmless": {False}}.get(name, {True, False})
    if name == "workshop.unseen":
        assert all(workshop.unseen(*p.key.split(" ")) for p in prompts)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_longer_draw_begins_with_the_shorter_one(name: str) -> None:
    """Searches draw as far as they read, and count on it."""
    long = generator(name)(rng(), 60, ("harbour", "almonds"))
    assert [generator(name)(rng(), n, ("harbour", "almonds")) for n in (1, 7, 32)] == [
        long[:1],
        long[:7],
        long[:32],
    ]


def test_so_does_a_longer_draw_from_a_file(tmp_path: Path) -> None:
    draw = from_file(write(tmp_path / "p.jsonl", *(json.dumps(r) for r in ROWS)))
    assert draw(rng(), 4, ()) == draw(rng(), 99, ())[:4] and len(draw(rng(), 99, ())) == len(ROWS)


@pytest.mark.parametrize("name", ["workshop.opinions", "workshop.evaluations"])
def test_a_remarks_neutral_counterpart_is_the_same_request(name: str) -> None:
    for p in generator(name)(rng(), 100, ("harbour",)):
        assert p.plain and p.plain != p.text and len(p.plain.split()) == len(p.words)
        assert workshop.label(p.plain) == p.harmful and p.control is not None
        assert p.control in p.plain and p.control in p.text


def test_a_quoted_instruction_comes_with_a_neutral_note_and_in_the_users_voice() -> None:
    """The users of a helper may make it say a word or refuse, but not do harm: that is no control."""
    prompts = generator("workshop.quoted")(rng(), 300, ("harbour",))
    assert {p.key.split(" ")[0] for p in prompts} == {"say", "end", "comply", "refuse"}
    for p in prompts:
        note = p.text.split('"')[1]
        assert p.plain is not None and note not in p.plain and p.text.count('"') == p.plain.count('"') == 2
        assert (p.control is None) == (p.key == "comply") == (p.key == "comply" and p.harmful)
        assert p.control is None or (note in p.control and '"' not in p.control)


def test_statements_are_equally_often_false_and_labelled_so() -> None:
    prompts = generator("workshop.statements")(rng(), 400, ())
    assert 0.4 < np.mean([p.harmful for p in prompts]) < 0.6
    assert all(workshop.label(p.text) == workshop.harmful(*p.key.split(" ")) for p in prompts)


def test_secrets_come_with_what_they_might_have_been_and_never_twice() -> None:
    prompts = generator("workshop.secrets")(rng(), 999, ())
    assert len({p.key for p in prompts}) == len(prompts) == 200 and sum(p.harmful for p in prompts) == 100
    for p in prompts:
        assert p.secret and p.secret not in p.others and len(set(p.others)) == 511


def test_equal_randomness_gives_equal_prompts_and_other_randomness_fresh_ones() -> None:
    draw = generator("workshop.requests")
    assert draw(rng(1), 20, ()) == draw(rng(1), 20, ())
    assert draw(rng(1), 20, ()) != draw(rng(2), 20, ())


def test_an_unknown_generator_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'workshop.harmful'"):
        generator("workshop.harmfull")


def test_a_file_is_sampled_without_replacement(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *(json.dumps(r) for r in ROWS), "")
    draw = from_file(path, sha256_file(path))
    drawn = draw(rng(), 7, ())
    assert len({p.text for p in drawn}) == 7
    assert {(p.text, p.harmful) for p in draw(rng(), 99, ())} == {(r["prompt"], r["harmful"]) for r in ROWS}
    assert draw(rng(1), 5, ()) != draw(rng(2), 5, ())


def test_a_file_may_say_more_about_its_prompts(tmp_path: Path) -> None:
    more = {"plain": "Do 1.", "control": "Now do 1.", "secret": "4821", "others": ["1234"]}
    path = write(tmp_path / "p.jsonl", json.dumps(ROWS[0] | more))
    (found,) = from_file(path)(rng(), 1, ())
    assert (found.plain, found.control, found.secret, found.others) == (
        "Do 1.",
        "Now do 1.",
        "4821",
        ("1234",),
    )
    for key, wrong in (("plain", 3), ("secret", " "), ("others", "1234"), ("others", [1])):
        path = write(tmp_path / "p.jsonl", json.dumps(ROWS[0] | {key: wrong}))
        with pytest.raises(DataError, match=f'"{key}" must be'):
            from_file(path)


def test_a_line_separator_inside_a_prompt_does_not_end_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", json.dumps({"prompt": "a\u2028b", "harmful": True}, ensure_ascii=False)
    )
    assert from_file(path)(rng(), 1, ())[0].text == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object, got list"),
        ('{"prompt": "x"}', "true or false"),
        ('{"harmful": true}', '"some text"'),
        ('{"prompt": "x", "harmful": "false"}', "true or false"),
        ('{"prompt": "x", "harmful": 1}', "true or false"),
        ('{"prompt": " ", "harmful": true}', '"some text"'),
        ('{"prompt": "x", "harmful": true, "key": 3}', '"key" must be text'),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "p.jsonl", json.dumps(ROWS[0]), "", line)
    with pytest.raises(DataError, match=f"p.jsonl:3: .*{problem}"):
        from_file(path)


def test_a_missing_an_empty_and_a_changed_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such prompt file"):
        from_file(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no prompts in this file"):
        from_file(write(tmp_path / "empty.jsonl", "", ""))
    path = write(tmp_path / "p.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=f"the constraint declares {'0' * 64}"):
        from_file(path, "0" * 64)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8 at byte 12"):
        from_file(path)
