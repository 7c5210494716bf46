"""One result as a page of its own: no script, nothing fetched, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from glasshouse.draw import esc
from glasshouse.page.report import POLICY, style


def result_page(title: str, parts: Iterable[Markup]) -> str:
    """A whole HTML document. ``title`` is escaped here; ``parts`` must be escaped already."""
    body = Markup("\n").join(Markup("<section>{}</section>").format(part) for part in parts)
    return str(
        Markup(
            "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
            '<meta http-equiv="Content-Security-Policy" content="{}">\n'
            "<meta name=viewport content='width=device-width,initial-scale=1'>\n"
            "<title>{}</title>\n<style>{}</style>\n</head>\n"
            "<body><main><h2>{}</h2>{}</main></body>\n</html>\n"
        ).format(POLICY, esc(title, 200), style(), esc(title, 200), body)
    )
