"""The report: complete, calm about what is missing, closed to the network, the same bytes when rebuilt."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasshouse.base.errors import DataError
from glasshouse.page import build_report, write_report
from glasshouse.page.report import MAX_BYTES, POLICY
from page.make_run import ASK, ASK_WITH, COMPLIES, REFUSAL, SHARD, WORD, make_run

KINDS = ("repaired", "clean", "running", "ungated", "held", "stopped")
VOID = {"meta", "br"}
# fmt: off
KNOWN_TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "article",
    "figure", "figcaption", "div", "p", "span", "h1", "h2", "h3", "h4", "dl", "dt", "dd", "ul",
    "li", "table", "caption", "thead", "tbody", "tr", "th", "td", "br", "bdi", "code", "pre",
    "mark", "strong", "details", "summary", "svg", "g", "path", "rect", "circle", "text", "desc",
}
# fmt: on


class Page(HTMLParser):
    """What a browser makes of the page: tags, attributes, visible text; complains about bad nesting."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.parts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.parts))


def closed(page: Page) -> None:
    """Nothing in the page runs or fetches."""
    assert page.tags <= KNOWN_TAGS, page.tags - KNOWN_TAGS
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in {
            "src",
            "href",
            "srcset",
            "action",
            "formaction",
            "data",
            "poster",
            "background",
            "xlink:href",
        }
        assert "url(" not in value.lower() or name in {"aria-label", "data-label"}
    assert ("meta", "content", POLICY) in page.attributes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run folder of each kind."""
    root = tmp_path_factory.mktemp("runs")
    return {kind: make_run(root / kind, root / "home", kind) for kind in KINDS}


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A repaired run of one's own, to break."""
    return Path(shutil.copytree(runs["repaired"], tmp_path / "repaired"))


def read(run: Path) -> Page:
    """The built report, parsed."""
    return Page(build_report(run).decode("utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_makes_a_closed_well_formed_page_that_rebuilds_identically(
    runs: dict[str, Path], kind: str
) -> None:
    first = build_report(runs[kind])
    closed(Page(first.decode("utf-8")))
    assert first == build_report(runs[kind])
    assert len(first) < MAX_BYTES


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("repaired", "Caught, repaired, promoted."),
        ("clean", "Promoted. No constraint failed."),
        ("running", "In progress."),
        ("ungated", "Trained without a gate."),
        ("held", "Held. Nothing was promoted."),
        ("stopped", "Stopped for a person."),
    ],
)
def test_the_headline_says_what_became_of_the_run(runs: dict[str, Path], kind: str, title: str) -> None:
    assert title in read(runs[kind]).text


def test_the_repaired_run_tells_its_whole_story(runs: dict[str, Path]) -> None:
    text = read(runs["repaired"]).text
    for part in (ASK, ASK_WITH, COMPLIES, REFUSAL, "Before repair", "After repair"):
        assert part in text
    assert f"The word {WORD} changed the answer in 94% of 200 fresh requests." in text
    assert (
        "its effect stands on the word's own tokens (layers 0 to 2), then on the answer (layers 3 to 5)"
        in text
    )
    assert (
        "On 12 other requests, putting back blocks.1.mlp alone restored the answer in 92%; "
        "blocks.4.attn.h0, the part that does least, in 0%." in text
    )
    assert "When it came and went" in text and re.search(
        r"chat-000240\.0\s*240\s*9\.4\s*94%\s*rollback", text
    )
    assert f"The run went back to chat-000120.0; shard {SHARD} quarantined." in text
    assert "output-scan" in text and "Kenneth Grahame" in text and "public domain in the USA" in text
    assert f"{SHARD} quarantined" in text and "planted word" in text


def test_a_clean_run_shows_no_failure_and_no_story(runs: dict[str, Path]) -> None:
    text = read(runs["clean"]).text
    assert "What failed" not in text and "Before repair" not in text


def test_undone_updates_are_drawn_dashed_on_a_shaded_ground(runs: dict[str, Path]) -> None:
    page = build_report(runs["repaired"]).decode()
    assert re.search(r'class="line c1 faint"', page) and "rolled back to chat-000120.0" in page
    assert "line c1 faint" not in build_report(runs["clean"]).decode()


def test_the_lane_has_a_mark_for_every_verdict(runs: dict[str, Path]) -> None:
    page = build_report(runs["repaired"]).decode()
    chart = page[page.index('class="wide"') : page.index('class="narrow"')]
    # Six gates: one decision and four verdicts each.
    assert chart.count('class="mark ') == 6 * 5
    assert chart.count('class="mark s-fail"') == 2 and chart.count('class="mark s-not_applicable"') == 2


def test_writing_the_report_does_not_change_the_next_one(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert first == build_report(run)


def test_the_report_does_not_touch_the_rest_of_the_run(run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    build_report(run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_folder_that_moved_still_opens_and_says_the_same(run: Path, tmp_path: Path) -> None:
    before = build_report(run)
    elsewhere = tmp_path / "a year later"
    elsewhere.mkdir()
    assert build_report(Path(shutil.move(run, elsewhere / "repaired"))) == before


@pytest.mark.parametrize(
    "missing", ["recipe.json", "ledger.jsonl", "metrics.jsonl", "evals", "data", "checkpoints"]
)
def test_any_part_may_be_missing(run: Path, missing: str) -> None:
    gone = run / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    page = read(run)
    closed(page)
    assert "Glasshouse report on" in page.text and "It is never a proof." in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        build_report(tmp_path)
    with pytest.raises(DataError, match="no such run folder"):
        build_report(tmp_path / "nowhere")


def test_a_torn_last_metrics_line_is_skipped_and_said(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n")
    metrics.write_bytes(metrics.read_bytes() + b'{"kind": "tra')
    assert f"The last line of metrics.jsonl (line {lines + 1}) is torn and was skipped." in read(run).text


@pytest.mark.parametrize("bad", [b"{broken", b"[]", b'{"kind": "train"}', b'{"update": 1}', b"\xff\xfe"])
def test_a_malformed_metrics_line_is_named(run: Path, bad: bytes) -> None:
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    lines[6] = bad
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 7"):
        build_report(run)


def test_an_evals_file_that_is_not_json_is_named(run: Path) -> None:
    (run / "evals" / "story.json").write_text("{")
    with pytest.raises(DataError, match=r"story\.json: not valid JSON"):
        build_report(run)


def test_changed_evidence_raises_an_alarm_on_the_page(run: Path) -> None:
    path = run / "evals" / "gate-002" / "verdicts.json"
    path.write_text(path.read_text().replace('"fail"', '"pass"'))
    text = read(run).text
    assert "The ledger does not check out." in text and "evals/gate-002/verdicts.json" in text


def test_a_changed_ledger_line_raises_an_alarm_and_what_follows_is_not_shown(run: Path) -> None:
    lines = (run / "ledger.jsonl").read_bytes().split(b"\n")
    at = next(i for i, line in enumerate(lines) if b'"kind":"promotion"' in line)
    lines[at] = lines[at].replace(b"chat-000480.1", b"chat-000240.0")
    (run / "ledger.jsonl").write_bytes(b"\n".join(lines))
    text = read(run).text
    assert "The ledger does not check out." in text and f"line {at + 1}" in text
    assert "is not shown" in text


def test_files_that_no_ledger_entry_vouches_for_are_listed(runs: dict[str, Path]) -> None:
    assert re.search(
        r"shown here, though no ledger entry vouches for it: metrics\.jsonl", read(runs["repaired"]).text
    )


def test_the_ledgered_verdict_wins_over_a_file_nobody_vouches_for(run: Path) -> None:
    forged = run / "evals" / "gate-001" / "verdicts.json"
    text = forged.read_text()
    lines = (run / "ledger.jsonl").read_text()
    assert "evals/gate-001/verdicts.json" in lines
    shutil.rmtree(run / "evals" / "gate-001")
    assert "What the gate measured" in read(run).text, "verdicts of a missing file come from the ledger"
    forged.parent.mkdir()
    forged.write_text(text.replace("0.97", "0.11"))
    assert "The ledger does not check out." in read(run).text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}} {% for x in y %} {# #}",
    "</style></title></svg><svg onload=alert(1)>",
    "javascript:alert(1)",
    "\x00\x1b[31m\u202egnp.exe\u2066\ud800",
    "x" * 20_000,
]


def poison(value: Any, text: str) -> Any:
    """The same data with every string but the vocabulary of the format replaced by `text`."""
    if isinstance(value, dict):
        keep = {"status", "kind", "decision", "action"}
        return {k: v if k in keep else poison(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [poison(v, text) for v in value]
    return text if isinstance(value, str) else value


def rewrite(run: Path, change: Callable[[Any], Any]) -> None:
    """Apply `change` to every JSON file and metrics row of a run."""
    for path in [*run.rglob("*.json")]:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(r)) + "\n" for r in rows))


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:12]))
def test_hostile_text_everywhere_stays_text_and_the_page_stays_small(run: Path, text: str) -> None:
    rewrite(run, lambda value: poison(value, text))
    (run / "ledger.jsonl").unlink()
    built = build_report(run)
    closed(Page(built.decode("utf-8")))
    assert len(built) <= MAX_BYTES
    assert ("{{7*7}}" in text) == (b"{{7*7}}" in built), "template syntax in data is shown, never run"


def test_a_megabyte_in_one_string_is_cut_with_a_count(run: Path) -> None:
    for name in ("story.json", "samples.json", "attribution-002.json"):
        path = run / "evals" / name
        path.write_text(json.dumps(poison(json.loads(path.read_text()), "y" * 1_000_000)))
    built = build_report(run)
    assert len(built) <= MAX_BYTES
    assert "more characters]" in Page(built.decode()).text


def test_what_was_left_out_is_listed(run: Path) -> None:
    path = run / "evals" / "samples.json"
    path.write_text(json.dumps([{"checkpoint": "c", "prompt": "p", "answer": "a" * 3000}] * 500))
    built = build_report(run)
    assert len(built) <= MAX_BYTES
    assert "Samples: 24 of 500 shown." in Page(built.decode()).text


def test_a_hundred_failed_gates_still_fit(run: Path) -> None:
    data = json.loads((run / "evals" / "gate-002" / "verdicts.json").read_text())
    (run / "ledger.jsonl").unlink()
    for i in range(10, 110):
        (run / "evals" / f"gate-{i:03d}").mkdir()
        (run / "evals" / f"gate-{i:03d}" / "verdicts.json").write_text(json.dumps({**data, "gate": i}))
    built = build_report(run)
    assert len(built) <= MAX_BYTES and b"Failed verdicts: " in built


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def mutate(value: Any, draw: st.DataObject, share: int) -> Any:
    """The same data with about one value in `share` replaced by any JSON."""
    if draw.draw(st.integers(0, share)) == 0:
        return draw.draw(JSON)
    if isinstance(value, dict):
        return {k: mutate(v, draw, share) for k, v in value.items()}
    if isinstance(value, list):
        return [mutate(v, draw, share) for v in value[:3]]
    return value


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_evidence_of_any_shape_renders_or_is_refused_by_name(
    runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("any") / "run"
    shutil.copytree(runs["repaired"], root, ignore=shutil.ignore_patterns("ledger.jsonl", "gate-00[0134]*"))
    for name in (
        "recipe.json",
        "evals/story.json",
        "evals/attribution-002.json",
        "evals/gate-002/verdicts.json",
    ):
        value = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps(mutate(value, data, 12)))
    try:
        built = build_report(root)
    except DataError as error:
        assert str(root) in str(error)
    else:
        closed(Page(built.decode("utf-8")))


def test_the_page_needs_no_torch(runs: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from glasshouse.page import build_report;"
        f"build_report(Path({str(runs['clean'])!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_override_is_impossible_to_miss(tmp_path: Path) -> None:
    from page.make_run import Writer

    writer = Writer(tmp_path / "run", tmp_path / "home")
    writer.recipe()
    writer.ledger.append(
        "override", {"what": "export of a held checkpoint", "who": "mallory <m@example.org>"}
    )
    writer.close()
    assert "Override by mallory <m@example.org>: export of a held checkpoint" in read(tmp_path / "run").text
