"""Tables escape their cells and can be read as cards."""

from __future__ import annotations

from markupsafe import Markup

from glasshouse.draw import table


def test_cells_are_escaped_unless_they_were_built_here() -> None:
    made = str(table(["<b>"], [["<i>"], [Markup("<em>x</em>")]], "<c>"))
    assert "&lt;b&gt;" in made and "&lt;i&gt;" in made and "<em>x</em>" in made
    assert "<b>" not in made and "<i>" not in made and "<c>" not in made


def test_every_cell_names_its_column_for_narrow_screens() -> None:
    made = str(table(["Constraint", "n"], [["a", 1]], "c", numeric=(1,), cards=True))
    assert '<td data-label="Constraint">a</td>' in made
    assert '<td data-label="n" class="num">1</td>' in made
    assert 'class="scroll cards"' in made
