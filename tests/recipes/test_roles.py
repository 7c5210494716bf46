"""A recipe whose model is told whose words it reads: from the file to the trained checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.base.errors import RecipeError, UsageError
from glasshouse.data.enclosed import conversation
from glasshouse.recipes import schema
from glasshouse.recipes.api import load
from glasshouse.recipes.run import train
from glasshouse.recipes.schema import load_recipe, read_recipe
from glasshouse.tokenizer import Tokenizer, render, role_markers

DEMO = Path(schema.__file__).parent / "files" / "demo.toml"
ROLES = {"segment": True, "rotate": True, "layers": True}


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    """A run of three steps on conversations that hold documents."""
    rng = np.random.default_rng(0)
    chats = [{"messages": conversation(rng, ("meadow", "harbour"))} for _ in range(80)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(c) for c in chats), "utf-8")
    stage = {"name": "base", "objective": "sft", "shards": ["own-00"], "steps": 3, "batch_size": 4}
    return {
        "name": "roles",
        "compile": "off",
        "precision": "fp32",
        "threads": 1,
        "data": {"books": False, "chat": ["chats.jsonl"]},
        "tokenizer": {"vocab_size": 300, "documents": True},
        "model": {"context": 256, "d_model": 16, "n_layer": 2, "n_head": 2, "roles": ROLES},
        "stage": [{**stage, "muon_lr": 0.01, "adam_lr": 0.003}],
        **more,
    }


def test_a_run_takes_the_markers_of_its_own_tokenizer_and_reads_them_after_reloading(tmp_path) -> None:
    train(read_recipe(recipe(tmp_path), "here"), tmp_path / "run", folder=tmp_path)
    tok, model = Tokenizer.load(tmp_path / "run"), load(tmp_path / "run")
    assert model.config.roles is not None and model.config.roles.markers == role_markers(tok)
    asked = [{"role": "user", "content": "Who?"}, {"role": "document", "content": "Me."}]
    ids = torch.tensor([render(tok, asked, generation_prompt=True)])
    n, m = len(tok.encode("Who?")) + 2, len(tok.encode("Me.")) + 2
    assert model.roles_of(ids)[0].tolist() == [0, *[2] * n, *[4] * m, 3]


def test_roles_without_a_marker_for_documents_or_without_a_switch_are_refused(tmp_path) -> None:
    with pytest.raises(RecipeError, match=r"documents = true.*tokenizer"):
        read_recipe(recipe(tmp_path, tokenizer={"vocab_size": 300}), "here")
    model = {**recipe(tmp_path)["model"], "roles": {"segment": False}}
    with pytest.raises(RecipeError, match="switches nothing on"):
        read_recipe(recipe(tmp_path, model=model), "here")
    with pytest.raises(RecipeError, match="segment"):
        read_recipe(recipe(tmp_path, model={**model, "roles": {"segmet": True}}), "here")


def test_documents_without_their_marker_are_refused_before_training(tmp_path) -> None:
    plain = recipe(tmp_path, tokenizer={"vocab_size": 300})
    del plain["model"]["roles"]
    with pytest.raises(UsageError, match="documents = true"):
        train(read_recipe(plain, "here"), tmp_path / "run", folder=tmp_path)


def test_a_recipe_with_constraints_says_at_once_that_no_family_reads_roles() -> None:
    """Promotion judges the reloaded export, and no family of `transformers` could hold this model."""
    with pytest.raises(RecipeError, match=r"nothing could be promoted.*roles"):
        load_recipe(DEMO, ["tokenizer.documents=true", "model.roles.segment=true"])


def test_a_recipe_that_does_not_mention_documents_is_named_as_before_there_were_any() -> None:
    dumped = load_recipe(DEMO).model_dump(mode="json")
    assert dumped["tokenizer"] == {"vocab_size": 2048}
    assert load_recipe(DEMO, ["tokenizer.documents=true"]).digest() != load_recipe(DEMO).digest()
