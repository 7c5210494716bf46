"""Tables that scroll inside their own box on a wide screen and become cards on a narrow one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from markupsafe import Markup

from glasshouse.draw.text import clean, esc


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    caption: str,
    *,
    numeric: Collection[int] = (),
    cards: bool = False,
    row_classes: Sequence[str] = (),
) -> Markup:
    """An HTML table. Cells are escaped unless they are Markup; `numeric` columns align right.

    `cards`: below the page's narrow width each row becomes a card that repeats the column names.
    """

    def attributes(j: int) -> Markup:
        side = Markup(' class="num"') if j in numeric else Markup()
        return Markup(' data-label="{}"').format(clean(head[j], 80)) + side

    heads = Markup().join(
        Markup("<th scope=col{}>{}</th>").format(
            Markup(' class="num"') if j in numeric else Markup(), esc(name)
        )
        for j, name in enumerate(head)
    )
    body = Markup()
    for i, row in enumerate(rows):
        cells = Markup().join(
            Markup("<td{}>{}</td>").format(attributes(j), esc(c)) for j, c in enumerate(row)
        )
        kind = row_classes[i] if i < len(row_classes) else ""
        body += Markup("<tr{}>{}</tr>\n").format(
            Markup(' class="{}"').format(kind) if kind else Markup(), cells
        )
    return Markup(
        '<div class="scroll{}" role="region" aria-label="{}" tabindex="0"><table>'
        '<caption class="away">{}</caption><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>'
    ).format(" cards" if cards else "", clean(caption, 200), clean(caption, 200), heads, body)
