"""Feature pages say what a full computation says, and their files are the same bytes every time."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.dictionaries.stream import capture
from glasshouse.interp.formats import (
    Explanation,
    PageOptions,
    Source,
    feature_pages,
    read_batch,
    write_pages,
    write_source,
)
from glasshouse.interp.formats.neuronpedia import batch_path
from glasshouse.interp.formats.pages import logit_effects
from glasshouse.model import GPT, GPTConfig
from stirred import stirred

SITE = "blocks.0.resid_post"
SOURCE = Source("tiny", "0-res-16", SITE, creator="us")


def model(**more: object) -> GPT:
    shape = {"vocab_size": 13, "context": 8, "d_model": 8, "n_layer": 2, "n_head": 2, **more}
    return stirred(GPT(GPTConfig(**shape)).init_weights(0), 1, 0.3)


def dictionary(width: int = 8, **more: object) -> Dictionary:
    return Dictionary(DictionaryConfig(architecture="topk", d_in=width, d_sae=16, k=3, **more)).init_weights(
        2
    )


ROWS = torch.randint(13, (11, 6), generator=torch.Generator().manual_seed(3))
FEATURES = tuple(range(16))


def text(token: int) -> str:
    return ["\n", "<b>", "\x00", "\udc80", "é", '"'][token] if token < 6 else f"w{token}"


def test_pages_equal_a_computation_of_everything_at_once():
    made, coder = model(), dictionary()
    pages = feature_pages(made, coder, ROWS, SITE, FEATURES, options=PageOptions(top=4, bins=10, batch=3))
    every = coder.encode(capture(made, ROWS, [SITE])[SITE]).detach()  # [row, pos, feature]
    assert {p.index for p in pages if p.contexts} and any(p.max_value > 0 for p in pages)
    for page in pages:
        own = every[..., page.index]
        assert page.n == 66 and page.frac_nonzero == pytest.approx(float((own > 0).float().mean()))
        assert page.max_value == pytest.approx(float(own.max()), rel=1e-5)
        best = own.amax(1).sort(descending=True).values[:4]
        assert [max(c.values) for c in page.contexts] == pytest.approx(
            [float(b) for b in best if b > 0], rel=1e-5
        )
        for context in page.contexts:
            assert context.tokens == tuple(ROWS[context.row].tolist())
            assert context.values == pytest.approx(own[context.row].tolist(), rel=1e-5, abs=1e-6)
        positive = own[own > 0]
        assert sum(page.values.heights) == len(positive)
        if len(positive):
            expected = torch.histc(positive, 10, 0, float(own.max()))
            assert (
                torch.tensor(page.values.heights) - expected
            ).abs().sum() <= 2  # a value on a bin's border


def test_neither_the_batch_nor_the_company_of_a_feature_changes_its_page():
    made, coder = model(), dictionary()
    together = feature_pages(made, coder, ROWS, SITE, FEATURES, options=PageOptions(batch=4))
    alone = feature_pages(made, coder, ROWS, SITE, [5], options=PageOptions(batch=4))
    assert together[5] == alone[0]
    other = feature_pages(made, coder, ROWS, SITE, [5], options=PageOptions(batch=11))[0]
    assert [c.row for c in other.contexts] == [c.row for c in alone[0].contexts]


@pytest.mark.parametrize(
    "more", [{"norm": "none"}, {"norm": "layer"}, {"norm": "rms"}, {"norm_offset": True}]
)
def test_logit_effects_are_the_derivative_of_the_logits_where_the_norm_does_not_turn(more):
    """Along a direction at right angles to the stream (and to ones), the norm's division does not change."""
    made = model(tied=False, **more)
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.cat((torch.ones(8, 1), torch.randn(8, 2, generator=generator)), 1)).Q
    x, d = basis[:, 1] * 3, basis[:, 2]
    _, slope = torch.autograd.functional.jvp(lambda v: made.unembed(made.norm(v)), x, d)
    scale = (
        1.0
        if more["norm" if "norm" in more else "norm_offset"] == "none"
        else float(x.square().mean().sqrt())
    )
    effect = logit_effects(made, d[None], SITE)[0]
    torch.testing.assert_close(effect, (slope - slope.mean()) * scale, rtol=1e-4, atol=1e-5)


def test_the_tokens_a_feature_writes_for_are_the_extremes_of_its_effects():
    made, coder = model(), dictionary()
    page = feature_pages(made, coder, ROWS, SITE, [7], options=PageOptions(n_logits=3))[0]
    effects = logit_effects(made, coder.W_dec.detach()[[7]], SITE)[0]
    assert [t for t, _ in page.positive] == effects.topk(3).indices.tolist()
    assert [t for t, _ in page.negative] == (-effects).topk(3).indices.tolist()
    assert all(v > 0 for _, v in page.positive) and all(v < 0 for _, v in page.negative)
    assert sum(page.logits.heights) == 13


def test_a_dictionary_that_does_not_write_to_the_stream_claims_no_logits():
    page = feature_pages(model(), dictionary(32), ROWS, "blocks.0.mlp_post", [0])[0]
    assert page.positive == page.negative == page.logits.heights == ()
    heads = feature_pages(model(), dictionary(), ROWS, "blocks.0.z", [0])[
        0
    ]  # as wide as the stream, but not it
    assert heads.positive == ()


def test_a_transcoder_is_read_where_it_reads_and_judged_where_it_writes():
    made = model()
    coder = dictionary(8, d_out=8, site="blocks.0.mlp_in", site_out="blocks.0.mlp_out")
    page = feature_pages(made, coder, ROWS, "blocks.0.mlp_in", [1], writes="blocks.0.mlp_out")[0]
    assert page.positive


@pytest.mark.parametrize(
    ("rows", "site", "features", "message"),
    [
        (ROWS[:0], SITE, [0], "need token rows"),
        (ROWS[0], SITE, [0], "need token rows"),
        (ROWS, SITE, [16], r"features \[16\] asked for; this dictionary has 0..15"),
        (ROWS, SITE, [], "features none"),
        (ROWS, "blocks.0.mlp_post", [0], "is 32 wide, the dictionary reads 8"),
        (ROWS, "blocks.0.resid_pst", [0], "Did you mean"),
    ],
)
def test_pages_that_cannot_be_made_say_why(rows, site, features, message):
    with pytest.raises(UsageError, match=message):
        feature_pages(model(), dictionary(), rows, site, features)


def test_activations_that_are_not_finite_are_named():
    made = model()
    with torch.no_grad():
        made.embed.weight[int(ROWS[4, 2])] = torch.nan
    with pytest.raises(UsageError, match="'blocks.0.resid_post' are not finite"):
        feature_pages(made, dictionary(), ROWS, SITE, [0])


def written(folder, **more):
    made = model()
    pages = feature_pages(made, dictionary(), ROWS, SITE, range(4))
    write_source(folder, SOURCE, made.config, data="dice", rows=ROWS)
    return pages, write_pages(folder, SOURCE, 0, pages, text, **more)


def test_files_are_the_same_bytes_every_time_and_lie_where_they_are_looked_for(tmp_path):
    explained = {2: Explanation("fires on dragons", "np_max-act", "a-model", (("recall_alt", 0.5),))}
    files = [written(tmp_path / name, explanations=explained)[1] for name in "ab"]
    assert [p.relative_to(tmp_path / "a").as_posix() for p in files[0]] == [
        f"v1/tiny/0-res-16/{kind}/batch-0.jsonl.gz" for kind in ("features", "activations", "explanations")
    ]
    for a, b in zip(*files, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert a.read_bytes()[4:8] == b"\0\0\0\0"  # no time in the header
    beside = files[0][0].parents[1]
    assert json.loads((beside / "source.jsonl").read_text("utf-8"))["num_prompts"] == 11
    assert {p.name for p in beside.glob("*.jsonl")} == {"model.jsonl", "source.jsonl", "sourceset.jsonl"}


def test_what_is_written_is_what_was_measured(tmp_path):
    pages, files = written(tmp_path)
    assert len(files) == 2  # nothing is explained, so there is no file of explanations
    features, activations = (read_batch(path) for path in files)
    assert [row["index"] for row in features] == ["0", "1", "2", "3"]
    for page, row in zip(pages, features, strict=True):
        assert row["hookName"] == "blocks.0.hook_resid_post" and row["layer"] == "0-res-16"
        assert row["maxActApprox"] == page.max_value and row["vector"] == list(page.direction)
        assert row["pos_values"] == [v for _, v in page.positive] and len(row["pos_str"]) == 10
        assert row["freq_hist_data_bar_heights"] == list(page.values.heights)
    contexts = [(str(p.index), c) for p in pages for c in p.contexts]
    assert len(activations) == len(contexts) > 0
    for (index, context), row in zip(contexts, activations, strict=True):
        assert row["index"] == index and row["values"] == list(context.values)
        assert row["tokens"] == [text(t) for t in context.tokens]
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(context.values)
    assert len({row["id"] for row in activations}) == len(activations)


def test_an_explanation_without_a_page_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"features \[9\] are explained but have no page"):
        written(tmp_path, explanations={9: Explanation("?")})


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "x" * 200, "a\0b"])
def test_names_that_would_leave_the_folder_are_refused(name):
    with pytest.raises(UsageError, match="names a folder"):
        Source(name, "0-res", SITE)
    with pytest.raises(UsageError, match="names a folder"):
        Source("tiny", name, SITE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"plain", "cannot be read as gzip"),
        (gzip.compress(b"{}", mtime=0)[:-9], "cannot be read as gzip"),
        (gzip.compress(b"{}", mtime=0), "'modelId' must be str"),
        (gzip.compress(b'{"a": 1, "a": 2}', mtime=0), "'a' appears twice"),
        (gzip.compress(b'{"a": NaN}', mtime=0), "NaN is not JSON"),
        (
            gzip.compress(b'{"modelId":"m","layer":"l","index":"0","tokens":["a"],"values":[]}', mtime=0),
            "differ in number",
        ),
    ],
)
def test_a_damaged_batch_is_refused_with_its_line(tmp_path, data, message):
    path = batch_path(tmp_path, SOURCE, "activations", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_batch(path)


def test_a_file_that_unpacks_to_more_than_a_machine_holds_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("glasshouse.interp.formats.neuronpedia.MAX_UNPACKED", 1000)
    path = batch_path(tmp_path, SOURCE, "features", 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(b" " * 10_000, mtime=0))
    with pytest.raises(CheckpointError, match="unpacks to more than"):
        read_batch(path)
