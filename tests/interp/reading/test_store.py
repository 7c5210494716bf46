from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import DataError, RunBusyError, UsageError
from glasshouse.interp.reading import ActivationStore, StoreWriter, fill, record
from glasshouse.model import GPT, Taps
from glasshouse.model.digest import weights_digest
from model.shapes import noisy

TOKENS = torch.randint(0, 53, (7, 9), generator=torch.Generator().manual_seed(4))
SITES = ["blocks.0.resid_post", "blocks.1.z"]
WIDTH = 3


def made(seed: int = 0) -> GPT:
    shape = {"vocab_size": 53, "context": 16, "d_model": 16, "n_layer": 2, "n_head": 4}
    return noisy(seed=seed, **shape)


@pytest.fixture(scope="module")
def model() -> GPT:
    return made()


def batches(sizes: list[int]) -> list[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Batches of one-token rows whose every vector is unlike every other."""
    found, first = [], 0
    for n in sizes:
        numbers = torch.arange(first, first + n)
        acts = {"s": (numbers[:, None, None] + torch.arange(WIDTH) / 8).float()}
        found.append((acts, numbers[:, None] % 50, numbers))
        first += n
    return found


def append_all(
    writer: StoreWriter,
    sizes: list[int],
) -> None:
    for mark, (acts, tokens, rows) in enumerate(batches(sizes)):
        writer.append(acts, tokens, rows, mark=mark)


@torch.no_grad()
def test_what_is_stored_is_what_the_model_computes_at_each_token(model, tmp_path):
    store = fill(tmp_path / "s", model, TOKENS, SITES, batch=3, shard=10)
    with Taps(read=SITES) as taps:
        model(TOKENS, taps)
    heads = taps["blocks.1.z"].transpose(1, 2).flatten(2)
    assert torch.allclose(store.read(SITES[0]), taps[SITES[0]].flatten(0, 1), atol=1e-5)
    assert torch.allclose(store.read(SITES[1]), heads.flatten(0, 1), atol=1e-5)
    assert torch.equal(store.tokens(), TOKENS.flatten())
    assert torch.equal(store.positions(), torch.arange(9).repeat(7))
    assert torch.equal(store.rows(), torch.arange(7).repeat_interleave(9))
    assert len(store) == 63 and store.widths == {SITES[0]: 16, SITES[1]: 16}
    assert [shard.n for shard in store.index.shards] == [10] * 6 + [3]
    picked = torch.tensor([62, 0, 31, 10, 10])
    assert torch.equal(store.read(SITES[0], picked), store.read(SITES[0])[picked])


@torch.no_grad()
def test_rows_of_different_lengths_are_stored_without_their_padding(model, tmp_path):
    lengths = [4, 9, 1, 6]
    rows = [TOKENS[i, :n].tolist() for i, n in enumerate(lengths)]
    store = fill(tmp_path / "s", model, rows, "blocks.*.hook_resid_post", numbers=[7, 5, 5, 2], skip_first=1)
    assert store.sites == ["blocks.0.resid_post", "blocks.1.resid_post"]
    assert store.rows().tolist() == [7] * 3 + [5] * 8 + [2] * 5
    assert store.positions().min() == 1
    with Taps(read=["blocks.1.resid_post"]) as taps:
        model(torch.tensor([rows[3]]), taps)
    alone = taps["blocks.1.resid_post"][0, 1:]
    assert torch.allclose(store.read("blocks.1.resid_post")[-5:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "error", "size"), [("float32", 0, 4), ("float16", 2e-3, 2), ("bfloat16", 8e-3, 2)]
)
def test_every_dtype_comes_back_within_its_rounding(model, tmp_path, dtype, error, size):
    exact = fill(tmp_path / "exact", model, TOKENS, SITES[:1]).read(SITES[0])
    store = fill(tmp_path / dtype, model, TOKENS, SITES[:1], dtype=dtype)
    assert torch.allclose(store.read(SITES[0]), exact, rtol=error, atol=error / 4)
    assert (tmp_path / dtype / f"000000.{SITES[0]}.bin").stat().st_size == 63 * 16 * size
    if dtype == "bfloat16":
        assert torch.equal(store.read(SITES[0]), exact.bfloat16().float())


class Killed(Exception):
    """Stands for the death of the process."""


@contextlib.contextmanager
def dying_after(writes: int) -> Iterator[None]:
    """Every write to a store beyond so many raises, as if the process had ended before it."""
    left = writes

    def dying(real: Callable[..., None], *args: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # only a power cut could tell the difference
        for module, name in (("writer", "write_bytes"), ("store", "write_json")):
            target = sys.modules[f"glasshouse.interp.reading.{module}"]
            patch.setattr(target, name, partial(dying, getattr(target, name)))
        yield


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    shard=st.integers(1, 12),
    lives=st.lists(st.integers(0, 30), min_size=1, max_size=3),
)
def test_a_store_killed_after_any_write_resumes_without_loss_or_repetition(
    tmp_path_factory, sizes, shard, lives
):
    folder = tmp_path_factory.mktemp("killed")
    for writes in lives:
        with contextlib.suppress(Killed), dying_after(writes):
            with StoreWriter(folder, ["s"], shard=shard) as writer:
                append_all(writer, sizes)
    with dying_after(10**6), StoreWriter(folder, ["s"], shard=shard) as writer:
        append_all(writer, sizes)
        writer.finish()
    store = ActivationStore(folder, verify=True)
    n = sum(sizes)
    assert store.rows().tolist() == list(range(n)), "each vector once, in order"
    assert store.tokens().tolist() == [i % 50 for i in range(n)]
    assert torch.equal(store.read("s"), torch.arange(n)[:, None] + torch.arange(WIDTH) / 8)
    assert len(store.index.shards) <= -(-n // shard) + len(lives), "a flush at the end of a life may be short"
    shutil.rmtree(folder)


FILL = """
import sys, torch
sys.path.insert(0, "tests")
from interp.reading.test_store import TOKENS, SITES, made
from glasshouse.interp.reading import fill
torch.set_num_threads(1)
fill(sys.argv[1], made(), TOKENS, SITES, batch=2, shard=20)
"""


def test_a_fill_killed_by_the_system_goes_on_to_the_same_bytes(model, tmp_path):
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"GLASSHOUSE_CRASH_AT": "activation-shard:2"}
    command = [sys.executable, "-c", FILL, str(tmp_path / "cut")]
    died = subprocess.run(command, cwd=root, env=environment, timeout=100, check=False)
    assert died.returncode == -signal.SIGKILL
    left = json.loads((tmp_path / "cut" / "index.json").read_text())
    assert len(left["shards"]) == 1 and not left["complete"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # their number decides the last bits
    for name in ("cut", "whole"):
        fill(tmp_path / name, model, TOKENS, SITES, batch=2, shard=20)
    torch.set_num_threads(threads)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == names
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_filling_a_complete_store_again_reads_no_model(model, tmp_path):
    first = fill(tmp_path / "s", model, TOKENS, SITES)
    before = (tmp_path / "s" / "index.json").stat().st_mtime_ns
    handle = model.blocks[0].register_forward_hook(lambda *_: pytest.fail("the model ran"))
    again = fill(tmp_path / "s", model, TOKENS, SITES)
    handle.remove()
    assert again.digest == first.digest and (tmp_path / "s" / "index.json").stat().st_mtime_ns == before


def test_a_store_grows_while_a_model_trains_and_replayed_steps_are_not_stored_twice(tmp_path):
    model = made()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    states = {}

    def train(steps: range, writer: StoreWriter) -> None:
        for step in steps:
            states[step] = {name: p.detach().clone() for name, p in model.state_dict().items()}
            record(writer, model, TOKENS[:2], step)
            model(TOKENS[:2]).logsumexp(-1).mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    with StoreWriter(tmp_path / "s", SITES[:1], shard=20) as writer:
        train(range(4), writer)
    model.load_state_dict(states[2])  # the checkpoint is older than what was stored
    with StoreWriter(tmp_path / "s", SITES[:1], shard=20) as writer:
        train(range(2, 6), writer)
        writer.finish()
    store = ActivationStore(tmp_path / "s")
    assert len(store) == 6 * 18
    for step in (0, 3, 5):
        model.load_state_dict(states[step])
        with torch.no_grad(), Taps(read=SITES[:1]) as taps:
            model(TOKENS[:2], taps)
        stored = store.read(SITES[0], np.arange(18 * step, 18 * step + 18))
        assert torch.allclose(stored, taps[SITES[0]].flatten(0, 1), atol=1e-5), step
    with pytest.raises(UsageError, match="a model while it trained"):
        store.check_model(model)


def test_marks_that_go_back_and_two_writers_at_once_are_refused(tmp_path):
    with StoreWriter(tmp_path / "s", ["s"]) as writer:
        acts, tokens, rows = batches([4])[0]
        assert writer.append(acts, tokens, rows, mark=3) == 4
        assert writer.append(acts, tokens, rows, mark=3) == 4, "more of the same step"
        with pytest.raises(UsageError, match="must not go back: 2 after 3"):
            writer.append(acts, tokens, rows, mark=2)
        with pytest.raises(RunBusyError, match="in use by process"):
            StoreWriter(tmp_path / "s", ["s"])
    with StoreWriter(tmp_path / "s", ["s"]) as writer:
        assert writer.append(acts, tokens, rows) == 4, "without a mark it is new"
        assert len(writer) == 12


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "is NaN"), (float("inf"), "is infinite")])
def test_activations_that_are_not_finite_are_refused_by_site_and_row(tmp_path, value, what):
    acts, tokens, rows = batches([4])[0]
    acts["s"][2, 0, 1] = value
    with StoreWriter(tmp_path / "s", ["s"]) as writer:
        with pytest.raises(DataError, match=rf"'s' at row 2, position 0 {what}"):
            writer.append(acts, tokens, rows)
        keep = torch.tensor([[True], [True], [False], [True]])
        assert writer.append(acts, tokens, rows, keep=keep) == 3, "what is not stored may be anything"


def test_a_broken_model_is_named_by_site_and_row(tmp_path):
    model = made()
    with torch.no_grad():
        model.embed.weight[TOKENS[4, 6]] = float("nan")
    row = int((TOKENS[4, 6] == TOKENS).any(1).nonzero()[0])
    with pytest.raises(DataError, match=rf"'blocks\.0\.resid_post' at row {row}, position \d is NaN"):
        fill(tmp_path / "s", model, TOKENS, SITES, batch=2)


def test_a_value_too_large_for_float16_is_refused_and_not_stored_as_infinity(tmp_path):
    acts, tokens, rows = batches([4])[0]
    acts["s"][1] = 1e5
    with StoreWriter(tmp_path / "s", ["s"], dtype="float16") as writer:
        with pytest.raises(DataError, match="row 1, position 0 is too large for float16; store bfloat16"):
            writer.append(acts, tokens, rows)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sites": SITES[:1]}, "another sites"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"model": made(seed=1)}, "another model"),
        ({"token_rows": TOKENS[:5]}, "another source"),
        ({"batch": 5}, "another source"),
    ],
)
def test_a_store_of_something_else_is_not_continued(model, tmp_path, changes, match):
    asked = {"model": model, "token_rows": TOKENS, "sites": SITES, "batch": 2}
    fill(tmp_path / "s", **asked)
    with pytest.raises(UsageError, match=match):
        fill(tmp_path / "s", **{**asked, **changes})


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no token rows"),
        ([[1, 2], []], "row 1 is not a row"),
        ([[1] * 17], "row 0 has 17 tokens and the context is 16"),
        ([[1, 2], [53]], "row 1 has a token outside the vocabulary of 53"),
        ([[0.5, 1.5]], "row 0 is not a row of token ids"),
    ],
)
def test_rows_that_no_model_can_read_are_refused_by_number(model, tmp_path, rows, match):
    with pytest.raises(DataError, match=match):
        fill(tmp_path / "s", model, rows, SITES)
    assert not (tmp_path / "s" / "index.json").exists()


def test_sites_without_a_vector_for_every_token_are_refused(model, tmp_path):
    with pytest.raises(UsageError, match=r"'blocks.0.pattern' has shape \[7, 4, 9, 9\]"):
        fill(tmp_path / "a", model, TOKENS, ["blocks.0.pattern"])
    with pytest.raises(UsageError, match="no site"):
        fill(tmp_path / "b", model, TOKENS, ["blocks.0.resid_pst"])
    with pytest.raises(UsageError, match="no site asked for"):
        fill(tmp_path / "c", model, TOKENS, [])
    acts, tokens, rows = batches([4])[0]
    with StoreWriter(tmp_path / "d", ["s"]) as writer:
        writer.append(acts, tokens, rows)
        with pytest.raises(UsageError, match="width 2, but .* holds 3"):
            writer.append({"s": acts["s"][..., :2]}, tokens, rows)
        with pytest.raises(UsageError, match="lack site 's'"):
            writer.append({"t": acts["s"]}, tokens, rows)
        with pytest.raises(UsageError, match="do not fit"):
            writer.append(acts, tokens, rows[:2])
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        StoreWriter(tmp_path / "e", ["s"], dtype="int8")
    with pytest.raises(UsageError, match="cannot name a file"):
        StoreWriter(tmp_path / "e", ["../s"])


def test_a_store_that_is_missing_empty_truncated_or_changed_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="is .* an activation store"):
        ActivationStore(tmp_path)
    with StoreWriter(tmp_path / "empty", ["s"]) as writer:
        with pytest.raises(DataError, match="nothing was stored"):
            writer.finish()
    folder = tmp_path / "s"
    fill(folder, model, TOKENS, SITES)
    file = folder / f"000000.{SITES[1]}.bin"
    raw = file.read_bytes()
    file.write_bytes(raw[:-4])
    with pytest.raises(DataError, match=rf"{SITES[1]}.bin: {len(raw) - 4} bytes, expected {len(raw)}"):
        ActivationStore(folder)
    file.write_bytes(raw[:-4] + b"\0\0\0\0")
    ActivationStore(folder)
    with pytest.raises(DataError, match="changed since it was written"):
        ActivationStore(folder, verify=True)
    file.unlink()
    with pytest.raises(DataError, match="missing"):
        ActivationStore(folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["files"] = {"../../etc": "0"}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not an activation index"):
        ActivationStore(folder)


def test_a_store_belongs_to_the_weights_it_was_filled_from(model, tmp_path):
    store = fill(tmp_path / "s", model, TOKENS, SITES)
    assert store.model_digest == weights_digest(model)
    assert len(ActivationStore(tmp_path / "s", model=model)) == 63
    with pytest.raises(UsageError, match="holds activations of model .* not of this one"):
        ActivationStore(tmp_path / "s", model=made(seed=1))
    with pytest.raises(UsageError, match=r"no site 'blocks.0.resid_pst'.*Did you mean 'blocks.0.resid_post'"):
        store.read("blocks.0.resid_pst")
    with pytest.raises(UsageError, match="holds vectors 0 to 62"):
        store.read(SITES[0], np.array([63]))


def test_a_store_shows_itself(model, tmp_path):
    store = fill(tmp_path / "s", model, TOKENS, SITES)
    assert "blocks.1.z" in store._repr_html_() and "63" in store._repr_html_()
    assert "63 vectors at 2 sites" in repr(store)
