"""Build the report: one self-contained HTML file, the same bytes whenever it is built from the same run."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from glasshouse.base.atomic import write_bytes
from glasshouse.base.errors import DataError
from glasshouse.base.run import RunFolder
from glasshouse.draw import STYLE, clean, esc
from glasshouse.page import (
    curves,
    evidence,
    headline,
    monitors,
    phases,
    proxy,
    sections,
    statistics,
    story,
    timeline,
    verdicts,
)
from glasshouse.page.cut import LEVELS, Cuts, Limits
from glasshouse.page.read import RunRecord, read_run, words

MAX_BYTES = 2_000_000
# Nothing may run, nothing may be fetched: a report may carry text that a model or a stranger wrote.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@cache
def _template() -> jinja2.Template:
    """The page's template; a name it uses and is not given is an error, not an empty string."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: esc(value, 4000),  # a text that reaches the page uncleaned is cleaned here
        loader=jinja2.PackageLoader("glasshouse.page", "templates"),
    )
    return environment.get_template("report.html.j2")


@cache
def style() -> Markup:
    """The style sheet, from this package's own file: the only text that enters the page unescaped."""
    own = files("glasshouse.page").joinpath("templates/report.css").read_text(encoding="utf-8")
    return Markup(own + STYLE)


def _context(record: RunRecord, limits: Limits) -> dict[str, Any]:
    """Everything the template names."""
    cuts = Cuts(limits)
    constraints, when = verdicts.constraint_table(record, cuts)
    name = words(record.recipe.get("name")) or record.path.resolve().name
    return {
        "policy": POLICY,
        "style": style(),
        "name": clean(name, 120),
        "headline": headline.headline(record),
        "overrides": headline.overrides(record),
        "sides": headline.before_after(record, limits),
        "word": clean(words(record.story.get("word")), 80),
        "planted": headline.ground_truth(record),
        "model": sections.model_facts(record),
        "shape": sections.model_line(record),
        "environment": sections.environment_facts(record),
        "stages": sections.stage_table(record, cuts),
        "phases": phases.phase_table(record, cuts),
        "measured": phases.measured_table(record),
        "shards": sections.shard_table(record, cuts),
        "sources": sections.source_table(record, cuts),
        "training": curves.training_chart(record),
        "decisions": story.decision_table(record, cuts),
        "timeline": timeline.timeline(record),
        "lineage": timeline.lineage_tables(record, cuts),
        "estimates": curves.constraint_charts(record),
        "proxy": proxy.proxy_charts(record),
        "drift": proxy.drift_table(record),
        "others": curves.other_curves(record),
        "monitors": monitors.monitor_charts(record),
        "spikes": monitors.spike_table(record, cuts),
        "undone": curves.undone(record)[:12],
        "badges": [verdicts.badge(s) for s in verdicts.STATUS_WORDS],
        "constraints": constraints,
        "when": when,
        "evidence": statistics.evidence(record, cuts),
        "failures": evidence.failures(record, cuts),
        "samples": sections.samples(record, cuts),
        "standings": sections.standing_table(record, cuts),
        "ledger": sections.ledger_facts(record, cuts),
        "notes": [clean(n, 400) for n in record.notes],
        "left_out": cuts.notes,
    }


def build_report(run: Path) -> bytes:
    """The report of the run folder `run` as UTF-8 HTML, at most 2 MB; what was left out is listed in it.

    Raises DataError naming file and line for a file that cannot be read.
    """
    record = read_run(Path(run))
    size = 0
    for limits in LEVELS:
        page = _template().render(_context(record, limits)).encode("utf-8")
        size = len(page)
        if size <= MAX_BYTES:
            return page
    raise DataError(
        f"{run}: the shortest report would take {size:,} bytes, more than {MAX_BYTES:,}. "
        "Remove files from evals/ that the report does not need, then build it again."
    )


def write_report(run: Path) -> Path:
    """Write report.html into the run folder and return its path."""
    target = RunFolder(Path(run)).report
    write_bytes(target, build_report(run))
    return target
