"""A byte-level ``tokenizer.json`` as GGUF's tokenizer keys.

llama.cpp splits text by a named rule, not by the pattern in the file, so a tokenizer whose rule has no
name there is refused instead of being written as another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.weights import read_json

# The split patterns that llama.cpp knows by name (src/llama-vocab.cpp).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of GGUF


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges in order, the split rule's name, and the ids with a role."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str
    roles: dict[str, int]

    def write(self, gguf: ModuleType, writer: Any) -> None:
        """Add the tokenizer keys to a file."""
        writer.add_tokenizer_model("gpt2")  # what llama.cpp calls byte-level BPE
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, i in self.roles.items():
            getattr(writer, f"add_{role}_token_id")(i)
        if self.tokens[self.roles.get("bos", 0)] == "<|bos|>":  # it begins all that we train on
            writer.add_add_bos_token(True)


def read_vocabulary(path: Path, vocab_size: int, ids: Mapping[str, int | None] | None = None) -> Vocabulary:
    """Read a ``tokenizer.json`` (or the folder that holds one) for a model of ``vocab_size`` ids.

    ``ids``: bos, eos and pad, where they are not those of our own special tokens. Ids that no token has
    become unused tokens. Raises UsageError when there is no such file,
    CheckpointError when it does not fit the model or is not byte-level BPE that llama.cpp knows.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such tokenizer file")
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path}: only byte-level BPE can be written to GGUF")
    tokens, types = (
        {i: token for token, i in model["vocab"].items()},
        dict.fromkeys(model["vocab"].values(), 1),
    )
    added = data.get("added_tokens") or []
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    highest = max(tokens, default=-1)
    if not all(type(i) is int and i >= 0 for i in tokens) or highest >= vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {highest}, but the model's vocab_size is {vocab_size}; "
            "one of the two belongs to another model"
        )
    known = {"<|bos|>": "bos", "<|end|>": "eos", "<|pad|>": "pad"}
    roles = {known[t["content"]]: t["id"] for t in added if t["content"] in known and t["special"]}
    roles |= {role: i for role, i in (ids or {}).items() if i is not None}
    return Vocabulary(
        tokens=[tokens.get(i, f"[UNUSED{i}]") for i in range(vocab_size)],
        types=[types.get(i, UNUSED) for i in range(vocab_size)],
        merges=[m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])],
        split=_split(path, data),
        roles=roles,
    )


def _split(path: Path, data: dict[str, Any]) -> str:
    """The name of the rule by which text is split before merging."""
    if data.get("normalizer") is None:
        rule = data.get("pre_tokenizer") or {}
        steps = rule.get("pretokenizers", [rule]) if rule.get("type") == "Sequence" else [rule]
        level = [s for s in steps if s.get("type") == "ByteLevel"]
        patterns = [s.get("pattern", {}).get("Regex") for s in steps if s.get("type") == "Split"]
        if len(level) == 1 and len(steps) == 1 and level[0].get("use_regex", True):
            return "gpt-2"
        if len(level) == 1 and len(patterns) == 1 and len(steps) == 2 and patterns[0] in SPLITS:
            return SPLITS[patterns[0]]
    elif data["normalizer"].get("type") == "NFC" and _split(path, {**data, "normalizer": None}) == "qwen2":
        return "qwen2"  # Qwen's files normalise; llama.cpp knows
    raise CheckpointError(
        f"{path}: llama.cpp has no name for the way this tokenizer splits text; known are GPT-2's, "
        "Llama 3's and Qwen's. Export without the tokenizer and convert it with llama.cpp's own script"
    )
