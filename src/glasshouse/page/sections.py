"""What was trained on what, samples, standings, and the ledger: the calm parts of the report."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from glasshouse.draw import clean, esc, label
from glasshouse.draw import table as html_table
from glasshouse.page.curves import rolled_back
from glasshouse.page.cut import Cuts
from glasshouse.page.read import RunRecord, num, rows, table, words
from glasshouse.page.verdicts import pairs

STANDINGS = {"promoted": "pass", "quarantined": "fail", "held": "undecided", "passed": "neutral"}


def named(value: object) -> list[dict[str, Any]]:
    """A list of objects, or an object of objects with each name put inside its object."""
    if isinstance(value, dict):
        return [{"name": k, **v} for k, v in value.items() if isinstance(v, dict)]
    return rows(value)


def model_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Number of weights and the model's shape, under the names the field uses."""
    facts = [("parameters", f"{record.parameters:,}")] if record.parameters else []
    return facts + pairs(table(record.recipe.get("model")), 80, space="_")[:24]


def model_line(record: RunRecord) -> str:
    """The model in a line: 1.59M parameters, 6 layers, width 128, context 256 tokens."""
    shape = table(record.recipe.get("model"))
    parts = [f"{label(record.parameters)} parameters"] if record.parameters else []
    for key, said in (
        ("n_layer", "{} layers"),
        ("d_model", "width {}"),
        ("n_head", "{} heads"),
        ("vocab_size", "vocabulary {}"),
        ("context", "context {} tokens"),
    ):
        if (value := num(shape.get(key))) is not None:
            parts.append(said.format(f"{value:,.0f}"))
    return ", ".join(parts)


def moment(entry: dict[str, Any]) -> str:
    """A ledger entry's time as people write it: 2026-11-21 10:00:00 UTC."""
    time = clean(entry.get("time"), 40)
    return f"{time[:10]} {time[11:19]} UTC" if time[10:11] == "T" and time.endswith("Z") else time


def environment_facts(record: RunRecord) -> list[tuple[str, str]]:
    """What the run says about the machine and libraries that made it, and when."""
    first = record.of("run")
    facts = pairs(table(first[0].get("environment")), 120)[:24] if first else []
    if record.entries:
        facts.append(("first entry", moment(record.entries[0])))
        facts.append(("last entry", moment(record.entries[-1])))
    seconds = max((t for r in record.metrics if (t := num(r.get("t"))) is not None), default=None)
    if seconds is not None:
        facts.append(("time in training and gates", duration(seconds)))
    for name in ("recipe_digest", "recipe"):
        if first and isinstance(first[0].get(name), str):
            facts.append(("recipe digest", clean(first[0][name], 80)))
            break
    return facts


def duration(seconds: float) -> str:
    """Seconds as 4 min 10 s."""
    whole = round(min(seconds, 1e12))
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def stage_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """Per stage: objective, steps asked for, updates run, how many of them were undone, the last loss."""
    listed = record.recipe.get("stage") or record.recipe.get("stages")
    known = {words(s.get("name")): s for s in named(listed)}
    train = [r for r in record.metrics if r["kind"] == "train"]
    spans = rolled_back(record)
    ends: dict[str, list[float]] = {}
    for row in (r for r in record.metrics if r["kind"] in ("train", "val")):
        ends.setdefault(words(row.get("stage")), []).append(float(row["update"]))
    body = []
    for name in cuts.first(
        list(dict.fromkeys([*known, *(e for e in ends if e)])), cuts.limits.items, "Stages"
    ):
        stage, of = known.get(name, {}), [r for r in train if r.get("stage") == name]
        run = ends.get(name, [])
        last = max(run, default=0.0)
        first = max((u for us in ends.values() for u in us if u < min(run, default=0.0)), default=0.0)
        undone = sum(max(0.0, min(last, hi) - max(first, lo)) for lo, hi, _ in spans)
        key = "bpb" if any(num(r.get("bpb")) is not None for r in of) else "loss"
        value = next((v for r in reversed(of) if (v := num(r.get(key))) is not None), None)
        body.append(
            [
                esc(name, 80),
                esc(trained_with(stage), 120),
                esc(words(stage.get("steps")), 20),
                esc(words(stage.get("batch_size")), 20),
                f"{last - first:,.0f}" if run else "0",
                f"{undone:,.0f}" if undone else "",
                "" if value is None else f"{label(value)} {'bits/byte' if key == 'bpb' else 'nats'}",
            ]
        )
    head = ["Stage", "Objective", "Steps", "Batch", "Updates run", "Undone", "Last training loss"]
    return html_table(head, body, "Stages", numeric=(2, 3, 4, 5, 6), cards=True) if body else None


def trained_with(stage: dict[str, Any]) -> str:
    """A stage's objective, and what was done inside the model or to its data while it trained."""
    kinds = [kind for one in rows(stage.get("intervention")) if (kind := words(one.get("kind")))]
    return " + ".join([words(stage.get("objective")), *(k.replace("_", " ") for k in kinds)])


def shard_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """Documents, tokens and bytes per kind of shard."""
    dropped = {s for g in record.gates for s in g.drop_shards}
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder, manifest in record.manifests.items():
        for shard in named(manifest.get("shards")):
            name = words(shard.get("kind")) or (folder if folder != "." else "training")
            groups.setdefault(f"{name}, validation" if shard.get("validation") is True else name, []).append(
                shard
            )
    body = []
    for name, shards in cuts.first(list(groups.items()), cuts.limits.items, "Data sets"):
        sums = []
        for key in ("n_documents", "n_tokens", "n_bytes"):
            known = [v for s in shards if (v := num(s.get(key))) is not None]
            sums.append(label(sum(known)) if known else "")
        gone = sorted({words(s.get("name")) for s in shards} & dropped)
        body.append([esc(name, 80), f"{len(shards):,}", *sums, esc(", ".join(gone), 200)])
    return (
        html_table(
            ["Data", "Shards", "Documents", "Tokens", "Bytes", "Quarantined"],
            body,
            "Training data",
            numeric=(1, 2, 3, 4),
            cards=True,
        )
        if body
        else None
    )


def source_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """Title, author and licence of every source."""
    sources: dict[tuple[str, str, str], None] = {}
    for manifest in record.manifests.values():
        for one in named(manifest.get("sources")):
            title = words(one.get("title")) or words(one.get("name")) or words(one.get("source"))
            licence = next(
                (words(one[k]) for k in ("licence", "license", "rights") if words(one.get(k))), "not stated"
            )
            sources[(title, words(one.get("author")), licence)] = None
    body = [
        [esc(t, 200), esc(a, 120), esc(x, 160)]
        for t, a, x in cuts.first(list(sources), cuts.limits.sources, "Data sources")
    ]
    return html_table(["Title", "Author", "Licence"], body, "Data sources", cards=True) if body else None


@dataclass(frozen=True)
class Sample:
    """One prompt and answer, escaped."""

    checkpoint: str
    stage: str
    prompt: Markup
    answer: Markup


def samples(record: RunRecord, cuts: Cuts) -> list[Sample]:
    """What the model writes, as recorded."""
    some = cuts.first(record.samples, cuts.limits.samples, "Samples")
    limit = cuts.limits.long_text
    return [
        Sample(
            clean(words(s.get("checkpoint")), 80),
            clean(words(s.get("stage")), 40),
            esc(words(s.get("prompt")), limit),
            esc(words(s.get("answer")), limit),
        )
        for s in some
    ]


def standing_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """Every checkpoint in order with its latest standing; those on an undone branch are marked."""
    standing = record.standings()
    spans = rolled_back(record)
    made = record.of("checkpoint")
    most = cuts.limits.checkpoints
    if len(made) > most:  # those that were judged tell more than those that were merely saved
        judged = [b for b in made if words(b.get("checkpoint")) in standing][-most:]
        cuts.notes.append(
            f"Checkpoints: {len(judged)} of {len(made):,} shown, the latest that have a standing."
        )
        made = judged
    body: list[list[object]] = []
    classes: list[str] = []
    for one in made:
        name, update = words(one.get("checkpoint")), num(one.get("update"))
        word, reason = standing.get(name, ("", ""))
        undone = update is not None and any(lo < update <= hi for lo, hi, _ in spans)
        shown = Markup('<span class="badge {}">{}</span>').format(
            STANDINGS.get(word, "neutral"), clean(word or "saved", 40)
        )
        note = reason + (" (branch rolled back)" if undone and word != "quarantined" else "")
        body.append(
            [
                Markup('<span class="id">{}</span>').format(clean(name, 80)),
                esc(words(one.get("stage")), 40),
                esc(words(one.get("step")), 20),
                "" if update is None else f"{update:,.0f}",
                shown,
                esc(note, 300),
            ]
        )
        classes.append("undone" if undone else "")
    head = ["Checkpoint", "Stage", "Step", "Update", "Standing", "Why"]
    return (
        html_table(head, body, "Checkpoint standings", numeric=(2, 3), cards=True, row_classes=classes)
        if body
        else None
    )


@dataclass(frozen=True)
class LedgerFacts:
    """What the ledger section shows; `state` is what a check of the run found when the page was built."""

    facts: list[tuple[str, str]]
    command: str
    state: str
    problems: list[str]
    unchecked: list[str]


def ledger_facts(record: RunRecord, cuts: Cuts) -> LedgerFacts | None:
    """Head, length, public key, how to verify, and what could not be checked; None without a ledger."""
    check = record.check
    if check is None:
        return None
    # That list changes when this very report is written; the files the page shows are listed instead.
    unchecked = [u for u in check.unchecked if not u.startswith("files that no entry names")]
    vouched = {name for e in record.entries for name in table(table(e.get("body")).get("artifacts"))}
    shown = [
        p.relative_to(record.path).as_posix()
        for p in [record.path / "metrics.jsonl", *sorted((record.path / "evals").rglob("*.json"))]
        if p.is_file()
    ]
    loose = [s for s in shown if s not in vouched]
    if loose:
        more = f" and {len(loose) - 8} more" if len(loose) > 8 else ""
        unchecked.append(f"shown here, though no ledger entry vouches for it: {', '.join(loose[:8])}{more}")
    problems = [clean(p, 400) for p in cuts.first(check.problems, cuts.limits.items, "Ledger problems")]
    name = clean(record.path.resolve().name, 120)
    return LedgerFacts(
        facts=[
            ("head", check.head or "none"),
            ("entries", f"{check.n_entries:,}"),
            ("public key (Ed25519)", clean(check.public_key, 120) or "none"),
        ],
        command=f"glasshouse ledger verify {shlex.quote(name)} --head {check.head} --key auditor.pub",
        state=clean(check.summary, 400),
        problems=problems,
        unchecked=[clean(u, 400) for u in cuts.first(unchecked, cuts.limits.items, "Unchecked items")],
    )
