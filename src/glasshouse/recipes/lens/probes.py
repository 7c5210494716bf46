"""`lens.probe`: can a concept be read, what else could explain that, and does the model use it?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from torch import Tensor

from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.rng import generator
from glasshouse.base.score import Score
from glasshouse.data import workshop
from glasshouse.evals.subject import Readout, refusal_readout
from glasshouse.interp.probes import ProbeConfig, ProbeReport, bag_of_words, probe_report
from glasshouse.interp.probes.causal import Decision
from glasshouse.interp.probes.core import Kind
from glasshouse.model.digest import weights_digest
from glasshouse.model.taps import Edit
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.lens.data import (
    Target,
    about,
    digest_of_rows,
    first_token,
    ids_of,
    json_lines,
    last_activations,
    last_logits,
    opened,
    streams,
    text_at,
)
from glasshouse.recipes.lens.report import Finding

KINDS = get_args(Kind)
LANGUAGE = "workshop"  # the closed language's own data, by this name
REQUESTS, DECIDED = 700, 160  # requests of the closed language to read; harmful ones whose refusal is edited
PLAIN = {"action": "move", "thing": "thing"}  # words of no class that stand for the language's own


@dataclass(frozen=True)
class Labelled:
    """Texts with a label, and what controls need: ``groups`` (meanings) and texts without the evidence."""

    texts: Sequence[str]
    labels: np.ndarray
    groups: Sequence[str] | None
    bare: Sequence[str] | None
    chat: bool
    source: str
    digest: str


def probe(
    model: Target,
    data: str | Path = LANGUAGE,
    *,
    kind: str = "logistic",
    sites: str | Sequence[str] = "blocks.*.resid_post",
    chat: bool = False,
    right: str | None = None,
    wrong: str | None = None,
    towards: bool = False,
    n_random: int = 8,
    seed: int = 0,
) -> Finding[ProbeReport]:
    """Fit a probe at every site, choose one, test it on meanings held out, with its controls.

    ``data``: a JSON-lines file of {"text", "label"[, "group"][, "evidence": words]}, or "workshop", the
    closed language's requests with harm as the concept. Activations are read at each text's last token
    (attention probes read all). The causal effect is on the logits of ``right`` less ``wrong`` (answers,
    by their first token) after texts not of class ``towards``; in the closed language on its refusals.
    DataError for data that are empty or a text longer than the context; VerificationError for one class or
    activations that are not finite; UsageError for a site that does not exist.
    """
    found = opened(model)
    if kind not in KINDS:
        raise UsageError(f"no kind of probe {kind!r}; there are {', '.join(KINDS)}")
    told = language(found, seed) if str(data) == LANGUAGE else labelled(Path(data), chat)
    rows = [ids_of(found, t, f"row {i + 1}", chat=told.chat) for i, t in enumerate(told.texts)]
    bare = None
    if told.bare is not None:
        where = "row {} without evidence"
        bare = [ids_of(found, t, where.format(i + 1), chat=told.chat) for i, t in enumerate(told.bare)]
    decide, decided = behaviour(found, told, rows, right, wrong, towards, seed)
    report = probe_report(
        **reading(found, rows, bare, kind, sites),
        labels=told.labels,
        groups=told.groups,
        config=ProbeConfig(kind=cast(Kind, kind)),
        words=bag_of_words(told.texts),
        decide=decide,
        towards=towards,
        n_random=n_random,
        model_digest=weights_digest(found.model),
        seed=seed,
    )
    facts = about(found, concept_from=told.source, data=told.digest, rows=len(rows), behaviour=decided)
    facts |= {"read_at": "every token" if kind == "attention" else "the last token"}
    title = f"{kind} probe at {report.site}"
    return Finding(title, report, numbers(report), facts, report.to_dict(), (report,), report.notes)


def reading(
    found: Loaded,
    rows: Sequence[Sequence[int]],
    bare: Sequence[Sequence[int]] | None,
    kind: str,
    sites: str | Sequence[str],
) -> dict[str, Any]:
    """The activations as `probe_report` takes them, with and without the evidence."""
    if kind != "attention":
        masked = None if bare is None else last_activations(found.model, bare, sites)
        return {"acts": last_activations(found.model, rows, sites), "masked": masked}
    acts, mask = streams(found.model, rows, sites)
    return {"acts": acts, "mask": mask}


def labelled(path: Path, chat: bool) -> Labelled:
    """Rows of a JSON-lines file. DataError names the line at fault."""
    rows = json_lines(path, ("text", "label"), ("group", "evidence"))
    labels = []
    for row in rows:
        if row["label"] not in (True, False):  # 1 and 0 too
            raise DataError(f"{row['where']}: label must be true or false (1 or 0), not {row['label']!r}")
        labels.append(bool(row["label"]))
    texts = [text_at(row, "text") for row in rows]
    groups = [str(row["group"]) for row in rows if "group" in row]
    if groups and len(groups) != len(rows):
        missing = next(row["where"] for row in rows if "group" not in row)
        raise DataError(f"{missing}: has no group, and other rows have; give every row one")
    bare = None
    if any("evidence" in row for row in rows):
        bare = [without(t, row, path) for t, row in zip(texts, rows, strict=True)]
    digest = digest_of_rows(rows)
    return Labelled(texts, np.array(labels), groups or None, bare, chat, path.name, digest)


def without(text: str, row: Mapping[str, Any], path: Path) -> str:
    """A text whose evidence words are replaced by "something". DataError where one is not in the text."""
    words = row.get("evidence", [])
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        raise DataError(f"{row['where']}: evidence must be a list of words")
    for word in words:
        text, n = re.subn(rf"(?<!\w){re.escape(word)}(?!\w)", "something", text, flags=re.IGNORECASE)
        if not n:
            raise DataError(f"{row['where']}: the evidence {word!r} is not in the text")
    return text


def language(found: Loaded, seed: int) -> Labelled:
    """Requests of the closed language: harm is the concept, the (action, object) pair the meaning."""
    rng = generator("lens probe", seed)
    asked = [workshop.request(rng) for _ in range(REQUESTS)]
    bare = [a.text.replace(a.action, PLAIN["action"]).replace(a.thing, PLAIN["thing"]) for a in asked]
    texts, groups = [a.text for a in asked], [f"{a.action} {a.thing}" for a in asked]
    labels, source = np.array([a.harmful for a in asked]), f"the closed language, seed {seed}"
    digest = digest_of_rows([{"text": t} for t in texts])
    return Labelled(texts, labels, groups, bare, True, source, digest)


def behaviour(
    found: Loaded,
    told: Labelled,
    rows: Sequence[Sequence[int]],
    right: str | None,
    wrong: str | None,
    towards: bool,
    seed: int,
) -> tuple[Decision | None, str]:
    """What the causal effect is measured on, as a function of edits, and what to call it."""
    if (right is None) != (wrong is None):
        raise UsageError("a behaviour is --right less --wrong: give both")
    if right is not None and wrong is not None:
        ids = first_token(found, right, "--right"), first_token(found, wrong, "--wrong")
        if ids[0] == ids[1]:
            raise UsageError(f"{right!r} and {wrong!r} begin with the same token; nothing tells them apart")
        readout = Readout("behaviour", (ids[0],), (ids[1],))
        called = f"logit of {right!r} less {wrong!r}"
    elif told.source.startswith("the closed language"):
        readout, called = refusal_readout(found.tokenizer), "refusals of the closed language (log-odds)"
    else:
        return None, "none was named (--right, --wrong)"
    some = [row for row, y in zip(rows, told.labels, strict=True) if y != towards][:DECIDED]
    if not some:
        return None, f"no row is of class {not towards}"

    def decide(edit: Mapping[str, Edit] | None) -> Tensor:
        return readout.margin(last_logits(found.model, some, edit))

    does = decide(None) > 0
    if bool(does.any()) and not bool(does.all()):  # rows that do it: what an edit can take away
        some = [row for row, yes in zip(some, does.tolist(), strict=True) if yes]
    return decide, f"{called}, {len(some)} texts"


def numbers(report: ProbeReport) -> list[tuple[str, Score | str]]:
    """Every number of a report, in order."""
    rows: list[tuple[str, Score | str]] = [("AUROC, held-out meanings", report.auroc)]
    if report.control is not None:
        rows += [
            ("selectivity (task less control task)", report.control.selectivity),
            ("control task AUROC", report.control.control),
        ]
    rows.append(("calibration error (ECE)", report.calibration.ece))
    leak = report.leakage
    named = (
        ("AUROC of the words alone", leak.words),
        ("share that words explain", leak.words_explain),
        ("AUROC without the evidence", leak.masked),
        ("AUROC without it, fitted again", leak.masked_refit),
        ("share that masking removes", leak.masking_removes),
    )
    rows += [(name, score) for name, score in named if score is not None]
    for effect in report.causal.effects if report.causal is not None else ():
        rows += [
            (f"{effect.operation}: rows that flip", effect.flipped),
            (f"{effect.operation}: the same, random directions", effect.random_flipped),
            (f"{effect.operation}: change of behaviour", effect.effect),
        ]
    return rows + [(f"sweep: {site}", score) for site, score in report.sweep.items()]
