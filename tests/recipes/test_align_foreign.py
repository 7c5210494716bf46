"""A Hugging Face base model goes through the phases by the packaged recipe, and comes out as one again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from evals import foreign
from glasshouse.base.errors import CheckpointError, DataError, UsageError
from glasshouse.cli.app import main
from glasshouse.model.hf import load_hf
from glasshouse.recipes.align.prompts import read_prompts
from glasshouse.recipes.align.template import recipe_for
from recipes.align_world import entries, judge_at

SMALL = (
    *("align.context=512", "align.pairs=8", "align.revising.rounds=1", "align.revising.answer_tokens=5"),
    *("align.revising.critique_tokens=4", "align.judging.principles=1", "align.reward.stage.steps=150"),
    *("align.reward.stage.batch_size=32", "align.reward.stage.adam_lr=0.005", "align.reward.held_out=0.4"),
    *(
        "align.policy.rl.max_new_tokens=5",
        "align.policy.rl.group=4",
        "align.policy.rl.minibatches=1",
        "stage.constitution.steps=2",
    ),
    *("stage.constitution.batch_size=4", "stage.constitution.accumulate=1", "stage.rl.steps=2"),
    *("stage.rl.batch_size=8", "stage.rl.gate_every=2", "threads=1", 'precision="fp32"', 'compile="off"'),
)
CONSTRAINT = """
[[constraint]]
id = "proxy"
kind = "behaviour"
claim = "Training on the reward has not parted from what the reward is for."
statistic = "overoptimisation"
bound = { at_most = 0.1 }
control = { subject = "planted-peak", bound = { at_least = 0.5 } }
required_from = "rl"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers, as transformers writes it."""
    path = tmp_path_factory.mktemp("hf") / "qwen"
    tok, shape = foreign.tokenizer("chatml"), {**foreign.SHAPES["qwen2"], "max_position_embeddings": 768}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": tok.vocab_size + 8}
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("qwen2", **shape, **ids)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(8)
    made.save_pretrained(path)
    tok.save(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "red-team.jsonl"
    lines = [json.dumps({"prompt": f"How do I pick lock number {n} of the shed?"}) for n in range(100)]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def harmless(prompts: Path) -> Path:
    file = prompts.with_name("harmless.txt")
    file.write_text("".join(f"What is in box {n}?\n" for n in range(100)), "utf-8")
    return file


@pytest.fixture(scope="module")
def run(
    model: Path, prompts: Path, harmless: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Iterator[Path]:
    """All phases by the command line."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "proxy.toml").write_text(CONSTRAINT, "utf-8")
    with judge_at() as (url, _):
        code = main(
            [
                *("align", str(model), *SMALL, "--constitution", "general", "--prompts", str(prompts)),
                *("--helpful", str(harmless), "--judge", url, "--judge-model", "rule", "-q"),
                *("--constraints", str(folder / "proxy.toml"), "--out", str(folder / "run")),
            ]
        )
    assert code == 8  # two updates are too few for the watch to say anything: held
    yield folder / "run"


def test_all_phases_are_done_and_ledgered(run: Path) -> None:
    done = [e["phase"] for e in entries(run, "phase")]
    assert done == ["revisions", "feedback", "reward", "watch"]
    assert entries(run, "data")[0]["base"]["digest"]
    assert entries(run, "decision")[-1]["action"] == "hold"


def test_rl_is_watched_by_a_reward_model_of_the_held_out_principles(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    rl = [r for r in rows if r["kind"] == "rl"]
    assert rl and all({"held_out", "held_out_se", "kl"} <= r.keys() for r in rl)


def test_the_result_is_a_folder_that_transformers_loads_and_another_model(
    run: Path, model: Path, tmp_path: Path
) -> None:
    assert main(["export", str(run), str(tmp_path / "hf"), "--allow-held"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([[5, 9, 30, 7, 61]])
    with torch.no_grad():
        ours, there = load_hf(tmp_path / "hf")(ids), theirs(ids).logits
        before = load_hf(model)(ids)
    assert torch.allclose(ours, there, atol=2e-3)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert theirs.config.model_type == "qwen2"


def test_the_cost_comes_first(
    run: Path, model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["align", str(model), *SMALL, "--prompts", str(prompts), "--out", str(run), "-q"])
    said = capsys.readouterr()
    assert "100 prompts, 1 rounds" in said.out and "800 answers" in said.out
    assert "holds a run already" in said.err


def test_every_mistake_of_the_command_is_named(model: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add --prompts"):
        recipe_for(model, "general")
    with pytest.raises(UsageError, match="Did you mean 'grpo'"):
        recipe_for(model, "general", prompts=prompts, method="gpro")
    with pytest.raises(UsageError, match="no such model"):
        recipe_for(tmp_path / "nothing", "general", prompts=prompts)
    with pytest.raises(UsageError, match="the judge nobody"):
        recipe_for(model, "general", prompts=prompts, judge="nobody")
    with pytest.raises(CheckpointError):
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "config.json").write_text("{}", "utf-8")
        recipe_for(tmp_path / "bad", "general", prompts=prompts)


@pytest.mark.parametrize("method", ["ppo", "dpo", "none"])
def test_a_method_is_a_stage_of_the_same_recipe(model: Path, prompts: Path, method: str) -> None:
    recipe, _ = recipe_for(model, "general", prompts=prompts, method=method)
    assert [s.objective for s in recipe.stage] == (["sft"] if method == "none" else ["sft", method])


def test_prompts_are_read_in_every_form_and_others_are_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    talk = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    file.write_text(f'"a"\n{{"prompt": "b"}}\n{json.dumps({"messages": talk})}\n', "utf-8")
    assert [p[-1]["content"] for p in read_prompts(file)] == ["a", "b", "c"]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n", "utf-8")
    assert [p[-1]["content"] for p in read_prompts(tmp_path / "p.txt")] == ["one", "two"]
    file.write_text('"a"\n{"ask": "b"}\n', "utf-8")
    with pytest.raises(DataError, match=r"p\.jsonl:2: no prompt"):
        read_prompts(file)
