"""Dictionaries survive other tools' files; a file that is damaged, foreign or contradictory is refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.formats import (
    check_fits,
    read_dictionary_learning,
    read_saelens,
    read_sparsify,
    read_sparsity,
    write_saelens,
    write_sparsify,
)
from glasshouse.interp.formats.fit import site_width
from glasshouse.interp.formats.hooks import hook_name, layer_of, site_name
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.digest import weights_digest
from parity.format_cases import FIXTURES

SITE = "blocks.1.resid_post"


def random_dictionary(config: DictionaryConfig, seed: int = 0, scale: float = 1.0) -> Dictionary:
    dictionary, generator = Dictionary(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(dictionary.named_parameters()):
            x = torch.randn(p.shape, generator=generator)
            p.copy_(x.abs() if name == "threshold" else x)
        dictionary.scale_in.fill_(scale)
        dictionary.scale_out.fill_(scale)
        if hasattr(dictionary, "topk_threshold"):
            dictionary.topk_threshold.fill_(0.5)
    return dictionary


def topk(**more: Any) -> Dictionary:
    return random_dictionary(DictionaryConfig(architecture="topk", d_in=4, d_sae=8, k=2, site=SITE, **more))


def same(a: Dictionary, b: Dictionary) -> bool:
    """Whether two dictionaries are the same bit by bit."""
    x, y = a.weights(), b.weights()
    return a.config == b.config and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@st.composite
def configs(draw: st.DrawFn) -> DictionaryConfig:
    d_in, d_sae = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    architecture = draw(st.sampled_from(["l1", "gated", "topk", "batchtopk", "matryoshka", "jumprelu"]))
    fields: dict[str, Any] = {"site": draw(st.sampled_from(["", SITE, "embed", "layers.3.mlp"]))}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        fields["k"] = draw(st.integers(1, d_sae))
    if architecture == "matryoshka":
        fields["prefixes"] = (*sorted(draw(st.sets(st.integers(1, d_sae - 1)))), d_sae)
    if architecture in ("l1", "jumprelu") and draw(st.booleans()):
        fields |= {"d_out": draw(st.integers(1, 5)), "skip_connection": draw(st.booleans())}
        fields["site_out"] = draw(st.none() | st.just("blocks.1.mlp_out"))
    else:
        fields["apply_b_dec_to_input"] = draw(st.booleans())
    digest = draw(st.sampled_from(["", "ab" * 32]))
    return DictionaryConfig(architecture=architecture, d_in=d_in, d_sae=d_sae, model_digest=digest, **fields)


@settings(max_examples=25)
@given(configs(), st.integers(0, 99), st.sampled_from([1.0, 0.3]))
def test_any_dictionary_comes_back_from_a_saelens_folder(tmp_path_factory, config, seed, scale):
    folder = tmp_path_factory.mktemp("sae") / "d"
    dictionary = random_dictionary(config, seed, scale)
    write_saelens(folder, dictionary, training={"steps": 10})
    assert same(read_saelens(folder), dictionary.folded())


@given(
    st.integers(1, 5), st.integers(2, 9), st.sampled_from(["sae", "transcoder", "skip"]), st.integers(0, 99)
)
def test_any_topk_dictionary_comes_back_from_a_sparsify_folder(tmp_path_factory, d_in, d_sae, kind, seed):
    folder = tmp_path_factory.mktemp("sparsify") / "d"
    fields = {} if kind == "sae" else {"d_out": d_in, "skip_connection": kind == "skip"}
    config = DictionaryConfig(architecture="topk", d_in=d_in, d_sae=d_sae, k=2, site=SITE, **fields)
    dictionary = random_dictionary(config, seed, 0.7)
    write_sparsify(folder, dictionary)
    assert same(read_sparsify(folder), dictionary.folded())


def test_sparsity_is_kept_beside_the_weights(tmp_path):
    dictionary, sparsity = topk(), torch.linspace(-9, 0, 8)
    write_saelens(tmp_path / "a", dictionary, sparsity=sparsity)
    write_saelens(tmp_path / "b", dictionary)
    assert torch.equal(read_sparsity(tmp_path / "a", dictionary), sparsity)
    assert read_sparsity(tmp_path / "b", dictionary) is None
    with pytest.raises(UsageError, match=r"sparsity must be \[8\], got \[7\]"):
        write_saelens(tmp_path / "c", dictionary, sparsity=sparsity[:7])
    assert not (tmp_path / "c").exists()


def test_an_existing_folder_is_never_overwritten(tmp_path):
    write_saelens(tmp_path / "d", topk())
    with pytest.raises(UsageError, match="exists already"):
        write_saelens(tmp_path / "d", topk())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "topk", "k": 2, "d_out": 4}, "no topk transcoder.*write_sparsify can hold"),
        ({"architecture": "gated", "d_out": 4}, "no gated transcoder"),
    ],
)
def test_what_saelens_cannot_hold_is_refused_and_nothing_written(tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        write_saelens(tmp_path / "d", Dictionary(DictionaryConfig(d_in=4, d_sae=8, **fields)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "l1"}, "topk only, not l1"),
        ({"architecture": "topk", "k": 2, "d_out": 5}, "from 4 to 5"),
        ({"architecture": "topk", "k": 2, "apply_b_dec_to_input": False}, "subtract b_dec"),
    ],
)
def test_what_sparsify_cannot_hold_is_refused(tmp_path, fields, message):
    with pytest.raises(UsageError, match=message):
        write_sparsify(tmp_path / "d", Dictionary(DictionaryConfig(d_in=4, d_sae=8, **fields)))


# What stands under metadata.glasshouse of the dictionary that `topk` makes.
OWN = {
    "sae_lens_version": "6.54.12",
    "glasshouse": {"version": 1, "config": topk().config.model_dump(mode="json")},
}

# -- damage --------------------------------------------------------------------------------------------------


def change_cfg(folder: Path, **more: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
    for key, value in more.items():
        cfg.pop(key, None) if value is ... else cfg.update({key: value})
    (folder / "cfg.json").write_text(json.dumps(cfg), "utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = next(folder.glob("sae*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_header(folder: Path, change: Callable[[str], str]) -> None:
    path = next(folder.glob("sae*.safetensors"))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["W_dec"][3, 1] = math.nan


BOTH: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: change_weights(f, nan), "'W_dec' holds NaN"),
    (lambda f: change_weights(f, lambda t: t.pop("b_dec")), "1 tensors missing, first 'b_dec'"),
    (lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(1))), "first 'extra'"),
    (
        lambda f: change_weights(f, lambda t: t.update(W_dec=torch.ones(8, 5))),
        r"shape \[8, 5\], not \[8, 4\]",
    ),
    (lambda f: change_weights(f, lambda t: t.update(b_dec=torch.ones(4).double())), "stored as F64"),
    (lambda f: change_weights(f, lambda t: t.update(b_dec=torch.ones(4).int())), "stored as I32"),
    (lambda f: change_header(f, lambda t: t.replace('"b_dec"', '"W_dec"')), "'W_dec' appears twice"),
    (lambda f: change_header(f, lambda t: t.replace("[8,4]", "[0,1099511627776]")), "claims shape"),
    (lambda f: change_header(f, lambda t: t.replace("[8,4]", "[-8,-4]")), "malformed"),
    (lambda f: change_cfg(f, d_in=5), "contradicts itself|shape|not the weights"),
    (lambda f: change_cfg(f, d_in=2**40), "'d_in' must be a whole number from 1"),
    (lambda f: change_cfg(f, d_in=True), "'d_in' must be a whole number"),
    (lambda f: change_cfg(f, d_in=...), "'d_in' must be a whole number.*None"),
    (lambda f: change_cfg(f, k=3), "contradicts itself: k is 3"),
    (lambda f: change_cfg(f, k=0), "'k' must be a whole number"),
    (lambda f: (f / "cfg.json").unlink(), "cannot be read"),
    (lambda f: next(f.glob("sae*.safetensors")).unlink(), "cannot be read"),
    (lambda f: (f / "cfg.json").write_text('{"d_in": 4, "d_in": 4}'), "'d_in' appears twice"),
    (lambda f: (f / "cfg.json").write_text('{"d_in": NaN}'), "NaN is not JSON"),
    (lambda f: (f / "cfg.json").write_text("[1]"), "expected a JSON object"),
    (lambda f: (f / "cfg.json").write_text("{" * 100_000), "not valid"),
]


@pytest.mark.parametrize(("spoil", "message"), BOTH)
@pytest.mark.parametrize("tool", ["saelens", "sparsify"])
def test_a_damaged_folder_is_refused_and_the_place_named(tmp_path, tool, spoil, message):
    folder = tmp_path / "d"
    (write_saelens if tool == "saelens" else write_sparsify)(folder, topk())
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        (read_saelens if tool == "saelens" else read_sparsify)(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("tool", ["saelens", "sparsify"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, tool):
    folder = tmp_path / "d"
    (write_saelens if tool == "saelens" else write_sparsify)(folder, topk())
    path = next(folder.glob("sae*.safetensors"))
    whole = path.read_bytes()
    for kept in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match="truncated"):
            (read_saelens if tool == "saelens" else read_sparsify)(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not read; known: standard"),
        ({"architecture": "top_k"}, "Did you mean 'topk'"),
        ({"architecture": "batchtopk"}, "training checkpoint: save it with save_inference_model"),
        ({"architecture": ["topk"]}, "is not read"),
        ({"architecture": "jumprelu", "k": ...}, "contradicts itself: 'jumprelu' here, 'topk'"),
        ({"normalize_activations": "layer_norm"}, "changes each activation by itself"),
        ({"normalize_activations": "expected_average_only_in"}, "does not say by what.*give scale="),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'"),
        ({"apply_b_dec_to_input": "yes"}, "must be true or false"),
        ({"metadata": 3}, "'metadata' must be an object"),
        ({"metadata": {"hook_name": 3}}, "'hook_name' must be text"),
        (
            {"metadata": {**OWN, "hook_name": "blocks.0.hook_resid_pre"}},
            "hook_name is 'blocks.0.resid_pre' here",
        ),
        ({"metadata": {"glasshouse": {"version": 99}}}, "newer version"),
        (
            {"metadata": {"glasshouse": {"version": 1, "config": {"architecture": "topk"}}}},
            "missing key 'd_in'",
        ),
    ],
)
def test_a_saelens_config_we_cannot_honour_is_refused(tmp_path, change, message):
    write_saelens(tmp_path / "d", topk())
    change_cfg(tmp_path / "d", **change)
    with pytest.raises(CheckpointError, match=message):
        read_saelens(tmp_path / "d")


def test_a_scale_may_be_given_where_the_file_needs_one_and_only_there(tmp_path):
    write_saelens(tmp_path / "d", topk())
    with pytest.raises(UsageError, match="a scale does not belong"):
        read_saelens(tmp_path / "d", scale=2.0)
    plain = read_saelens(tmp_path / "d")
    change_cfg(tmp_path / "d", normalize_activations="expected_average_only_in")
    x = torch.randn(5, 4)
    scaled = read_saelens(tmp_path / "d", scale=2.0)
    assert torch.equal(scaled.encode(x), plain.encode(2 * x))
    torch.testing.assert_close(scaled(x), plain(2 * x) / 2)
    for wrong in (0.0, math.inf, math.nan, -1.0):
        with pytest.raises(CheckpointError, match="does not say by what"):
            read_saelens(tmp_path / "d", scale=wrong)


def test_a_thresholded_dictionary_whose_thresholds_were_changed_one_by_one_is_jumprelu(tmp_path):
    config = DictionaryConfig(architecture="batchtopk", d_in=4, d_sae=8, k=2)
    write_saelens(tmp_path / "d", random_dictionary(config))
    assert read_saelens(tmp_path / "d").config == config
    change_weights(tmp_path / "d", lambda t: t["threshold"].__setitem__(2, 9.0))
    back = read_saelens(tmp_path / "d")
    assert back.config.architecture == "jumprelu" and back.threshold[2] == 9.0


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "ae.pt").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(CheckpointError, match=r"weights_only=True.*save_file"):
            read_dictionary_learning(path)


def test_a_dictionary_learning_file_that_could_be_two_classes_asks_which():
    path = FIXTURES / "dictlearn" / "AutoEncoderTopK" / "ae.safetensors"
    assert read_dictionary_learning(path).config.architecture == "topk"  # config.json beside it says so
    assert read_dictionary_learning(path, dict_class="BatchTopKSAE").config.architecture == "batchtopk"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "could be AutoEncoderTopK or BatchTopKSAE"),
        (lambda t: t.pop("k"), "does not say its class"),
        (lambda t: t.pop("encoder.weight"), "does not say its class"),
    ],
)
def test_a_dictionary_learning_file_that_does_not_say_what_it_is_is_refused(tmp_path, change, message):
    tensors = load_file(FIXTURES / "dictlearn" / "AutoEncoderTopK" / "ae.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_dictionary_learning(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.weight", torch.ones(3), "absurd shape"),
        ("encoder.weight", torch.ones(0, 8), "absurd shape"),
        ("k", torch.ones(2), r"'k' has shape \[2\], not \[\]"),
        ("k", torch.tensor(0), "'k' should be greater"),
        ("b_dec", torch.full((8,), math.inf), "NaN or infinite"),
        ("b_dec", torch.ones(8, dtype=torch.float64), "stored as F64"),
    ],
)
def test_a_damaged_dictionary_learning_file_is_refused(tmp_path, name, tensor, message):
    tensors = load_file(FIXTURES / "dictlearn" / "AutoEncoderTopK" / "ae.safetensors")
    save_file(tensors | {name: tensor}, tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_dictionary_learning(tmp_path, dict_class="AutoEncoderTopK")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("AutoEncoderTop", "Did you mean 'AutoEncoderTopK'"), ("GatedAutoEncoder", "missing")],
)
def test_a_class_that_does_not_fit_the_tensors_is_refused(kind, message):
    with pytest.raises(CheckpointError, match=message):
        read_dictionary_learning(FIXTURES / "dictlearn" / "AutoEncoderTopK", dict_class=kind)


# -- whether it belongs to a model ---------------------------------------------------------------------------


def model(**more: Any) -> GPT:
    shape = {"vocab_size": 11, "context": 8, "d_model": 4, "n_layer": 2, "n_head": 2, "n_kv_head": 1, **more}
    return GPT(GPTConfig(**shape)).init_weights(0)


def test_a_dictionary_fits_the_model_it_was_trained_on():
    own = model()
    assert check_fits(topk(model_digest=weights_digest(own)), own, site=SITE) is None
    assert check_fits(topk(), own) is None, "a foreign file says nothing: its width is what can be checked"
    with pytest.raises(CheckpointError, match="trained on model"):
        check_fits(topk(model_digest=weights_digest(own)), GPT(own.config).init_weights(1), site=SITE)


@pytest.mark.parametrize(
    ("fields", "site", "message"),
    [
        ({"model_digest": "ab" * 32}, None, "trained on model abababababab, this is"),
        ({}, "blocks.0.resid_post", "site 'blocks.1.resid_post', not on 'blocks.0.resid_post'"),
        ({"site": "blocks.1.resid_pst"}, None, "does not have. Did you mean 'blocks.1.resid_post'"),
        ({"site": "blocks.7.resid_post"}, None, "which this model does not have"),
        ({"site": "blocks.0.mlp_post"}, None, "reads 4 numbers; 'blocks.0.mlp_post' of this model has 16"),
        (
            {"site": "blocks.0.mlp_in", "d_out": 3, "site_out": "blocks.0.mlp_out"},
            None,
            "writes 3 numbers; 'blocks.0.mlp_out' of this model has 4",
        ),
    ],
)
def test_a_dictionary_of_another_model_site_or_width_is_refused(tmp_path, fields, site, message):
    config = DictionaryConfig(**{"architecture": "l1", "d_in": 4, "d_sae": 8, "site": SITE, **fields})
    write_saelens(tmp_path / "d", random_dictionary(config))
    with pytest.raises(CheckpointError, match=message):
        read_saelens(tmp_path / "d", model=model(), site=site)


def test_a_foreign_file_takes_the_site_it_is_given_and_is_held_to_it():
    folder = FIXTURES / "sparsify" / "topk"
    assert read_sparsify(folder, site="blocks.0.z").config.site == "blocks.0.z"
    with pytest.raises(CheckpointError, match="reads 8 numbers; 'blocks.0.z' of this model has 4"):
        read_sparsify(folder, model=model(), site="blocks.0.z")
    with pytest.raises(CheckpointError, match="reads 8 numbers; 'embed' of this model has 4"):
        read_dictionary_learning(FIXTURES / "dictlearn" / "AutoEncoder", model=model(), site="embed")
    with pytest.raises(CheckpointError, match="'blocks.1.resid_post', not on 'embed'"):
        read_saelens(FIXTURES / "saelens" / "topk", site="embed")


@pytest.mark.parametrize("more", [{}, {"mlp": "gated", "d_mlp": 6, "d_head": 6, "n_kv_head": 2}])
def test_the_width_of_every_site_is_what_is_read_there(more):
    made = model(**more)
    sites = [s for s in made.sites() if not s.endswith("pattern")]
    with Taps(read=sites) as taps:
        made(torch.zeros(1, 3, dtype=torch.int64), taps)
    for site in sites:
        x = taps[site]
        assert site_width(made.config, site) == (x.shape[-1] if x.ndim == 3 else x.shape[1] * x.shape[3])
    assert site_width(made.config, "blocks.0.pattern") is None


def test_a_site_whose_name_in_transformer_lens_means_the_same_carries_it_and_others_their_own():
    sites = [*model().sites(), "blocks.1.mlp_in"]
    names = [hook_name(site) for site in sites]
    assert len(set(names)) == len(names) and [site_name(name) for name in names] == sites
    unnamed = {site.rpartition(".")[2] for site, name in zip(sites, names, strict=True) if site == name}
    assert unnamed == {"q", "k", "mlp_in", "embed"}  # theirs depend on the model, or are other tensors
    for wrong in ("blocks.0.hook_nothing", "hook_resid_post", "blocks.1.hook_embed", "blocks.01.z", ""):
        assert site_name(wrong) is None
    assert (layer_of("blocks.11.z"), layer_of("embed"), layer_of("blocks.x.z")) == (11, None, None)


def test_a_name_that_means_our_site_in_some_models_only_is_understood_with_the_model():
    rotary, learned = model().config, model(position="learned").config
    assert site_name("hook_embed") is None is site_name("hook_embed", learned)
    assert site_name("hook_embed", rotary) == "embed"
    assert site_name("blocks.0.attn.hook_q", learned) == "blocks.0.q"
    assert site_name("blocks.0.attn.hook_q", rotary) is None  # theirs is before the rotation
    assert site_name("blocks.0.attn.hook_rot_q", rotary) == "blocks.0.q"
