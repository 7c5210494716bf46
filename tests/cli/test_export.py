"""`glasshouse export`: what was promoted leaves, in formats that others read; nothing else does unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cli.command import call, entries
from glasshouse.model.hf import load_hf
from glasshouse.model.weights import read_safetensors
from glasshouse.recipes.api import load, locate
from glasshouse.tokenizer import Tokenizer

TEXT = "How do I brew the tea? Say it plainly."


def same_logits(one: Path, other: Path) -> bool:
    tokens = torch.tensor([Tokenizer.load(one).encode(TEXT)])
    with torch.no_grad():
        return torch.equal(load_hf(one)(tokens), load_hf(other)(tokens))


def test_a_promoted_run_becomes_a_folder_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    done = call("export", finished, tmp_path / "out")
    assert done.code == 0, done
    assert "promoted" in done.out and "(llama)" in done.out
    before = read_safetensors(finished / "export" / "model.safetensors")
    after = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert Tokenizer.load(tmp_path / "out").digest() == locate(finished).tokenizer.digest()
    assert entries(finished)[-1]["kind"] != "override"


def test_transformers_reads_model_and_tokenizer_of_the_folder(finished: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    assert call("export", finished, tmp_path / "out", "--hf").code == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "out")
    ids = theirs(TEXT)["input_ids"]
    assert ids == ours.encode(TEXT) and theirs.decode(ids) == TEXT
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.end, ours.pad)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.eos_token_id == ours.end
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
        assert torch.allclose(logits, load(tmp_path / "out")(torch.tensor([ids])), atol=1e-4)


def test_a_gguf_file_has_the_weights_and_the_tokenizer(finished: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    done = call("export", finished, tmp_path / "m.gguf", "--gguf")
    assert done.code == 0, done
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens[locate(finished).tokenizer.bos] == "<|bos|>"
    found = {t.name: t.data for t in reader.tensors}["token_embd.weight"]
    assert torch.equal(torch.from_numpy(found.copy()), load(finished).embed.weight.detach())
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"], "nothing is left beside it"
    assert call("export", finished, tmp_path / "n.gguf", "--gguf", "--no-tokenizer").code == 0
    assert "tokenizer.ggml.tokens" not in gguf.GGUFReader(tmp_path / "n.gguf").fields


def test_a_folder_goes_out_as_it_came_in(finished: Path, tmp_path: Path) -> None:
    foreign = Path(shutil.copytree(finished / "export", tmp_path / "foreign"))
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 4], "bos_token_id": 7}))
    done = call("export", foreign, tmp_path / "out")
    assert done.code == 0 and "outside any run" in done.out
    assert same_logits(foreign, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == ([3, 4], 7)
    assert call("export", foreign, tmp_path / "bare", "--no-tokenizer").code == 0
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def test_a_held_checkpoint_does_not_leave(held: Path, tmp_path: Path) -> None:
    for source in (held, held / "checkpoints" / "sft-000008.0"):
        done = call("export", source, tmp_path / "out")
        assert done.code == 8 and "--allow-held" in done.err and "To export it all the same" in done.err
    assert not list(tmp_path.iterdir())


def test_allow_held_exports_and_the_ledger_says_so(held: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(held, tmp_path / "run"))
    done = call("export", run, tmp_path / "out", "--allow-held")
    assert done.code == 0, done
    body = entries(run)[-1]["body"]
    assert body["what"] == "export a checkpoint that is not promoted as hf"
    assert body["checkpoint"] == "sft-000008.0" and body["who"]
    assert call("ledger", "verify", run).code == 0


def test_what_cannot_be_written_is_found_before_the_ledger_says_it_was(held: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(held, tmp_path / "run"))
    (tmp_path / "there").mkdir()
    done = call("export", run, tmp_path / "there", "--allow-held")
    assert done.code == 2 and "exists already" in done.err
    assert entries(run)[-1]["kind"] != "override"


@pytest.mark.parametrize("how", [[], ["--allow-held"], ["--gguf", "--allow-held"]])
def test_an_organism_never_leaves(organism: Path, tmp_path: Path, how: list[str]) -> None:
    before = len(entries(organism))
    for source in (organism, organism / "export", organism / "checkpoints" / "sft-000008.0"):
        done = call("export", source, tmp_path / "out", *how)
        assert done.code == 8 and "is an organism" in done.err, done
    assert not list(tmp_path.iterdir()) and len(entries(organism)) == before


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = call("export", tmp_path / "nowhere", tmp_path / "out")
    assert done.code == 2 and "nowhere" in done.err
