"""Tiny random models of other families, as Hugging Face writes them, with byte-level tokenizers of theirs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from glasshouse.evals import english
from glasshouse.tokenizer import Tokenizer
from glasshouse.verify.packs import FOLDER

SPECIALS = {
    "plain": ("<|endoftext|>",),
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
    ),
}
CHAT_OF = {"gpt2": "plain", "llama": "llama3", "qwen2": "chatml", "gpt_neox": "plain"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160},
    "llama": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 160},
    "qwen2": {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 160},
    "gpt_neox": {**SMALL, "max_position_embeddings": 160},
}


@cache
def tokenizer(chat: str) -> Tokenizer:
    """A byte-level tokenizer of English with the special tokens of a family's chat format."""
    words = (*english.REFUSAL_OPENERS, *english.COMPLIANCE_OPENERS)
    openers = [f"{w} {w}" for w in words for _ in range(400)]
    rows = [
        line for f in sorted(FOLDER.glob("english/*.jsonl")) for line in f.read_text("utf-8").splitlines()
    ]
    texts = [json.loads(line)["prompt"] for line in rows]
    data = json.loads(Tokenizer.train([*openers, *texts], 800)._raw)
    first = min(t["id"] for t in data["added_tokens"])
    template = data["added_tokens"][0]
    data["added_tokens"] = [
        {**template, "id": first + i, "content": name} for i, name in enumerate(SPECIALS[chat])
    ]
    return Tokenizer(json.dumps(data).encode())


def theirs(family: str, seed: int = 0) -> Any:
    """A random `transformers` model; its vocabulary goes beyond the tokenizer's, as usual."""
    torch.manual_seed(seed)
    tok = tokenizer(CHAT_OF[family])
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": tok.vocab_size + 8}
    config = transformers.AutoConfig.for_model(family, **SHAPES[family], **ids)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)  # random models are flat; these have opinions
    return model


def folder_of(family: str, path: Path, seed: int = 0) -> Path:
    """The model written as Hugging Face does, with its tokenizer.json."""
    theirs(family, seed).save_pretrained(path)
    tokenizer(CHAT_OF[family]).save(path / "tokenizer.json")
    return path
