from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.model.compiled import compile_blocks, is_compiled
from glasshouse.train import precision
from glasshouse.train.precision import (
    bf16_instructions,
    choose_compile,
    choose_dtype,
    choose_threads,
    interleaved,
    muon_dtype,
)
from train.tiny import batches, new_model, plan

BATCH = batches(0, plan(0))


def test_what_is_asked_for_is_chosen() -> None:
    assert choose_dtype("bf16", new_model(), BATCH).value == "bf16"
    assert choose_threads(3, new_model(), BATCH).value == 3


def test_a_setting_that_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="fp16"):
        choose_dtype("fp16", new_model(), BATCH)
    with pytest.raises(UsageError, match="0"):
        choose_threads(0, new_model(), BATCH)


def test_measuring_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_instructions", lambda: "avx512_bf16")
    model = new_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    choice = choose_dtype("auto", model, BATCH)
    assert set(choice.seconds) == {"fp32", "bf16"} and choice.value in choice.seconds
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_bf16_is_not_tried_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_instructions", lambda: None)
    choice = choose_dtype("auto", new_model(), BATCH)
    assert choice.value == "fp32" and choice.seconds == {}
    assert muon_dtype() == "fp32"


def test_bf16_must_be_worth_its_lost_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_instructions", lambda: "avx512_bf16")
    for took, expected in [(1.0, "fp32"), (0.98, "fp32"), (0.5, "bf16")]:
        monkeypatch.setattr(precision, "interleaved", lambda *_, took=took: {"fp32": 1.0, "bf16": took})
        assert choose_dtype("auto", new_model(), BATCH).value == expected


def test_threads_are_compared_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    choice = choose_threads("auto", new_model(), BATCH, repeats=1)
    assert choice.value in (1, 2) and set(choice.seconds) == {"1", "2"}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert choose_threads("auto", new_model(), BATCH).value == 1


def test_the_first_round_is_not_measured_and_turns_are_taken() -> None:
    calls: list[str] = []
    took = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == list("ababab") and set(took) == {"a", "b"}


def test_the_instruction_set_is_one_we_know() -> None:
    assert bf16_instructions() in (None, "amx_bf16", "avx512_bf16", "bf16")


def patched(monkeypatch: pytest.MonkeyPatch, off: float, on: float) -> None:
    """Real blocks, compiled without a C++ compiler; the clock says what the test wants it to."""
    monkeypatch.setattr(precision, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))
    monkeypatch.setattr(precision, "cpp_compiler", lambda: "g++")
    seconds = {"off": off, "on": on}

    def timed(candidates: dict[str, Callable[[], None]], _: int) -> dict[str, float]:
        for run in candidates.values():
            run()
        return {name: seconds[name] for name in candidates}

    monkeypatch.setattr(precision, "interleaved", timed)


def test_a_short_run_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, off=0.1, on=0.01)
    choice = choose_compile("auto", new_model(), BATCH, steps=100)
    assert choice.value == "off" and "10 s" in choice.why and set(choice.seconds) == {"off"}


@pytest.mark.parametrize(("on", "expected"), [(0.5, "on"), (0.99, "off"), (1.2, "off")])
def test_a_long_run_is_compiled_if_that_is_faster(
    on: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, off=1.0, on=on)
    model = new_model()
    choice = choose_compile("auto", model, BATCH, steps=10_000)
    assert choice.value == expected and set(choice.seconds) == {"off", "on"}
    assert not is_compiled(model)


def test_without_a_compiler_nothing_is_compiled_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patched(monkeypatch, off=1.0, on=0.5)
    monkeypatch.setattr(precision, "cpp_compiler", lambda: None)
    choice = choose_compile("auto", new_model(), BATCH, steps=10_000)
    assert choice.value == "off" and "g++" in choice.why


def test_compiling_is_asked_for_by_name() -> None:
    assert choose_compile("off", new_model(), BATCH, steps=10).value == "off"
    with pytest.raises(UsageError, match="'auto', 'on' or 'off'"):
        choose_compile("yes", new_model(), BATCH, steps=10)
