"""Gates for a training run that Glasshouse does not drive: the same verdicts, ledger and report.

Three lines in any loop::

    watch = gh.watch("runs/finetune", "refusal-english", tokenizer="./model", every=100)
    for step, batch in enumerate(batches, start=1):
        ...                                            # your update
        watch(model, step)                             # judged and ledgered when a gate is due
    watch.finish(model)                                # on the reloaded export: promoted or held

What Glasshouse cannot do here is act: the optimiser and the data are yours. A gate that asks to go back is
therefore written down as a stop, with the shards to leave out and the checkpoint to return to, if there is
one: ``watch.start(model)`` before training keeps the model as it was.
"""

from __future__ import annotations

import logging
import tempfile
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glasshouse.base.canonical import canonical_json
from glasshouse.base.digest import digest_of, sha256_bytes, sha256_file
from glasshouse.base.errors import Stopped, UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.run import RunFolder
from glasshouse.data import Corpus, Document, Shards, books, pack, prepare, word_types
from glasshouse.model import GPT
from glasshouse.model.hf import load_hf
from glasshouse.recipes.api import check_vocabulary
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import Checkpoint, Decision, enter_run, environment, position
from glasshouse.train import checkpoint as saving
from glasshouse.train.decisions import decision_body, history
from glasshouse.train.gate import ask
from glasshouse.train.metrics import MetricsLog
from glasshouse.verify import ConstraintGate, GateConfig, load_constraints
from glasshouse.verify.packs import pack_file
from glasshouse.verify.weights import declare_envelope, require_envelopes

log = logging.getLogger(__name__)
STAGE = "finetune"
MANY = 10**9  # rollbacks that a foreign run may ask for: it stops at the first anyway
Texts = Iterable[str | Sequence[Mapping[str, str]]]


class Watch:
    """Judges the model of a foreign loop every ``every`` steps. Call it after each update.

    ``run``: a new folder for checkpoints, ledger and evidence. ``constraints``: a TOML file or a shipped
    pack's name. ``tokenizer``: a folder with ``tokenizer.json``. ``data``: what the run trains on, as shards
    (name -> texts or lists of messages), so that a failure can be traced to its documents; without it a
    failure stops the run untraced. ``chat_format`` as in `evals.chat` (default: told by the tokenizer).
    ``envelope``: what clean updates are like (`recipes.envelope`), for constraints that declare none.
    ``planned``: gates that share the constraints' error levels. Raises RecipeError for bad constraints and
    UsageError for a folder that holds a run.
    """

    def __init__(
        self,
        run: str | Path,
        constraints: str | Path,
        *,
        tokenizer: str | Path,
        every: int = 100,
        data: Mapping[str, Texts] | None = None,
        chat_format: str | None = None,
        envelope: str | Path | None = None,
        planned: int = 20,
        stop_on_fail: bool = True,
        name: str = STAGE,
    ):
        if every < 1:
            raise UsageError(f"every = {every}: a gate is due every so many steps, at least 1")
        self.run, self.every, self.stage = RunFolder(Path(run)), every, name
        if self.run.ledger.is_file() and self.run.ledger.stat().st_size:
            raise UsageError(f"{run} holds a run already; name another folder")
        self.stop_on_fail = stop_on_fail
        self.tokenizer = Tokenizer.load(tokenizer)
        file = pack_file(Path(constraints))
        declared = load_constraints(file)
        if envelope is not None:
            declared = declare_envelope(declared, Path(envelope))
        require_envelopes(declared)
        self.run.create()
        self.tokenizer_file = self.run.path / "tokenizer.json"
        self.tokenizer.save(self.tokenizer_file)
        self.shards = shards_of(self.run, self.tokenizer, data)
        self.plan = plan_of(self.shards)
        recipe = {
            "name": name,
            "constraints": {c.id: c.digest() for c in declared},
            "tokenizer": self.tokenizer.digest(),
            "data": dict(self.plan.digests),
            "chat_format": chat_format,
            "every": every,
            "planned": planned,
        }
        self.gate = ConstraintGate(
            declared,
            GateConfig(planned=planned),
            self.run,
            self.tokenizer,
            self.shards,
            (name,),
            digest_of(recipe),
            words_of(self.shards),
            (),
            chat_format=chat_format,
            folder=file.parent,
        )
        self.gate.require_readable()
        self.metrics = MetricsLog(self.run.metrics, 0)
        weakref.finalize(self, self.metrics.close)  # a loop may break off without `finish`
        self.began, self.last, self.seen, self.ended = time.perf_counter(), 0, 0, False
        self.ledger = begun(self.run, recipe)

    def __call__(self, model: Any, step: int, **numbers: float) -> Decision | None:
        """Judge ``model`` if a gate is due at ``step`` (updates made so far); None if none is. One is due at
        the first call at or after every ``every`` steps, whichever steps a loop calls at.

        ``numbers`` (loss, learning rate, ...) go into the metrics. Raises Stopped when a constraint asks to
        stop or to go back, unless ``stop_on_fail`` is False: then look at the decision's action.
        """
        self.seen = step
        if numbers:
            row = {"kind": "train", "stage": self.stage, "step": step, "update": step}
            self.metrics.append(row | {k: float(v) for k, v in numbers.items()})
        if step // self.every == self.last // self.every:
            return None
        return self.judge(model, step, final=False)

    def start(self, model: Any) -> None:
        """Keep the model as it is before the first update, unjudged: something to go back to."""
        if position(self.ledger.entries()).head is not None:
            raise UsageError(f"{self.run.path}: this run has begun; start comes before the first gate")
        self.save(model, 0, why="start")

    def finish(self, model: Any, step: int | None = None) -> Decision:
        """Judge the last model with full coverage on its reloaded export: promote it, or hold it.

        ``step``: updates made in all (default: that of the last call). Raises Stopped as a gate does.
        """
        decision = self.judge(model, self.seen if step is None else step, final=True)
        self.ended = True
        self.ledger.append(
            "finish",
            {
                "checkpoint": position(self.ledger.entries()).head,
                "promoted": decision.action == "promote",
                "reason": decision.reason,
            },
        )
        self.metrics.close()
        return decision

    def judge(self, model: Any, step: int, final: bool) -> Decision:
        """Save, ask the gate, ledger what it says. Fails closed: a check that breaks holds the checkpoint."""
        if self.ended:
            raise UsageError(f"{self.run.path}: this run is finished; watch another folder")
        if step < self.last:
            raise UsageError(f"step {step} comes after step {self.last}: steps only rise")
        checkpoint = self.save(model, step, why="end" if final else "gate")
        at = position(self.ledger.entries())
        known = tuple(self.plan.shards) if self.shards is not None else ()
        decision = ask(self.gate, checkpoint, history(self.run, at), final, known)
        if decision.action == "rollback":
            dropped = ", ".join(decision.drop_shards) or "the data behind it"
            said = f"{decision.reason}; go back to {decision.to_checkpoint} and leave out {dropped}"
            decision = replace(decision, action="stop", reason=said)
        if decision.action == "stop" and not self.stop_on_fail:
            said = f"{decision.reason}; the run goes on, as whoever began it asked for"
            decision = replace(decision, action="hold", reason=said)
        body = decision_body(at, decision, (), MANY)
        self.ledger.append("decision", {**body, **self.measured()})
        self.last = step
        if decision.action == "stop":
            self.ended = True
            self.metrics.close()
            raise Stopped(f"{decision.reason}. The evidence is in {self.run.path}")
        return decision

    def measured(self) -> dict[str, Any]:
        """Size of the metrics and time so far, as entries of a ledger have them."""
        return {
            "metrics_bytes": self.metrics.sync(),
            "elapsed_s": round(time.perf_counter() - self.began, 3),
        }

    def save(self, model: Any, step: int, why: str) -> Checkpoint:
        """Write the model as a checkpoint of ours and ledger it."""
        ours = as_gpt(model)
        check_vocabulary(self.tokenizer, ours, self.tokenizer_file)
        at = position(self.ledger.entries())
        place = {"stage": self.stage, "stage_index": 0, "step": step, "attempt": 0, "update": step}
        plan = self.plan.model_dump(mode="json")
        again = any(mark.step == step for mark in at.marks.values())  # the last gate and the end may coincide
        name = saving.checkpoint_name(self.stage, step, int(again))
        artifacts = saving.write_checkpoint(
            self.run, name, ours, None, self.tokenizer_file, {**place, "plan": plan, "seed": 0}
        )
        body = {
            **place,
            "checkpoint": name,
            "parent": at.head,
            "why": why,
            "gate": None if why == "start" else at.gates,
            "last": why == "end",
            "plan": plan,
            "digest": saving.digest_of_artifacts(artifacts),
            **self.measured(),
            "artifacts": artifacts,
        }
        self.ledger.append("checkpoint", body)
        return saving.from_ledger(self.run, body)


def watch(run: str | Path, constraints: str | Path, **how: Any) -> Watch:
    """A `Watch` over a training loop that Glasshouse does not drive; arguments as there."""
    return Watch(run, constraints, **how)


def as_gpt(model: Any) -> GPT:
    """A GPT with the weights of ``model``: one of ours, or a `transformers` model of a supported family."""
    if isinstance(model, GPT):
        return model
    inner = getattr(model, "module", model)  # as DistributedDataParallel wraps it
    if hasattr(inner, "merge_and_unload"):
        raise UsageError("an adapter cannot be judged alone: give the merged model (merge_and_unload)")
    if not hasattr(inner, "save_pretrained"):
        raise UsageError(
            f"a {type(model).__name__} cannot be judged: give a transformers model or a glasshouse.GPT"
        )
    with tempfile.TemporaryDirectory() as folder:
        inner.save_pretrained(folder)
        return load_hf(Path(folder))


def shards_of(run: RunFolder, tokenizer: Tokenizer, data: Mapping[str, Texts] | None) -> Shards | None:
    """The user's training data as shards that a failure can be traced to; None without any."""
    if data is None:
        return None
    corpora = []
    for name, rows in data.items():
        documents = [
            Document(f"{name}/{i}", name, text=row)
            if isinstance(row, str)
            else Document(
                f"{name}/{i}", name, messages=tuple({"role": m["role"], "content": m["content"]} for m in row)
            )
            for i, row in enumerate(rows)
        ]
        corpora.append(Corpus(name, documents))
    return pack(run.data, tokenizer, prepare(corpora))


def words_of(shards: Shards | None) -> tuple[str, ...]:
    """The words that searches try: those of the training text, else of the packaged books."""
    if shards is not None:
        return tuple(shards.words)
    return tuple(word_types(d.text or "" for d in books.documents()))


def begun(run: RunFolder, recipe: Mapping[str, Any]) -> Ledger:
    """The recipe written down, and the ledger with its first entry."""
    ledger = Ledger(run.ledger, signing_key())
    run.recipe.write_bytes(canonical_json(recipe) + b"\n")
    enter_run(
        ledger,
        recipe_digest=digest_of(recipe),
        environment=environment(1, "fp32", "fp32"),
        body={
            "name": recipe["name"],
            "seed": 0,
            "foreign": True,
            "constraints": recipe["constraints"],
            "artifacts": {"recipe.json": sha256_file(run.recipe)},
        },
    )
    return ledger


def plan_of(shards: Shards | None) -> DataPlan:
    """Every shard from the start on, or a stand-in for data that nobody showed us."""
    if shards is not None:
        return shards.plan(list(shards))
    unknown = sha256_bytes(b"data that the watched run did not show")
    return DataPlan(phases=(Phase(from_step=0, weights={"unknown": 1.0}),), digests={"unknown": unknown})
