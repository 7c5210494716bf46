"""Path patching equals the equations in which one receiver alone reads the exchanged sender."""

from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import path_patching
from glasshouse.model import GPT
from interp.attribution import byhand
from interp.attribution.byhand import contrast, forward, give, make, measure

HEADS = ("q", "k", "v")


def key(sender: str) -> object:
    """The part of the equations that a sender's name stands for."""
    if sender == "input":
        return "embed"
    if sender[0] == "m":
        return ("mlp_out", int(sender[1:]))
    layer, head = sender[1:].split(".h")
    return ("z", int(layer), int(head))


def streams(model: GPT, row: torch.Tensor, base: dict, source: dict, sender: str, free_mlps: bool) -> dict:
    """What everybody reads when ``sender`` is exchanged and all other outputs are held."""
    held: byhand.Change = {}
    for layer in range(model.config.n_layer):
        held |= {("z", layer, h): give(base[("z", layer, h)]) for h in range(model.config.n_head)}
        if not free_mlps:
            held[("mlp_out", layer)] = give(base[("mlp_out", layer)])
    name, _, at = sender.partition("@")
    return forward(model, row, held | {key(name): give(mixed(source, base, key(name), at))})


def mixed(source: dict, base: dict, part: object, at: str) -> torch.Tensor:
    """The source's value at one position (all: no position), the base's elsewhere."""
    return source[part] if not at else give(source[part], int(at))(base[part])


def expected(
    model: GPT, row: torch.Tensor, base: dict, source: dict, sender: str, receivers: list[str], free: bool
) -> torch.Tensor:
    """Logits by hand."""
    told = streams(model, row, base, source, sender, free)
    if receivers == ["logits"]:
        return told["logits"]
    change: byhand.Change = {}
    for receiver in receivers:
        if receiver[0] == "m":
            layer = int(receiver[1:])
            change[("reads_mlp", layer)] = give(told[("reads_mlp", layer)])
            continue
        name, _, letter = receiver.partition("<")
        layer, head = (int(x) for x in name[1:].split(".h"))
        for s in letter[:1] or "qkv":
            change[(f"reads_{s}", layer, head)] = give(told[(f"reads_{s}", layer, head)])
    return forward(model, row, change)["logits"]


EACH = [["logits"], ["m1"], ["a1.h2<q>"], ["a1.h3<k>"], ["a1.h1<v>"], ["a1.h0", "m1"]]
CASES = [(shape, receivers) for shape in byhand.SHAPES for receivers in EACH]
CASES += [("pre-norm", ["m0", "a1.h2<k>"])]  # senders between two receivers


@pytest.mark.parametrize(("shape", "receivers"), CASES)
def test_every_path_equals_the_equations(shape: str, receivers: list[str]) -> None:
    model, data = make(shape, seed=2), contrast(2)
    for direction, free in (("noise", False), ("denoise", True)):
        found = path_patching(
            model,
            data,
            receivers,
            direction=direction,
            through_mlps=free,
            sequences=5,  # type: ignore[arg-type]
        )
        assert "input" in found.names and "a0.h3" in found.names
        for i in range(2):
            clean, corrupt = forward(model, data.clean[i]), forward(model, data.corrupt[i])
            base, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)
            row, sign = (data.clean[i], -1) if direction == "noise" else (data.corrupt[i], 1)
            for s, sender in enumerate(found.names):
                if sender == "input" and model.config.value_residual:
                    continue  # it reaches values beside the stream; a test of its own is below
                logits = expected(model, row, base, source, sender, receivers, free)
                gain = sign * (measure(data, i, logits) - measure(data, i, base["logits"]))
                assert float(found.per_row[s, i]) == pytest.approx(gain, abs=1e-4), sender


def test_a_sender_at_one_position_equals_the_equations() -> None:
    model, data = make("pre-norm"), contrast(2)
    found = path_patching(model, data, "a1.h2<k>", ["a0.h1@3", "m0@2"])
    for i in range(2):
        clean, corrupt = forward(model, data.clean[i]), forward(model, data.corrupt[i])
        for s, sender in enumerate(found.names):
            logits = expected(model, data.clean[i], clean, corrupt, sender, ["a1.h2<k>"], False)
            gain = measure(data, i, clean["logits"]) - measure(data, i, logits)
            assert float(found.per_row[s, i]) == pytest.approx(gain, abs=1e-4)


def test_all_paths_into_all_readers_are_the_whole_effect_of_the_embedding() -> None:
    """With values mixed in from layer 0, too: what the input tells everybody is everything."""
    model, data = make("value residual, no norm"), contrast()
    heads = [f"a0.h{h}" for h in range(4)]
    found = path_patching(model, data, heads, ["input"], direction="noise")
    direct = path_patching(model, data, "logits", ["input"], direction="noise")
    with torch.no_grad():
        # By hand: heads of layer 0 get the corrupt row's values, the embedding itself stays.
        for i in range(len(data)):
            clean, corrupt = forward(model, data.clean[i]), forward(model, data.corrupt[i])
            change = {("z", 0, h): give(corrupt[("z", 0, h)]) for h in range(4)}
            logits = forward(model, data.clean[i], change)["logits"]
            lost = measure(data, i, clean["logits"]) - measure(data, i, logits)
            assert float(found.per_row[0, i]) == pytest.approx(lost, abs=1e-4)
    assert direct.per_row.shape == (1, 5)


def test_parallel_blocks_have_no_path_from_a_head_to_its_own_mlp() -> None:
    found = path_patching(make("parallel"), contrast(), "m0")
    assert found.names == ("input",)
    with pytest.raises(UsageError, match="nothing leads from a0.h0 to m0"):
        path_patching(make("parallel"), contrast(), "m0", ["a0.h0"])


def test_wrong_names_are_refused_with_the_nearest_right_one() -> None:
    model, data = make("pre-norm"), contrast()
    with pytest.raises(UsageError, match="Did you mean 'logits'"):
        path_patching(model, data, "logit")
    with pytest.raises(UsageError, match="no receiver 'a1.h9<q>'"):
        path_patching(model, data, "a1.h9<q>")
    with pytest.raises(UsageError, match="stand alone"):
        path_patching(model, data, ["logits", "m1"])
    with pytest.raises(UsageError, match="nothing leads from m1"):
        path_patching(model, data, "a1.h0<q>", ["m1"])
    with pytest.raises(UsageError, match="no sender"):
        path_patching(model, data, "logits", ["blocks.0.resid_mid"])
