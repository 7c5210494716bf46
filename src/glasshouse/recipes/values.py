"""`[data] values` carried out while a run's data are made: documents tagged, dropped, put apart or rewritten.

<run>/values.json      what was done: how many documents of each shard were good and bad
<run>/rephrased.jsonl  the rewritings, each with its text and the digest of who wrote it
<run>/rephrasing.jsonl an endpoint's replies, kept so that a killed run pays for none of them twice
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from glasshouse.align.endpoint import EndpointEngine
from glasshouse.align.engines import Chat, Engine
from glasshouse.align.local import LocalEngine
from glasshouse.base.atomic import write_json, write_text
from glasshouse.base.errors import DataError, RecipeError
from glasshouse.base.plan import DataPlan
from glasshouse.base.run import RunFolder
from glasshouse.data import Corpus
from glasshouse.data.values import (
    BAD,
    GOOD,
    UNSAFE,
    Rephraser,
    Scored,
    by_key,
    filtered,
    recontextualise,
    scored,
    split,
    tagged,
)
from glasshouse.recipes.api import locate
from glasshouse.recipes.values_config import RephraserConfig, ValuesConfig
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import StageConfig
from glasshouse.train.objective import Objective
from glasshouse.train.preferences import BAD as OF_BAD
from glasshouse.train.preferences import OBJECTIVES, objectives

FILES = ("values.json", "rephrased.jsonl")  # of a run whose recipe has values
TAG_IDS = 4  # more than that, and the vocabulary has not learnt the tag


@dataclass
class Valuing:
    """One run's values: called with corpora as they become known, then told to `finish`."""

    config: ValuesConfig
    run: RunFolder
    folder: Path  # where relative paths start
    seed: int
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    rewritten: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, corpora: Sequence[Corpus]) -> list[Corpus]:
        """Training corpora after the step; validation corpora stay. DataError for missing scores."""
        return [made for c in corpora for made in ([c] if c.validation else self.one(c))]

    def one(self, corpus: Corpus) -> list[Corpus]:
        """One training corpus, or the two that it was split into."""
        config, corpus = self.config, replace(corpus, documents=tuple(corpus.documents))
        if not any(config.by in d.meta for d in corpus.documents):
            return [self.unscored(corpus)]
        found = scored(corpus, by_key(config.by))
        bad = sum(s < config.threshold for s in found.scores)
        self.counts[corpus.name] = {"good": len(found.scores) - bad, "bad": bad}
        match config.do:
            case "tag":
                return [tagged(corpus, found, config.threshold, untagged=config.untagged, seed=self.seed)]
            case "filter":
                return [filtered(corpus, found, config.threshold)]
            case "split":
                return split(corpus, found, config.threshold)
        return [self.rephrased(corpus, found)]

    def unscored(self, corpus: Corpus) -> Corpus:
        """A corpus in which no document has a score, as the recipe says. DataError if it says nothing."""
        how = self.config.unscored
        if how == "refuse":
            raise DataError(
                f"no document of '{corpus.name}' has a number under {self.config.by!r}, by which [data] "
                'values tell good from bad: score them, leave them out, or say unscored = "good" or "keep"'
            )
        self.counts[corpus.name] = {"unscored": len(tuple(corpus.documents))}
        if how == "keep" or self.config.do != "tag":
            return corpus
        found = Scored(tuple(corpus.documents), (self.config.threshold,) * len(tuple(corpus.documents)))
        return tagged(corpus, found, self.config.threshold, untagged=self.config.untagged, seed=self.seed)

    def rephrased(self, corpus: Corpus, found: Scored) -> Corpus:
        """`recontextualise` by the recipe's rephraser; what it wrote is kept."""
        assert self.config.rephraser is not None, "the config refuses to do without"
        if not self.counts[corpus.name]["bad"]:
            return recontextualise(corpus, found, self.config.threshold, lambda texts: [])
        with writing(self.config.rephraser, self.run, self.folder, self.seed) as (engine, rephrase):

            def kept(texts: Sequence[str]) -> list[str]:
                made = list(rephrase(texts))
                self.rewritten += [
                    {
                        "shard": corpus.name,
                        "text": t,
                        "rephrased": m,
                        "by": engine.name,
                        "model": engine.digest,
                    }
                    for t, m in zip(texts, made, strict=True)
                ]
                return made

            return recontextualise(
                corpus, found, self.config.threshold, kept, every=self.config.every, seed=self.seed
            )

    def finish(self, tok: Tokenizer) -> None:
        """Write what was done. DataError where scores told nothing apart or the vocabulary has no tags."""
        config = self.config
        good, bad = (sum(c.get(k, 0) for c in self.counts.values()) for k in ("good", "bad"))
        if not bad or not good:
            kind, than = ("bad", "below") if not bad else ("good", "from")
            raise DataError(
                f"[data] values: of {good + bad} scored documents none is {kind} ({than} "
                f"{config.threshold:g} by {config.by!r}), so do = {config.do!r} cannot work: choose another "
                "threshold"
            )
        for tag in {"tag": (GOOD, BAD), "recontextualise": (UNSAFE,)}.get(config.do, ()):
            if len(tok.encode(tag)) > TAG_IDS:
                raise DataError(
                    f"the vocabulary of {tok.vocab_size} spells {tag} in {len(tok.encode(tag))} tokens, more "
                    f"than {TAG_IDS}: it is not learnt. Raise [tokenizer] vocab_size, or tag more documents"
                )
        if self.rewritten:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rewritten)
            write_text(self.run.path / "rephrased.jsonl", lines)
        about = {k: getattr(config, k) for k in ("by", "threshold", "do", "asked_under")}
        write_json(self.run.path / "values.json", {**about, "shards": self.counts})


@contextmanager
def writing(
    config: RephraserConfig, run: RunFolder, folder: Path, seed: int
) -> Iterator[tuple[Engine, Rephraser]]:
    """The recipe's rephraser, ready to be asked: each text after the instruction, as a user's message."""

    def rephrase(engine: Engine, texts: Sequence[str]) -> list[str]:
        before = f"{config.ask}\n\n" if config.ask else ""
        prompts: list[Chat] = [[{"role": "user", "content": f"{before}{text}"}] for text in texts]
        return engine.write(prompts, config.max_new_tokens, seed=seed)

    if config.path is not None:
        at = Path(config.path)
        found = locate(at if at.is_absolute() else folder / at)
        engine = LocalEngine(found.model, found.tokenizer, name=config.path)
        yield engine, lambda texts: rephrase(engine, texts)
        return
    with EndpointEngine(
        str(config.url), str(config.model), cache=run.path / "rephrasing.jsonl", key_env=config.key_env
    ) as far:
        yield far, lambda texts: rephrase(far, texts)


def check_plan(config: StageConfig, plan: DataPlan) -> None:
    """RecipeError for a stage of preferences whose shards are all good, or all bad."""
    if config.objective not in OBJECTIVES:
        return
    bad = [name for name in plan.shards if name.endswith(OF_BAD)]
    if not bad or len(bad) == len(plan.shards):
        lacks = "no shard of bad documents (NAME-bad)" if not bad else "none but shards of bad documents"
        raise RecipeError(
            f"stage {config.name}: {config.objective} compares good with bad, and its `shards` name {lacks}; "
            f"it draws from {', '.join(plan.shards)}"
        )


def objectives_of(values: ValuesConfig | None) -> dict[str, Objective]:
    """The objectives of a recipe beside those that every run has."""
    return {} if values is None else objectives(values.alpha, values.beta)
