"""An attribution graph adds up, link by link, to what the model computed, and finds a path that is known."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasshouse.base.errors import CheckpointError, DataError, UsageError
from glasshouse.interp.circuits import pruning
from glasshouse.interp.circuits.features import FeatureGraph, feature_graph
from glasshouse.interp.circuits.intervene import check_interventions
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.formats.viewer import read_graph
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.digest import weights_digest
from interp.circuits.byhand import CONFIGS, noisy

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9])
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "l1": {"architecture": "l1"},
    "gated": {"architecture": "gated"},
    "topk": {"architecture": "topk", "k": 5},
    "batchtopk": {"architecture": "batchtopk", "k": 5},
    "jumprelu": {"architecture": "jumprelu", "jumprelu_threshold": 0.3},
    "skip": {"architecture": "topk", "k": 5, "skip_connection": True},
}


def transcoder(model: GPT, layer: int, d_sae: int = 16, **kind: Any) -> Dictionary:
    """A random transcoder that explains little: what must add up must do so all the same."""
    width = model.config.d_model
    sites = {"site": f"blocks.{layer}.mlp_in", "site_out": f"blocks.{layer}.mlp_out"}
    config = DictionaryConfig(
        **((kind or {"architecture": "topk", "k": 5}) | sites),
        **{"d_in": width, "d_out": width, "d_sae": d_sae, "model_digest": weights_digest(model)},
    )
    made = Dictionary(config).init_weights(layer)
    generator = torch.Generator().manual_seed(100 + layer)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name not in ("W_enc", "W_dec", "threshold"):
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        made.scale_in.fill_(1.7)
        made.scale_out.fill_(0.6)
        if "topk_threshold" in dict(made.named_buffers()):
            made.topk_threshold.fill_(0.4)
    return made


def transcoders(model: GPT, **kind: Any) -> list[Dictionary]:
    return [transcoder(model, i, **kind) for i in range(model.config.n_layer)]


# -- brute force: the model's own code, with its norms and patterns held, one source taken away at a time --


class Held(nn.Module):
    """A norm that keeps the scale of the first thing it saw."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.factor = norm, None

    def forward(self, x: Tensor) -> Tensor:
        centred = isinstance(self.norm, nn.LayerNorm)
        shift = self.norm.bias if centred else 0.0
        inner = x - x.mean(-1, keepdim=True) if centred else x
        if self.factor is None:
            self.factor = (self.norm(x) - shift) / inner
        return inner * self.factor + shift


def by_hand(model: GPT, graph: FeatureGraph, dictionaries: list[Dictionary]) -> tuple[Tensor, Tensor]:
    """Weights [N, N] and constants [N] from one batch: row i runs without node i, the last without all."""
    held = copy.deepcopy(model).double()
    twins = [copy.deepcopy(d).double() for d in dictionaries]
    for block in held.blocks:
        for name in ("norm1", "norm2", "post1"):
            setattr(block, name, Held(getattr(block, name)))
    held.norm = Held(held.norm)
    with Taps(read="*") as first:
        held(TOKENS[None], first)
    N, nodes = len(graph.nodes), graph.nodes
    gone = torch.cat([torch.eye(N, dtype=torch.bool), torch.ones(1, N, dtype=torch.bool)])
    reads: dict[int, Tensor] = {}

    def embed(x: Tensor) -> Tensor:
        x, scale = x.clone(), held.config.embed_scale or 1.0
        for i, n in enumerate(nodes):
            if n.kind == "token":
                x[gone[:, i], n.pos] -= scale * held.embed.weight[n.index]
        return x

    def mlp(layer: int) -> Any:
        block, one = held.blocks[layer], twins[layer]
        site = f"blocks.{layer}.resid_pre" if held.config.parallel else f"blocks.{layer}.resid_mid"
        normal = first[f"blocks.{layer}.mlp_out"]
        chosen = {(n.pos, n.index) for n in nodes if n.kind == "feature" and n.layer == layer}
        before = block.norm2(first[site])
        value = one.encode(before)[0]
        writes = {key: value[key] * one.W_dec[key[1]] / one.scale_out for key in chosen}
        error = normal[0] - one.b_dec / one.scale_out
        if one.config.skip_connection:
            error = error - one.skipped(before)[0]
        for (p, _), w in writes.items():
            error[p] -= w

        def replaced(x: Tensor) -> Tensor:
            y = (one.b_dec / one.scale_out).expand_as(x).clone()
            if one.config.skip_connection:
                y = y + one.skipped(reads[layer])
            for i, n in enumerate(nodes):
                if n.layer == layer:
                    y[~gone[:, i], n.pos] += error[n.pos] if n.kind == "error" else writes[n.pos, n.index]
            return y

        return replaced

    def remember(layer: int) -> Any:
        def see(x: Tensor) -> Tensor:
            reads[layer] = held.blocks[layer].norm2(x)
            return x

        return see

    edits: dict[str, Any] = {"embed": embed}
    for i in range(held.config.n_layer):
        edits[f"blocks.{i}.pattern"] = lambda x, i=i: first[f"blocks.{i}.pattern"].expand_as(x)
        edits[f"blocks.{i}.resid_pre" if held.config.parallel else f"blocks.{i}.resid_mid"] = remember(i)
        edits[f"blocks.{i}.mlp_out"] = mlp(i)
    with Taps(read=["final_norm"], edit=edits) as taps:
        held(TOKENS.expand(N + 1, -1), taps)
    logits = taps["final_norm"] @ held.head_weight.T
    logits = logits - logits.mean(-1, keepdim=True)
    weights, constants = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for t, n in enumerate(nodes):
        if n.kind == "feature":
            x, one = reads[n.layer][:, n.pos], twins[n.layer]
            if one.config.architecture == "gated":
                value = x * one.scale_in @ (one.W_enc * one.r_mag.exp())[:, n.index] + one.b_mag[n.index]
            else:
                value = one.pre_activations(x)[:, n.index]
        elif n.kind == "logit":
            value = logits[:, -1, n.index]
        else:
            continue
        weights[t] = float(graph.values[t]) - value[:-1].detach()
        constants[t] = value[-1].detach()
    return weights, constants


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k != "both ways"])
def test_every_link_is_what_its_source_adds_when_nothing_else_may_move(kind: str):
    model = noisy(**CONFIGS[kind])
    dictionaries = transcoders(model)
    graph = feature_graph(model, TOKENS, dictionaries)
    weights, constants = by_hand(model, graph, dictionaries)
    torch.testing.assert_close(graph.weights, weights, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(graph.constants, constants, atol=1e-4, rtol=1e-4)
    assert graph.weights[graph.kinds.features].abs().max() > 0.05


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_links_are_exact_for_every_architecture_of_transcoder(kind: str):
    model = noisy(**CONFIGS["llama"])
    dictionaries = transcoders(model, **ARCHITECTURES[kind])
    graph = feature_graph(model, TOKENS, dictionaries)
    weights, constants = by_hand(model, graph, dictionaries)
    torch.testing.assert_close(graph.weights, weights, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(graph.constants, constants, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("most", [4096, 7])
def test_links_and_constant_sum_to_the_value_however_few_features_are_nodes(most: int):
    model = noisy(**CONFIGS["gpt2"])
    graph = feature_graph(model, TOKENS, transcoders(model), max_features=most)
    targets = graph.kinds.features | graph.kinds.outputs
    assert int(graph.kinds.features.sum()) == min(most, graph.facts["active_features"])
    sums = (graph.weights.sum(1) + graph.constants)[targets]
    torch.testing.assert_close(sums, graph.values[targets], atol=1e-4, rtol=1e-4)
    assert graph.gap < 1e-4


def test_a_layer_without_a_transcoder_is_all_error():
    model = noisy(**CONFIGS["plain"])
    graph = feature_graph(model, TOKENS, [transcoder(model, 1)])
    assert {n.layer for n in graph.nodes if n.kind == "feature"} == {1}
    assert graph.gap < 1e-4 and 0 < graph.completeness < 1


# -- a path that is known ----------------------------------------------------------------------------------

PATH = ["L_4_3", "1_0_3", "0_2_0", "E_2_0"]
STORY = [2, 3, 1, 0]


def written() -> GPT:
    """Token 2 makes the first MLP write dimension 6; attention brings it to the end as 9; the second MLP
    makes of that 10, which is token 4's. Token 3 writes 7, which nobody reads, and louder; 0 and 1 write 8,
    which ends as token 5.
    """
    config = GPTConfig(
        **{"vocab_size": 6, "context": 8, "d_model": 12, "n_layer": 2, "n_head": 1, "d_mlp": 6},
        **{"norm": "none", "activation": "relu", "mlp_bias": True, "tied": False},
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.weight[range(6), range(6)] = 1.0
        first, second = model.blocks
        first.mlp.up.weight[range(6), range(6)] = 1.0
        first.mlp.up.bias.fill_(-0.25)
        for neuron, dim, size in ((2, 6, 2.0), (3, 7, 9.0), (0, 8, 0.5), (1, 8, 0.5)):
            first.mlp.down.weight[dim, neuron] = size
        second.attn.v.weight[0, 6] = 2.0
        second.attn.o.weight[9, 0] = 2.0  # queries and keys are zero: it looks at all alike
        second.mlp.up.weight[0, 9] = second.mlp.up.weight[1, 8] = 1.0
        second.mlp.down.weight[10, 0] = second.mlp.down.weight[11, 1] = 1.5
        model.head.weight[4, 10] = 2.0
        model.head.weight[5, 11] = 1.0
    return model


def same_as_mlp(model: GPT, scramble: bool = False) -> list[Dictionary]:
    """Transcoders that are the model's MLPs; scrambled, a feature writes what its neighbour should."""
    made = []
    for i, block in enumerate(model.blocks):
        one = transcoder(model, i, d_sae=6, architecture="l1")
        up, down = block.mlp.up, block.mlp.down
        decoder = down.weight.T.roll(1, 0) if scramble else down.weight.T
        named = {"W_enc": up.weight.T, "b_enc": up.bias, "W_dec": decoder, "b_dec": down.bias}
        made.append(Dictionary.from_weights(one.config, {k: v.detach().clone() for k, v in named.items()}))
    return made


def strongest_path(graph: FeatureGraph) -> list[str]:
    pruned = graph.pruned()
    name = next(n.name for n in pruned.nodes if n.target)
    found = [name]
    while links := pruned.into(name):
        name = links[0].source
        found.append(name)
    return found


def test_a_written_path_is_found_and_a_scrambled_transcoder_finds_another():
    model = written()
    graph = feature_graph(model, STORY, same_as_mlp(model), targets=[4])
    assert strongest_path(graph) == PATH
    assert graph.replacement == pytest.approx(1.0) and graph.completeness == pytest.approx(1.0)
    scrambled = feature_graph(model, STORY, same_as_mlp(model, scramble=True), targets=[4])
    assert strongest_path(scrambled) != PATH and scrambled.gap < 1e-4
    assert scrambled.replacement < 0.7 and scrambled.completeness < 0.7


def test_the_loud_feature_that_nobody_reads_is_pruned():
    model = written()
    graph = feature_graph(model, STORY, same_as_mlp(model), targets=[4])
    names = {n.name for n in graph.pruned().nodes}
    assert "0_3_1" in graph.number and "0_3_1" not in names
    assert set(PATH) <= names


def test_predictions_are_what_ablation_does_where_the_model_is_linear_and_not_with_scrambled_features():
    model = written()
    right = same_as_mlp(model)
    found = check_interventions(model, feature_graph(model, STORY, right, targets=[4]), right)
    assert found.predicted == pytest.approx(found.measured, abs=1e-5)
    at = found.names.index("0_2_0")
    without, tokens = copy.deepcopy(model), torch.tensor([STORY])
    with torch.no_grad():
        without.blocks[0].mlp.down.weight[:, 2] = 0.0  # token 2 comes once, so this is that feature alone
        change = (without(tokens) - model(tokens))[0, -1]
    assert found.measured[at] == pytest.approx(float(change[4] - change.mean()), abs=1e-5)
    assert found.measured[at] < -1
    wrong = same_as_mlp(model, scramble=True)
    off = check_interventions(model, feature_graph(model, STORY, wrong, targets=[4]), wrong)
    assert found.correlation.value == pytest.approx(1.0) and off.correlation.value < 0.9
    assert found.over == "features" and found.correlation.n == 10  # 4 in the first layer, 6 above


def test_ablations_are_measured_in_the_real_model_with_everything_computed_anew():
    model = noisy(**CONFIGS["llama"])
    dictionaries = transcoders(model)
    graphs = [feature_graph(model, TOKENS.roll(i), dictionaries) for i in range(5)]
    found = check_interventions(model, graphs, dictionaries, n=6, seed=1)
    assert found.over == "prompts" and len(found.names) == 30 and found.correlation.n == 5
    node = graphs[0].nodes[graphs[0].number[found.names[0]]]
    one = dictionaries[node.layer]

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, node.pos] -= node.activation * one.W_dec[node.index] / one.scale_out
        return x

    target = int(graphs[0].kinds.outputs.nonzero()[0])
    index = graphs[0].nodes[target].index
    with torch.no_grad():
        changed = model(TOKENS[None], Taps(edit={f"blocks.{node.layer}.mlp_out": edit})) - model(TOKENS[None])
    assert found.measured[0] == pytest.approx(float(changed[0, -1, index] - changed[0, -1].mean()), abs=1e-4)


# -- influence ---------------------------------------------------------------------------------------------


def test_influence_is_the_sum_over_all_paths():
    weights = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1)
    outputs = torch.zeros(9, dtype=torch.float64)
    outputs[-2:] = torch.tensor([0.7, 0.2], dtype=torch.float64)
    share = pruning.shares(weights)
    closed = torch.linalg.inv(torch.eye(9, dtype=torch.float64) - share) - torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(pruning.influence(weights, outputs), outputs @ closed)
    with pytest.raises(UsageError, match="cycle"):
        pruning.influence(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def test_pruning_keeps_the_fewest_entries_that_hold_the_share():
    scores = torch.tensor([5.0, 1.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    assert pruning.covering(scores, 0.8).tolist() == [True, False, True, False, False]
    assert pruning.covering(scores, 1.0).tolist() == [True, True, True, False, True]
    assert pruning.reached(scores).tolist() == pytest.approx([0.5, 0.9, 0.8, 1.0, 1.0])


def test_pruning_and_scores_are_circuit_tracers_on_a_graph_it_judged():
    theirs = json.loads((Path(__file__).parent / "fixtures" / "circuit_tracer_pruning.json").read_text())
    weights = torch.tensor(theirs["weights"], dtype=torch.float64)
    N, ends = len(weights), [theirs[f"n_{k}"] for k in ("features", "errors", "tokens")]
    kind = torch.tensor([i for i, n in enumerate([*ends, len(theirs["outputs"])]) for _ in range(n)])
    kinds = pruning.Kinds(kind == 2, kind == 0, kind == 1, kind == 3)
    outputs = torch.zeros(N, dtype=torch.float64)
    outputs[kinds.outputs] = torch.tensor(theirs["outputs"], dtype=torch.float64)
    for case in theirs["pruned"]:
        nodes, edges = pruning.prune(weights, outputs, kinds, case["node_threshold"], case["edge_threshold"])
        assert nodes.nonzero()[:, 0].tolist() == case["nodes"]
        assert edges.nonzero().tolist() == case["edges"]
        influence = pruning.influence(weights, outputs)
        counts = influence > 0
        reached = torch.tensor(case["reached"], dtype=torch.float64)
        torch.testing.assert_close(pruning.reached(influence)[counts], reached[counts], atol=1e-5, rtol=1e-5)
    assert pruning.replacement(weights, outputs, kinds) == pytest.approx(theirs["replacement"], abs=1e-5)
    # Theirs counts tokens and errors, which have no inputs, as explained; ours leaves them out.
    all_nodes = influence + outputs
    explained = 1 - pruning.shares(weights)[:, kinds.errors].sum(1)
    assert float((all_nodes * explained).sum() / all_nodes.sum()) == pytest.approx(
        theirs["completeness"], abs=1e-5
    )
    assert pruning.completeness(weights, outputs, kinds) < theirs["completeness"]


def test_a_pruned_graph_holds_no_feature_without_cause_or_effect_and_more_threshold_keeps_more():
    model = noisy(**CONFIGS["llama"])
    graph = feature_graph(model, TOKENS, transcoders(model))
    few, many = graph.pruned(0.5, 0.8), graph.pruned(0.9, 0.99)
    for pruned in (few, many):
        sources, targets = {k.source for k in pruned.links}, {k.target for k in pruned.links}
        assert all(n.name in sources & targets for n in pruned.nodes if n.kind == "feature")
        assert all(n.name in sources for n in pruned.nodes if n.kind == "error")
    assert {n.name for n in few.nodes} < {n.name for n in many.nodes} and len(few.links) < len(many.links)
    for share in (0.0, 1.5):
        with pytest.raises(UsageError, match="threshold"):
            graph.pruned(share)


# -- going elsewhere ---------------------------------------------------------------------------------------


class Hostile:
    """A tokenizer whose every token is markup."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 6 for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"<script>{i}</script>" for i in ids)


def test_it_is_written_for_the_viewer_and_read_back(tmp_path: Path):
    model = written()
    graph = feature_graph(model, STORY, same_as_mlp(model))
    graph.save(tmp_path / "g.json")
    back = read_graph(tmp_path / "g.json")
    assert back == graph.pruned() and back.facts["model_digest"] == weights_digest(model)
    assert graph.to_dict()["metadata"]["info"]["glasshouse"]["completeness"] == graph.completeness


def test_it_shows_itself_and_escapes_what_tokens_say():
    model = written()
    graph = feature_graph(model, "abcd", same_as_mlp(model), tokenizer=Hostile())
    html = graph._repr_html_()
    assert "<svg" in html and "0.2@" in html and "completeness" in html
    assert "<script>" not in html and "&lt;script&gt;" in html
    shown = check_interventions(model, graph, same_as_mlp(model))._repr_html_()
    assert "correlation" in shown and "0_2_" in shown


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "named"), [({"value_residual": True}, "value_residual"), ({"causal": False}, "causal")]
)
def test_a_model_that_cannot_be_held_linear_is_refused_by_the_name_of_the_feature(features: Any, named: str):
    model = noisy(**features)
    with pytest.raises(UsageError, match=named):
        feature_graph(model, TOKENS, transcoders(model))


def test_transcoders_of_another_model_site_or_width_are_refused():
    model, other = noisy(0), noisy(1)
    with pytest.raises(CheckpointError, match="trained on model"):
        feature_graph(model, TOKENS, transcoders(other))
    narrow = noisy(0, d_model=16)
    config = transcoder(narrow, 0).config.model_copy(update={"model_digest": ""})
    with pytest.raises(CheckpointError, match="16 numbers"):
        feature_graph(model, TOKENS, [Dictionary(config).init_weights(0)])
    config = transcoder(model, 0).config.model_copy(update={"site": "blocks.0.resid_pre"})
    with pytest.raises(UsageError, match="mlp_in"):
        feature_graph(model, TOKENS, [Dictionary(config)])
    config = transcoder(model, 0).config.model_copy(
        update={"site": "blocks.7.mlp_in", "site_out": "blocks.7.mlp_out"}
    )
    with pytest.raises(CheckpointError, match="does not have"):
        feature_graph(model, TOKENS, [Dictionary(config)])
    with pytest.raises(UsageError, match="two transcoders"):
        feature_graph(model, TOKENS, [transcoder(model, 0)] * 2)
    with pytest.raises(UsageError, match="no transcoders"):
        feature_graph(model, TOKENS, [])


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "one row"), ([1] * 13, "context of 12"), ([17], "vocabulary"), ("a", "tokenizer")],
)
def test_a_prompt_that_cannot_be_is_refused(prompt: Any, said: str):
    model = noisy()
    with pytest.raises(UsageError, match=said):
        feature_graph(model, prompt, transcoders(model))


def test_numbers_that_are_not_finite_and_coarse_weights_are_refused():
    model = noisy()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    with pytest.raises(DataError, match="finite"):
        feature_graph(model, TOKENS, transcoders(model))
    coarse = noisy().bfloat16()
    with pytest.raises(UsageError, match="bfloat16"):
        feature_graph(coarse, TOKENS, transcoders(coarse))


def test_interventions_on_another_model_than_the_graphs_are_refused():
    model, other = noisy(0), noisy(1)
    graph = feature_graph(model, TOKENS, transcoders(model))
    with pytest.raises(UsageError, match="another model"):
        check_interventions(other, graph, transcoders(other))
