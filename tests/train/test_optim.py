from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from glasshouse.base.errors import CheckpointError
from glasshouse.model import GPT, GPTConfig
from glasshouse.train.config import StageConfig
from glasshouse.train.objective import next_token, tensors
from glasshouse.train.optim import Muon, Optimizers, orthogonalise, parameter_groups
from train.tiny import CONFIG, batches, new_model, plan

STAGE = StageConfig(name="s", steps=10, batch_size=8)
HIDDEN = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"}


def names(model: GPT, group: str) -> set[str]:
    return {name for g in parameter_groups(model, STAGE) if g.name == group for name, _ in g.parameters}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_muon_gets_exactly_the_hidden_matrices(tied: bool, norm: str) -> None:
    model = GPT(
        CONFIG.model_copy(
            update={"tied": tied, "norm": norm, "mlp": "gated", "n_layer": 2, "attn_bias": True}
        )
    )
    assert names(model, "hidden matrices") == {f"blocks.{i}.{m}.weight" for i in range(2) for m in HIDDEN}
    assert names(model, "embeddings") == {"embed.weight"}
    assert names(model, "head") == (set() if tied else {"head.weight"})
    rest = names(model, "norms and biases")
    assert all(dict(model.named_parameters())[name].ndim == 1 for name in rest)


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = GPT(
        GPTConfig(vocab_size=9, context=4, d_model=8, n_layer=2, n_head=2, position="learned", mlp_bias=True)
    )
    listed = [name for group in parameter_groups(model, STAGE) for name, _ in group.parameters]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_only_matrices_that_map_activations_decay() -> None:
    decays = {group.name for group in parameter_groups(new_model(), STAGE) if group.weight_decay > 0}
    assert decays == {"hidden matrices", "head"}


def test_adamw_alone_takes_every_parameter_when_asked() -> None:
    stage = STAGE.model_copy(update={"optimizer": "adamw"})
    assert {g.optimizer for g in parameter_groups(new_model(), stage)} == {"adamw"}


def test_muon_updates_as_torchs_does() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 24), (24, 8), (8, 8)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.1, weight_decay=0.1, momentum=0.9, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=0.02)  # both iterate in bf16, in another order
        assert (p - q).norm() < 0.02 * p.norm()


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_an_update_is_nearly_orthogonal_and_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    gradient = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    step = orthogonalise(gradient, torch.float32)[0]
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(gradient[0], full_matrices=False)
    aligned = u.T @ step @ v.T
    assert torch.allclose(aligned, torch.diag(aligned.diagonal()), atol=1e-4)


def one_step(model: GPT, optimizers: Optimizers, step: int, factor: float = 1.0) -> float:
    optimizers.zero_grad()
    next_token(model, tensors(batches(step, plan(0)))).total.backward()
    norm = optimizers.clip()
    optimizers.step(factor)
    return norm


def test_clipping_reports_the_norm_before_and_limits_it_after() -> None:
    model = new_model()
    optimizers = Optimizers(model, STAGE.model_copy(update={"clip_norm": 1e-3}))
    next_token(model, tensors(batches(0, plan(0)))).total.backward()
    norm = optimizers.clip()
    assert norm > 0.1
    after = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(after) == pytest.approx(1e-3, rel=1e-3)


def test_a_rate_of_zero_changes_nothing() -> None:
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    one_step(model, Optimizers(model, STAGE), 0, factor=0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_restored_from_flat_tensors_continues_bitwise() -> None:
    model = new_model()
    optimizers = Optimizers(model, STAGE)
    assert optimizers.state_tensors() == {}
    for step in range(3):
        one_step(model, optimizers, step)
    other = new_model()
    other.load_state_dict(model.state_dict())
    restored = Optimizers(other, STAGE)
    restored.load({name: t.clone() for name, t in optimizers.state_tensors().items()}, "here")
    for step in range(3, 6):
        one_step(model, optimizers, step)
        one_step(other, restored, step)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_state_of_another_model_is_refused(change: str) -> None:
    model = new_model()
    optimizers = Optimizers(model, STAGE)
    one_step(model, optimizers, 0)
    state = optimizers.state_tensors()
    if change == "missing":
        state.pop("embed.weight/exp_avg")
    elif change == "shape":
        state["embed.weight/exp_avg"] = torch.zeros(3)
    else:
        state["nobody/exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="somewhere: optimiser state"):
        Optimizers(model, STAGE).load(state, "somewhere")
