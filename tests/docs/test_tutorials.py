"""Every Python block of a tutorial runs, in order, in one namespace: what a reader copies works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["lens.md"])
def test_the_blocks_of_a_tutorial_run_in_order(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 8, "the page lost its blocks"
    namespace: dict[str, object] = {"__name__": "tutorial"}
    with torch.random.fork_rng():
        for block in blocks:
            line = text[: block.start()].count("\n") + 1  # so that an error names the line of the page
            exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), namespace)
    assert "[" in capsys.readouterr().out, "no interval was printed"


def test_every_link_of_the_tutorial_leads_somewhere() -> None:
    text = (DOCS / "lens.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", text)
    assert links
    missing = [path for path, _ in links if not path.startswith("http") and not (DOCS / path).exists()]
    assert not missing, missing
