"""A report on planted concepts: what it must find, what it must not, and what it must refuse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.interp.probes import (
    ProbeConfig,
    bag_of_words,
    causal_effect,
    decision,
    patch_along,
    probe_report,
)
from glasshouse.interp.probes.rows import split
from glasshouse.model import Taps
from interp.dice import thrown
from interp.probes.toy import rows

FAST = ProbeConfig(c=0.1)


def planted(seed: int = 0, n: int = 480, meanings: int = 120) -> tuple[dict[str, np.ndarray], Any, Any, Any]:
    """Three sites of which the second carries the concept."""
    x, y, keys, unit = rows(n=n, d=16, gap=3.0, meanings=meanings, seed=seed)
    rng = np.random.default_rng(seed + 100)
    return {"s0": rng.standard_normal((n, 16)), "s1": x, "s2": rng.standard_normal((n, 16))}, y, keys, unit


def test_the_site_that_carries_the_concept_is_chosen_and_tested_on_meanings_held_out_whole() -> None:
    acts, y, keys, _ = planted()
    report = probe_report(acts, y, groups=keys, config=FAST)
    assert report.site == report.probe.site == "s1"
    assert report.auroc.low > 0.85 and report.sweep["s0"].low < 0.5 < report.sweep["s0"].high
    assert sum(report.meanings) == 120 and report.auroc.n == report.meanings[2]
    assert report.control is not None and report.control.selectivity.low > 0.1
    assert report.scores == pytest.approx(report.probe.score(acts["s1"][report.test_rows]))
    assert (report.held == y[report.test_rows]).all()


def test_no_meaning_stands_on_both_sides_of_a_split() -> None:
    _, y, keys, _ = planted()
    group = np.array([int(k[1:]) for k in keys])
    part = split(y, group, (0.4, 0.2, 0.4), 0)
    sets = [set(group[part == p].tolist()) for p in range(3)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert [len(s) for s in sets] == [48, 24, 48]


def test_noise_gives_no_finding_about_95_times_in_100() -> None:
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y, keys = np.arange(160) % 2 == 0, [i // 4 * 2 + i % 2 for i in range(160)]
        found = probe_report(
            {"a": rng.standard_normal((160, 6))}, y, groups=keys, config=FAST, labelings=1, seed=seed
        )
        hits += found.auroc.low <= 0.5 <= found.auroc.high
    assert hits >= 52


def test_a_probe_that_learns_meanings_by_heart_has_no_selectivity() -> None:
    rng, n = np.random.default_rng(0), 600
    key = np.arange(n) % 30
    x = np.eye(30)[key] * 5 + 0.1 * rng.standard_normal((n, 30))
    report = probe_report({"s": x}, key % 2 == 0, groups=key.tolist(), config=ProbeConfig(c=10.0))
    assert report.control is not None
    assert report.control.task.value > 0.99 and report.control.control.value > 0.99
    assert abs(report.control.selectivity.value) < 0.01
    assert report.auroc.low < 0.5 < report.auroc.high  # on meanings it never saw


def test_words_explain_all_where_the_label_is_a_word_and_nothing_where_it_is_a_combination() -> None:
    rng, n = np.random.default_rng(1), 800
    a, b = rng.integers(0, 12, n), rng.integers(0, 12, n)
    texts = [f"do act{i} to thing{j}" for i, j in zip(a, b, strict=True)]
    words, keys = bag_of_words(texts), [f"{i} {j}" for i, j in zip(a, b, strict=True)]
    assert words.shape == (n, 26) and (words.sum(1) == 4).all()
    shares = {}
    for name, y in (("word", a % 2 == 0), ("match", a % 2 == b % 2)):
        x = np.where(y, 1.0, -1.0)[:, None] + 0.4 * rng.standard_normal((n, 5))
        leak = probe_report({"s": x}, y, groups=keys, config=FAST, words=words).leakage
        assert leak.words is not None and leak.words_explain is not None
        shares[name] = leak.words_explain
    assert shares["word"].low > 0.95
    assert shares["match"].high < 0.4


def test_masking_the_evidence_removes_what_only_the_evidence_told() -> None:
    acts, y, keys, _ = planted()
    rng = np.random.default_rng(5)
    gone = {"s1": rng.standard_normal(acts["s1"].shape)}
    there = {"s1": acts["s1"] + 0.1 * rng.standard_normal(acts["s1"].shape)}
    removed = probe_report(acts, y, groups=keys, config=FAST, masked=gone).leakage
    kept = probe_report(acts, y, groups=keys, config=FAST, masked=there).leakage
    assert removed.masking_removes is not None and kept.masking_removes is not None
    assert removed.masking_removes.value > 0.7 and kept.masking_removes.high < 0.1
    assert kept.masked is not None and kept.masked.low > 0.85


def test_evidence_positions_are_out_of_an_attention_probes_sight() -> None:
    rng, n = np.random.default_rng(0), 400
    x, y = rng.standard_normal((n, 5, 4)), np.arange(n) % 2 == 0
    x[:, 2, 0] += np.where(y, 3.0, -3.0)
    x[:, 2, 1] += 5.0  # by which its place is known
    evidence = np.zeros((n, 5), bool)
    evidence[:, 2] = True
    config = ProbeConfig(kind="attention")
    report = probe_report({"s": x}, y, config=config, mask=np.ones((n, 5), bool), evidence=evidence)
    assert report.auroc.low > 0.95
    assert report.leakage.masking_removes is not None and report.leakage.masking_removes.low > 0.7


def behaviour(weight: np.ndarray, x: np.ndarray) -> Any:
    """A model whose whole forward pass is one site [n, pos 1, d] and a linear read-out."""

    def decide(edit: Any) -> np.ndarray:
        at = torch.from_numpy(x).float()[:, None]
        for change in (edit or {}).values():
            at = change(at)
        return at[:, 0].double().numpy() @ weight

    return decide


def test_a_direction_that_is_used_moves_behaviour_and_one_that_is_only_readable_does_not() -> None:
    acts, y, keys, unit = planted()
    x = acts["s1"]
    rng = np.random.default_rng(9)
    idle = rng.standard_normal(16)
    idle -= unit * (unit @ idle)
    for weight, used in ((unit, True), (idle / np.linalg.norm(idle), False)):
        level = weight @ x.mean(0)
        ask = behaviour(weight, x[y] - np.outer(np.full(y.sum(), level), weight))
        found = probe_report(acts, y, groups=keys, config=FAST, decide=ask, n_random=19).causal
        assert found is not None and found.sites == ("s1",)
        for operation in ("ablate", "patch", "steer"):
            effect = found[operation]
            if used:
                assert effect.effect.high < min(0, effect.random.low) and effect.p <= 0.1
            else:
                assert abs(effect.effect.value) < 0.6
        if used:  # by hand: what the probe's direction shares with the one that is used
            assert found["steer"].effect.value == pytest.approx(-2 * 3.0, rel=0.35)
            began = float((ask(None) > 0).mean())  # the others are on that side already
            assert found["steer"].flipped.value == pytest.approx(began, abs=0.05)
            assert found["steer"].random_flipped.high < began / 2


def test_interchange_along_a_direction_equals_the_same_edit_by_hand_on_a_real_model() -> None:
    model = thrown()
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 24, (6, 5), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 1] = (corrupt[:, 1] + 3) % 24
    metric = LogitDifference(torch.full((6,), 3), torch.full((6,), 5), torch.full((6,), 4))
    unit = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    found = patch_along(model, Contrast(clean, corrupt, metric), "blocks.1.resid_post", unit, n_random=3)
    with torch.no_grad(), Taps(read=["blocks.1.resid_post"]) as taps:
        model(clean, taps)
    source = taps["blocks.1.resid_post"]
    ask = decision(model, corrupt, metric, batch=6)
    project = torch.outer(unit, unit)
    after = torch.as_tensor(ask({"blocks.1.resid_post": lambda x: x + (source - x) @ project}))
    before = torch.as_tensor(ask(None))
    assert found.effect.value == pytest.approx(float((after - before).mean()), abs=1e-5)
    assert found.effect.n == 6 and found.random.n == 3
    whole = torch.as_tensor(ask({"embed": lambda x: model.embed(clean)}))
    clean_run = torch.as_tensor(decision(model, clean, metric)(None))
    assert torch.allclose(whole, clean_run, atol=1e-5)


def test_a_report_is_data_and_shows_itself_with_names_escaped() -> None:
    acts, y, keys, unit = planted()
    acts["<script>alert(1)</script>"] = acts.pop("s1")
    ask = behaviour(unit, acts["<script>alert(1)</script>"][y])
    report = probe_report(acts, y, groups=keys, config=FAST, decide=ask, model_digest="d" * 64)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["auroc"]["value"] == report.auroc.value and data["model_digest"] == "d" * 64
    assert {e["operation"] for e in data["causal"]["effects"]} == {"ablate", "patch", "steer"}
    assert set(data["layer_sweep"]) == set(acts)
    shown = report._repr_html_()
    assert shown.count("<svg") == 2 and "<script>" not in shown and "&lt;script&gt;" in shown
    assert "Leakage was not measured" in shown and "Leakage was not measured" in str(report)
    assert str(report.auroc) in str(report)


def test_what_was_not_measured_is_said() -> None:
    acts, y, _, unit = planted()
    bare = probe_report(acts, y, config=FAST)
    assert bare.control is None and bare.causal is None and len(bare.notes) == 3
    unique = probe_report(acts, y, groups=range(len(y)), config=FAST)
    assert any("too few meanings occur twice" in n for n in unique.notes)
    deep = probe_report(acts, y, config=ProbeConfig(kind="mlp", steps=5), decide=behaviour(unit, acts["s1"]))
    assert any("mlp probes have no single direction" in n for n in deep.notes)


def test_bad_input_is_refused() -> None:
    acts, y, keys, unit = planted(n=120, meanings=40)
    with pytest.raises(UsageError, match="no activations"):
        probe_report({}, y)
    with pytest.raises(VerificationError, match="activations of s2: 120 of 120 rows hold NaN"):
        probe_report(acts | {"s2": acts["s2"] * np.nan}, y)
    with pytest.raises(VerificationError, match="one class"):
        probe_report(acts, y | True)
    with pytest.raises(VerificationError, match="too few to hold any out"):
        probe_report(acts, y, groups=["a" if one else "b" for one in y])
    with pytest.raises(UsageError, match="different numbers of rows"):
        probe_report(acts | {"s2": acts["s2"][:80]}, y)
    with pytest.raises(UsageError, match="no activations of the chosen site"):
        probe_report(acts, y, groups=keys, config=FAST, masked={"s0": acts["s0"]})
    with pytest.raises(UsageError, match="are not the rows"):
        probe_report(acts, y, groups=keys, config=FAST, masked={"s1": acts["s1"][:50]})
    with pytest.raises(UsageError, match="for attention probes"):
        probe_report(acts, y, config=FAST, evidence=np.zeros((120, 3)))
    with pytest.raises(VerificationError, match="behaviour is NaN"):
        probe_report(acts, y, config=FAST, decide=lambda edit: np.array([np.nan]))
    with pytest.raises(UsageError, match="one number for each row"):
        probe_report(acts, y, config=FAST, decide=lambda edit: np.zeros((3, 2)))
    with pytest.raises(UsageError, match="does not fit"):
        causal_effect(torch.ones(3), acts["s1"], y, behaviour(unit, acts["s1"]), "s1")
