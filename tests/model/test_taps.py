from __future__ import annotations

import pytest
import torch

from glasshouse.base.errors import UsageError
from glasshouse.model import Taps

TOKENS = torch.randint(0, 53, (2, 12), generator=torch.Generator().manual_seed(6))


def test_a_pattern_that_matches_no_site_is_refused(tiny):
    for taps in (Taps(read=["blocks.7.resid_post"]), Taps(edit={"blocks.*.rsid_post": torch.zeros_like})):
        with pytest.raises(UsageError, match=r"no site .*model\.sites\(\) lists all"):
            tiny()(TOKENS, taps)


def test_a_site_never_reached_raises_on_the_way_out(tiny):
    with pytest.raises(LookupError, match="never reached"), Taps(read=["blocks.0.resid_post"]):
        tiny()(TOKENS)  # the taps were forgotten
    with pytest.raises(LookupError, match=r"blocks\.2\.q"):
        with Taps(read=["embed", "blocks.2.q"]) as taps:
            taps.check(tiny().sites())
            taps("embed", torch.zeros(1))


def test_an_error_inside_is_not_hidden_by_sites_not_reached():
    with pytest.raises(ZeroDivisionError), Taps(read=["embed"]):
        raise ZeroDivisionError


def test_what_was_not_read_cannot_be_taken(tiny):
    with Taps(read=["blocks.0.resid_post"]) as taps:
        tiny()(TOKENS, taps)
    with pytest.raises(UsageError, match="was not read"):
        taps["blocks.1.resid_post"]


@torch.no_grad()
def test_every_site_can_be_edited_and_the_edit_reaches_the_logits(any_model):
    plain = any_model(TOKENS)

    def tilt(x: torch.Tensor) -> torch.Tensor:
        return x * torch.linspace(0.3, 1.5, x.shape[-1])  # no norm can undo it, as it could a scale or shift

    for site in any_model.sites():
        with Taps(edit={site: tilt}) as taps:
            edited = any_model(TOKENS, taps)
        assert not torch.allclose(edited, plain, atol=1e-3), site


@torch.no_grad()
def test_an_identity_edit_changes_nothing(any_model):
    cheap = {s: lambda x: x for s in any_model.sites() if not s.endswith("pattern")}
    assert torch.equal(any_model(TOKENS, Taps(edit=cheap)), any_model(TOKENS))


@torch.no_grad()
def test_patching_a_whole_layer_transplants_the_rest_of_the_computation(any_model):
    donor = torch.randint(0, 53, (2, 12), generator=torch.Generator().manual_seed(8))
    with Taps(read=["blocks.1.resid_post"]) as source:
        expected = any_model(donor, source)
    patched = any_model(TOKENS, Taps(edit={"blocks.1.resid_post": lambda _: source["blocks.1.resid_post"]}))
    assert torch.equal(patched, expected)


@torch.no_grad()
def test_a_value_is_read_after_its_edit(tiny):
    with Taps(read=["blocks.0.mlp_out"], edit={"blocks.*.mlp_out": torch.zeros_like}) as taps:
        tiny()(TOKENS, taps)
    assert (taps["blocks.0.mlp_out"] == 0).all()


def test_an_edit_that_changes_the_shape_is_refused(tiny):
    with pytest.raises(UsageError, match=r"edit of 'blocks\.0\.resid_post' made \[16\] of \[2, 12, 16\]"):
        tiny()(TOKENS, Taps(edit={"blocks.0.resid_post": lambda x: x[0, 0]}))


def test_gradient_reaches_a_captured_site(any_model):
    with Taps(read=["blocks.1.resid_post"]) as taps:
        logits = any_model(TOKENS, taps)
    (gradient,) = torch.autograd.grad(logits[:, -1, 3].sum(), taps["blocks.1.resid_post"])
    assert gradient.shape == (2, 12, 16)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():  # a step along the gradient changes the logit as much as the gradient says
        up, down = (
            any_model(TOKENS, Taps(edit={"blocks.1.resid_post": lambda x, s=sign: x + s * step}))[
                :, -1, 3
            ].sum()
            for sign in (1, -1)
        )
    assert torch.isclose(up - down, 2 * 1e-2 * gradient.norm(), rtol=0.05)


@torch.no_grad()
def test_stopping_early_reads_the_same_and_computes_no_more(tiny):
    model = tiny()
    with Taps(read=["*"]) as whole:
        model(TOKENS, whole)
    ran: list[int] = []
    handle = model.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    with Taps(read=["blocks.0.z", "blocks.1.resid_post"], stop_early=True) as taps:
        out = model(TOKENS, taps)
    handle.remove()
    assert not ran
    assert torch.allclose(taps["blocks.1.resid_post"], whole["blocks.1.resid_post"], atol=1e-5)
    assert out.shape == (2, 12, 16), "the stream, never something that looks like logits"


@torch.no_grad()
def test_a_second_pass_never_answers_with_the_first(tiny):
    model, other = tiny(), torch.flip(TOKENS, dims=(1,))
    with Taps(read=["blocks.2.resid_mid"], stop_early=True) as taps:
        model(TOKENS, taps)
        first = taps["blocks.2.resid_mid"]
        model(other, taps)
    assert not torch.equal(taps["blocks.2.resid_mid"], first)
    with pytest.raises(LookupError, match="never reached"):
        with Taps(read=["blocks.2.resid_mid"]) as taps:
            model(TOKENS, taps)
            taps.check(model.sites())  # a second pass begins, and reaches nothing


@torch.no_grad()
def test_one_taps_serves_models_of_different_depth(tiny):
    with Taps(read=["blocks.*.resid_post"]) as taps:
        tiny(n_layer=2)(TOKENS, taps)
        assert len(taps.acts) == 2
        tiny(n_layer=4)(TOKENS, taps)
    assert len(taps.acts) == 4


@torch.no_grad()
def test_taps_work_with_a_cache(tiny):
    from glasshouse.model import KVCache

    model = tiny("grouped")
    with Taps(read=["blocks.*.resid_post", "blocks.1.pattern"]) as whole:
        model(TOKENS, whole)
    cache = KVCache(model.config, 2, 12, torch.float32, torch.device("cpu"))
    model(TOKENS[:, :8], cache=cache)
    with Taps(read=["blocks.*.resid_post", "blocks.1.pattern"]) as rest:
        model(TOKENS[:, 8:], rest, cache=cache)
    for i in range(3):
        site = f"blocks.{i}.resid_post"
        assert torch.allclose(rest[site], whole[site][:, 8:], atol=1e-4)
    assert torch.allclose(rest["blocks.1.pattern"], whole["blocks.1.pattern"][:, :, 8:], atol=1e-4)


@torch.no_grad()
def test_blocks_compiled_as_one_graph_are_read_and_edited_like_eager_ones(tiny):
    """With the pure-Python backend: what is tested is the capture, and no compiler is needed."""
    eager, compiled = tiny(n_layer=2), tiny(n_layer=2)
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(compiled(TOKENS), eager(TOKENS))  # first unwatched: later hooks would silently not run
    asked = {"read": ["blocks.1.resid_post"], "edit": {"blocks.0.mlp_out": torch.zeros_like}}
    with Taps(**asked) as expected, Taps(**asked) as taps:
        assert torch.equal(compiled(TOKENS, taps), eager(TOKENS, expected))
    assert torch.equal(taps["blocks.1.resid_post"], expected["blocks.1.resid_post"])
