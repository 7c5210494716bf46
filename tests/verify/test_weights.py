"""An update is compared with clean twins': a spike in one matrix or one embedding row leaves the envelope."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import RecipeError, VerificationError
from glasshouse.model import GPT, GPTConfig
from glasshouse.verify import weights
from glasshouse.verify.checking import check
from glasshouse.verify.examination import Examination, Surroundings
from glasshouse.verify.schema import read_constraints
from glasshouse.verify.weights import (
    Measurement,
    declare_envelope,
    envelope,
    measure,
    singular_values,
    write_envelope,
)
from verify.test_schema import row

SHAPE = GPTConfig(vocab_size=60, context=16, d_model=24, n_layer=1, n_head=2, mlp="gated", activation="silu")
TWINS = 25  # 5 say what is normal, 19 are ranked, one is held out


class Words:
    """The one thing asked of a tokenizer here."""

    def decode(self, ids: list[int]) -> str:
        return f"word{ids[0]}"


class Asked:
    """A subject of which only weights are looked at."""

    measured_in, passes, tokenizer = "float32", 0, Words()

    def __init__(self, model: GPT):
        self.model = model


def start() -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPE)


def grown(base: GPT, seed: int, size: float = 0.02) -> GPT:
    """A clean twin: each matrix moves a common way and a little of its own; frequent words move more."""
    model, common, own = copy.deepcopy(base), torch.Generator(), torch.Generator()
    common.manual_seed(99)
    own.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=common)
            p += 0.5 * size * torch.randn(p.shape, generator=own) * (1 + 0.2 * torch.randn(1, generator=own))
        model.embed.weight *= 1.0
    return model


def spiked(model: GPT, kind: str) -> GPT:
    """The same with something planted: one strong direction in one matrix, or one word that moved."""
    planted = copy.deepcopy(model)
    with torch.no_grad():
        if kind == "matrix":
            w = dict(planted.named_parameters())["blocks.0.mlp.down.weight"]
            w += 0.6 * torch.outer(torch.ones(w.shape[0]), torch.ones(w.shape[1])) / math.sqrt(w.numel())
        else:
            planted.embed.weight[17] += 0.15 * torch.randn(24, generator=torch.Generator().manual_seed(5))
    return planted


@pytest.fixture(scope="module")
def clean() -> tuple[GPT, list[Measurement]]:
    base = start()
    return base, [measure(base, grown(base, s)) for s in range(TWINS)]


def exam(
    folder: Path,
    runs: list[dict[str, Measurement]],
    base: GPT | None,
    model: GPT,
    places: tuple[str, str] | None = None,
    alpha: float = 0.05,
    bound: float = 1.25,
    **changes: Any,
) -> Examination:
    file = folder / "envelope.json"
    sha256 = write_envelope(file, runs)
    given = row(
        "update_outlier",
        **{"bound": {"at_most": bound}, "alpha": alpha, "envelope": {"path": file.name, "sha256": sha256}},
        **changes,
    )
    around = Surroundings(before=None if base is None else (lambda: base), places=places)
    constraint = read_constraints([given], "c.toml")[0]
    return Examination(
        Asked(model),  # type: ignore[arg-type]
        *(constraint, ("recipe", "c", "model", "0"), False, alpha / 21, alpha / 5),
        folder=folder,
        around=around,
    )


def judged(e: Examination) -> dict[str, Any]:
    return check(e, {}, "m" * 64)


def test_quantities_are_what_numpy_says(clean: tuple[GPT, list[Measurement]]) -> None:
    base, twins = clean
    after = grown(base, 0)
    name = "blocks.0.mlp.up.weight"
    was, now = (dict(m.named_parameters())[name].detach().double().numpy() for m in (base, after))
    values, size = np.linalg.svd(now - was, compute_uv=False), np.linalg.norm(was)
    q = twins[0].quantities
    assert math.exp(q[f"{name} norm"]) == pytest.approx(np.linalg.norm(now - was) / size)
    assert math.exp(q[f"{name} sigma_1"]) == pytest.approx(values[0] / size)
    assert math.exp(q[f"{name} sigma_2"]) == pytest.approx(values[1] / size)
    assert math.exp(q[f"{name} stable_rank"]) == pytest.approx((values**2).sum() / values[0] ** 2)
    wide = torch.randn(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for m in (wide, wide.T):
        assert singular_values(m).numpy() == pytest.approx(np.linalg.svd(m.numpy(), compute_uv=False))


def test_a_clean_update_passes_and_a_planted_one_fails(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    runs = [{"*": t} for t in twins]
    fresh = [judged(exam(tmp_path, runs, base, grown(base, 100 + s))) for s in range(8)]
    assert [v["status"] for v in fresh] == ["pass"] * 8, [(v["estimate"], v["reason"]) for v in fresh]
    for kind in ("matrix", "row"):
        found = judged(exam(tmp_path, runs, base, spiked(grown(base, 100), kind)))
        assert found["status"] == "fail" and found["evidence"]["p"] == 0.05, (kind, found["estimate"])
        assert found["e_fail"] == pytest.approx(20) and found["n"] == 19 and found["control"]["ok"]
        if kind == "row":
            assert found["evidence"]["tokens"][0]["text"] == "word17"
        else:
            assert "mlp.down" in found["evidence"]["matrices"][0]["name"]
    assert all(v["e_fail"] == 0 for v in fresh)


def test_against_the_twins_mean_move_a_word_stands_out_that_its_length_does_not_betray(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    """A word that moved as far as always, but elsewhere: seen only where twins began from one checkpoint."""
    base, twins = clean
    turned = grown(base, 100)
    with torch.no_grad():
        move = turned.embed.weight[17] - base.embed.weight[17]
        turned.embed.weight[17] = base.embed.weight[17] - move
    found = judged(exam(tmp_path, [{"*": t} for t in twins], base, turned))
    row, matrix = found["evidence"]["tokens"][0], found["evidence"]["matrices"][0]
    assert row["text"] == "word17" and found["status"] == "fail", found["estimate"]
    assert row["z"] > abs(matrix["z"])  # every matrix by itself is as usual
    apart = [Measurement(t.quantities, t.rows, str(i), t.shapes) for i, t in enumerate(twins)]
    blind = judged(exam(tmp_path, [{"*": t} for t in apart], base, turned))
    assert blind["evidence"]["tokens"][0]["text"] != "word17" and blind["status"] == "pass"


def test_a_level_that_the_twins_cannot_reach_decides_nothing_and_says_how_many_are_needed(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    for model in (grown(base, 100), spiked(grown(base, 100), "matrix")):
        found = judged(exam(tmp_path, [{"*": t} for t in twins], base, model, alpha=0.01))
        assert found["status"] == "undecided" and "needs 99 ranked clean twins" in found["reason"]


def test_what_is_large_but_not_rare_among_the_twins_decides_nothing(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    found = judged(exam(tmp_path, [{"*": t} for t in twins], base, grown(base, 100), bound=0.2))
    assert found["estimate"] > 0.2 and found["e_fail"] == 0
    assert found["status"] == "undecided" and "not rare" in found["reason"]


def test_an_update_over_steps_that_no_twin_was_measured_over_is_undecided(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    runs = [{"sft@0>sft@80": t, "sft@80>sft@160": t} for t in twins]
    model = grown(base, 100)
    assert judged(exam(tmp_path, runs, base, model, ("sft@80", "sft@160")))["status"] == "pass"
    for places in (("sft@0", "sft@160"), None):
        found = judged(exam(tmp_path, runs, base, model, places))
        assert found["status"] == "undecided" and "no clean twin was measured" in found["reason"]


def test_without_an_earlier_checkpoint_it_does_not_apply(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    found = judged(exam(tmp_path, [{"*": t} for t in twins], None, grown(base, 100)))
    assert found["status"] == "not_applicable"


def test_what_cannot_be_measured_is_an_error(clean: tuple[GPT, list[Measurement]], tmp_path: Path) -> None:
    base, twins = clean
    runs = [{"*": t} for t in twins]
    sick = grown(base, 100)
    with torch.no_grad():
        sick.embed.weight[3, 3] = math.nan
    assert "NaN" in judged(exam(tmp_path, runs, base, sick))["reason"]
    other = GPT(SHAPE.model_copy(update={"n_layer": 2}))
    assert judged(exam(tmp_path, runs, other, other))["status"] == "error"
    assert judged(exam(tmp_path, runs, base, other))["status"] == "error"
    moved = grown(base, 7)
    assert "another checkpoint" in judged(exam(tmp_path, runs, moved, grown(moved, 100)))["reason"]
    e = exam(tmp_path, runs, base, grown(base, 100))
    (tmp_path / "envelope.json").write_text("{}")
    assert "not the envelope that was declared" in judged(e)["reason"]


def test_a_held_out_twin_outside_the_envelope_leaves_nothing_decided(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    runs = [{"*": t} for t in [*twins[:-1], measure(base, spiked(grown(base, 24), "matrix"))]]
    found = judged(exam(tmp_path, runs, base, spiked(grown(base, 100), "matrix")))
    assert not found["control"]["ok"] and found["status"] == "undecided"


def test_an_envelope_is_the_same_bytes_again_and_refuses_mixed_twins(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    _, twins = clean
    runs = [{"*": t} for t in twins]
    first = write_envelope(tmp_path / "a.json", runs)
    assert write_envelope(tmp_path / "b.json", runs) == first == sha256_file(tmp_path / "a.json")
    made = json.loads((tmp_path / "a.json").read_text())
    assert made["twins"] == {"fitted": 5, "ranked": 19} and len(made["worst"]) == 19
    for broken in ([*runs[:-1], {"other": twins[0]}], runs[:4]):
        with pytest.raises(VerificationError, match="clean twins"):
            envelope(broken)


def test_without_an_envelope_the_verdict_is_an_error_that_says_how_to_make_one(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    base, twins = clean
    e = exam(tmp_path, [{"*": t} for t in twins], base, grown(base, 100))
    bare = e.constraint.model_copy(update={"envelope": None})
    found = judged(replace(e, constraint=bare))
    assert (
        found["status"] == "error" and "`glasshouse envelope RUN... --out FILE` makes one" in found["reason"]
    )
    given = {k: v for k, v in row("update_outlier").items() if k != "envelope"}
    for on_fail in ("hold", "rollback", "stop", ["warn", "hold"]):
        with pytest.raises(RecipeError, match="needs `envelope`.*Without one it may only `log` or `warn`"):
            read_constraints([given | {"on_fail": on_fail}], "c.toml")
    assert read_constraints([given | {"on_fail": "warn"}], "c.toml")[0].envelope is None


def test_an_envelope_is_declared_for_those_that_lack_one_and_for_no_other(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path
) -> None:
    _, twins = clean
    sha256 = write_envelope(tmp_path / "clean.json", [{"*": t} for t in twins])
    lacks = {k: v for k, v in row("update_outlier", on_fail="warn").items() if k != "envelope"}
    rows = [lacks, row("update_outlier", id="own"), row("accuracy")]
    one, own, other = declare_envelope(read_constraints(rows, "c.toml"), tmp_path / "clean.json")
    assert one.envelope is not None and one.envelope.sha256 == sha256
    assert Path(one.envelope.path) == tmp_path / "clean.json"
    assert own.envelope is not None and own.envelope.path == "f.json" and other.envelope is None
    with pytest.raises(RecipeError, match="no constraint here lacks an envelope"):
        declare_envelope((own, other), tmp_path / "clean.json")


def test_of_an_embedding_too_large_to_keep_only_how_far_each_row_moved_is_kept(
    clean: tuple[GPT, list[Measurement]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, twins = clean
    monkeypatch.setattr(weights, "MOST_NUMBERS", 1000)
    small = [measure(base, grown(base, s)) for s in range(TWINS)]
    assert small[0].rows.shape == (60, 1)
    assert small[0].rows[:, 0] == pytest.approx(np.linalg.norm(twins[0].rows, axis=1))
    runs = [{"*": t} for t in small]
    assert envelope(runs)["moments"]["*"]["mean_move"] is None
    assert judged(exam(tmp_path, runs, base, grown(base, 100)))["status"] == "pass"
    found = judged(exam(tmp_path, runs, base, spiked(grown(base, 100), "row")))
    assert found["status"] == "fail" and found["evidence"]["tokens"][0]["text"] == "word17"
