"""Scores that nothing trains on come with a standard error that is one, and a run stops when they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import ShrunkCovariance
from torch import Tensor

from align import bandit
from align.bandit import new_gpt, rows, train
from align.test_rl import GRPO, ONE
from glasshouse.align.collect import collect
from glasshouse.align.heldout import OUTLIERS, SHRINK, Cloud, HeldOut, over_prompts, residuals, within
from glasshouse.align.policy import Policy, Prompts, RLConfig
from glasshouse.align.rl import PolicyTrainee
from glasshouse.align.rollout import Embedded
from glasshouse.align.sequences import pack
from glasshouse.align.watch import Online, ProxyParted
from glasshouse.base.errors import Stopped, TrainingError, UsageError


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_error_over_fixed_prompts_is_that_of_drawing_the_answers_again() -> None:
    rng = np.random.default_rng(0)
    chances = rng.beta(0.3, 0.3, size=(80, 1))  # most prompts are answered alike every time
    again = [within(torch.from_numpy((rng.random((80, 2)) < chances) * 1.0)) for _ in range(1500)]
    scatter = float(np.std([mean for mean, _ in again]))
    assert np.mean([mean for mean, _ in again]) == pytest.approx(chances.mean(), abs=0.002)
    assert scatter < np.mean([se for _, se in again]) < 1.15 * scatter
    assert within(torch.ones(80, 2))[1] > 0.005  # alike answers are no certainty


def test_the_error_over_drawn_prompts_counts_prompts_and_not_answers() -> None:
    rng = np.random.default_rng(1)
    means, said = [], []
    for _ in range(1500):
        chances = rng.beta(0.3, 0.3, size=(24, 1))
        scores = torch.from_numpy((rng.random((24, 8)) < chances) * 1.0).flatten()
        means.append(float(scores.mean()))
        said.append(over_prompts(scores, 8))
    assert np.mean(said) == pytest.approx(np.std(means), rel=0.06)
    assert np.isnan(over_prompts(torch.ones(8), 8))


def test_a_probe_stands_in_the_row_with_its_error() -> None:
    policy, how = Policy(new_gpt()), RLConfig(group=4, max_new_tokens=1)
    prompts = Prompts(0, ((0,), (1, 2), (3,)), ("a",) * 3)
    made = collect(policy, prompts, how, Embedded(), bandit.reward, {"gold": bandit.reward}, "here")
    by_prompt = made.reward.view(3, 4).mean(dim=1)
    assert made.row["gold_se"] == pytest.approx(float(by_prompt.std()) / 3**0.5, rel=1e-5)


def test_distances_inside_are_sklearn_s() -> None:
    rng = np.random.default_rng(2)
    own, other = rng.normal(size=(60, 9)) @ rng.normal(size=(9, 9)), rng.normal(size=(40, 9)) + 2
    theirs = ShrunkCovariance(shrinkage=SHRINK).fit(own)
    expected = theirs.mahalanobis(other).mean() / theirs.mahalanobis(own).mean()
    cloud = Cloud(torch.from_numpy(own))
    assert cloud.distance(torch.from_numpy(other)) == pytest.approx(expected, rel=1e-9)
    assert cloud.distance(torch.from_numpy(own)) == pytest.approx(1.0)


def test_residuals_are_means_over_an_answer_s_own_predictions() -> None:
    gpt = new_gpt()
    found = residuals(gpt, [[0], [1, 2]], [[3, 4, 5], [6]])
    rows = pack([[0], [1, 2]], [[3, 4, 5], [6]], context=8)
    with torch.no_grad():
        alone = gpt.hidden(rows.tokens[:1, :3])[0].mean(dim=0), gpt.hidden(rows.tokens[1:, :2])[0, 1]
    assert torch.allclose(found, torch.stack(alone), atol=1e-5)


def test_of_many_answers_an_even_share_is_read_for_outliers() -> None:
    policy, how = Policy(new_gpt()), RLConfig(group=2, max_new_tokens=2)
    held_out = HeldOut([(i,) for i in range(5)], bandit.reward, each=120)  # 600 answers: every third
    said = held_out.measure(policy, how, Embedded(), 0, "here")["outlier"]
    drawn = {w: held_out._draw(policy.gpt, how, Embedded(), w, 0) for w in ("held-out reference", "held-out")}
    own, now = (
        residuals(policy.gpt, held_out.prompts[::3], [a.ids for a in answers[::3]])
        for answers in drawn.values()
    )
    assert len(now) == 200 <= OUTLIERS < 600
    assert said == pytest.approx(Cloud(own).distance(now))


def parted(prompts: Any, answers: Any) -> Tensor:
    """What the bandit's reward stands for: its second and third best words are good, its best one is not."""
    return torch.tensor([{4: 1.0, 7: 1.0, 3: -1.0}.get(answer[0], 0.0) for answer in answers])


HACKED: dict[str, Any] = {"steps": 75, "adam_lr": 0.0001, "save_every": 20}


def hacked(folder: Path, how: RLConfig = GRPO, **changes: Any) -> Any:
    held_out = HeldOut([(0,), (1,)], parted, each=48, full=2.0)
    trainee = PolicyTrainee(how, bandit.reward, held_out=held_out, watch=Online())
    return train(folder, how, trainee=trainee, **(HACKED | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, glasshouse_home: Path) -> Path:
    """A run whose reward is hacked and that nobody stops."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hacked") / "run"
    hacked(folder)
    return folder


def test_a_hack_is_measured_flagged_and_its_peak_foretold_row_by_row(whole: Path) -> None:
    found = rows(whole)
    gold = np.array([row["gold"] for row in found])
    smooth = np.convolve(gold, np.ones(5) / 5, "same")
    peak = int(smooth[2:-2].argmax()) + 2
    assert gold[peak] > gold[0] + 0.2 and gold[-1] < gold[peak] - 0.5  # it rose, and was lost
    assert found[-1]["reward"] > found[peak]["reward"] > found[0]["reward"]
    first = next(i for i, row in enumerate(found) if row["flagged"])
    # A sharp turn is seen late: not before the peak, and while most of the fall is still to come.
    assert peak <= first and smooth[first] - gold[-5:].mean() > 0.5 * (smooth[peak] - gold[-5:].mean())
    told = [row for row in found if "peak_d" in row][-1]
    assert found[first]["watch"] >= 1 and told["peak_d"] < told["d"] * 1.25
    assert found[-1]["outlier"] > 2 * found[0]["outlier"] and found[-1]["lost"] > 0.2
    assert all(0 < row["gold_se"] < 0.2 for row in found)


def test_what_is_measured_teaches_nothing(whole: Path, tmp_path: Path) -> None:
    bare = train(tmp_path / "bare", GRPO, **HACKED)
    last = sorted((whole / "checkpoints").iterdir())[-1] / "model.safetensors"
    assert (bare.checkpoint.path / "model.safetensors").read_bytes() == last.read_bytes()


def test_a_run_told_to_stops_at_the_flag_and_says_where(whole: Path, tmp_path: Path) -> None:
    how = GRPO.model_copy(update={"on_flag": "stop"})
    with pytest.raises(ProxyParted, match=r"parted from what it is for at a distance of \d"):
        hacked(tmp_path / "run", how)
    first = next(i for i, row in enumerate(rows(whole)) if row["flagged"])
    assert len(rows(tmp_path / "run")) == first  # the row that flags it is not learnt from
    saved, stop = [json.loads(x) for x in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()][-2:]
    assert stop["kind"] == "stop" and saved["body"]["why"] == "halt"
    with pytest.raises(Stopped, match="parted"):
        hacked(tmp_path / "run", how, resume=True)


def test_a_resumed_watch_has_seen_what_it_saw(whole: Path) -> None:
    """As a checkpoint holds it: what goes on from there says the same as what was never interrupted."""
    found = rows(whole)
    first = Online()
    for row in found[:30]:
        first.take(row)
    again = Online()
    again.again(json.loads(json.dumps(first.kept)))
    told = [again.take(row) for row in found[30:]]
    assert [t["watch"] for t in told] == pytest.approx([row["watch"] for row in found[30:]])
    checkpoint = next(path for path in (whole / "checkpoints").iterdir() if "000020" in path.name)
    assert len(json.loads((checkpoint / "rl.json").read_text())["watched"]) == 20


def test_what_cannot_be_measured_is_refused() -> None:
    for wrong in ({"each": 1}, {"every": 0}, {"full": 0.0}):
        with pytest.raises(UsageError, match="held-out measurements need"):
            HeldOut([(0,), (1,)], parted, **({"each": 2} | wrong))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a watch"):
        PolicyTrainee(RLConfig(on_flag="stop", **ONE), bandit.reward)
    broken = HeldOut([(0,), (1,)], lambda p, a: [float("nan")] * len(a))
    with pytest.raises(TrainingError, match=r"here: 'gold' gave \(4,\) numbers for 4 answers, or one that"):
        broken.measure(Policy(new_gpt()), RLConfig(**ONE), Embedded(), 0, "here")
