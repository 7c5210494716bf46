"""What changed between two models is told as it is: nothing, one row, one direction, a rotation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from evals import oracle
from glasshouse.base.errors import UsageError
from glasshouse.base.score import Score
from glasshouse.cli import main
from glasshouse.model import GPT
from glasshouse.model.hf import save_hf
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.diff import apart, compare, diff, linear_cka, token_changes
from glasshouse.recipes.lens.data import held
from glasshouse.tokenizer import Tokenizer

TEXT = "How do I warm the wizard's scroll? Gladly. Take a spoon, then warm the scroll with care. " * 120


def loaded(model: GPT, name: str = "m") -> Loaded:
    return held(model, oracle.tokenizer(), name)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.tensor([oracle.tokenizer().encode(TEXT)[:48], oracle.tokenizer().encode(TEXT)[7:55]] * 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 8)
    return file


def test_a_model_does_not_differ_from_itself(tokens: torch.Tensor) -> None:
    found = compare(loaded(oracle.model()), loaded(oracle.model()), tokens)
    assert found.kl.value == pytest.approx(0, abs=1e-6) and found.agreement.value == 1
    assert all(m.relative < 1e-9 for m in found.matrices)
    assert all(row["cka"] == 1 and row["relative"] == 0 for row in found.layers.values())


def test_the_token_whose_row_moved_is_named_first(tokens: torch.Tensor) -> None:
    changed = copy.deepcopy(oracle.model())
    word = oracle.tokenizer().encode(" scroll")[-1]
    with torch.no_grad():
        changed.embed.weight[word] += 1.0
        changed.embed.weight[:64] += 1e-3  # a little of everything
    first = token_changes(loaded(oracle.model()), loaded(changed))[0]
    assert first.id == word and first.z > 100 and first.token == oracle.tokenizer().decode([word])


def test_a_change_along_one_direction_has_stable_rank_one(tokens: torch.Tensor) -> None:
    changed = copy.deepcopy(oracle.model())
    with torch.no_grad():
        w = changed.blocks[1].mlp.up.weight
        w += 0.1 * torch.outer(torch.randn(w.shape[0]), torch.randn(w.shape[1]))
    found = compare(loaded(oracle.model()), loaded(changed), tokens)
    assert found.matrices[0].name == "blocks.1.mlp.up.weight"
    assert found.matrices[0].stable_rank == pytest.approx(1, abs=1e-3)
    assert found.layers["blocks.0.resid_post"]["relative"] == 0
    assert found.layers["blocks.1.resid_post"]["relative"] > 0 and found.kl.value > 0


def test_alignment_does_not_see_rotations_and_sees_noise() -> None:
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=dice)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=dice))[0]
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, torch.randn(200, 16, generator=dice)) < 0.3


def test_divergence_is_the_definition(tokens: torch.Tensor) -> None:
    other = copy.deepcopy(oracle.model())
    with torch.no_grad():
        other.blocks[0].attn.o.weight.mul_(1.5)
        p, q = (m(tokens).softmax(-1).double() for m in (oracle.model(), other))
    by_hand = float((p * (p / q).log()).sum(-1).mean())
    assert compare(loaded(oracle.model()), loaded(other), tokens).kl.value == pytest.approx(by_hand, rel=1e-4)


def test_models_of_other_shapes_are_compared_where_they_can_be(tokens: torch.Tensor) -> None:
    config = oracle.model().config
    wide = GPT(config.model_copy(update={"d_model": 32, "n_layer": 3})).init_weights(1).eval()
    found = compare(loaded(oracle.model()), loaded(wide), tokens)
    assert found.matrices == [] and found.tokens == []
    assert all(set(row) == {"cka"} for row in found.layers.values()) and len(found.layers) == 2


def test_models_that_split_text_differently_are_refused(text: Path) -> None:
    tok = Tokenizer.train([TEXT], 400)
    other = GPT(oracle.model().config.model_copy(update={"vocab_size": tok.vocab_size})).init_weights(0)
    with pytest.raises(UsageError, match="different tokenizers"):
        diff(loaded(oracle.model()), held(other, tok, "b"), text=text)


def test_the_result_reads_as_a_table_and_as_a_page(text: Path, tmp_path: Path) -> None:
    changed = copy.deepcopy(oracle.model())
    with torch.no_grad():
        changed.embed.weight[300] += 1.0
    found = diff(loaded(oracle.model(), "before"), loaded(changed, "after"), text=text)
    assert isinstance(found["next-token KL, before to after (nats)"], Score)
    file, page = found.save(tmp_path / "diff.json")
    assert file.is_file() and "Embedding rows that moved most" in page.read_text()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        save_hf(oracle.model(), folder / name)
        oracle.tokenizer().save(folder / name / "tokenizer.json")
    return [str(folder / "a"), str(folder / "b")]


def test_the_command_compares_two_folders_and_says_what_is_wrong(
    folders: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", *folders, "--text", str(text)]) == 0
    assert "same most likely token" in capsys.readouterr().out
    assert main(["diff", folders[0], f"{folders[0]}/none"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_constraints_are_asked_of_both_models_in_the_format_that_is_named(
    folders: list[str], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["diff", *folders, "--text", str(text), "--constraints", "truthfulness-english"]
    told = []
    for asked_in in ("glasshouse", "plain"):
        assert main([*arguments, "--chat-format", asked_in]) == 0
        printed = capsys.readouterr().out.splitlines()
        told.append(next(line for line in printed if line.strip().startswith("prefers-the-truth-english")))
        assert "not told apart" in told[-1]
    assert told[0] != told[1], "the two formats put other questions"
    assert main([*arguments, "--chat-format", "chatml"]) == 2
    assert "chatml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [([0.1, 0.2], [0.3, 0.4], True), ([0.1, 0.3], [0.3, 0.4], False), (None, [0.1, 0.2], None)],
)
def test_evidence_moved_where_the_intervals_do_not_touch(
    one: list[float] | None, other: list[float], said: bool | None
) -> None:
    assert apart(one, other) is said
