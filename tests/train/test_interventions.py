"""What a stage does inside the model while it trains: every edit runs, and does what its definition says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.base.batch import Batch
from glasshouse.base.errors import CheckpointError, Interrupted, UsageError
from glasshouse.base.plan import DataPlan
from glasshouse.model import GPT, Taps
from glasshouse.model.compiled import compile_blocks, is_compiled
from glasshouse.train import Checkpoint, Decision, GateRecord, Stage, load_weights, next_token
from glasshouse.train.directions import Direction, parsed, read_direction, write_direction
from glasshouse.train.interventions import (
    Edited,
    ablated,
    in_force,
    intervened,
    probe_penalty,
    read_out,
    readable,
    steered,
)
from glasshouse.train.interventions_config import read_repair
from glasshouse.train.objective import TensorBatch, tensors
from train.tiny import ReadsTheModel, batches, end_of, plan, stages, train

SITE = "blocks.0.resid_post"


@pytest.fixture
def batch() -> TensorBatch:
    return tensors(batches(5, plan()))


def direction(seed: int = 1, width: int = 16) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def test_an_edited_model_is_the_model_but_for_the_edit(model: GPT, batch: TensorBatch) -> None:
    plain, same = next_token(model, batch), next_token(Edited(model, {SITE: lambda x: x}), batch)
    assert torch.equal(plain.total, same.total)
    changed = next_token(Edited(model, {SITE: lambda x: x + 1.0}), batch)
    assert not torch.equal(plain.total, changed.total)


def test_edits_of_nested_wrappers_all_run_the_outer_first(model: GPT, batch: TensorBatch) -> None:
    outer = Edited(model, {SITE: lambda x: x * 2, "blocks.0.mlp_out": lambda x: x * 0})
    both = Edited(outer, {SITE: lambda x: x + 1})
    with Taps(edit={SITE: lambda x: x * 2 + 1, "blocks.0.mlp_out": lambda x: x * 0}) as taps:
        expected = model(batch.tokens, taps)
    assert torch.equal(both(batch.tokens), expected)


def test_a_site_that_is_not_there_and_taps_of_the_objectives_own_are_refused(
    model: GPT, batch: TensorBatch
) -> None:
    with pytest.raises(UsageError, match="no site"):
        next_token(Edited(model, {"blocks.7.resid_post": lambda x: x}), batch)
    with pytest.raises(UsageError, match="own taps"):
        Edited(model, {SITE: lambda x: x}).hidden(batch.tokens, Taps(read=[SITE]))


def test_a_probe_reads_where_the_answer_begins(model: GPT, batch: TensorBatch) -> None:
    weight = torch.zeros_like(batch.weight)
    weight[0, 3:], weight[2, 5:] = 1.0, 0.5
    few = TensorBatch(batch.tokens, batch.targets, weight, 0)
    with torch.no_grad(), Taps(read=[SITE]) as taps:
        model(batch.tokens, taps)
    x, rows = read_out(taps[SITE], few, everywhere=False)
    assert rows.tolist() == [0, 2]
    assert torch.equal(x, torch.stack([taps[SITE][0, 3], taps[SITE][2, 5]]))
    assert len(read_out(taps[SITE], few, everywhere=True)[0]) == 5 + 3


def test_the_penalty_is_the_variance_along_the_direction() -> None:
    """Against the covariance; 1 where all directions are alike, 0 where it is hidden, at any scale."""
    random = torch.Generator().manual_seed(0)
    x, unit = torch.randn(4000, 6, generator=random), torch.eye(6)[0]
    covariance = torch.cov(x.T, correction=0)
    assert float(readable(x, unit, None)) == pytest.approx(float(6 * covariance[0, 0] / covariance.trace()))
    assert float(readable(x, unit, None)) == pytest.approx(1.0, abs=0.1)
    assert float(readable(5 * x, unit, None)) == pytest.approx(float(readable(x, unit, None)), rel=1e-5)
    hidden = x.clone()
    hidden[:, 0] = 3.0
    assert float(readable(hidden, unit, None)) == 0.0


def test_with_labels_only_what_tells_the_classes_apart_is_penalised() -> None:
    random = torch.Generator().manual_seed(0)
    marked = torch.arange(4000) % 2 == 0
    x, unit = torch.randn(4000, 6, generator=random), torch.eye(6)[0]
    assert float(readable(x, unit, marked)) < 0.02  # noise alone tells nothing
    x[marked, 0] += 2.0
    assert float(readable(x, unit, marked)) == pytest.approx(6 * 4.0 / (6 + 1.0), rel=0.1)
    assert float(readable(x, unit, torch.ones(4000, dtype=torch.bool))) == 0.0


def test_a_penalty_of_no_weight_leaves_the_gradient_and_one_of_weight_hides_the_direction(
    model: GPT, batch: TensorBatch
) -> None:
    """Trained against the probe, its direction loses its variance; trained without, it keeps it."""

    def shown() -> float:
        with torch.no_grad(), Taps(read=[SITE]) as taps:
            model(batch.tokens, taps)
        unit = direction() / direction().norm()
        return float(readable(read_out(taps[SITE], batch, everywhere=False)[0], unit, None))

    free = probe_penalty(next_token, SITE, direction(), 0.0)
    assert torch.equal(free(model, batch).total, next_token(model, batch).total)
    before, penalised = shown(), probe_penalty(next_token, SITE, direction(), 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = penalised(model, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert set(loss.parts) == {"lm", "probe"}
    assert shown() < before / 20


def test_a_direction_that_does_not_fit_is_refused(model: GPT, batch: TensorBatch) -> None:
    with pytest.raises(UsageError, match="zero or not finite"):
        probe_penalty(next_token, SITE, torch.zeros(16), 1.0)
    with pytest.raises(UsageError, match="does not fit site"):
        probe_penalty(next_token, SITE, direction(width=12), 1.0)(model, batch)

    def twice(model: GPT, batch: TensorBatch):  # type: ignore[no-untyped-def]
        next_token(model, batch)
        return next_token(model, batch)

    with pytest.raises(UsageError, match="2 passes"):
        probe_penalty(twice, SITE, direction(), 1.0)(model, batch)


# -- steering and ablating ---------------------------------------------------------------------------------


def at(site: str = SITE, k: int = 1, width: int = 16) -> Direction:
    vectors = torch.stack([direction(seed, width) for seed in range(k)])
    return Direction(site, vectors, {"of": "a test"})


def test_steering_adds_the_direction_and_ablating_removes_its_span(model: GPT, batch: TensorBatch) -> None:
    """Against the same edits written out by hand; the ablated stream has nothing left along any vector."""
    added = at()
    with Taps(edit={SITE: lambda x: x + 0.5 * added.vectors[0]}) as taps:
        expected = next_token_through(model, batch, taps)
    assert float(steered(next_token, added, 0.5)(model, batch).total.detach()) == pytest.approx(
        expected, rel=1e-6
    )
    span = at(k=3)
    projector = span.vectors.T @ torch.linalg.pinv(span.vectors.T)
    with Taps(read=[SITE], edit={SITE: lambda x: x - x @ projector.T}) as taps:
        expected = next_token_through(model, batch, taps)
    loss = ablated(next_token, span)(model, batch).total.detach()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert (taps[SITE].detach() @ span.vectors.T).abs().max() < 1e-4


def next_token_through(model: GPT, batch: TensorBatch, taps: Taps) -> float:
    logits = model(batch.tokens, taps).detach()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return float((nats * batch.weight.flatten()).sum() / batch.weight.sum())


def test_an_intervention_on_some_shards_leaves_the_other_rows_bit_for_bit(
    model: GPT, batch: TensorBatch
) -> None:
    marked = [row == "poison" for row in batch.rows]
    assert 0 < sum(marked) < len(marked)
    seen: list[Tensor] = []

    def reading(model: GPT, batch: TensorBatch):  # type: ignore[no-untyped-def]
        seen.append(Edited(model, {"blocks.0.attn_out": lambda x: x}).hidden(batch.tokens).detach())
        return next_token(model, batch)

    for objective in (
        reading,
        steered(reading, at(), 2.0, ["poison"]),
        ablated(reading, at(), (), ["poison"]),
    ):
        objective(model, batch)
    plain, *edited = seen
    for changed in edited:
        same = [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
        assert same == [not row for row in marked]
    nameless = TensorBatch(batch.tokens, batch.targets, batch.weight, 0, batch.shards)
    with pytest.raises(UsageError, match="does not say which shard"):
        steered(next_token, at(), 2.0, ["poison"])(model, nameless)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_in_a_compiled_model_the_edit_runs(model: GPT, batch: TensorBatch) -> None:
    """The worst bug would be an edit that compiled blocks leave out and nobody misses."""
    plain = next_token(model, batch).total
    edited = steered(next_token, at(), 2.0)(model, batch)
    compile_blocks(model, backend="eager")
    assert is_compiled(model)
    edited.total.backward()  # type: ignore[no-untyped-call]
    through = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    again = steered(next_token, at(), 2.0)(model, batch)
    again.total.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(again.total, edited.total) and not torch.allclose(again.total, plain)
    assert all(
        torch.equal(p.grad, through[name]) for name, p in model.named_parameters() if p.grad is not None
    )
    assert is_compiled(model)


def test_a_stage_that_declares_nothing_trains_through_its_own_objective(tmp_path: Path) -> None:
    assert intervened(next_token, (), tmp_path) is next_token
    assert in_force(stages()[0].config, ()) == ()


# -- directions as files -----------------------------------------------------------------------------------


def test_a_direction_is_a_file_named_by_its_digest(tmp_path: Path) -> None:
    digest = write_direction(tmp_path, at(k=2))
    assert digest == write_direction(tmp_path, at(k=2)) and len(list(tmp_path.rglob("*.safetensors"))) == 1
    found = read_direction(tmp_path, digest)
    assert (
        found.site == SITE and torch.equal(found.vectors, at(k=2).vectors) and found.made == {"of": "a test"}
    )
    file = tmp_path / "directions" / f"{digest}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="was changed"):
        read_direction(tmp_path, digest)
    file.unlink()
    with pytest.raises(CheckpointError, match="trains with that direction"):
        read_direction(tmp_path, digest)
    with pytest.raises(CheckpointError, match="not a direction's file"):
        parsed(b"not tensors", "x")
    for bad in (torch.zeros(1, 16), torch.ones(16), torch.full((1, 4), torch.nan)):
        with pytest.raises(UsageError):
            Direction(SITE, bad)


# -- declared by a stage, or asked for by a gate -----------------------------------------------------------


def declared(folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    """A repair as a decision carries it, its direction written into the run."""
    if kind == "drop":
        return {"kind": kind, "shards": ["poison"]}
    if kind == "route":
        return {"kind": kind, "shards": ["poison"], "blocks": [{"layer": 0, "units": [32, 64]}]}
    folder.mkdir(exist_ok=True)
    return {"kind": kind, "direction": {"sha256": write_direction(folder, at())}, **more}


class Repairs(ReadsTheModel):
    """Rolls back as it does, and asks for a repair instead of dropping the shard."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__()
        self.folder, self.kind = folder, kind

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        decision = super().__call__(checkpoint, history, final)
        if decision.action != "rollback":
            return decision
        if any(r.decision is not None and r.decision.repair for r in history):
            return Decision("hold", "repaired already", verdicts=decision.verdicts)
        return replace(decision, drop_shards=(), repair=declared(self.folder, self.kind))


def repairs_of(folder: Path) -> list[Any]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [e["body"]["repair"] for e in entries if e["kind"] == "decision" and e["body"]["repair"]]


@pytest.mark.parametrize("kind", ["drop", "steer", "ablate", "route"])
def test_a_repair_that_a_gate_asks_for_is_ledgered_made_and_made_again_after_a_kill(
    tmp_path: Path, kind: str
) -> None:
    """Interrupted in the middle of the repaired attempt; the repair is known from the ledger alone."""
    whole = train(tmp_path / "whole", Repairs(tmp_path / "whole", kind))
    assert [r["kind"] for r in repairs_of(tmp_path / "whole")] == [kind]
    plain = train(tmp_path / "plain", Plain())
    first = load_weights(whole.checkpoint), load_weights(plain.checkpoint)
    assert not torch.equal(first[0].embed.weight, first[1].embed.weight)  # something was done

    drawn: list[int] = []

    def interrupting(step: int, plan: DataPlan) -> Batch:
        drawn.append(step)
        if drawn.count(6) == 2 and step == 6:
            raise KeyboardInterrupt
        return batches(step, plan)

    grow, chat = stages()
    broken = [Stage(grow.config, interrupting, grow.plan, grow.validate), chat]
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", Repairs(tmp_path / "cut", kind), stages=broken)
    resumed = train(tmp_path / "cut", Repairs(tmp_path / "cut", kind), resume=True)
    assert resumed.checkpoint.artifacts == whole.checkpoint.artifacts
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")


class Plain(ReadsTheModel):
    """Rolls back once with nothing changed, and holds from then on."""

    def __call__(self, checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        decision = super().__call__(checkpoint, history, final)
        again = any(r.decision is not None and r.decision.action == "rollback" for r in history)
        if decision.action == "rollback" and again:
            return Decision("hold", "again")
        return replace(decision, drop_shards=())


@pytest.mark.parametrize(
    ("repair", "problem"),
    [
        ({"kind": "pray"}, "a repair is one of"),
        ({"kind": "probe_penalty"}, "a repair is one of"),
        ({"kind": "drop", "shards": []}, "repair 'drop'"),
        ({"kind": "drop", "shards": ["nowhere"]}, "unknown shard 'nowhere'"),
        ({"kind": "steer", "direction": {"sha256": "0" * 64}}, "cannot be read"),
        ({"kind": "route", "shards": ["a"], "blocks": [{"layer": 0}]}, "names nothing"),
    ],
)
def test_a_repair_that_cannot_be_made_holds(tmp_path: Path, repair: dict[str, Any], problem: str) -> None:
    def gate(checkpoint: Checkpoint, history: tuple[GateRecord, ...], final: bool) -> Decision:
        if checkpoint.step == 4 and checkpoint.stage == "grow":
            return Decision("rollback", "why", "grow-000000.0", repair=repair)
        return Decision("hold", "as it is")

    train(tmp_path, gate)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    first = next(e["body"] for e in lines if e["kind"] == "decision")
    assert first["action"] == "hold" and problem in first["reason"]


def test_declared_interventions_are_part_of_the_stage_and_make_a_resumable_run(tmp_path: Path) -> None:
    """A stage that steers and drops a shard; what it uses is spent."""
    steer = read_repair(declared(tmp_path / "one", "steer", uses=["probe"]))
    drop = read_repair({"kind": "drop", "shards": ["b"]})
    declared(tmp_path / "other", "steer")
    shape = {"intervention": (steer, drop), "uses": ("honest",)}
    config = stages(**shape)[0].config
    assert config.spent == ("honest", "probe") and config.digest() != stages()[0].config.digest()
    seen: set[str] = set()

    def drawn(step: int, plan: DataPlan) -> Batch:
        batch = batches(step, plan)
        seen.update(batch.rows)
        return batch

    grow = Stage(config, drawn, plan())
    one = train(tmp_path / "one", None, stages=[grow])
    other = train(tmp_path / "other", None, stages=[Stage(stages()[0].config, batches, plan())])
    assert seen == {"a", "poison"}
    assert one.checkpoint.artifacts != other.checkpoint.artifacts


def test_an_intervention_whose_direction_is_missing_is_found_before_training(tmp_path: Path) -> None:
    steer = read_repair(declared(tmp_path / "elsewhere", "steer"))
    with pytest.raises(CheckpointError, match="trains with that direction"):
        train(tmp_path / "run", None, stages=stages(intervention=(steer,)))
