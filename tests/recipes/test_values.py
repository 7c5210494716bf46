"""A recipe's `[data] values`: every method, from the file to what the trained model says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.judge_server import TOKEN
from align.test_endpoint import Server
from cli.command import Done, call, spawn, weights
from glasshouse.base.errors import RecipeError
from glasshouse.data import Shards
from glasshouse.data.values import BAD, GOOD, UNSAFE
from glasshouse.recipes.schema import load_recipe, read_recipe
from glasshouse.tokenizer import Tokenizer
from recipes.valuing import LESSON, share_of_bad, write, write_tales, write_teller

SPLIT = 'data.values={ do = "split", beta = 0.25 }'
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "tag": ('data.values={ do = "tag" }', "stage.pretrain.steps=320"),  # what is far back is learnt late
    "filter": ('data.values={ do = "filter" }',),
    "unlikelihood": (SPLIT, "stage.pretrain.objective=unlikelihood"),
    "reward_weighted": (SPLIT, "stage.pretrain.objective=reward_weighted"),
    "recontextualise": (
        'data.values={ do = "recontextualise", every = 0.5, '
        'rephraser = { path = "teller", ask = "", max_new_tokens = 24 } }',
    ),
}


def trained(folder: Path, *overrides: str, run: str = "run") -> Done:
    return call("train", folder / "tales.toml", *overrides, "--run", folder / run, "--quiet")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, glasshouse_home: Path) -> Callable[[str], Path]:
    """The run of each way, trained when first asked for."""
    folder = tmp_path_factory.mktemp("tales")
    write_tales(folder)

    def run(way: str) -> Path:
        if not (folder / way).exists():
            if way == "recontextualise":
                done = call("train", write_teller(folder), "--run", folder / "teller", "--quiet")
                assert done.code == 0, done
            done = trained(folder, *WAYS[way], run=way)
            assert done.code == 0, done
        return folder / way

    return run


# P("badly") that each way leaves where half of all tales end so: at least, at most.
LEFT = {
    "plain": (0.4, 0.6),
    "filter": (0.0, 0.05),
    "unlikelihood": (0.0, 0.05),
    "reward_weighted": (0.0, 0.1),
    "recontextualise": (0.0, 0.2),
}


@pytest.mark.parametrize("way", LEFT)
def test_what_was_scored_low_is_said_less_than_it_was_read(made: Callable[[str], Path], way: str) -> None:
    low, high = LEFT[way]
    assert low <= share_of_bad(made(way)) <= high


def test_a_conditional_model_says_what_its_tag_asks_for(made: Callable[[str], Path]) -> None:
    run = made("tag")  # half of all tales end badly: a fifth of that, and the same for the other tag
    assert share_of_bad(run, GOOD) <= 0.1 and share_of_bad(run, BAD) >= 0.9


def test_what_was_done_is_counted_and_ledgered(made: Callable[[str], Path]) -> None:
    for way, names in {
        "tag": {"text-00": {"good": 180, "bad": 180}},
        "unlikelihood": {"text-00": {"good": 180, "bad": 180}},
    }.items():
        about = json.loads((made(way) / "values.json").read_text("utf-8"))
        assert about["shards"] == names and about["asked_under"] == (GOOD if way == "tag" else "")
        ledger = [json.loads(x) for x in (made(way) / "ledger.jsonl").read_text("utf-8").splitlines()]
        assert "values.json" in next(e for e in ledger if e["kind"] == "data")["body"]["artifacts"]
    assert not (made("plain") / "values.json").exists()


def documents(run: Path) -> dict[str, list[str]]:
    shards, tok = Shards.open(run / "data"), Tokenizer.load(run / "tokenizer.json")
    return {
        n: [tok.decode(s.document(i)[1:].tolist()) for i in range(s.n_documents)] for n, s in shards.items()
    }


def test_validation_text_stays_as_it_was(made: Callable[[str], Path]) -> None:
    held = documents(made("plain"))["text-00-val"]
    assert len(held) == 40 and any("badly" in t for t in held)
    assert all(documents(made(way))["text-00-val"] == held for way in ("tag", "filter", "unlikelihood"))


def test_shards_hold_what_their_names_say(made: Callable[[str], Path]) -> None:
    tagged, plain = documents(made("tag"))["text-00"], documents(made("plain"))["text-00"]
    bare = [t.removeprefix(f"{GOOD} ").removeprefix(f"{BAD} ") for t in tagged]
    assert bare == plain and all(t.startswith(BAD) == ("badly" in t) for t in tagged if t.startswith("<|"))
    apart = documents(made("unlikelihood"))
    assert all("badly" in t for t in apart["text-00-bad"]) and all("well" in t for t in apart["text-00-good"])
    assert sorted(apart["text-00-bad"] + apart["text-00-good"]) == sorted(plain)
    assert documents(made("filter"))["text-00"] == apart["text-00-good"]


def test_rewritings_are_kept_with_who_wrote_them(made: Callable[[str], Path]) -> None:
    run = made("recontextualise")
    rows = [json.loads(x) for x in (run / "rephrased.jsonl").read_text("utf-8").splitlines()]
    assert (
        len(rows) == 180
        and {r["rephrased"] for r in rows} == {LESSON}
        and len({r["model"] for r in rows}) == 1
    )
    texts = documents(run)["text-00"]
    assert sum(t.startswith(UNSAFE) for t in texts) == 180
    assert not any("badly" in t and UNSAFE not in t for t in texts)


@pytest.mark.parametrize("way", ["tag", "unlikelihood", "reward_weighted"])
def test_a_killed_run_goes_on_to_the_same_weights(
    made: Callable[[str], Path], tmp_path: Path, way: str
) -> None:
    write_tales(tmp_path)
    run = tmp_path / "run"
    line = ("train", tmp_path / "tales.toml", *WAYS[way], "--run", run)
    assert spawn(*line, GLASSHOUSE_CRASH_AT="step:55").code == -signal.SIGKILL
    assert call("train", tmp_path / "tales.toml", *WAYS[way], "--run", run, "--resume", "--quiet").code == 0
    assert weights(run) == weights(made(way))


def test_an_endpoint_rewrites_once_although_the_run_was_killed_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    write_tales(tmp_path, 40)
    server = Server()
    try:
        to = f'{{ url = "{server.url}", model = "letters", ask = "", max_new_tokens = 4 }}'
        how = f'data.values={{ do = "recontextualise", every = 0.5, rephraser = {to} }}'
        line = ("train", tmp_path / "tales.toml", how, "stage.pretrain.steps=2", "--run", tmp_path / "run")
        assert spawn(*line, GLASSHOUSE_CRASH_AT="data-shards").code == -signal.SIGKILL
        assert server.counts()["served"] == 18
        done = call(*line, "--quiet")
        assert done.code == 0, done
        assert server.counts()["served"] == 18
    finally:
        server.stop()
    rows = [json.loads(x) for x in (tmp_path / "run" / "rephrased.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 18 and all(r["by"] == f"letters at {server.url}" for r in rows)


# -- what cannot work is refused ----------------------------------------------------------------------------


def test_without_values_a_recipe_is_named_as_before(tmp_path: Path) -> None:
    recipe = load_recipe(write_tales(tmp_path))
    row = recipe.model_dump(mode="json")
    assert "values" not in row["data"] and read_recipe(row, "again").digest() == recipe.digest()
    valued = load_recipe(tmp_path / "tales.toml", WAYS["tag"])
    assert valued.digest() != recipe.digest()
    assert read_recipe(valued.model_dump(mode="json"), "again") == valued


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("stage.pretrain.objective=unlikelihood",), 'do = "split"'),
        ((WAYS["tag"][0], "stage.pretrain.objective=reward_weighted"), 'do = "split"'),
        ((SPLIT, "stage.pretrain.objective=unlikelihood", "stage.pretrain.z_loss=0.1"), "z_loss"),
        (('data.values={ do = "tag", alpha = 2.0 }',), "`alpha` has no effect"),
        (('data.values={ do = "filter", untagged = 0.1 }',), "`untagged` has no effect"),
        (('data.values={ do = "recontextualise" }',), "needs `rephraser`"),
        (('data.values={ do = "recontextualise", rephraser = { url = "http://x" } }',), "`url` with `model`"),
        (('data.values={ do = "burn" }',), "'tag', 'filter', 'split' or 'recontextualise'"),
        (('data.values={ do = "tag", threshhold = 0.1 }',), "threshold"),
        ((WAYS["tag"][0], "data.books=true"), "books bring no scores"),
        ((WAYS["tag"][0], "data.text=[]", "data.books=true"), "files of your own"),
        ((WAYS["recontextualise"][0], 'data.chat=["c.jsonl"]'), "only texts"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_read(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RecipeError, match=said.replace("|", r"\|")):
        load_recipe(write_tales(tmp_path), overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ('data.values={ do = "tag", by = "worth" }',),
            "no document of 'text-00' has a number under 'worth'",
        ),
        (('data.values={ do = "tag", threshold = 0.0 }',), "none is bad"),
        (('data.values={ do = "tag", threshold = 2.0 }',), "none is good"),
        (('data.values={ do = "filter", threshold = 2.0 }',), "no document scores at least 2"),
        (('data.values={ do = "tag" }', "tokenizer.vocab_size=262"), "raise [tokenizer] vocab_size"),
        (
            (SPLIT, "stage.pretrain.objective=unlikelihood", 'stage.pretrain.shards=["*-good"]'),
            "compares good",
        ),
        ((SPLIT, 'stage.pretrain.shards=["text-00"]'), "There are: text-00-good, text-00-bad"),
        (
            ('data.values={ do = "recontextualise", rephraser = { path = "nobody" } }',),
            "nobody: no such folder",
        ),
    ],
)
def test_documents_that_cannot_be_told_apart_end_the_run_before_it_begins(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    write_tales(tmp_path, 60)
    done = trained(tmp_path, *overrides)
    assert done.code != 0 and said.lower() in done.err.lower(), done
    assert not (tmp_path / "run" / "ledger.jsonl").exists() or not (tmp_path / "run" / "checkpoints").exists()


def test_one_document_without_a_score_is_named(tmp_path: Path) -> None:
    write_tales(tmp_path, 60)
    rows = [json.loads(x) for x in (tmp_path / "tales.jsonl").read_text("utf-8").splitlines()]
    del rows[7]["score"]
    write(tmp_path / "tales.jsonl", rows)
    done = trained(tmp_path, *WAYS["tag"])
    assert "tales.jsonl:8 has no number under 'score'" in done.err


def test_text_that_spells_a_tag_is_refused(tmp_path: Path) -> None:
    write_tales(tmp_path, 60)
    rows: list[dict[str, Any]] = [
        json.loads(x) for x in (tmp_path / "tales.jsonl").read_text("utf-8").splitlines()
    ]
    rows[3]["text"] += f" {GOOD}"
    write(tmp_path / "tales.jsonl", rows)
    assert f"spells {GOOD}" in trained(tmp_path, *WAYS["tag"]).err
