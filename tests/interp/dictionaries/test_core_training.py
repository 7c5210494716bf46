"""Dictionaries that train: they find what was planted, revive what died, and remember it when resumed."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.base.errors import TrainingError
from glasshouse.interp.dictionaries import (
    ActivationBatch,
    Dictionary,
    DictionaryConfig,
    dictionary_loss,
    dictionary_optimizer,
    dictionary_step,
    fit_start,
    resample,
)

D_IN, TRUE = 32, 32


def planted(step: int, n: int = 512, truth_seed: int = 77) -> tuple[Tensor, Tensor]:
    """Activations [n, D_IN] of two or so of TRUE unit features, and those features; seeds of their own."""
    truth = F.normalize(torch.randn(TRUE, D_IN, generator=torch.Generator().manual_seed(truth_seed)), dim=1)
    generator = torch.Generator().manual_seed(10_000 + step)
    on = torch.rand(n, TRUE, generator=generator) < 1.5 / TRUE
    strength = 0.5 + torch.rand(n, TRUE, generator=generator)
    return 5 * (on * strength) @ truth, truth


def recovered(made: Dictionary, truth: Tensor) -> float:
    rows = F.normalize(made.W_dec.detach(), dim=1)
    return float(((truth @ rows.T).amax(1) > 0.9).float().mean())


def built(architecture: str, **more: object) -> Dictionary:
    extra: dict[str, object] = {"normalize_activations": "expected_average_only_in", "dead_after": 20_000}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        extra["k"] = 3
    if architecture == "matryoshka":
        extra["prefixes"] = (24, 48)
    whole = {"architecture": architecture, "d_in": D_IN, "d_sae": 48} | extra | more
    return Dictionary(DictionaryConfig.model_validate(whole)).init_weights(1)


# Learning rate, what the architecture needs, and the share of the planted features that it must find. Where a
# batch shares one budget, features that occur together are sometimes merged: that is asked less.
PLANTED: dict[str, tuple[float, dict[str, object], float]] = {
    "l1": (1e-2, {"sparsity_weight": 2.0}, 0.9),
    "gated": (1e-2, {"sparsity_weight": 8.0}, 0.9),
    "topk": (1e-2, {"k": 2}, 0.9),
    "batchtopk": (3e-2, {"k": 2}, 0.75),
    "matryoshka": (3e-2, {"k": 2, "prefixes": (32, 48)}, 0.7),
    "jumprelu": (
        3e-2,
        {"sparsity_weight": 3.0, "jumprelu_threshold": 0.5, "jumprelu_bandwidth": 0.5},
        0.9,
    ),
}


@pytest.mark.parametrize("architecture", PLANTED)
def test_a_planted_dictionary_is_recovered(architecture: str) -> None:
    lr, more, least = PLANTED[architecture]
    made = built(architecture, **more)
    x, truth = planted(0)
    fit_start(made, ActivationBatch(x))
    assert recovered(made, truth) == 0.0  # no initialisation holds the truth
    optimizer = dictionary_optimizer(made, lr)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (500 - step) / 250)
        dictionary_step(made, ActivationBatch(planted(step)[0]), optimizer)
    assert recovered(made, truth) >= least
    x, _ = planted(10**6)
    with torch.no_grad():
        rest = (x - made.eval()(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert 1 - rest.item() > 0.85


def test_a_transcoder_learns_a_map_that_no_autoencoder_would() -> None:
    """What it writes is a rotation of what it reads: the truth of its decoder is the rotated one."""
    turn = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5))).Q
    made = built("topk", d_out=D_IN, k=2)
    x, truth = planted(0)
    fit_start(made, ActivationBatch(x, x @ turn))
    optimizer = dictionary_optimizer(made, 1e-2)
    for step in range(500):
        x, _ = planted(step)
        dictionary_step(made, ActivationBatch(x, x @ turn), optimizer)
    assert recovered(made, truth @ turn) >= 0.75 > 0.2 > recovered(made, truth)


def test_features_count_how_long_they_are_silent() -> None:
    made = built("topk", k=1)
    with torch.no_grad():
        made.b_enc[0] = -1e6
    for step in range(3):
        dictionary_loss(made, ActivationBatch(planted(step, n=100)[0]))
    assert int(made.since_fired[0]) == 300
    assert int(made.since_fired.min()) == 0
    made.eval()
    dictionary_loss(made, ActivationBatch(planted(3, n=100)[0]))
    assert int(made.since_fired[0]) == 300  # looking on is not training


def kill(made: Dictionary, n: int, bias: float) -> None:
    """Let ``n`` features start so low that others win, and count as dead."""
    with torch.no_grad():
        made.b_enc[:n] = bias
        made.since_fired[:n] = made.config.dead_after


def alive(made: Dictionary, n: int, x: Tensor) -> int:
    """How many of the first ``n`` features fire in at least 1% of ``x``; a planted one is in 5% of it."""
    with torch.no_grad():
        return int(((made.encode(x)[:, :n] > 0).float().mean(0) >= 0.01).sum())


@pytest.mark.parametrize("auxiliary_weight", [1 / 32, 0.0])
def test_the_auxiliary_loss_revives_dead_features(auxiliary_weight: float) -> None:
    made = built("topk", k=1, auxiliary_weight=auxiliary_weight, dead_after=2_000, d_sae=TRUE)
    x, _ = planted(0)
    fit_start(made, ActivationBatch(x))
    kill(made, 16, -3.0)
    assert alive(made, 16, x) == 0
    optimizer = dictionary_optimizer(made, 1e-2)
    for step in range(300):
        dictionary_step(made, ActivationBatch(planted(step)[0]), optimizer)
    revived = alive(made, 16, planted(999, n=2000)[0])
    assert revived >= 10 if auxiliary_weight else revived <= 5


def test_resampling_revives_dead_features() -> None:
    made = built("l1", dead_after=2_000, sparsity_weight=0.5)
    x, truth = planted(0, n=2000)
    fit_start(made, ActivationBatch(x))
    kill(made, 24, -30.0)
    optimizer = dictionary_optimizer(made, 5e-3)
    for step in range(100):
        dictionary_step(made, ActivationBatch(planted(step)[0]), optimizer)
    assert alive(made, 24, x) == 0
    before, n_dead = recovered(made, truth), int(made.dead().sum())
    assert n_dead >= 24
    again = Dictionary(made.config)
    again.load_state_dict(made.state_dict())
    assert resample(made, x, 3, [optimizer]) == n_dead
    assert resample(again, x, 3) == n_dead
    assert torch.equal(made.W_dec, again.W_dec) and not made.dead().any()
    moment = optimizer.state[made.W_enc]["exp_avg"]
    assert (moment[:, :24] == 0).all() and (moment[:, made.config.d_sae - 1] != 0).any()
    for step in range(100, 600):
        dictionary_step(made, ActivationBatch(planted(step)[0]), optimizer)
    assert alive(made, 24, x) >= 12 and recovered(made, truth) > before
    assert resample(made.eval(), x, 3) == int(made.dead().sum())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_resumed_training_goes_on_bit_for_bit(architecture: str) -> None:
    """Counters and thresholds are part of the state: features die on the same step."""
    made = built(architecture, dead_after=1_000)
    optimizer = dictionary_optimizer(made, 5e-3)
    for step in range(6):
        dictionary_step(made, ActivationBatch(planted(step)[0]), optimizer)
    file = io.BytesIO()
    torch.save({"model": made.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Dictionary(made.config)
    again.load_state_dict(saved["model"])
    resumed = dictionary_optimizer(again, 5e-3)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(6, 10):
        for one, its in ((made, optimizer), (again, resumed)):
            dictionary_step(one, ActivationBatch(planted(step)[0]), its)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_threshold_of_batchtopk_keeps_about_k_features_at_inference() -> None:
    made = built("batchtopk", k=2)
    optimizer = dictionary_optimizer(made, 5e-3)
    for step in range(300):
        dictionary_step(made, ActivationBatch(planted(step)[0]), optimizer)
    features = made.encode(planted(999, n=4000)[0])
    assert 1.3 < float((features > 0).sum(1).float().mean()) < 2.7
    alone = made.encode(planted(999, n=4000)[0][:1])
    assert torch.allclose(alone, features[:1], atol=1e-5)  # whatever else is in the batch


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    made = built("topk")
    with torch.no_grad():
        made.W_dec[0] = 1e30
        made.W_enc[:, 0] = 1e30
    before = {name: tensor.clone() for name, tensor in made.state_dict().items() if name != "since_fired"}
    with pytest.raises(TrainingError, match="not finite"):
        dictionary_step(made, ActivationBatch(planted(0)[0]), dictionary_optimizer(made, 1e-3))
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in before.items())
