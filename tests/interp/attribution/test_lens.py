"""Lenses say what their equations say; the tuned one is nearer to the model on rows it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glasshouse.base.errors import CheckpointError, TrainingError, UsageError
from glasshouse.interp.attribution import TunedLens, fit_tuned_lens, logit_lens, tuned_lens_loss
from glasshouse.train.objective import TensorBatch
from interp.attribution import byhand
from interp.attribution.byhand import forward, make
from interp.dice import thrown


def rows(n: int, seed: int, T: int = 12) -> torch.Tensor:
    return torch.randint(0, 24, (n, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", byhand.SHAPES)
def test_the_logit_lens_is_norm_and_head_on_every_stream_of_the_equations(shape: str) -> None:
    model, tokens = make(shape), rows(2, 0, 6)
    found = logit_lens(model, tokens)
    assert found.sites == ("embed", "blocks.0.resid_post", "blocks.1.resid_post")
    for i in range(2):
        run = forward(model, tokens[i])
        final = run["logits"].softmax(-1)
        for place, part in enumerate(("embed", ("resid_post", 0), ("resid_post", 1))):
            with torch.no_grad():
                said = byhand.norm(model.norm, model.config, run[part]) @ model.head_weight.T
            if model.config.logit_softcap is not None:
                said = model.config.logit_softcap * torch.tanh(said / model.config.logit_softcap)
            p = said.softmax(-1)
            kl = (final * (final / p).log()).sum(-1)
            assert torch.allclose(found.kl[place, i].double(), kl, atol=1e-4)
            assert torch.equal(found.top[place, i], p.argmax(-1))
            nats = -p[:-1].gather(1, tokens[i][1:, None]).log()[:, 0]
            assert torch.allclose(found.loss[place, i].double(), nats, atol=1e-4)
    assert float(found.kl[-1].abs().max()) < 1e-5  # the last place is the model


def test_a_tuned_lens_is_nearer_to_the_final_prediction_on_rows_it_never_saw() -> None:
    model = thrown(0)
    lens = fit_tuned_lens(model, rows(256, 1), steps=150, batch_size=16, lr=3e-3)
    held_out = rows(64, 2)
    plain, tuned = logit_lens(model, held_out), logit_lens(model, held_out, lens)
    gain = tuned.gain_over(plain)
    for site in plain.sites[:-1]:
        assert gain[site].low > 0 and gain[site].n == 64
        assert tuned.kl_scores()[site].value < 0.9 * plain.kl_scores()[site].value
    assert torch.equal(tuned.kl[-1], plain.kl[-1])  # the last is not touched
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_objective_is_the_mean_divergence_and_its_parts_add_up() -> None:
    model = thrown(0, logit_softcap=3.0)
    lens, tokens = TunedLens(model), rows(4, 3)
    weight = torch.ones(tokens.shape)
    weight[:, 5:] = 0
    loss = tuned_lens_loss(lens, TensorBatch(tokens, tokens, weight, 0))
    plain = logit_lens(model, tokens)
    assert loss.total.item() == pytest.approx(float(plain.kl[:-1, :, :5].mean()), rel=1e-4)
    assert sum(p.item() for p in loss.parts.values()) == pytest.approx(loss.total.item())
    loss.total.backward()
    assert lens.weight.grad is not None and all(p.grad is None for p in model.parameters())


def test_a_saved_lens_comes_back_for_its_own_model_alone(tmp_path: Path) -> None:
    model = thrown(0)
    lens = fit_tuned_lens(model, rows(32, 1), steps=5)
    lens.save(tmp_path / "lens")
    again = TunedLens.load(tmp_path / "lens", model)
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias)
    with pytest.raises(CheckpointError, match="fitted on other weights"):
        TunedLens.load(tmp_path / "lens", thrown(1))
    with pytest.raises(UsageError, match="made for another model"):
        logit_lens(thrown(0), rows(2, 0), lens)
    file = tmp_path / "lens" / "lens.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        TunedLens.load(tmp_path / "lens", model)
    (tmp_path / "lens" / "lens.json").write_text("{}")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        TunedLens.load(tmp_path / "lens", model)


def test_fitting_is_a_function_of_its_seed() -> None:
    model, tokens = thrown(0), rows(32, 1)
    first, same, other = (fit_tuned_lens(model, tokens, steps=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.weight, same.weight) and not torch.equal(first.weight, other.weight)


def test_a_model_with_nan_stops_fitting_and_reading() -> None:
    model = thrown(0)
    with torch.no_grad():
        model.embed.weight[:] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        fit_tuned_lens(model, rows(8, 1), steps=2)
    with pytest.raises(UsageError, match="not finite"):
        logit_lens(model, rows(2, 0))


def test_a_reading_shows_itself_with_words_escaped() -> None:
    html = logit_lens(thrown(0), rows(2, 0), decode=lambda i: f"<{i}>")._repr_html_()
    assert "<svg" in html and "&lt;" in html and "<3>" not in html
