"""How probe reports look: a table of numbers with intervals, the layer sweep, the reliability diagram."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from markupsafe import Markup

from glasshouse.base.score import Score
from glasshouse.draw import STYLE, Axes, Series, clean, esc, line_chart, table

if TYPE_CHECKING:
    from glasshouse.interp.probes.composition import CompositionReport
    from glasshouse.interp.probes.grid import Variable
    from glasshouse.interp.probes.report import ProbeReport


def figures(report: ProbeReport) -> Iterator[tuple[str, str]]:
    """Every number of a report: what it is, and its value with interval."""
    yield "held-out AUROC", str(report.auroc)
    if report.control is not None:
        yield "selectivity (task less control task)", str(report.control.selectivity)
        yield "control task AUROC", str(report.control.control)
    c = report.calibration
    yield "calibration error (ECE)", f"{c.ece}; {c.ece_if_calibrated:.3f} if calibrated"
    leak = report.leakage
    named = (
        ("AUROC of the words alone", leak.words),
        ("share that words explain", leak.words_explain),
        ("AUROC, evidence masked", leak.masked),
        ("AUROC, masked and fitted again", leak.masked_refit),
        ("share that masking removes", leak.masking_removes),
    )
    yield from ((name, str(score)) for name, score in named if score is not None)
    for effect in report.causal.effects if report.causal is not None else ():
        yield f"{effect.operation}: change of behaviour", f"{effect.effect}; random {effect.random}"
        yield f"{effect.operation}: rows that flip", f"{effect.flipped}; random {effect.random_flipped}"


def report_text(report: ProbeReport) -> str:
    """A report for a terminal."""
    rows = [("probe", f"{report.probe.config.kind} at {report.site}"), *figures(report)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {clean(value)}" for name, value in rows]
    return "\n".join([*lines, *report.notes])


def sweep_chart(sweep: Mapping[str, Score], title: str, label: str = "AUROC", half: float = 0.5) -> Markup:
    """Scores over sites in their order, with intervals; ``half`` is the level of chance."""
    scores = list(sweep.values())
    series = Series(
        label,
        [(i, s.value) for i, s in enumerate(scores)],
        style="both",
        intervals=[(i, s.low, s.high) for i, s in enumerate(scores)],
        labelled=False,
    )
    low = min([half, *(s.low for s in scores)])
    axes = Axes(
        x_label="site, in the order of computation",
        y_label=label,
        bounds=[(half, "chance")],
        y_range=(min(low, 0.4), 1.02),
        x_range=(0.0, max(1.0, len(scores) - 1.0)),
    )
    told = "; ".join(f"{site}: {score}" for site, score in sweep.items())
    return line_chart([series], title, told, axes, width=480, height=170)


def reliability_chart(report: ProbeReport) -> Markup:
    """Observed share against predicted probability; the broken line is perfect calibration."""
    bins = report.calibration.bins
    found = Series(
        "observed",
        [(b.predicted, b.observed.value) for b in bins],
        style="both",
        intervals=[(b.predicted, b.observed.low, b.observed.high) for b in bins],
        labelled=False,
    )
    perfect = Series("calibrated", [(0.0, 0.0), (1.0, 1.0)], color=4, faint=True, labelled=False)
    axes = Axes(
        x_label="predicted probability", y_label="share positive", x_range=(0.0, 1.0), y_range=(0.0, 1.02)
    )
    told = "; ".join(f"predicted {b.predicted:.2f}, observed {b.observed}" for b in bins)
    return line_chart([perfect, found], "Reliability", told, axes, width=380, height=170)


def report_html(report: ProbeReport) -> str:
    """A report for a notebook. Site names come from a model or a file: they are escaped."""
    head = f"{report.probe.config.kind} probe at {report.site}"
    sites = table(
        ("site", "AUROC"),
        [(site, str(score)) for site, score in report.sweep.items()],
        "Layer sweep, on rows that choose the site",
    )
    fit, choose, test = report.meanings
    notes = Markup().join(Markup("<p>{}</p>").format(esc(note)) for note in report.notes)
    return str(
        Markup("<style>{}</style><div class=probe-report><h4>{}</h4>").format(Markup(STYLE), esc(head))
        + table(("", "value [95% interval]"), list(figures(report)), head)
        + sweep_chart(report.sweep, "Layer sweep")
        + sites
        + reliability_chart(report)
        + Markup("<p>{}</p>").format(
            esc(f"Meanings: {fit} fitted, {choose} chose the site, {test} tested ({report.rows[2]} rows).")
        )
        + notes
        + Markup("</div>")
    )


def composition_rows(report: CompositionReport) -> Iterator[tuple[str, str]]:
    """Every number of a composition report but those by site."""
    yield "composes", "yes" if report.composes else "no"
    yield "pairs answered as the hypothesis says", str(report.seen)
    yield "the same, pairs held out", str(report.unseen)
    yield "combination in the answer (0: a sum over words)", str(report.combination)
    for v, site in report.parts.items():
        yield f"{v} alone, last at", site or "no site tested"
    yield "combination formed at", report.formed or "no site tested"
    for v, found in report.shuffled.items():
        yield f"classes dealt anew, {report.shuffled_at}: {v}", str(found.all)
    for v, by in report.carried.items():
        ranked = sorted(by.items(), key=lambda item: -abs((item[1].site or item[1].answer).value))[:3]
        told = (f"{name} {share.site or share.answer}" for name, share in ranked)
        yield f"{v} carried {'there' if report.formed else 'to the answer'} by", "; ".join(told)


def _site_rows(report: CompositionReport) -> list[tuple[str, ...]]:
    return [
        (site, *(str(f.found[v].all) for v in f.found), str(f.random["both"]), str(f.combination))
        for site, f in report.sites.items()
    ]


SITE_HEAD = ("site", "A", "B", "A and B", "random rotation", "combination")


def composition_text(report: CompositionReport) -> str:
    """A composition report for a terminal."""
    rows = list(composition_rows(report))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {clean(value)}" for name, value in rows]
    table_rows = [SITE_HEAD, *_site_rows(report)]
    widths = [max(len(r[i]) for r in table_rows) for i in range(len(SITE_HEAD))]
    lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in table_rows]
    return "\n".join(lines)


def composition_html(report: CompositionReport) -> str:
    """A composition report for a notebook: interchange accuracy over sites, and its numbers."""
    names = {"a": "A", "b": "B", "both": "A and B"}
    series = [
        Series(
            names[v],
            [(i, f.found[v].all.value) for i, f in enumerate(report.sites.values())],
            color=color,
            style="both",
            intervals=[
                (i, f.found[v].all.low, f.found[v].all.high) for i, f in enumerate(report.sites.values())
            ],
        )
        for color, v in enumerate(VARIABLE_NAMES)
    ]
    axes = Axes(
        x_label="site, in the order of computation",
        y_label="interchange accuracy",
        bounds=[(0.5, "chance")],
        y_range=(0.0, 1.02),
        x_range=(0.0, max(1.0, len(report.sites) - 1.0)),
    )
    told = "; ".join(f"{site}: A and B {f.found['both'].all}" for site, f in report.sites.items())
    return str(
        Markup("<style>{}</style><div class=probe-report>").format(Markup(STYLE))
        + table(("", "value [95% interval]"), list(composition_rows(report)), "Composition")
        + line_chart(series, "Interchange accuracy", told, axes, width=600, height=180)
        + table(SITE_HEAD, _site_rows(report), "Interchange accuracy by site, held-out combinations")
        + Markup("</div>")
    )


VARIABLE_NAMES: tuple[Variable, ...] = ("a", "b", "both")
