"""Every architecture against its equation, worked by hand and written again densely."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import DataError, RecipeError, UsageError
from glasshouse.interp.dictionaries import (
    ARCHITECTURES,
    ActivationBatch,
    Dictionary,
    DictionaryConfig,
    dictionary_loss,
    fit_start,
    geometric_median,
    plain_loss,
)
from glasshouse.interp.dictionaries.jumprelu import jumprelu, step


def config(architecture: str, d_in: int = 8, d_sae: int = 32, **more: object) -> DictionaryConfig:
    """A small config with what its architecture needs."""
    if architecture in ("topk", "batchtopk", "matryoshka"):
        more.setdefault("k", 4)
    if architecture == "matryoshka":
        more.setdefault("prefixes", (d_sae // 4, d_sae // 2, d_sae))
    return DictionaryConfig.model_validate(
        {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, **more}
    )


def noisy(architecture: str, seed: int = 0, **more: object) -> Dictionary:
    """A dictionary in which no parameter is zero or trivial, in float64."""
    torch.manual_seed(seed)
    made = Dictionary(config(architecture, **more)).init_weights(seed).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name == "threshold":
                p.uniform_(0.05, 0.3)
            elif name not in ("W_dec", "W_enc"):
                p.normal_(std=0.2)
    return made


def tiny(architecture: str, **more: object) -> Dictionary:
    """Two inputs, two features: feature 0 reads and writes axis 0, feature 1 axis 1, at twice the size."""
    made = Dictionary(config(architecture, d_in=2, d_sae=2, **more))
    with torch.no_grad():
        made.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        made.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        made.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return made


def test_hand_worked_features_of_every_architecture() -> None:
    x = torch.tensor([[3.0, 0.5], [0.0, 1.0]])  # less b_dec: (2, 0.5) and (-1, 1); encoded (2, 1) and (-1, 2)
    assert tiny("l1").encode(x).tolist() == [[2.0, 1.0], [0.0, 2.0]]
    assert tiny("topk", k=1).encode(x).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    by_batch = tiny("batchtopk", k=1)
    by_batch.topk_threshold.fill_(1.5)
    assert by_batch.encode(x).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    nested = tiny("matryoshka", k=1, prefixes=(1, 2))
    nested.topk_threshold.fill_(0.5)
    assert nested.encode(x).tolist() == [[2.0, 1.0], [0.0, 2.0]]
    jump = tiny("jumprelu")
    jump.threshold.data = torch.tensor([0.5, 1.5])
    assert jump.encode(x).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    gated = tiny("gated")
    gated.b_gate.data = torch.tensor([0.0, -1.5])  # gates open: (2, -0.5) and (-1, 0.5)
    gated.b_mag.data = torch.tensor([0.25, 0.0])
    gated.r_mag.data = torch.tensor([math.log(2.0), 0.0])
    assert torch.allclose(gated.encode(x), torch.tensor([[4.25, 0.0], [0.0, 2.0]]))


def test_hand_worked_reconstruction_and_loss() -> None:
    x = torch.tensor([[3.0, 0.5], [0.0, 1.0]])
    made = tiny("topk", k=1, auxiliary_weight=0.0)
    assert made(x).tolist() == [[3.0, 0.0], [1.0, 1.0]]  # errors (0, 0.5) and (-1, 0)
    loss = dictionary_loss(made.eval(), ActivationBatch(x))
    assert loss.total.item() == pytest.approx((0.25 + 1.0) / 2 / 2)
    assert loss.metrics["l0"] == 1.0
    sparse = tiny("l1", sparsity_weight=10.0)
    parts = dictionary_loss(sparse.eval(), ActivationBatch(x)).parts
    assert parts["sparsity"].item() == pytest.approx(10 * (3 + 2) / 2 / 2)
    assert parts["reconstruction"].item() == pytest.approx((0.0 + 1.0) / 2 / 2)


def test_hand_worked_matryoshka_means_the_errors_of_its_prefixes() -> None:
    x = torch.tensor([[3.0, 0.5]])  # features (2, 1): feature 0 alone leaves (0, 0.5), both leave nothing
    made = tiny("matryoshka", k=2, prefixes=(1, 2), auxiliary_weight=0.0).eval()
    assert dictionary_loss(made, ActivationBatch(x)).total.item() == pytest.approx((0.25 + 0.0) / 2 / 2)


def test_hand_worked_straight_through_gradients() -> None:
    pre = torch.tensor([[0.9, 1.05, 2.0]], requires_grad=True)
    threshold = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    out = jumprelu(pre, threshold, 0.4)
    assert out.tolist() == [[0.0, pytest.approx(1.05), 2.0]]
    out.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert pre.grad is not None and pre.grad.tolist() == [[0.0, 2.0, 3.0]]
    # Within half a bandwidth: -threshold / bandwidth times what arrives; the third is too far away.
    assert threshold.grad is not None and threshold.grad.tolist() == pytest.approx([-2.5, -5.0, 0.0])
    threshold.grad = None
    counted = step(pre, threshold, 0.4)
    assert counted.tolist() == [[0.0, 1.0, 1.0]]
    counted.sum().backward()
    assert threshold.grad is not None and threshold.grad.tolist() == pytest.approx([-2.5, -2.5, 0.0])


def dense(made: Dictionary, x: Tensor) -> Tensor:
    """The reconstruction at inference, written row by row and feature by feature, without this package."""
    p = {name: tensor.detach() for name, tensor in made.state_dict().items()}
    out = []
    for row in x * p["scale_in"]:
        if made.config.apply_b_dec_to_input:
            row = row - p["b_dec"]
        bias = p.get("b_enc", p.get("b_gate"))
        pre = [float(row @ p["W_enc"][:, j] + bias[j]) for j in range(made.config.d_sae)]
        match made.config.architecture:
            case "l1":
                f = [max(a, 0.0) for a in pre]
            case "topk":
                best = sorted(range(len(pre)), key=lambda j: -pre[j])[: made.config.k]
                f = [max(a, 0.0) if j in best else 0.0 for j, a in enumerate(pre)]
            case "jumprelu":
                f = [a if a > max(0.0, float(t)) else 0.0 for a, t in zip(pre, p["threshold"], strict=True)]
            case "gated":
                r, b = p["r_mag"].exp(), p["b_mag"]
                f = [
                    max(float(row @ p["W_enc"][:, j] * r[j] + b[j]), 0.0) if pre[j] > 0 else 0.0
                    for j in range(len(pre))
                ]
            case _:
                f = [a if a > max(0.0, float(p["topk_threshold"])) else 0.0 for a in pre]
        y = sum((a * p["W_dec"][j] for j, a in enumerate(f)), p["b_dec"].clone())
        out.append((y + p["W_skip"] @ row if "W_skip" in p else y) / p["scale_out"])
    return torch.stack(out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip transcoder"])
def test_every_architecture_equals_an_independent_dense_one(architecture: str, kind: str) -> None:
    more = {} if kind == "autoencoder" else {"d_out": 5, "skip_connection": kind == "skip transcoder"}
    made = noisy(architecture, **more)
    made.scale_in.fill_(0.6)
    made.scale_out.fill_(0.6 if kind == "autoencoder" else 1.7)
    if hasattr(made, "topk_threshold"):
        made.topk_threshold.fill_(0.3)
    x = torch.randn(20, 8, dtype=torch.float64)
    expected = dense(made, x)
    assert torch.allclose(made(x), expected)
    assert torch.allclose(made(x.reshape(4, 5, 8)), expected.reshape(4, 5, -1))
    assert torch.allclose(made.double().folded().double()(x), expected, atol=1e-5)


def both(made: Dictionary, batch: ActivationBatch) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Parts and gradients of the fast and of the plain loss."""
    found = []
    for loss_of in (dictionary_loss, plain_loss):
        made.zero_grad()
        loss = loss_of(made, batch)
        loss.total.backward()
        gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
        found.append((loss.parts, gradients))
    return found


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
@pytest.mark.parametrize("n_dead", [0, 3, 20])
@pytest.mark.parametrize("d_out", [None, 6])
def test_the_fast_path_equals_the_plain_one(architecture: str, n_dead: int, d_out: int | None) -> None:
    made = noisy(architecture, d_out=d_out, auxiliary_k=2).eval()
    made.since_fired[:n_dead] = made.config.dead_after
    y = None if d_out is None else torch.randn(50, d_out, dtype=torch.float64)
    (fast, by_fast), (plain, by_plain) = both(
        made, ActivationBatch(torch.randn(50, 8, dtype=torch.float64), y)
    )
    assert fast.keys() == plain.keys() and by_fast.keys() == by_plain.keys()
    assert bool(n_dead) == bool(fast["auxiliary"] > 0)
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value)
    for name, gradient in by_plain.items():
        torch.testing.assert_close(by_fast[name], gradient)


@pytest.mark.parametrize("architecture", ["l1", "gated", "topk", "batchtopk", "matryoshka"])
def test_gradients_are_slopes_of_the_plain_loss(architecture: str) -> None:
    made = noisy(architecture, auxiliary_weight=0.0).eval()
    batch = ActivationBatch(torch.randn(12, 8, dtype=torch.float64))
    dictionary_loss(made, batch).total.backward()
    h = 1e-6
    for name, p in made.named_parameters():
        gradient = p.grad
        assert gradient is not None
        if architecture == "gated" and name in ("W_dec", "b_dec"):
            continue  # the gate's own reconstruction leaves the decoder alone: that part is no slope
        towards = torch.randn_like(p)
        with torch.no_grad():
            p.add_(towards, alpha=h)
            above = plain_loss(made, batch).total
            p.sub_(towards, alpha=2 * h)
            below = plain_loss(made, batch).total
            p.add_(towards, alpha=h)
        slope = ((above - below) / (2 * h)).item()
        assert (gradient * towards).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-9), name


def test_bf16_only_chooses() -> None:
    made = noisy("topk", d_in=32, d_sae=512, k=8).float().eval()
    x = torch.randn(200, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = dictionary_loss(made, ActivationBatch(x))
    exact = dictionary_loss(made, ActivationBatch(x))
    assert rough.total.dtype == torch.float32
    # Near ties may be chosen differently; every chosen value is exact, so hardly anything is lost.
    assert rough.total.item() == pytest.approx(exact.total.item(), rel=2e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_order_of_a_batch_does_not_matter(architecture: str) -> None:
    made = noisy(architecture).eval()
    x = torch.randn(40, 8, dtype=torch.float64)
    order = torch.randperm(40)
    one, other = (dictionary_loss(made, ActivationBatch(rows)) for rows in (x, x[order]))
    torch.testing.assert_close(one.total, other.total)
    torch.testing.assert_close(made.encode(x)[order], made.encode(x[order]))


def test_sparse_and_dense_encodings_are_the_same() -> None:
    made = noisy("topk")
    x = torch.randn(30, 8, dtype=torch.float64)
    values, indices = made.encode_sparse(x)
    assert values.shape == indices.shape == (30, 4)
    torch.testing.assert_close(torch.zeros(30, 32).double().scatter(1, indices, values), made.encode(x))
    torch.testing.assert_close(made.decode_sparse(values, indices), made.decode(made.encode(x)))
    with pytest.raises(UsageError, match="no fixed number"):
        noisy("l1").encode_sparse(x)


# -- scales and starts -------------------------------------------------------------------------------------


def test_a_fitted_scale_makes_the_mean_norm_the_root_of_the_width() -> None:
    made = Dictionary(config("topk", normalize_activations="expected_average_only_in")).init_weights(0)
    x = torch.randn(500, 8) * 40 + 7
    fit_start(made, ActivationBatch(x))
    assert float((x * made.scale_in).norm(dim=1).mean()) == pytest.approx(math.sqrt(8), rel=1e-5)
    assert float(made.scale_in) == float(made.scale_out)
    # The middle of the activations is what a dictionary without active features gives back.
    assert torch.allclose(made.decode(torch.zeros(1, 32)), geometric_median(x), atol=0.05)


def test_the_geometric_median_ignores_how_far_an_outlier_is() -> None:
    x = torch.cat([torch.zeros(10, 2), torch.tensor([[1e4, 0.0]])])
    assert float(geometric_median(x).norm()) < 1e-3 < float(x.mean(0).norm())
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    assert torch.allclose(geometric_median(square), torch.ones(2), atol=1e-5)


def test_the_projected_gradient_leaves_norms_alone_and_constrain_restores_them() -> None:
    made = Dictionary(config("topk")).init_weights(0)
    dictionary_loss(made, ActivationBatch(torch.randn(50, 8))).total.backward()
    made.project_gradient()
    assert made.W_dec.grad is not None
    assert torch.linalg.vecdot(made.W_dec.grad, made.W_dec).abs().max() < 1e-6
    with torch.no_grad():
        made.W_dec.mul_(3.0)
    made.constrain()
    assert torch.allclose(made.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_that_are_not_finite_are_refused(architecture: str) -> None:
    made = Dictionary(config(architecture)).init_weights(0)
    x = torch.randn(10, 8)
    x[3, 2] = math.nan
    x[7, 0] = math.inf
    before = made.since_fired.clone()
    with pytest.raises(DataError, match=r"2 of 10 activations from shard-7 are not finite \(first: row 3\)"):
        dictionary_loss(made, ActivationBatch(x, shards=("shard-7",)))
    assert torch.equal(made.since_fired, before)
    for read in (made.encode, made, lambda rows: fit_start(made, ActivationBatch(rows))):
        with pytest.raises(DataError, match="not finite"):
            read(x)


def test_widths_that_do_not_fit_are_refused() -> None:
    made = Dictionary(config("topk", site="blocks.1.resid_post")).init_weights(0)
    with pytest.raises(DataError, match="width 9 for a dictionary of width 8 .site blocks.1.resid_post"):
        made(torch.randn(3, 9))
    with pytest.raises(DataError, match="width 9"):
        dictionary_loss(made, ActivationBatch(torch.randn(3, 9)))
    with pytest.raises(DataError, match=r"shape \[0, 8\]"):
        dictionary_loss(made, ActivationBatch(torch.randn(0, 8)))
    with pytest.raises(DataError, match="needs d_out"):
        dictionary_loss(made, ActivationBatch(torch.randn(3, 8), torch.randn(3, 8)))
    writes = Dictionary(config("topk", d_out=5)).init_weights(0)
    with pytest.raises(DataError, match=r"needs targets \[3, 5\]; got none"):
        dictionary_loss(writes, ActivationBatch(torch.randn(3, 8)))
    with pytest.raises(DataError, match=r"needs targets \[3, 5\]; got \[3, 4\]"):
        dictionary_loss(writes, ActivationBatch(torch.randn(3, 8), torch.randn(3, 4)))
    with pytest.raises(DataError, match="all activations are zero"):
        scaled = Dictionary(config("topk", normalize_activations="expected_average_only_in"))
        fit_start(scaled, ActivationBatch(torch.zeros(3, 8)))


def test_configs_that_make_no_sense_are_refused() -> None:
    for wrong, why in [
        ({"architecture": "topk", "k": None}, "needs k"),
        ({"architecture": "topk", "k": 33}, "from 1 to d_sae = 32"),
        ({"architecture": "l1", "k": 4}, "has none"),
        ({"architecture": "matryoshka", "prefixes": (8, 4, 32)}, "prefixes must increase"),
        ({"architecture": "matryoshka", "prefixes": (8, 16)}, "end with d_sae"),
        ({"architecture": "topk", "prefixes": (8, 32)}, "are for matryoshka"),
        ({"architecture": "topk", "d_out": 8, "apply_b_dec_to_input": True}, "belongs to its output"),
        ({"architecture": "topk", "skip_connection": True}, "for transcoders"),
        ({"architecture": "topk", "site_out": "blocks.0.mlp_out"}, "set d_out too"),
    ]:
        with pytest.raises((ValueError, RecipeError), match=why):
            config(**wrong)
    assert not config("topk", d_out=8).apply_b_dec_to_input


def test_weights_go_into_the_same_shape_only() -> None:
    made = noisy("jumprelu").float()
    again = Dictionary.from_weights(made.config, made.weights())
    x = torch.randn(4, 8)
    assert torch.equal(again(x), made(x))
    lost = made.weights()
    del lost["threshold"]
    with pytest.raises(DataError, match="here.safetensors: 'threshold' is missing"):
        Dictionary.from_weights(made.config, lost, "here.safetensors")
    with pytest.raises(DataError, match=r"'W_enc' has shape \[8, 32\], not \[9, 32\]"):
        Dictionary.from_weights(config("jumprelu", d_in=9), made.weights())
    broken = made.weights()
    broken["b_dec"][0] = math.nan
    with pytest.raises(DataError, match="'b_dec' has numbers that are not finite"):
        Dictionary.from_weights(made.config, broken)


def test_a_dictionary_shows_itself_and_escapes_what_others_wrote() -> None:
    shown = Dictionary(config("topk", site="<script>")).init_weights(0)._repr_html_()
    assert "<script>" not in shown and "8 to 32 features to 8" in shown
