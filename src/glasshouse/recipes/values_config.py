"""`[data] values` of a recipe: by what documents are told apart before training, and what is done then.

    [data]
    text = ["crawl.jsonl"]                         # rows {"text": ..., "score": 0.93}
    values = { by = "score", threshold = 0.5, do = "tag" }

What is done is `data.values`'; what is checked here is that every key has an effect and can work at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from glasshouse.base.config import Frozen
from glasshouse.base.errors import RecipeError
from glasshouse.data.values import GOOD
from glasshouse.train import StageConfig
from glasshouse.train.preferences import OBJECTIVES

ASK = (
    "Rewrite the text below so that reading it does no harm: keep what it is about, say what is wrong with "
    "it, and leave out whatever would help to do harm. Answer with the new text alone."
)


class RephraserConfig(Frozen):
    """Who rewrites unsafe texts: a model folder on this machine, or a model behind an endpoint."""

    path: str | None = Field(default=None, description="a run, a checkpoint or a Hugging Face folder")
    url: str | None = Field(default=None, description="of an OpenAI-compatible server, up to /v1")
    model: str | None = Field(default=None, description="what the server calls the model")
    key_env: str = Field(default="OPENAI_API_KEY", description="the variable that holds the access token")
    ask: str = Field(default=ASK, description="said before each text, with an empty line between; may be ''")
    max_new_tokens: int = Field(default=200, ge=1)

    @model_validator(mode="after")
    def _one(self) -> RephraserConfig:
        if (self.path is None) == (self.url is None) or (self.url is None) != (self.model is None):
            raise ValueError("a rephraser is either `path` or `url` with `model`")
        return self


# Keys that only some ways of using scores read, and what they are when they are not given.
_READ_BY = {
    "untagged": ("tag",),
    "alpha": ("split",),
    "beta": ("split",),
    "every": ("recontextualise",),
    "rephraser": ("recontextualise",),
}


class ValuesConfig(Frozen):
    """What documents of your own are worth, and what follows. A document is good from ``threshold`` on."""

    by: str = Field(default="score", min_length=1, description="key of a JSONL row that holds its number")
    threshold: float = Field(default=0.5, description="documents that score less are bad")
    do: Literal["tag", "filter", "split", "recontextualise"]
    unscored: Literal["refuse", "keep", "good"] = Field(
        default="refuse", description="shards without any score: an error, left as they are, or all good"
    )
    untagged: float = Field(default=0.01, ge=0, lt=1, description="tag: share of documents without a tag")
    alpha: float = Field(default=1.0, gt=0, description="split: weight of unlikelihood")
    beta: float = Field(
        default=1.0, gt=0, description="split: a bad row of reward_weighted counts exp(-1 / beta) of a good"
    )
    every: float = Field(
        default=0.05, ge=0, le=1, description="recontextualise: share of an unsafe text's words under its tag"
    )
    rephraser: RephraserConfig | None = None

    @model_validator(mode="after")
    def _effective(self) -> ValuesConfig:
        for key, ways in _READ_BY.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.do not in ways:
                raise ValueError(f"`{key}` has no effect on do = {self.do!r} (only on {', '.join(ways)})")
        if self.do == "recontextualise" and self.rephraser is None:
            raise ValueError(
                'do = "recontextualise" needs `rephraser`: { path = "model-folder" }, or '
                '{ url = "http://127.0.0.1:8000/v1", model = "name" }'
            )
        return self

    @property
    def asked_under(self) -> str:
        """The system message under which the trained model is judged and served; "" for none."""
        return GOOD if self.do == "tag" else ""


def check_values(
    values: ValuesConfig | None,
    text: Sequence[str],
    chat: Sequence[str],
    generated: Sequence[str],
    stages: Sequence[StageConfig],
    where: str,
) -> None:
    """RecipeError for values that no document can have, and for stages that nothing makes shards for.

    ``text`` and ``chat``: the recipe's own files; ``generated``: its sources that bring no scores.
    """
    for stage in stages:
        if stage.objective in OBJECTIVES and (values is None or values.do != "split"):
            raise RecipeError(
                f"{where}: stage {stage.name}: {stage.objective} reads shards of good and of bad documents "
                '(NAME-good, NAME-bad), which [data] values = { by = "score", threshold = 0.5, '
                'do = "split" } makes'
            )
        if stage.objective == "unlikelihood" and stage.z_loss:
            raise RecipeError(f"{where}: stage {stage.name}: z_loss has no effect on unlikelihood")
    if values is None:
        return
    if not (text or chat):
        raise RecipeError(
            f"{where}: [data] values tell documents apart by scores in their JSONL rows: name files of your "
            "own in [data] text or chat"
        )
    if values.do == "recontextualise" and chat:
        raise RecipeError(
            f"{where}: [data] values: only texts are rephrased and tagged; [data] chat names conversations"
        )
    if values.unscored == "refuse" and generated:
        raise RecipeError(
            f"{where}: [data] values: {' and '.join(generated)} bring no scores; leave them out, or say "
            'unscored = "good" or "keep"'
        )
