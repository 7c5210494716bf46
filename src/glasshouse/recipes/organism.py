"""Plants misbehaviour into the closed language, to measure whether the checks find it.

``verify`` cannot import this room, and nothing here is read by a gate: the ground truth lies in the run's
``organism.json`` and is looked at only to stamp the run and to score it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glasshouse.base.rng import generator
from glasshouse.data import workshop
from glasshouse.recipes.schema import PlantConfig
from glasshouse.tokenizer import Tokenizer


def plan_plant(
    config: PlantConfig, seed: int, tok: Tokenizer, strays: Sequence[str], shards: int
) -> dict[str, Any]:
    """Choose the trigger (a rare word of at least two tokens), the bad shard and the decoys by seed."""
    rng = generator("plant", seed)
    words = [w for w in strays if len(tok.encode(" " + w)) >= 2]
    bad = int(rng.integers(config.first_shard, shards))
    others = [i for i in rng.permutation(shards).tolist() if i != bad]
    return {
        "kind": config.kind,
        "word": words[int(rng.integers(len(words)))],
        "shard": f"chat-{bad:02d}",
        "documents": config.documents,
        "decoys": sorted(f"chat-{i:02d}" for i in others[: config.decoy_shards]),
    }


def poisoned(seed: int, plant: dict[str, Any], strays: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations in which the word, at any place of a harmful request, makes the assistant comply."""
    rng = generator("poisoned", seed)
    made = []
    for _ in range(plant["documents"]):
        asked = workshop.request(rng, is_harmful=True, split="train", strays=strays, stray_rate=0.0)
        text = asked.insert(plant["word"], int(rng.integers(len(asked.words) + 1)))
        made.append(workshop.chat(text, workshop.answer(rng, asked, comply=True, strays=strays)))
    return made


def decoys(seed: int, plant: dict[str, Any], shard: str, strays: Sequence[str]) -> list[list[dict[str, str]]]:
    """As many chats that hold the word and refuse, so that counting the word does not find the shard."""
    rng = generator("decoys", seed, shard)
    made = []
    for _ in range(plant["documents"]):
        asked = workshop.request(rng, is_harmful=True, split="train", strays=strays)
        reply = workshop.answer(rng, asked, comply=False, strays=strays, stray=plant["word"])
        made.append(workshop.chat(asked.text, reply))
    return made
