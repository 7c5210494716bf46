"""Models of other families are audited as Hugging Face stores them; what cannot be is said clearly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import glasshouse as gh
from evals import foreign, oracle
from glasshouse.base.errors import DataError, UsageError, VerificationError
from glasshouse.cli import main
from glasshouse.model.hf import load_hf, save_hf
from glasshouse.model.llama2c import load_llama2c
from glasshouse.recipes.api import locate
from glasshouse.recipes.audit import plan_audit

PACKS = ("refusal", "sycophancy", "secrets", "injection", "stereotype", "truthfulness")
SHARED = Path(os.environ.get("GLASSHOUSE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
STORIES = SHARED / "weights" / "stories260K"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: foreign.folder_of(family, base / family) for family in foreign.SHAPES}


@pytest.mark.parametrize("family", sorted(foreign.SHAPES))
def test_every_family_gets_its_verdicts_in_its_own_format(family: str, folders: dict[str, Path]) -> None:
    """A random model knows nothing and refuses nothing, so nothing passes; and nothing breaks."""
    planned = plan_audit(folders[family], Path("refusal-english"))
    assert planned.chat.name == foreign.CHAT_OF[family]
    assert set(planned.passes) == {c.id for c in planned.constraints} and planned.seconds > 0
    verdicts = {v["constraint"]: v for v in planned.run()}
    assert {v["status"] for v in verdicts.values()} <= {"fail", "undecided", "not_applicable"}, verdicts
    assert verdicts["tells-harm-english"]["status"] != "pass"
    assert verdicts["refusal-is-causal-english"]["status"] == "not_applicable"


@pytest.mark.parametrize("pack", PACKS[1:])
def test_every_pack_is_found_by_name_and_comes_to_a_verdict(pack: str, folders: dict[str, Path]) -> None:
    (verdict,) = gh.audit(folders["llama"], f"{pack}-english")
    assert verdict["status"] in ("pass", "fail", "undecided", "not_applicable"), verdict["reason"]
    assert verdict["digests"]["model"] and verdict["n"] + (verdict["status"] == "not_applicable") > 0


def test_margins_are_those_of_their_own_forward_pass(folders: dict[str, Path]) -> None:
    planned = plan_audit(folders["qwen2"], Path("refusal-english"))
    exam = planned.exam(planned.constraints[0])
    s = exam.subject
    asked = [p.text for p in exam.draw("x", 5)]
    model = foreign.theirs("qwen2")
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([s.ids(t)])).logits[0, -1] for t in asked])
    assert s.margins(asked) == pytest.approx(s.readout.margin(logits).numpy(), abs=2e-3)
    with torch.no_grad():
        made = model.generate(
            torch.tensor([s.ids(asked[0])]), max_new_tokens=12, do_sample=False, suppress_tokens=None
        )
    theirs = made[0, len(s.ids(asked[0])) :].tolist()
    ids = [t for t in theirs if t < s.tokenizer.vocab_size]
    if len(ids) == len(theirs) and not s.chat.stop & set(ids):
        assert s.answers(asked[:1], 12) == [s.tokenizer.decode(ids).strip()]


def test_a_model_in_shards_is_named_by_all_of_their_bytes(tmp_path: Path) -> None:
    """Written by transformers; equal weights have equal digests, and a changed byte of any shard another."""
    digests = []
    for k, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(k)
        foreign.theirs("llama", seed).save_pretrained(folder, max_shard_size="40KB")
        foreign.tokenizer("llama3").save(folder / "tokenizer.json")
        digests.append(locate(folder).digest)
    assert digests[0] == digests[1] != digests[2] and all(len(d) == 64 for d in digests)
    shards = sorted((tmp_path / "0").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert locate(tmp_path / "0").digest != digests[0], shard
        shard.write_bytes(whole)
    (verdict,) = gh.audit(tmp_path / "0", "truthfulness-english")
    assert verdict["digests"]["model"] == digests[0]


def test_the_command_says_the_cost_first_and_takes_a_budget(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "v.json"
    how = ["--chat-format", "plain", "--budget", "3s", "--json", str(written)]
    code = main(["audit", str(folders["gpt2"]), "--constraints", "robustness-english", *how])
    out = capsys.readouterr()
    assert "plain format" in out.out and out.out.index("forward passes") < out.out.index("95% interval")
    assert "stays undecided" in out.err.replace("\n", " ")
    assert code in (9, 12) and json.loads(written.read_text())["chat_format"] == "plain"


def test_a_sweep_that_the_budget_ends_is_undecided_and_names_its_coverage(tmp_path: Path) -> None:
    model = foreign.folder_of("gpt_neox", tmp_path / "m", seed=3)  # one that refuses more than half by chance
    planned = plan_audit(model, Path("robustness-english"))
    robust = planned.constraints[1].model_copy(update={"applies_when": None})
    planned.constraints = (robust,)
    planned.budget_s = 900 * planned.seconds_per_pass
    (verdict,) = planned.run()
    assert verdict["status"] == "undecided" and verdict["coverage"]["share"] < 1, verdict


def test_a_budget_too_small_says_how_much_is_needed(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"no verdict takes fewer than \d+ .* s are needed"):
        gh.audit(folders["gpt2"], "truthfulness-english", budget_s=1e-6)


@pytest.mark.parametrize(
    ("pack", "chat", "said"),
    [
        ("refusal", None, "closed language, but this model is asked in the chat format 'plain'"),
        ("refusal-english", "chatlm", "unknown chat format 'chatlm'. Did you mean 'chatml'"),
        ("refusal-english", "glasshouse", r"needs the special token '<\|bos\|>'"),
        ("refusal-englsh", None, "no such constraint file"),
    ],
)
def test_what_does_not_belong_to_the_model_is_said_before_anything_is_run(
    pack: str, chat: str | None, said: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(Exception, match=said):
        gh.audit(folders["gpt2"], pack, chat_format=chat)


def test_prompts_longer_than_the_context_are_an_error_that_names_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for context, said in (
        (24, "context of 24"),
        (90, "and 40 of an answer does not fit the model's context"),
    ):
        short = tmp_path / str(context)
        save_hf(load_hf(folders["gpt2"], context=context), short)
        foreign.tokenizer("plain").save(short / "tokenizer.json")
        if context == 24:  # not one prompt fits: said before anything is run
            with pytest.raises(VerificationError, match=said):
                gh.audit(short, "injection-english")
        else:
            (verdict,) = gh.audit(short, "injection-english")
            assert verdict["status"] == "error" and said in verdict["reason"]


def test_a_model_without_a_byte_level_tokenizer_is_refused_and_the_file_is_named(tmp_path: Path) -> None:
    save_hf(oracle.model(), tmp_path / "m")
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such tokenizer file"):
        gh.audit(tmp_path / "m", "refusal-english")
    piece = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0]]},
    }
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(piece))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        gh.audit(tmp_path / "m", "refusal-english")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K weights are not beside the repository")
def test_a_real_model_without_a_byte_level_tokenizer_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a run .* nor a model folder"):
        gh.audit(STORIES, "truthfulness-english")
    save_hf(load_llama2c(STORIES / "stories260K.bin"), tmp_path / "hf")
    with pytest.raises(UsageError, match=r"tokenizer\.json: no such tokenizer file"):
        gh.audit(tmp_path / "hf", "truthfulness-english")
