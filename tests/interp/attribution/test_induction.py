"""Induction heads are named where there are some, and only there."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from glasshouse.base.errors import UsageError
from glasshouse.interp.attribution import attention_pattern_view, induction_scores, path_patching
from glasshouse.interp.attribution.induction import PREFIX, repeated_rows
from glasshouse.interp.metric import Contrast
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.llama2c import load_llama2c
from interp.attribution.byhand import forward, make

SHARED = Path(os.environ.get("GLASSHOUSE_SHARED", Path(__file__).resolve().parents[4] / "shared"))
STORIES = SHARED / "weights" / "stories260K" / "stories260K.bin"


def blank(seed: int) -> GPT:
    """Two layers of attention alone: the MLPs write nothing and are not trained."""
    shape = {"vocab_size": 32, "context": 48, "d_model": 32, "n_layer": 2, "n_head": 2, "position": "learned"}
    model = GPT(GPTConfig.model_validate(shape | {"d_mlp": 1, "mlp": "plain"})).init_weights(seed)
    for block in model.blocks:
        block.mlp.down.weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


def walks(n: int, T: int, drawn: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that go round a cycle of 14 tokens of their own, jumping now and then; and where what follows can
    be known: the token came before. Jumps, so that counting tokens is no way to guess.
    """
    members = torch.stack([torch.randperm(32, generator=drawn)[:14] for _ in range(n)])
    follows = torch.stack([torch.randperm(14, generator=drawn) for _ in range(n)])
    at, each = torch.zeros(n, dtype=torch.long), torch.arange(n)
    seen, tokens, known = torch.zeros(n, 14, dtype=torch.bool), [], []
    for _ in range(T):
        tokens.append(members[each, at])
        jump = torch.rand(n, generator=drawn) < 0.2
        known.append(seen[each, at] & ~jump)
        seen[each, at] |= ~jump
        at = torch.where(jump, torch.randint(14, (n,), generator=drawn), follows[each, at])
    return torch.stack(tokens, 1), torch.stack(known, 1)


@pytest.fixture(scope="module")
def trained() -> GPT:
    """Trained for some seconds on such walks; it never saw the rows that heads are scored on."""
    model, drawn, steps = blank(0), torch.Generator().manual_seed(1), 450
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        tokens, known = walks(32, 47, drawn)
        known = known[:, :-1]
        loss = F.cross_entropy(model(tokens[:, :-1])[known], tokens[:, 1:][known])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10, (steps - step) / 150)
        optimizer.step()
    return model.eval()


def test_a_model_trained_to_continue_walks_has_induction_heads_and_losing_them_hurts(trained: GPT) -> None:
    found = induction_scores(trained, n=64, period=12, seed=5)
    first, second = found.loss
    assert second.high < 0.5 < 3.0 < first.low  # it repeats, and knows nothing else
    named = found.heads()
    assert named and all(h.startswith("a1") for h in named)  # they read what an earlier layer wrote
    assert all(found.prefix[h].low >= PREFIX and found.copying[h].low > 0 for h in named)
    assert found.together is not None
    lost = found.together["+".join(named)]
    assert lost.low > 2.0  # of the 3.5 nats that a random token costs
    assert (
        max(found.ablation[h].high for h in named) < lost.low or len(named) == 1
    )  # one stands in for another
    assert "ablation together" in str(found)


def test_what_it_names_is_what_zeroing_the_output_matrix_by_hand_shows(trained: GPT) -> None:
    """Independent of taps: columns of the weights are zeroed, and the loss on new rows is taken."""
    found = induction_scores(trained, n=64, period=12, seed=5)
    tokens = repeated_rows(range(32), 64, 12, None, seed=9)

    def loss(cut: list[str]) -> float:
        changed = copy.deepcopy(trained)
        with torch.no_grad():
            for name in cut:
                layer, head = (int(x) for x in name[1:].split(".h"))
                changed.blocks[layer].attn.o.weight[:, 16 * head : 16 * head + 16] = 0  # type: ignore
            logits = changed(tokens[:, :-1])[:, 12:]
        return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 13:].flatten()))

    whole = loss([])
    assert loss(found.heads()) > whole + 2.0
    idle = min((h for h in found.ablation.names if h[1] == "0"), key=lambda h: found.ablation[h].value)
    assert loss([idle]) < whole + 1.0  # of layer 0, the head that is no part of it


def test_the_heads_it_names_are_told_by_a_previous_token_head(trained: GPT) -> None:
    """Path patching finds the composition through keys (Elhage et al. 2021), and whose it is."""
    found = induction_scores(trained, n=64, period=12, seed=5)
    tokens = repeated_rows(range(32), 64, 12, None, seed=11)
    other = repeated_rows(range(32), 64, 12, None, seed=12)
    corrupt = torch.cat([other[:, :12], tokens[:, 12:]], 1)  # the second half repeats nothing

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        said = logits[:, 12:-1].log_softmax(-1)
        return said.gather(-1, tokens[rows][:, 13:, None])[..., 0].mean(1)

    data, senders = Contrast(tokens, corrupt, metric), ["a0.h0", "a0.h1"]
    keys = path_patching(trained, data, [f"{h}<k>" for h in found.heads()], senders)
    before = attention_pattern_view(trained, tokens[0])
    teller, score = next(iter(keys.top(1).items()))
    assert score.low > 0.3  # of all that the first half's tokens do
    share = {h: float(before[h].diagonal(-1).mean()) for h in senders}
    assert share[teller] > 0.5 and share[teller] == max(share.values())


def test_an_untrained_model_has_no_induction_heads() -> None:
    found = induction_scores(blank(3), n=32, period=10)
    assert found.heads() == [] and "no induction heads" in str(found)
    assert found.loss[0].low - found.loss[1].high < 0.1
    assert all(abs(s.value) < 0.05 for s in found.ablation.scores().values())


@pytest.mark.parametrize("shape", ["grouped, qk-norm", "post-norm", "gpt2"])
def test_scores_are_those_of_the_equations(shape: str) -> None:
    model, period = make(shape), 6
    found = induction_scores(model, n=3, period=period, seed=2)
    tokens = repeated_rows(range(24), 3, period, None, 2)
    for name, layer, h in (("a0.h1", 0, 1), ("a1.h3", 1, 3)):
        at = found.prefix.names.index(name)
        for i in range(3):
            run = forward(model, tokens[i])
            q, k = run[("q", layer, h)], run[("k", layer, h)]
            share = []
            for t in range(period, 2 * period - 1):
                pattern = (k[: t + 1] @ q[t] / model.config.head_width**0.5).softmax(0)
                share.append(float(pattern[t - period + 1]))
            assert float(found.prefix.per_row[at, i]) == pytest.approx(sum(share) / len(share), abs=1e-5)


def test_copying_is_the_direct_effect_on_the_logit_less_its_mean() -> None:
    """Without norms the direct path is the output matrix and the head, and nothing else."""
    model, period = make("value residual, no norm"), 5
    found = induction_scores(model, n=2, period=period, seed=2)
    tokens = repeated_rows(range(24), 2, period, None, 2)
    W = model.head_weight.detach()
    for i in range(2):
        run = forward(model, tokens[i])
        for h in range(4):
            o = model.blocks[1].attn.o.weight.detach()[:, 4 * h : 4 * h + 4]  # type: ignore[union-attr, index]
            logits = run[("z", 1, h)] @ o.T @ W.T  # type: ignore[union-attr]
            each = []
            for t in range(period, 2 * period - 1):
                each.append(float(logits[t, tokens[i, t + 1 - period]] - logits[t].mean()))
            at = found.copying.names.index(f"a1.h{h}")
            assert float(found.copying.per_row[at, i]) == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_rows_repeat_and_nothing_in_a_period_does() -> None:
    rows = repeated_rows([t for t in range(24) if t != 1], 8, 7, 1, 0)
    assert rows.shape == (8, 15) and bool((rows[:, 0] == 1).all())
    assert torch.equal(rows[:, 1:8], rows[:, 8:]) and 1 not in rows[:, 1:]
    assert all(len(set(row.tolist())) == 7 for row in rows[:, 1:8])


def test_a_context_too_short_for_repetition_is_refused() -> None:
    with pytest.raises(UsageError, match="period of 4 to 8"):
        induction_scores(make("pre-norm"), period=9)
    with pytest.raises(UsageError, match="two or more rows"):
        induction_scores(make("pre-norm"), n=1)


@pytest.mark.skipif(not STORIES.exists(), reason="the small public model is not on this machine")
@pytest.mark.parametrize("pool", [None, range(259, 512)], ids=["all", "pieces of words"])
def test_a_small_public_model_without_induction_is_said_to_have_none(pool: range | None) -> None:
    """260k parameters that tell stories: repetition gains it a twentieth of its loss, by no such head."""
    found = induction_scores(load_llama2c(STORIES), n=32, period=24, first=1, pool=pool)
    first, second = found.loss
    assert second.value > 0.9 * first.value  # what a model that does induction would lose is nearly all
    assert found.heads() == []
    best = next(iter(found.prefix.top(1)))
    assert found.prefix[best].high < PREFIX and found.ablation[best].high < 0.2


def test_scores_show_themselves() -> None:
    html = induction_scores(make("pre-norm"), n=4)._repr_html_()
    assert "<svg" in html and "n = 4 rows" in html and "said twice" in html
