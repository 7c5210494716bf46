"""A constitution is read as it is written, and a mistake in it is named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from align.judges import TOK, constitution
from glasshouse.align.constitution import SHIPPED, Constitution, Principle, load_constitution
from glasshouse.align.revise import worked_examples
from glasshouse.base.errors import RecipeError, UsageError

GOOD = """
name = "mine"
[[principle]]
id = "kind"
critique = "Is it unkind?"
revision = "Make it kind."
preference = "Choose the kinder one."
[[principle]]
id = "brief"
critique = "Is it long?"
revision = "Make it short."
preference = "Choose the shorter one."
weight = 3.0
source = "me"
[[principle]]
id = "calm"
critique = "Is it angry?"
revision = "Make it calm."
preference = "Choose the calmer one."
held_out = true
[[example]]
principle = "kind"
prompt = "Hello"
answer = "Go away"
critique = "It is unkind."
revision = "Good day."
"""


def read(tmp_path: Path, text: str) -> Constitution:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_constitution(path)


def test_a_file_says_what_it_says(tmp_path: Path) -> None:
    made = read(tmp_path, GOOD)
    assert [p.id for p in made.trained] == ["kind", "brief"] and [p.id for p in made.held_out] == ["calm"]
    assert made["brief"].weight == 3.0 and made["kind"].weight == 1.0 and made["brief"].source == "me"
    assert worked_examples(made, 1) == (
        ("user", "Hello"),
        ("assistant", "Go away"),
        ("user", "Is it unkind?"),
        ("assistant", "It is unkind."),
        ("user", "Make it kind."),
        ("assistant", "Good day."),
    )
    with pytest.raises(UsageError, match="2 worked examples are asked for and .* has 1"):
        worked_examples(made, 2)
    assert made.digest() != read(tmp_path, GOOD.replace("kinder", "nicer")).digest()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("critique = ", "critque = ", r"principle\[0\].critque'. Did you mean 'critique'"),
        ("[[principle]]", "[[principal]]", r"'principal'. Did you mean 'principle'"),
        ("weight = 3.0", 'weight = "much"', r"principle\[1\].weight"),
        ("weight = 3.0", "weight = 0.0", "greater than 0"),
        ("held_out = true", 'held_out = "yes"', "held_out"),
        ('id = "brief"', 'id = "kind"', "'kind' is there twice"),
        ('principle = "kind"', 'principle = "kint"', "'kint', which is not there. Did you mean 'kind'"),
        ("Make it kind.", " ", "must not be empty"),
        ("[[example]]", "[[example", "not valid TOML"),
    ],
)
def test_a_mistake_is_named_where_it_stands(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        read(tmp_path, GOOD.replace(old, new))
    assert "mine.toml" in str(error.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'workshop'"):
        load_constitution("workshp")
    with pytest.raises(UsageError, match="Did you mean 'kind'"):
        _ = read(tmp_path, GOOD)["kidn"]
    with pytest.raises(RecipeError, match="none is left to train by"):
        Constitution_of(held_out=True)
    (tmp_path / "big.toml").write_bytes(b" " * 5_000_000)
    with pytest.raises(UsageError, match="no constitution"):
        load_constitution(tmp_path / "big.toml")


def Constitution_of(held_out: bool) -> Constitution:
    from glasshouse.align.constitution import _made

    only = Principle(id="a", critique="b", revision="c", preference="d", held_out=held_out)
    return _made("here", name="x", principles=[only])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_ones_have_principles_to_train_and_to_judge_by_and_examples(name: str) -> None:
    made = load_constitution(name)
    assert made.name == name and len(made.trained) >= 5 and len(made.held_out) >= 2
    assert len(worked_examples(made, 2)) == 12
    texts = [t for p in made.principles for t in (p.critique, p.revision, p.preference)]
    assert len(set(texts)) == len(texts)
    if name == "workshop":  # as long as small models can bear
        assert max(len(TOK.encode(p.preference)) for p in made.principles) <= 40


def test_principles_are_drawn_by_weight_and_held_out_ones_never(tmp_path: Path) -> None:
    made = read(tmp_path, GOOD)
    rng = np.random.default_rng(0)
    drawn = Counter(made.draw(rng)[0].id for _ in range(4000))
    assert set(drawn) == {"kind", "brief"}
    assert abs(drawn["brief"] / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    assert {p.id for p in made.draw(rng, 2)} == {"kind", "brief"}
    assert [p.id for p in made.draw(rng, held_out=True)] == ["calm"]
    with pytest.raises(UsageError, match="3 principles are asked for"):
        made.draw(rng, 3)


def test_some_principles_can_be_taken_out_to_judge_by(tmp_path: Path) -> None:
    made = read(tmp_path, GOOD).only(["calm", "kind"])
    assert [p.id for p in made.trained] == ["calm", "kind"] and len(made.examples) == 1


def test_the_open_recipes_file_is_read_from_where_the_user_has_it(tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Criticise."},
            {"role": "assistant", "content": "Rude."},
            {"role": "user", "content": "Revise."},
            {"role": "assistant", "content": "Hello!"},
        ]
    ]
    rules = [{"critic": f"Is it bad {k}?", "revision": f"Mend it {k}."} for k in range(16)]
    path = tmp_path / "constitution.json"
    path.write_text(json.dumps({"constitutions": rules, "system_chat": chats}))
    made = load_constitution(path)
    assert len(made.principles) == 16 and made["03"].critique == "Is it bad 2?"
    assert "Is it bad 2?" in made["03"].preference and made["03"].source == "constitution.json#3"
    assert worked_examples(made, 1)[-1] == ("assistant", "Hello!")
    assert constitution().digest() != made.digest()
    for broken, message in [
        ({"constitutions": [{"critc": "x", "revision": "y"}]}, "Did you mean 'critic'"),
        ({"constitutions": rules, "system_chat": [[{"role": "user", "text": "x"}]]}, r"system_chat\[0\]"),
        ({"constitution": rules}, "Did you mean 'constitutions'"),
    ]:
        path.write_text(json.dumps(broken))
        with pytest.raises(RecipeError, match=message):
            load_constitution(path)
