"""Dictionaries in the one loop: resumed bit for bit, side by side as if alone, started from earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import CheckpointError, DataError, Interrupted, RecipeError, UsageError
from glasshouse.interp.dictionaries import (
    ARCHITECTURES,
    ActivationBatch,
    Dictionary,
    dictionary_optimizer,
    dictionary_step,
    fit_start,
)
from glasshouse.interp.dictionaries import train as training
from glasshouse.interp.dictionaries.bank import BankTrainee, read_dictionaries
from glasshouse.interp.dictionaries.difference import DifferenceStream, sides
from glasshouse.interp.dictionaries.stream import TensorStream
from glasshouse.interp.dictionaries.train import train_dictionaries, train_dictionary
from glasshouse.model import GPT, GPTConfig
from glasshouse.train import Checkpoint, Decision

D, S, N = 16, 48, 2048
SHORT: dict[str, Any] = {"steps": 30, "batch_size": 128, "lr": 3e-3, "log_every": 10}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSHOUSE_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def planted(n: int = N, seed: int = 0, d: int = D, features: int = 24) -> tuple[Tensor, Tensor]:
    """Activations [n, d] that are sums of a few of ``features`` unit rows, and those rows."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(features, d, generator=torch.Generator().manual_seed(99))
    truth /= truth.norm(dim=1, keepdim=True)
    on = (torch.rand(n, features, generator=generator) < 0.08) * (
        0.5 + torch.rand(n, features, generator=generator)
    )
    return on @ truth, truth


def config(architecture: str = "topk", **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"architecture": architecture, "d_sae": S, "dead_after": 1500, "site": "a"}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        made["k"] = 4
    if architecture == "matryoshka":
        made["prefixes"] = (12, S)
    return made | changes


def same(one: Dictionary, other: Dictionary) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stops_at(step: int) -> type[BankTrainee]:
    class Stops(BankTrainee):
        def after_update(self, *arguments: Any) -> None:
            super().after_update(*arguments)
            if arguments[-1] == step:
                raise KeyboardInterrupt

    return Stops


def test_five_lines_train_a_dictionary_that_finds_what_was_planted() -> None:
    x, truth = planted(8192)
    trained = train_dictionary({"a": x}, "a", config(), **(SHORT | {"steps": 400, "batch_size": 512}))
    rows = trained.dictionary.W_dec.detach()
    found = (truth @ (rows / rows.norm(dim=1, keepdim=True)).T).max(1).values
    begun = Dictionary(trained.dictionary.config).init_weights(0).W_dec.detach()
    assert (truth @ begun.T).max(1).values.mean() < 0.7
    assert found.mean() > 0.9
    assert trained.rows[-1]["variance_explained"] > 0.85 and trained.rows[-1]["l0"] <= 4
    html = trained._repr_html_()
    assert "<svg" in html and "topk" in html


def test_the_loop_takes_the_steps_that_the_plain_function_takes() -> None:
    x, _ = planted()
    shape = SHORT | {"steps": 5, "warmup_share": 0.0, "decay_share": 0.0, "clip_norm": 0.1}
    source = TensorStream({"a": x}, batch_size=128)
    looped = train_dictionary(source, "a", config(), **shape).dictionary
    plain = Dictionary(looped.config).init_weights(0)
    fit_start(plain, ActivationBatch(source.batch(0)["a"]))
    optimizer = dictionary_optimizer(plain, lr=3e-3)
    for step in range(5):
        dictionary_step(plain, ActivationBatch(source.batch(step)["a"]), optimizer, clip_norm=0.1)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor.float(), looped.state_dict()[name].float(), atol=1e-6), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_killed_and_resumed_every_architecture_ends_in_the_same_bits(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = planted()
    how = SHORT | {"save_every": 7, "resample_every": 11}
    whole = train_dictionary({"a": x}, "a", config(architecture), run=tmp_path / "whole", **how)
    for kill in (3, 17):
        monkeypatch.setattr(training, "BankTrainee", stops_at(kill))
        with pytest.raises(Interrupted):
            train_dictionary({"a": x}, "a", config(architecture), run=tmp_path / f"cut{kill}", **how)
        monkeypatch.undo()
        monkeypatch.setenv("GLASSHOUSE_HOME", str(tmp_path / "home"))
        resumed = train_dictionary(
            {"a": x}, "a", config(architecture), run=tmp_path / f"cut{kill}", resume=True, **how
        )
        assert same(whole.dictionary, resumed.dictionary)
    if architecture in ("batchtopk", "matryoshka"):
        assert whole.dictionary.topk_threshold > 0


def test_trained_together_each_is_as_if_trained_alone() -> None:
    x, _ = planted()
    acts = {"a": x, "b": torch.roll(x, 1, dims=1) * 30}
    configs = {
        "narrow": config("topk", d_sae=24, k=2),
        "wide": config("jumprelu"),
        "other": config("batchtopk", site="b"),
        "across": config("topk", site="a", site_out="b"),
    }
    how = SHORT | {"lr": None, "resample_every": 9, "clip_norm": 0.01}
    together = train_dictionaries(acts, configs, **how)
    for name, one in configs.items():
        alone = train_dictionaries(acts, {name: one}, **how)
        assert same(together.dictionaries[name], alone.dictionary), name
    assert together.rows[-1]["narrow/l0"] <= 2
    with pytest.raises(UsageError, match="there are 4"):
        _ = together.dictionary
    assert together._repr_html_().count("across") >= 1


def test_an_earlier_dictionary_is_gone_on_from() -> None:
    x, _ = planted()
    first = train_dictionary({"a": x}, "a", config(), **SHORT)
    second = train_dictionary(
        {"a": x}, "a", config(), start=first.dictionary, **(SHORT | {"lr": 0.0, "steps": 1})
    )
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "scale_in"):
        assert torch.allclose(
            second.dictionary.state_dict()[name], first.dictionary.state_dict()[name], atol=1e-6
        )
    assert (second.dictionary.since_fired >= first.dictionary.since_fired).any()
    longer = train_dictionary({"a": x}, "a", config(), start=first.dictionary, **SHORT)
    assert longer.rows[0]["loss"] < first.rows[0]["loss"]
    with pytest.raises(UsageError, match="cannot start from a topk dictionary 16 to 48: W_dec"):
        train_dictionary({"a": x}, "a", config(d_sae=24), start=first.dictionary, **SHORT)


def test_dead_features_are_drawn_anew_and_their_moments_forgotten() -> None:
    x, _ = planted()
    how = SHORT | {"steps": 40, "lr": 0.03}
    sick = config("l1", sparsity_weight=40.0, dead_after=400)
    left = train_dictionary({"a": x}, "a", sick, **how)
    revived = train_dictionary({"a": x}, "a", sick, resample_every=38, **how)
    assert int(left.dictionary.dead().sum()) > 0
    assert int(revived.dictionary.dead().sum()) < int(left.dictionary.dead().sum())


def test_a_transcoder_learns_an_mlp_streamed_from_the_model() -> None:
    model = GPT(GPTConfig(vocab_size=32, context=8, d_model=D, n_layer=1, n_head=2)).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randint(0, 32, (200, 8), generator=torch.Generator().manual_seed(2))
    written = {"architecture": "topk", "d_sae": 128, "k": 16, "site_out": "blocks.0.mlp_out"}
    trained = train_dictionary(
        model, "blocks.0.mlp_in", written, tokens=tokens, **(SHORT | {"steps": 300, "batch_size": 256})
    )
    assert trained.dictionary.config.is_transcoder and trained.dictionary.config.d_out == D
    assert trained.rows[-1]["variance_explained"] > 0.8
    assert trained.dictionary.config.model_digest


def test_a_difference_dictionary_finds_what_changed_between_two_models() -> None:
    before = GPT(GPTConfig(vocab_size=32, context=8, d_model=D, n_layer=1, n_head=2)).init_weights(0)
    after = GPT(before.config)
    after.load_state_dict(before.state_dict())
    added = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(5)), dim=0)
    with torch.no_grad():
        after.embed.weight[7] += 3 * added  # one token got a new direction
    tokens = torch.randint(0, 32, (200, 8), generator=torch.Generator().manual_seed(2))
    source = DifferenceStream(before, after, tokens, "blocks.0.resid_post", mode="difference", batch_size=256)
    small = {"architecture": "topk", "d_sae": 8, "k": 1}
    trained = train_dictionary(
        source, "blocks.0.resid_post", small, **(SHORT | {"steps": 200, "batch_size": 256})
    )
    rows = trained.dictionary.W_dec.detach()
    assert (rows @ added).abs().max() > 0.95
    paired = DifferenceStream(before, after, tokens, "blocks.0.resid_post", mode="paired", batch_size=256)
    both = train_dictionary(paired, "blocks.0.resid_post", small | {"d_sae": 32, "k": 4}, **SHORT)
    assert both.dictionary.config.d_in == 2 * D and sides(both.dictionary).shape == (32,)


def test_a_gate_judges_dictionaries_and_their_files_are_apart(tmp_path: Path) -> None:
    x, _ = planted()
    seen: list[float] = []

    def gate(checkpoint: Checkpoint, history: Any, final: bool) -> Decision:
        found = read_dictionaries(checkpoint)["main"]
        with torch.no_grad():
            error = float((found(x) - x).square().sum() / x.square().sum())
        seen.append(error)
        return Decision("promote" if final else "continue", f"unexplained {error:.2f}")

    how = SHORT | {"steps": 60, "gate_every": 20}
    trained = train_dictionary({"a": x}, "a", config(), run=tmp_path / "run", gate=gate, **how)
    assert len(seen) == 3 and seen[-1] < seen[0]
    last = sorted((tmp_path / "run" / "checkpoints").glob("dictionary-000060*"))[0]
    assert {"main.dictionary.json", "main.dictionary.safetensors"} <= {p.name for p in last.iterdir()}
    assert trained.run == tmp_path / "run"


def test_a_resumed_run_must_be_the_same(tmp_path: Path) -> None:
    x, _ = planted()
    train_dictionary({"a": x}, "a", config(), run=tmp_path / "run", **SHORT)
    with pytest.raises(UsageError, match="--resume"):
        train_dictionary({"a": x}, "a", config(), run=tmp_path / "run", **SHORT)
    for changed in ({"a": x + 1}, {"a": x}):
        other = config(k=5) if changed["a"] is x else config()
        with pytest.raises(RecipeError, match="recipe changed"):
            train_dictionary(changed, "a", other, run=tmp_path / "run", resume=True, **SHORT)
    file = next((tmp_path / "run" / "checkpoints").glob("dictionary-000030*/main.dictionary.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="changed or truncated"):
        train_dictionary({"a": x}, "a", config(), run=tmp_path / "run", resume=True, **SHORT)


def test_activations_that_are_not_finite_stop_it_with_their_place() -> None:
    x, _ = planted()
    x[77, 3] = torch.inf
    with pytest.raises(DataError, match="a: 1 of 2048 activations hold NaN or infinity, the first at 77"):
        train_dictionary({"a": x}, "a", config(), **SHORT)


@pytest.mark.parametrize(
    ("data", "made", "how", "said"),
    [
        ({"a": torch.zeros(9, 4)}, {"site": "b"}, {}, "the config says site 'b', the call 'a'"),
        ({"a": torch.zeros(9, 4)}, {"d_in": 8}, {}, "d_in is 8, but a is 4 wide"),
        ({"b": torch.zeros(9, 4)}, {}, {}, "no site 'a', only b"),
        ({"a": torch.zeros(9, 4)}, {"model_digest": "f" * 64}, {}, "for a model with weights ffffffffffff"),
        (object(), {}, {}, "cannot read activations from a object"),
        (
            GPT(GPTConfig(vocab_size=8, context=4, d_model=8, n_layer=1, n_head=2)),
            {},
            {},
            "give rows of tokens",
        ),
        ({"a": torch.ones(9, 4)}, {}, {"stepps": 3}, "unknown key 'stepps'. Did you mean 'steps'"),
    ],
)
def test_a_call_that_cannot_be_right_is_explained(data: Any, made: Any, how: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        train_dictionary(data, "a", config(**made), **how)


def test_names_that_cannot_be_files_are_refused() -> None:
    for name in ("A b", "../x", "keys"):
        with pytest.raises(UsageError, match="cannot name a dictionary"):
            train_dictionaries({"a": torch.ones(9, 4)}, {name: config()}, **SHORT)
