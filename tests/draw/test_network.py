"""Layered graphs are drawn from data alone, and text in them cannot break out."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from glasshouse.draw.network import Link, Node, network

NODES = [Node("input", 0, 0.5), Node("a0.h0", 1, 0.2), Node("a0.h1", 1, 0.8), Node("logits", 7, 0.5)]
LINKS = [Link("input", "a0.h0", 2.0, side="q"), Link("a0.h0", "logits", -0.5), Link("input", "logits", 0.1)]


def parsed(markup: str) -> ET.Element:
    return ET.fromstring(str(markup))


def test_every_node_and_link_is_drawn_once_and_equal_data_give_equal_bytes():
    picture = network(NODES, LINKS, "t", "d")
    root = parsed(picture)
    assert [t.text for t in root.iter("text")] == [n.name for n in NODES]
    assert len(list(root.iter("path"))) == 3
    assert picture == network(NODES, LINKS, "t", "d")


def test_width_tells_size_and_colour_tells_sign():
    paths = list(parsed(network(NODES, LINKS, "t", "d")).iter("path"))
    widths = [float(re.search(r"stroke-width:([\d.]+)px", p.attrib["style"]).group(1)) for p in paths]
    assert widths[0] > widths[1] > widths[2]
    assert ["c2" in p.attrib["class"] for p in paths] == [False, True, False]


def test_higher_levels_stand_higher_and_empty_ones_take_no_room():
    root = parsed(network(NODES, LINKS, "t", "d"))
    y = {t.text: float(t.attrib["y"]) for t in root.iter("text")}
    assert y["input"] > y["a0.h0"] == y["a0.h1"] > y["logits"]
    assert y["input"] - y["a0.h0"] == y["a0.h0"] - y["logits"]


def test_links_to_nobody_and_weights_that_are_no_numbers_do_no_harm():
    odd = [Link("input", "nobody", 1.0), Link("input", "logits", float("nan"))]
    assert len(list(parsed(network(NODES, odd, "t", "d")).iter("path"))) == 1
    assert parsed(network([], [], "t", "d")) is not None


def test_hostile_text_is_escaped():
    nodes = [Node("<script>", 0, 0.5), Node("b", 1, 0.5)]
    picture = network(nodes, [Link("<script>", "b", 1.0, "<img onerror=x>")], "<b>", '"><x>')
    assert "<script>" not in picture and "<img" not in picture and "<x>" not in picture
