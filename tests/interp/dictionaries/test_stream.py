"""Activation streams: pure functions of the step, every position once, bounded memory, bad input named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import DataError, UsageError
from glasshouse.interp.dictionaries.core import Dictionary, DictionaryConfig
from glasshouse.interp.dictionaries.difference import DifferenceStream, sides
from glasshouse.interp.dictionaries.stream import LiveStream, StoreStream, TensorStream, capture
from glasshouse.interp.dictionaries.train import train_dictionary
from glasshouse.interp.reading import ActivationStore, fill
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.digest import weights_digest
from stirred import stirred

V, POS = 32, 8


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSHOUSE_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


SITE = "blocks.1.resid_post"


def noisy(seed: int = 0, **changes: Any) -> GPT:
    shape: dict[str, Any] = {"vocab_size": V, "context": POS, "d_model": 16, "n_layer": 2, "n_head": 4}
    return stirred(GPT(GPTConfig(**(shape | changes))).init_weights(seed), seed + 100)


def rows(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (n, POS), generator=torch.Generator().manual_seed(seed))


def stacked(stream: Any, steps: range, site: str = SITE) -> Tensor:
    return torch.cat([stream.batch(step)[site] for step in steps])


def sorted_rows(x: Tensor) -> np.ndarray:
    return np.array(sorted(map(tuple, np.round(x.numpy(), 4).tolist())))


def test_a_batch_is_the_same_whatever_was_read_before_it() -> None:
    made = {"batch_size": 20, "block_rows": 10, "seed": 3}
    one, other = (LiveStream(noisy(), rows(), SITE, **made) for _ in range(2))
    straight = [one.batch(step)[SITE] for step in range(9)]
    for step in (7, 2, 8, 0):
        assert torch.equal(other.batch(step)[SITE], straight[step])
    again = LiveStream(noisy(), rows(), SITE, **(made | {"seed": 4}))
    assert not torch.equal(again.batch(0)[SITE], straight[0])


def test_an_epoch_gives_every_position_once_and_memory_holds_one_block() -> None:
    stream = LiveStream(noisy(), rows(), SITE, batch_size=16, block_rows=8)
    assert stream.batches_per_block == 4
    seen = stacked(stream, range(12))  # 24 rows of 8 positions
    expected = capture(noisy(), rows(), [SITE])[SITE].flatten(0, 1)
    assert np.allclose(sorted_rows(seen), sorted_rows(expected), atol=2e-4)
    assert len(stream._acts[SITE]) == 8 * POS
    assert not torch.allclose(seen[: POS * 4], expected[: POS * 4])  # in another order


def test_neighbouring_positions_of_a_row_do_not_stay_together() -> None:
    stream = LiveStream(noisy(), rows(200, 1), ["embed"], batch_size=64, block_rows=100)
    order = torch.cat([stream.batch(step)["embed"] for step in range(12)])
    near = float((order[1:] - order[:-1]).norm(dim=1).mean())
    shuffled = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    assert near == pytest.approx(float((shuffled[1:] - shuffled[:-1]).norm(dim=1).mean()), rel=0.1)


def test_positions_that_do_not_count_are_never_drawn() -> None:
    valid = torch.zeros(24, POS, dtype=torch.bool)
    valid[:, 2:5] = True
    stream = LiveStream(noisy(), rows(), SITE, batch_size=12, block_rows=8, valid=valid)
    expected = capture(noisy(), rows(), [SITE])[SITE][valid]
    assert np.allclose(sorted_rows(stacked(stream, range(6))), sorted_rows(expected), atol=2e-4)


@pytest.mark.parametrize("parallel", [False, True])
def test_mlp_in_is_what_the_mlp_reads_and_heads_stand_side_by_side(parallel: bool) -> None:
    model = noisy(parallel=parallel, n_kv_head=2)
    found = capture(model, rows(), ["blocks.1.mlp_in", "blocks.1.mlp_pre", "blocks.0.z", "blocks.0.k"])
    block = model.blocks[1]
    assert torch.allclose(block.mlp.up(found["blocks.1.mlp_in"]), found["blocks.1.mlp_pre"], atol=1e-5)
    with torch.no_grad(), Taps(read=["blocks.0.z"]) as taps:
        model(rows(), taps)
    assert torch.equal(found["blocks.0.z"][..., 4:8], taps["blocks.0.z"][:, 1])
    assert found["blocks.0.k"].shape == (24, POS, 8)


def test_several_sites_come_from_the_same_positions() -> None:
    stream = LiveStream(noisy(), rows(), ["blocks.1.mlp_in", "blocks.1.mlp_out"], batch_size=16)
    batch = stream.batch(2)
    mlp = noisy().blocks[1].mlp
    assert torch.allclose(mlp(batch["blocks.1.mlp_in"]), batch["blocks.1.mlp_out"], atol=1e-5)


def test_a_store_gives_what_the_model_would_and_trains_a_dictionary(tmp_path: Path) -> None:
    model, sites = noisy(), [SITE, "blocks.0.z"]
    fill(tmp_path / "store", model, rows(), sites)
    store = ActivationStore(tmp_path / "store")
    stream = StoreStream(store, batch_size=16, seed=2)
    assert set(stream.widths) == set(sites) and stream.model_digest == weights_digest(model)
    expected = capture(model, rows(), sites)
    assert np.allclose(
        sorted_rows(stacked(stream, range(12))), sorted_rows(expected[SITE].flatten(0, 1)), atol=2e-4
    )
    again = StoreStream(ActivationStore(tmp_path / "store"), SITE, batch_size=16, seed=2)
    assert torch.equal(again.batch(7)[SITE], stream.batch(7)[SITE])
    small = {"architecture": "topk", "d_sae": 32, "k": 4}
    trained = train_dictionary(store, SITE, small, steps=3, batch_size=16)
    assert trained.dictionary.config.model_digest == weights_digest(model)
    with pytest.raises(UsageError, match="no site 'blocks.0.resid_post'"):
        StoreStream(store, "blocks.0.resid_post")


def test_transformerlens_names_stand_for_the_same_sites() -> None:
    theirs, ours = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
    found = capture(noisy(), rows(), [theirs, ours])
    expected = capture(noisy(), rows(), [SITE, "blocks.1.z"])
    assert torch.equal(found[theirs], expected[SITE]) and torch.equal(found[ours], expected["blocks.1.z"])


def test_tensors_are_drawn_as_purely() -> None:
    x = torch.arange(40.0)[:, None].repeat(1, 3)
    stream = TensorStream({"a": x, "b": 2 * x}, batch_size=16, seed=1)
    drawn = [stream.batch(step) for step in range(5)]
    assert torch.equal(torch.cat([b["a"] for b in drawn])[:40, 0].sort().values, x[:, 0])
    assert all(torch.equal(b["b"], 2 * b["a"]) for b in drawn)
    assert torch.equal(TensorStream({"a": x}, batch_size=16, seed=1).batch(4)["a"], drawn[4]["a"])


def test_a_difference_is_of_the_same_tokens_and_a_pair_holds_both() -> None:
    before, after = noisy(0), noisy(1)
    how = {"batch_size": 16, "block_rows": 8}
    difference = DifferenceStream(before, after, rows(), SITE, mode="difference", **how)
    paired = DifferenceStream(before, after, rows(), SITE, mode="paired", **how)
    for step in (0, 5):
        a, b = paired.batch(step)[SITE].chunk(2, dim=1)
        assert torch.equal(difference.batch(step)[SITE], b - a)
    expected = capture(after, rows(), [SITE])[SITE] - capture(before, rows(), [SITE])[SITE]
    everything = stacked(difference, range(12))
    assert np.allclose(sorted_rows(everything), sorted_rows(expected.flatten(0, 1)), atol=2e-4)
    assert paired.widths == {SITE: 32} and difference.digests() != paired.digests()
    with pytest.raises(UsageError, match="same weights"):
        DifferenceStream(before, noisy(0), rows(), SITE, mode="difference")
    with pytest.raises(UsageError, match="different widths"):
        DifferenceStream(before, noisy(0, d_model=32), rows(), SITE, mode="difference")


def test_the_sides_of_a_pair_say_which_model_has_a_feature() -> None:
    crosscoder = Dictionary(DictionaryConfig(architecture="l1", d_in=4, d_sae=3))
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]))
    assert torch.equal(sides(crosscoder), torch.tensor([0.0, 0.5, 1.0]))


def test_bad_input_is_named() -> None:
    model = noisy()
    with pytest.raises(UsageError, match="no site 'blocks.1.resid_pots'.*resid_post"):
        LiveStream(model, rows(), "blocks.1.resid_pots")
    with pytest.raises(UsageError, match="patterns are as wide as the text"):
        LiveStream(model, rows(), "blocks.1.pattern")
    with pytest.raises(DataError, match="rows of tokens"):
        LiveStream(model, torch.zeros(0, POS), SITE)
    with pytest.raises(DataError, match="count at least one position"):
        LiveStream(model, rows(), SITE, valid=torch.zeros(24, POS, dtype=torch.bool))
    with torch.no_grad():
        model.embed.weight[rows()[5, 0]] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity, the first at"):
        LiveStream(model, rows(), SITE, batch_size=24 * POS).batch(0)
    with pytest.raises(DataError, match="of equal n"):
        TensorStream({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})
