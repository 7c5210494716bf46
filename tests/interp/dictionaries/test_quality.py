"""The quality table on planted truth: where the answer is known before anything is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.dictionaries.concepts import (
    Concepts,
    absorption,
    absorption_by_concept,
    first_letters,
    sparse_probing,
    targeted_perturbation,
    tasks,
    token_kinds,
)
from glasshouse.interp.dictionaries.quality import quality, quality_html
from glasshouse.interp.dictionaries.splice import spliced
from glasshouse.interp.dictionaries.stability import assign, seed_stability
from glasshouse.interp.dictionaries.stream import capture
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.digest import weights_digest

V, POS, D = 12, 16, 16


def copier() -> GPT:
    """A model that gives its own token the largest logit: on text that repeats tokens it is right."""
    model = GPT(GPTConfig(vocab_size=V, context=POS, d_model=D, n_layer=2, n_head=2)).init_weights(0)
    with torch.no_grad():
        rows = torch.randn(V, D, generator=seeded(1))
        model.embed.weight.copy_(torch.nn.functional.normalize(rows, dim=1))
        for block in model.blocks:
            block.mlp.up.weight.copy_(0.2 * torch.randn(block.mlp.up.weight.shape, generator=seeded(2)))
            block.mlp.down.weight.copy_(0.05 * torch.randn(block.mlp.down.weight.shape, generator=seeded(3)))
    return model.eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def repeats(n: int = 40) -> Tensor:
    """Rows in which most tokens come several times in a row."""
    return torch.randint(0, V, (n, POS // 4), generator=seeded(4)).repeat_interleave(4, dim=1)


def identity(site: str = "blocks.1.resid_post", sign: float = 1.0, d: int = D, **changes: Any) -> Dictionary:
    """x = relu(x) - relu(-x): a dictionary that loses nothing (sign 0: one that keeps nothing)."""
    made = Dictionary(DictionaryConfig(architecture="l1", d_in=d, d_sae=2 * d, site=site, **changes))
    eye = torch.eye(d)
    with torch.no_grad():
        made.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        made.W_dec.copy_(sign * torch.cat([eye, -eye]))
    return made


def test_a_dictionary_that_loses_nothing_recovers_all_and_one_that_keeps_nothing_none() -> None:
    whole = quality(identity(), copier(), repeats())
    for ablation in ("zero", "mean"):
        score = whole[f"loss recovered, {ablation}"]
        assert score.value == pytest.approx(1.0, abs=1e-4) and score.high - score.low < 1e-3 and score.n == 40
    assert whole["variance explained"].value == pytest.approx(1.0, abs=1e-6)
    x = capture(copier(), repeats(), ["blocks.1.resid_post"])["blocks.1.resid_post"].flatten(0, 1)
    silent = int((x <= 0).all(0).sum() + (x >= 0).all(0).sum())
    assert whole["L0"].value == pytest.approx(D) and whole["dead"].value == silent / (2 * D)
    nothing = quality(identity(sign=0.0), copier(), repeats())
    assert nothing["loss recovered, zero"].value == pytest.approx(0.0, abs=1e-4)
    assert nothing["variance explained"].high < 0.01


def test_a_dictionary_that_always_says_the_mean_scores_zero_against_mean_ablation() -> None:
    model, text = copier(), repeats()
    mean = capture(model, text, ["blocks.1.resid_post"])["blocks.1.resid_post"].flatten(0, 1).mean(0)
    constant = identity(sign=0.0, apply_b_dec_to_input=False)
    with torch.no_grad():
        constant.b_dec.copy_(mean)
    found = quality(constant, model, text)
    assert found["loss recovered, mean"].value == pytest.approx(0.0, abs=1e-4)
    assert found["variance explained"].value == pytest.approx(0.0, abs=1e-5)


def test_the_splice_gives_the_cross_entropy_of_the_model_written_by_hand() -> None:
    model, text = copier(), repeats(3)
    noisy = identity()
    with torch.no_grad():
        noisy.W_dec.add_(0.2 * torch.randn(noisy.W_dec.shape, generator=seeded(6)))
        x = model.embed(text)
        for block in model.blocks:
            x = model.run_block(block, x, model.where(POS)[0], None, None)
        logits = model.unembed(model.norm(noisy(x)))
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    found = spliced(model, text, noisy)
    assert found.nats["reconstruction"].sum() / found.targets.sum() == pytest.approx(
        float(expected), rel=1e-5
    )


def test_positions_that_do_not_count_keep_the_models_own_activation() -> None:
    model, text = copier(), repeats(4)
    valid = torch.zeros_like(text, dtype=torch.bool)
    valid[:, :8] = True
    found = spliced(model, text, identity(sign=0.0), valid=valid)
    assert found.positions.tolist() == [8.0] * 4 and found.targets.tolist() == [7.0] * 4
    longer = spliced(model, text[:, :8], identity(sign=0.0))
    assert np.allclose(found.nats["reconstruction"], longer.nats["reconstruction"], rtol=1e-5)


def test_a_transcoder_that_is_the_mlp_recovers_all() -> None:
    model, text = copier(), repeats()
    mlp = model.blocks[1].mlp
    width = mlp.up.weight.shape[0]
    # relu2 is no ReLU, so the planted transcoder is exact only where the model's MLP is made one.
    relu = GPT(model.config.model_copy(update={"activation": "relu"}))
    relu.load_state_dict(model.state_dict())
    planted = Dictionary(
        DictionaryConfig(
            architecture="l1",
            d_in=D,
            d_sae=width,
            d_out=D,
            site="blocks.1.mlp_in",
            site_out="blocks.1.mlp_out",
        )
    )
    with torch.no_grad():
        planted.W_enc.copy_(mlp.up.weight.T)
        planted.W_dec.copy_(mlp.down.weight.T)
    found = spliced(relu, text, planted)
    assert np.allclose(found.nats["reconstruction"], found.nats["model"], atol=1e-3)
    assert found.missed.sum() < 1e-6 * found.spread.sum()


# -- concepts ------------------------------------------------------------------------------------------------


def spelled(n: int = 1500, absorb: bool = False) -> tuple[Concepts, Dictionary]:
    """Words of five letters' groups: x = letter direction + word direction; features for both, planted.

    With ``absorb`` the feature of letter 0 is silent on its words 0 and 5, whose own features have its
    direction inside: the hand-built case of Chanin et al., figure 1.
    """
    letters, words = 5, 60
    basis = torch.linalg.qr(torch.randn(80, 80, generator=seeded(7))).Q
    word = torch.randint(0, words, (n,), generator=seeded(8))
    letter = word % letters
    x = basis[letter] + 0.3 * basis[letters + word] + 0.01 * torch.randn(n, 80, generator=seeded(9))
    rows = torch.cat([basis[:letters], 0.3 * basis[letters : letters + words]])
    reads = torch.cat([basis[:letters], basis[letters : letters + words] / 0.3])
    absorbed = list(range(0, words, letters * 2)) if absorb else []  # every second word of letter 0
    for w in absorbed:
        rows[letters + w] += basis[0]
        reads[0] -= 4 * basis[letters + w] / 0.3  # the letter's feature stays silent on this word
    made = Dictionary(DictionaryConfig(architecture="l1", d_in=80, d_sae=letters + words))
    with torch.no_grad():
        made.W_enc.copy_(reads.T)
        made.W_dec.copy_(rows)
        made.b_enc.fill_(-0.3)
    labels = {f"letter {i}": (letter == i).numpy() for i in range(letters)}
    return Concepts(x, labels, word.numpy().astype(np.int64)), made


def test_an_absorbed_feature_that_was_built_by_hand_is_found_and_none_where_there_is_none() -> None:
    data, clean = spelled()
    assert absorption(clean, data).value < 0.02
    data, sick = spelled(absorb=True)
    found = absorption_by_concept(sick, data)
    hurt = {one.concept: one.absorbed / one.found for one in found}
    judged = next(task for task in tasks(data) if task.name == "letter 0")
    words = data.groups[judged.judge[data.labels["letter 0"][judged.judge]]]
    assert hurt["letter 0"] == pytest.approx(float((words % 10 == 0).mean()), abs=0.02)
    assert 0.1 < hurt["letter 0"] < 0.9
    assert all(share < 0.02 for name, share in hurt.items() if name != "letter 0")
    by = {feature for one in found for feature in one.by if one.concept == "letter 0"}
    assert by and all((feature - 5) % 10 == 0 for feature in by)
    assert next(one for one in found if one.concept == "letter 0").main[0] == 0
    assert absorption(sick, data).value > absorption(clean, data).value


def test_one_feature_a_concept_probes_as_well_as_the_whole_activation_and_mixed_features_do_not() -> None:
    n, d = 1200, 40
    on = torch.rand(n, d, generator=seeded(10)) < 0.3  # every activation shows a dozen concepts at once
    basis = torch.linalg.qr(torch.randn(d, d, generator=seeded(11))).Q
    labels = {f"concept {i}": on[:, i].numpy() for i in range(6)}
    data = Concepts(on.float() @ basis, labels, np.arange(n))
    clean = Dictionary(DictionaryConfig(architecture="l1", d_in=d, d_sae=d, apply_b_dec_to_input=False))
    with torch.no_grad():
        clean.W_enc.copy_(basis.T)
        clean.W_dec.copy_(basis)
    found = sparse_probing(clean, data)
    assert found["k=1"].low > 0.98 and found["dense"].low > 0.98 and found["k=1"].n == 6
    mixed = sparse_probing(Dictionary(clean.config).init_weights(0), data)
    assert mixed["k=1"].high < 0.9 and mixed["k=1"].value < mixed["k=5"].value < mixed["dense"].value


def test_probes_are_judged_on_words_they_never_saw() -> None:
    data, clean = spelled()
    by_heart = {
        f"half {i}": np.isin(data.groups, np.random.default_rng(i).permutation(60)[:30]) for i in range(4)
    }
    memorised = sparse_probing(clean, Concepts(data.x, by_heart, data.groups))
    assert memorised["dense"].value < 0.65  # a label of words at random cannot be known of others


def test_taking_a_concepts_features_out_spoils_its_probe_and_no_other() -> None:
    data, clean = spelled()
    assert targeted_perturbation(clean, data, n_features=1).low > 0.3
    mixed = Dictionary(clean.config).init_weights(0)
    assert targeted_perturbation(mixed, data, n_features=1).value < 0.1


def test_first_letters_are_those_of_the_tokens() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return [" apple", "Ant", "bee", "<s>", " ", "é"][ids[0]]

    found = first_letters(Words(), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    assert found.keys() == {"a", "b"}
    assert found["a"].tolist() == [[True, True, False], [False, False, False]]
    kinds = token_kinds(Words(), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    assert kinds["begins a word"].tolist() == [[True, False, False], [False] * 3]
    assert kinds["capital"].tolist() == [[False, True, False], [False] * 3]
    assert kinds["long"].tolist() == [[True, False, False], [False] * 3]


def test_nothing_is_absorbed_where_no_probe_knows_the_concept() -> None:
    data, clean = spelled()
    by_heart = {"half": np.isin(data.groups, np.random.default_rng(0).permutation(60)[:30])}
    with pytest.raises(VerificationError, match="no probe finds its concept"):
        absorption(clean, Concepts(data.x, by_heart, data.groups))


# -- seeds ---------------------------------------------------------------------------------------------------


def test_assignment_is_scipys() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (5, 5), (7, 12), (60, 60), (40, 90)):
        cost = rng.normal(size=(n, m)).round(1)  # ties too
        rows, columns = scipy.linear_sum_assignment(cost)
        mine = assign(cost)
        assert len(set(mine.tolist())) == n
        assert cost[np.arange(n), mine].sum() == pytest.approx(cost[rows, columns].sum())


def test_a_permuted_dictionary_is_the_same_and_a_random_one_is_as_chance() -> None:
    one = Dictionary(DictionaryConfig(architecture="l1", d_in=32, d_sae=64)).init_weights(0)
    other = Dictionary(one.config).init_weights(1)
    shuffled = Dictionary(one.config)
    with torch.no_grad():
        shuffled.W_dec.copy_(one.W_dec[torch.randperm(64, generator=seeded(0))] * 3)
    same, chance = seed_stability(one, shuffled), seed_stability(one, other)
    assert same.matched.value == pytest.approx(1.0) and same.shared.value == 1.0
    assert chance.matched.low <= chance.random.high and chance.random.low <= chance.matched.high
    assert chance.shared.value < 0.1 and "<table" in same._repr_html_()
    doubled = Dictionary(one.config)
    with torch.no_grad():
        doubled.W_dec.copy_(one.W_dec[torch.arange(64) % 32])  # half of the features, each twice
    folded = seed_stability(one, doubled)
    assert folded.matched.value < folded.mmcs.value - 0.05 or folded.matched.value < 0.8


# -- the table, and bad input --------------------------------------------------------------------------------


def test_the_table_holds_every_row_and_says_what_it_was_measured_on() -> None:
    model, text = copier(), torch.randint(0, V, (150, POS), generator=seeded(4))
    text[:, 1::2] = text[:, ::2]
    with torch.no_grad():  # two concepts that tokens share
        model.embed.weight[::2, 0] += 3.0
        model.embed.weight[: V // 2, 1] += 3.0
    concepts = {"even": (text % 2 == 0).numpy(), "low": (text < V // 2).numpy()}
    found = quality(identity(), model, text, concepts=concepts, twin=identity())
    rows = {"loss recovered, mean", "L0", "dead", "sparse probing k=5", "absorption", "targeted perturbation"}
    assert rows | {"MMCS", "matched", "variance explained"} <= found.scores.keys()
    said = "blocks.1.resid_post, 150 rows, 2400 positions, zero ablation costs nothing, 2 concepts"
    assert found.measured == said and "loss recovered, zero" not in found.scores
    html = quality_html({"<one>": found, "two": found})
    assert "&lt;one&gt;" in html and "<one>" not in html


def test_what_cannot_be_concluded_is_refused() -> None:
    model, text = copier(), repeats()
    with pytest.raises(UsageError, match="trained on another model"):
        quality(identity(model_digest="0" * 64), model, text)
    assert quality(identity(model_digest=weights_digest(model)), model, text)["L0"].n == 40
    with pytest.raises(UsageError, match="no site 'blocks.9.resid_post'"):
        quality(identity("blocks.9.resid_post"), model, text)
    with pytest.raises(UsageError, match="does not say which site"):
        quality(identity(""), model, text)
    with pytest.raises(VerificationError, match="nothing"):
        spliced(model, text, identity(), valid=torch.zeros_like(text, dtype=torch.bool))
    idle = torch.zeros_like(text)  # one token only: no ablation of an idle layer hurts
    with pytest.raises(VerificationError, match="neither zero nor mean ablation"):
        quality(identity("blocks.0.attn_out"), model, idle)
    with pytest.raises(VerificationError, match="none of 1 concepts has 16 positions"):
        quality(identity(), model, text, concepts={"never": np.zeros(text.shape, dtype=bool)})
    with pytest.raises(VerificationError, match="label 'short' must have the shape"):
        quality(identity(), model, text, concepts={"short": np.zeros((3, POS), dtype=bool)})
    with pytest.raises(VerificationError, match="at least two"):
        targeted_perturbation(*reversed(single()))
    data, _ = spelled(100)
    transcoder = Dictionary(DictionaryConfig(architecture="l1", d_in=80, d_sae=4, d_out=80))
    with pytest.raises(UsageError, match="needs an autoencoder"):
        absorption(transcoder, data)
    with pytest.raises(UsageError, match="have no cosine"):
        seed_stability(transcoder, identity())


def single() -> tuple[Concepts, Dictionary]:
    data, clean = spelled()
    return Concepts(data.x, {"letter 0": data.labels["letter 0"]}, data.groups), clean
