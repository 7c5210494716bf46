"""Patching against a model stitched together by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.interp.patching import patch_component, patch_residuals
from glasshouse.model import GPT, Taps
from interp.dice import Difference, thrown

CLEAN, MOVED = [1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6]
READ = Difference()


def stream(model: GPT, tokens: list[int]) -> list[Tensor]:
    """The residual stream [1, pos, d_model] before every block and after the last."""
    x = model.embed(torch.tensor([tokens]))
    if model.config.position == "learned":
        x = x + model.pos(torch.arange(len(tokens)))
    where = model.where(len(tokens))[0]
    out = [x]
    for block in model.blocks:
        x = block(x, where)
        out.append(x)
    return out


def finish(model: GPT, x: Tensor, layer: int) -> float:
    """Run the blocks from ``layer`` on and read the decision at the last position."""
    where = model.where(x.shape[1])[0]
    for block in list(model.blocks)[layer:]:
        x = block(x, where)
    return float(READ.margin(model.unembed(model.norm(x))[:, -1]))


@torch.no_grad()
@pytest.mark.parametrize(
    "shape", [{}, {"n_kv_head": 2, "qk_norm": True}, {"position": "learned", "mlp": "plain"}]
)
def test_recovery_equals_a_forward_pass_patched_by_hand(shape: dict[str, object]) -> None:
    model = thrown(**shape)
    found = patch_residuals(model, CLEAN, MOVED, READ)
    clean, moved = stream(model, CLEAN), stream(model, MOVED)
    best, base = finish(model, clean[0], 0), finish(model, moved[0], 0)
    assert (found.clean, found.moved) == (pytest.approx(best, abs=1e-5), pytest.approx(base, abs=1e-5))
    assert found.recovery.shape == (4, len(CLEAN))  # the embeddings, and after each of three layers
    for row in range(4):
        for pos in range(len(CLEAN)):
            x = moved[row].clone()
            x[:, pos] = clean[row][:, pos]
            expected = (finish(model, x, row) - base) / (best - base)
            assert float(found.recovery[row, pos]) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_positions_before_the_change_restore_nothing_and_the_last_site_restores_all() -> None:
    found = patch_residuals(thrown(), CLEAN, MOVED, READ)
    assert found.recovery[:, :2].abs().max() < 1e-4  # a causal model: they are the same in both runs
    assert float(found.recovery[0, 2]) == pytest.approx(1.0, abs=1e-4)  # only this token was changed
    assert float(found.recovery[-1, -1]) == pytest.approx(1.0, abs=1e-4)  # the read-out hangs on it alone
    assert found.recovery[-1, :-1].abs().max() < 1e-4


@torch.no_grad()
def test_components_equal_heads_and_mlps_replaced_by_hand() -> None:
    model = thrown(1)
    found = patch_residuals(model, CLEAN, MOVED, READ)
    names = [
        *(f"blocks.{i}.attn.h{h}" for i in range(3) for h in range(4)),
        *(f"blocks.{i}.mlp" for i in range(3)),
    ]
    assert sorted(found.components) == sorted(names)
    best, base = found.clean, found.moved
    for layer in range(3):
        sites = [f"blocks.{layer}.z", f"blocks.{layer}.mlp_out"]
        with Taps(read=sites) as source:
            model(torch.tensor([CLEAN]), source)
        replaced = {f"blocks.{layer}.mlp": (sites[1], lambda x, s=source[sites[1]]: s)}
        for head in range(4):

            def put(x: Tensor, head: int = head, s: Tensor = source[sites[0]]) -> Tensor:
                mixed = x.clone()
                mixed[:, head] = s[:, head]
                return mixed

            replaced[f"blocks.{layer}.attn.h{head}"] = (sites[0], put)
        for name, (site, edit) in replaced.items():
            with Taps(edit={site: edit}) as taps:
                margin = float(READ.margin(model(torch.tensor([MOVED]), taps)[:, -1]))
            assert found.components[name] == pytest.approx((margin - base) / (best - base), abs=1e-4), name
            assert patch_component(model, CLEAN, MOVED, name, READ) == pytest.approx(margin, abs=1e-5), name


def test_rows_of_unequal_length_or_equal_decisions_are_refused() -> None:
    model = thrown()
    with pytest.raises(UsageError, match="equal length, got 6 and 5"):
        patch_residuals(model, CLEAN, MOVED[:5], READ)
    with pytest.raises(UsageError, match="nothing to restore"):
        patch_residuals(model, CLEAN, CLEAN, READ)
