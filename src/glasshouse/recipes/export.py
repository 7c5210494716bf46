"""Hand a model on: a Hugging Face folder that `transformers` loads unchanged, or a GGUF file.

Only a promoted checkpoint of a run leaves it; any other needs an override, which the ledger records. A model
that still holds what was planted into it never leaves.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glasshouse.base.atomic import atomic_dir, write_json
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import HeldError, UsageError
from glasshouse.model import GPT
from glasshouse.model.families import family_for
from glasshouse.model.gguf import architecture_for, save_gguf
from glasshouse.model.hf import load_hf, save_hf
from glasshouse.model.weights import read_json
from glasshouse.recipes.api import Loaded, check_vocabulary, in_a_run, locate, released, still_planted
from glasshouse.tokenizer import Tokenizer

Kind = Literal["hf", "gguf"]
# What of a foreign folder goes along with the model, where it is there.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class Exported:
    """Where a model went, as what, what its standing was, and the SHA-256 of its weights' file."""

    path: Path
    family: str
    checkpoint: str
    standing: str
    digest: str


def export(
    source: str | Path,
    dest: str | Path,
    kind: Kind = "hf",
    *,
    tokenizer: bool = True,
    allow_held: bool = False,
    who: str = "unnamed",
) -> Exported:
    """Write the model of ``source`` (a run, a checkpoint in one, or a Hugging Face folder) to ``dest``.

    ``tokenizer``: write it too. HeldError for a checkpoint that is not promoted unless ``allow_held``, and
    always for an organism that still holds what was planted. UsageError when ``dest`` exists,
    CheckpointError when no family or architecture computes the model. Whole or not at all.
    """
    source, dest = Path(source), Path(dest)
    if dest.exists():
        raise UsageError(f"{dest} exists already; remove it or choose another name")
    owner = source.resolve().parent
    if source.resolve().name.startswith("export") and (owner / "ledger.jsonl").is_file():
        source = owner  # the folder inside a run has no standing of its own
    if not in_a_run(source) and (source / "config.json").is_file():
        return _write(load_hf(source), dest, kind, None, source if tokenizer else None)
    found = locate(source)
    if still_planted(found):
        raise HeldError(
            f"{found.checkpoint} is an organism: it still holds the misbehaviour that was planted into it. "
            "Such a model is not exported; its clean twin can be"
        )
    (family_for if kind == "hf" else architecture_for)(found.model.config)  # before the ledger says anything
    released(
        found,
        allow_held=allow_held,
        who=who,
        doing="export it",
        what=f"export a checkpoint that is not promoted as {kind}",
    )
    return _write(found.model, dest, kind, found, found.tokenizer if tokenizer else None)


def _write(
    model: GPT, dest: Path, kind: Kind, found: Loaded | None, tokenizer: Tokenizer | Path | None
) -> Exported:
    """``tokenizer``: ours, or the foreign folder that may hold one."""
    if isinstance(tokenizer, Tokenizer):
        check_vocabulary(tokenizer, model, dest)
    if kind == "gguf":
        family, weights = _gguf(model, dest, tokenizer), dest
    else:
        family, weights = _folder(model, dest, tokenizer), dest / "model.safetensors"
    return Exported(
        path=dest,
        family=family,
        checkpoint=found.checkpoint if found is not None else dest.name,
        standing=found.standing if found is not None else "outside any run",
        digest=sha256_file(weights),
    )


def _folder(model: GPT, dest: Path, tokenizer: Tokenizer | Path | None) -> str:
    with atomic_dir(dest) as folder:
        if isinstance(tokenizer, Path):
            for name in COMPANIONS:
                if (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, folder / name)
            return save_hf(model, folder, **_ids(tokenizer / "config.json"))
        if tokenizer is None:
            return save_hf(model, folder)
        tokenizer.save(folder / "tokenizer.json")
        roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.end, "pad_token": tokenizer.pad}
        named = {i: name for name, i in tokenizer.specials.items()}
        settings = {role: named[i] for role, i in roles.items() if i is not None}
        # Our tokenizer is plain byte-level BPE: no class of a family fits it better than the general one.
        write_json(
            folder / "tokenizer_config.json",
            {
                **settings,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": model.config.context,
            },
        )
        return save_hf(model, folder, bos_id=tokenizer.bos, eos_id=tokenizer.end, pad_id=tokenizer.pad)


def _ids(config: Path) -> dict[str, Any]:
    """The special ids of a foreign config."""
    raw = read_json(config)
    raw = {**raw.get("text_config", {}), **raw}
    return {f"{role}_id": raw.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}


def _gguf(model: GPT, dest: Path, tokenizer: Tokenizer | Path | None) -> str:
    if isinstance(tokenizer, Path):
        has_one = (tokenizer / "tokenizer.json").is_file()
        return save_gguf(model, dest, tokenizer if has_one else None, **_ids(tokenizer / "config.json"))
    if tokenizer is None:
        return save_gguf(model, dest)
    beside = dest.with_name(f".{dest.name}.tokenizer.json")
    tokenizer.save(beside)
    try:
        return save_gguf(model, dest, beside)
    finally:
        beside.unlink()
