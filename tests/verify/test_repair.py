"""What a constraint may ask for beside a rollback, and the direction that is fitted on a failing verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.base.errors import RecipeError, VerificationError
from glasshouse.base.run import RunFolder
from glasshouse.evals.subject import Subject, refusal_readout
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import Decision
from glasshouse.train.directions import read_direction
from glasshouse.train.interventions_config import read_repair
from glasshouse.verify.repair import Repair, direction_from, repaired
from glasshouse.verify.schema import read_constraints
from verify.test_schema import row

FAILING = ["Please soak the map.", "Please toast the igloo today.", "Do shake the egg, please."]
PLAIN = ["How do I soak the map?", "Toast the igloo?"]
SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A random model whose blocks write to the stream."""
    words = " ".join(FAILING + PLAIN) + " No I Sorry Gladly Certainly Of course."
    tokenizer = Tokenizer.train([words] * 4, 300)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, context=64, d_model=16, n_layer=2, n_head=2)
    model, random = GPT(config).init_weights(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=random) * 0.2)
    return Subject(model.eval(), tokenizer, refusal_readout(tokenizer))


def activations(subject: Subject, prompts: list[str]) -> torch.Tensor:
    """[n, d_model] at `SITE` where the answer begins, one prompt at a time."""
    rows = []
    for prompt in prompts:
        with torch.no_grad(), Taps(read=[SITE]) as taps:
            subject.model(torch.tensor([subject.ids(prompt)]), taps)
        rows.append(taps[SITE][0, -1])
    return torch.stack(rows)


def test_the_direction_is_the_difference_of_means_in_the_failing_model(subject: Subject) -> None:
    expected = activations(subject, FAILING).mean(0) - activations(subject, PLAIN).mean(0)
    found = direction_from(subject, FAILING, PLAIN, SITE)
    assert found.site == SITE and torch.allclose(found.vectors[0], expected, atol=1e-5)


def test_further_vectors_are_orthogonal_and_span_what_failing_prompts_add(subject: Subject) -> None:
    """With as many as there are failing prompts, nothing of their difference is left outside the span."""
    found = direction_from(subject, FAILING, PLAIN, SITE, rank=3).vectors
    unit = found / found.norm(dim=1, keepdim=True)
    assert torch.allclose(unit @ unit.T, torch.eye(3), atol=1e-4)
    added = activations(subject, FAILING) - activations(subject, PLAIN).mean(0)
    left = added - added @ unit.T @ unit
    assert left.norm() < 1e-3 * added.norm()
    again = direction_from(subject, FAILING, PLAIN, SITE, rank=3).vectors
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([], PLAIN, SITE), "prompts that show the failure"),
        ((FAILING, [], SITE), "prompts that show the failure"),
        ((FAILING, PLAIN, "blocks.7.resid_post"), "no residual site"),
        ((FAILING, PLAIN, "blocks.0.z"), "no residual site"),
        ((FAILING, FAILING, SITE), "look alike"),
    ],
)
def test_without_a_difference_there_is_no_direction(
    subject: Subject, arguments: tuple[Any, ...], problem: str
) -> None:
    with pytest.raises(VerificationError, match=problem):
        direction_from(subject, *arguments)


@pytest.mark.parametrize("kind", ["drop", "steer", "ablate", "route"])
def test_a_rollback_carries_the_repair_that_the_constraint_declares(
    subject: Subject, tmp_path: Path, kind: str
) -> None:
    run = RunFolder(tmp_path).create()
    asked = Decision(
        "rollback", "it failed", "sft-000000.0", ("chat-01",), artifacts={"evals/a.json": "0" * 64}
    )
    mended = repaired(asked, Repair(kind=kind), subject, FAILING, PLAIN, run)  # type: ignore[arg-type]
    assert mended.repair is not None
    repair = read_repair(mended.repair)  # what the trainer reads
    assert repair.kind == kind and (mended.drop_shards == ("chat-01",)) == (kind == "drop")
    if kind in ("steer", "ablate"):
        found = read_direction(tmp_path, repair.direction.sha256)
        assert found.site == SITE  # the last block's
        assert (
            mended.artifacts[f"directions/{repair.direction.sha256}.safetensors"] == repair.direction.sha256
        )
    if kind == "route":
        assert [b.layer for b in repair.blocks] == [0, 1] and repair.shards == ("chat-01",)
    assert mended.artifacts["evals/a.json"] == "0" * 64


def test_nothing_but_a_rollback_is_mended(subject: Subject, tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    stop = Decision("stop", "a person must look")
    assert repaired(stop, Repair(kind="steer"), subject, FAILING, PLAIN, run) == stop
    back = replace(stop, action="rollback", to_checkpoint="a")
    assert repaired(back, None, subject, FAILING, PLAIN, run) == back


@pytest.mark.parametrize(
    ("repair", "on_fail", "problem"),
    [
        ({"kind": "steer", "share": 0.5}, "rollback", "`share` has no effect on repair 'steer'"),
        ({"kind": "drop", "site": SITE}, "rollback", "`site` has no effect on repair 'drop'"),
        ({"kind": "ablate", "rank": 99}, "rollback", "rank"),
        ({"kind": "pray"}, "rollback", "kind"),
        ({"kind": "route"}, "hold", "no step of `on_fail` is a rollback"),
    ],
)
def test_a_repair_without_effect_is_refused(repair: dict[str, Any], on_fail: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        read_constraints([row(on_fail=on_fail, repair=repair)], "c.toml")
    read_constraints([row(on_fail=["hold", "rollback"], repair={"kind": "route", "share": 0.25})], "c.toml")
