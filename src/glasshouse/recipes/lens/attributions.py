"""`lens.attribute`: which parts, tokens and layers an answer comes from, and which heads do induction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.errors import DataError, UsageError, suggest
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import clean
from glasshouse.interp.attribution import (
    Effects,
    attribution_patching,
    direct_logit_attribution,
    fit_tuned_lens,
    induction_scores,
    integrated_gradients,
    logit_lens,
    patch_activations,
)
from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.lens.data import (
    HELD,
    Target,
    about,
    digest_of_rows,
    first_token,
    ids_of,
    last_logits,
    opened,
    padded,
    text_rows,
)
from glasshouse.recipes.lens.report import Finding
from glasshouse.recipes.lens.tasks import ordinary

SHOWN = 20  # effects in the table, the largest
STEPS = 250  # of a tuned lens
LENS_TOKENS = 100_000  # that a tuned lens is fitted on
WORDS = 20  # positions of a text that the picture of a lens has room for

Rows = list[tuple[str, Score | str]]


@dataclass(frozen=True)
class Asked:
    """Prompts and the answer looked at: ``tokens`` [n, pos] padded on the right, ``at`` [n] their last ones,
    ``right`` and ``wrong`` [n] the answers' first tokens (wrong None: the mean of all tokens).
    """

    found: Loaded
    texts: Sequence[str]
    tokens: Tensor
    at: Tensor
    right: Tensor
    wrong: Tensor | None
    told: str

    @property
    def metric(self) -> LogitDifference:
        """Logit of the right answer less that of the wrong one, or less the mean over the vocabulary."""
        every = torch.arange(self.found.model.config.vocab_size).expand(len(self.at), -1)
        return LogitDifference(self.right, every if self.wrong is None else self.wrong, self.at)


def attribute(
    model: Target,
    texts: str | Sequence[str] = (),
    *,
    method: str = "dla",
    target: str | None = None,
    wrong: str | None = None,
    corrupt: str | Sequence[str] = (),
    text: str | Path | None = None,
    chat: bool = False,
    seed: int = 0,
) -> Finding[Any]:
    """Attribute an answer after ``texts`` to parts of the model.

    ``method``: one of `METHODS`. ``target``: the answer, by its first token (default: what the model itself
    puts first); ``wrong``: what it is compared with. ``corrupt``: a twin of each text, of as many tokens, for
    "patching". ``text``: a file for the lenses' rows (default the run's data, else the packaged books).
    Intervals are over texts: one text has none. DataError for a text longer than the context or empty;
    UsageError for an unknown method or what a method lacks.
    """
    found = opened(model)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise UsageError(f"no method {method!r}.{suggest(method, METHODS)} There are {known}")
    given, twins = ([x] if isinstance(x, str) else list(x) for x in (texts, corrupt))
    if method in ("induction", "logit-lens", "tuned-lens"):
        return METHODS[method](found, given, text, chat, seed)
    if not given:
        raise UsageError(f"{method} needs a text: --text TEXT, more than once for intervals")
    asked = prompts(found, given, target, wrong, chat)
    if method == "patching":
        return patching(asked, twins, wrong, chat)
    return METHODS[method](asked)


def prompts(found: Loaded, texts: Sequence[str], target: str | None, wrong: str | None, chat: bool) -> Asked:
    """Texts as tokens, with the answer looked at."""
    rows = [ids_of(found, t, f"text {i + 1}", chat=chat) for i, t in enumerate(texts)]
    tokens, at = padded(rows)
    logits = last_logits(found.model, rows)
    if not torch.isfinite(logits).all():
        raise UsageError("the model's logits are not finite numbers: look for NaN in its weights")
    if target is None:
        right = logits.argmax(-1)
        told = "the model's own first choice: " + ", ".join(
            dict.fromkeys(repr(found.tokenizer.decode([i])) for i in right.tolist())
        )
    else:
        right = torch.full((len(rows),), first_token(found, target, "--target"))
        told = repr(found.tokenizer.decode([int(right[0])], specials=True))
        if len(found.tokenizer.encode(target)) > 1:
            told += f", the first token of {target!r}"
    other = None if wrong is None else torch.full((len(rows),), first_token(found, wrong, "--wrong"))
    told += " less the mean of all tokens" if wrong is None else f" less {wrong!r}"
    if other is not None and bool((other == right).any()):
        raise UsageError(f"{wrong!r} begins with the very token that is asked about")
    return Asked(found, texts, tokens, at, right, other, told)


def top(effects: Effects) -> Rows:
    """The largest effects; one text has no interval."""
    return list(effects.top(SHOWN).items())


def dla(asked: Asked) -> Finding[Any]:
    """What every part writes straight into the answer's logit."""
    wrong = asked.metric.wrong
    made = direct_logit_attribution(asked.found.model, asked.tokens, asked.right, wrong, asked.at)
    rows: Rows = [("all parts together", bootstrap(made.total.double().cpu().numpy())), *top(made)]
    notes = [f"The parts add up to the whole within {made.inexact:.1g} logits."]
    return finding(asked, made, rows, "Direct logit attribution", made.method, notes)


def gradients(asked: Asked) -> Finding[Any]:
    """Which tokens of each text the answer comes from."""
    words = [
        asked.found.tokenizer.decode([i], specials=True) for i in range(asked.found.tokenizer.vocab_size)
    ]
    rows, parts = Rows(), list[Any]()
    metric = asked.metric
    for number in range(len(asked.texts)):
        n = int(asked.at[number]) + 1
        mine = LogitDifference(metric.right[[number]], metric.wrong[[number]], asked.at[[number]])
        made = integrated_gradients(
            asked.found.model, asked.tokens[[number], :n], mine, words=words, most_steps=256
        )
        parts.append(made)
        before = f"text {number + 1}, " if len(asked.texts) > 1 else ""
        rows.append((f"{before}incomplete by (share)", made.incomplete))
        for t, value in enumerate(made.values[0].tolist()):
            name = f"{before}{t} {clean(words[int(asked.tokens[number, t])])!r}"
            rows.append((name, Score(value, value, value, 1)))
    method = "integrated gradients at embed, baseline mean of the text's embeddings"
    notes = ["Of one text each: values have no interval; how far they are from adding up is 'incomplete'."]
    return finding(asked, tuple(parts), rows, "Integrated gradients", method, notes, parts)


def patching(asked: Asked, twins: Sequence[str], wrong: str | None, chat: bool) -> Finding[Any]:
    """Which heads and MLPs restore the answer when they come from the clean text."""
    found = asked.found
    if len(twins) != len(asked.texts):
        raise UsageError(
            f"patching needs a corrupted twin of every text: {len(asked.texts)} texts and {len(twins)} twins "
            "(--corrupt)"
        )
    rows = [ids_of(found, t, f"corrupt {i + 1}", chat=chat) for i, t in enumerate(twins)]
    for i, row in enumerate(rows):
        if len(row) != int(asked.at[i]) + 1:
            raise DataError(
                f"text {i + 1} has {int(asked.at[i]) + 1} tokens and its twin {len(row)}: patching needs the "
                "same number; choose words of as many tokens"
            )
    tokens, _ = padded(rows)
    metric = asked.metric
    if wrong is None:
        first = last_logits(found.model, rows).argmax(-1)
        if not bool((first == asked.right).any()):
            metric = LogitDifference(asked.right, first, asked.at)
            told = asked.told.replace("the mean of all tokens", "the first choice after the corrupted twin")
            asked = replace(asked, told=told)
    data = Contrast(asked.tokens, tokens, metric)
    exact = patch_activations(found.model, data)
    estimate = attribution_patching(found.model, data)
    table: Rows = top(exact)
    if len(exact.names) >= 3:
        table.append(("attribution patching, correlation with exact", estimate.correlation(exact)))
    parts = (exact, estimate)
    return finding(asked, exact, table, "Activation patching", exact.method, (), parts)


def lens(found: Loaded, texts: Sequence[str], text: Any, chat: bool, seed: int, tuned: bool) -> Finding[Any]:
    """What the model would say if it stopped after each layer, on held-out rows; of texts, a picture."""
    data = text_rows(found, text, LENS_TOKENS if tuned else 1, seed)
    rows = data.held[:HELD]
    made = logit_lens(found.model, rows)
    table: Rows = [(f"KL to the final prediction: {s}", v) for s, v in made.kl_scores().items()]
    fitted, parts, found_thing = None, [made], made
    if tuned:
        fitted = fit_tuned_lens(found.model, data.train, steps=STEPS, seed=seed)
        better = logit_lens(found.model, rows, fitted)
        table += [(f"tuned lens: {s}", v) for s, v in better.kl_scores().items()]
        table += [(f"nearer by, nats: {s}", v) for s, v in better.gain_over(made).items()]
        parts, found_thing = [made, better], better
    for i, shown in enumerate(texts):
        ids = torch.tensor([ids_of(found, shown, f"text {i + 1}", chat=chat)])
        parts.append(logit_lens(found.model, ids, fitted, decode=lambda i: found.tokenizer.decode([i], True)))
    name = "Tuned lens" if tuned else "Logit lens"
    facts = about(found, method=name, rows=len(rows), positions=rows.numel(), text=data.source)
    return Finding(
        name, found_thing, table, facts, {}, parts, ["In nats; the last layer is 0 by definition."]
    )


def logit(found: Loaded, texts: Sequence[str], text: Any, chat: bool, seed: int) -> Finding[Any]:
    """`lens` through the model's own norm and head."""
    return lens(found, texts, text, chat, seed, False)


def tuned(found: Loaded, texts: Sequence[str], text: Any, chat: bool, seed: int) -> Finding[Any]:
    """`lens` through maps fitted on the rows to train on."""
    return lens(found, texts, text, chat, seed, True)


def induction(found: Loaded, texts: Sequence[str], text: Any, chat: bool, seed: int) -> Finding[Any]:
    """Which heads find what followed the last time, and copy it."""
    made = induction_scores(found.model, first=found.tokenizer.bos, pool=ordinary(found), seed=seed)
    first, second = made.loss
    heads = made.heads()
    table: Rows = [("induction heads", ", ".join(heads) or "none")]
    table += [("nats a token, first half", first), ("nats a token, second half", second)]
    matched = made.prefix.scores()
    for head in sorted(matched, key=lambda h: -matched[h].value)[:8]:
        table += [
            (f"{head} prefix matching", matched[head]),
            (f"{head} copying, logits", made.copying[head]),
            (f"{head} ablated, nats lost", made.ablation[head]),
        ]
    for name, whole in (("those heads together", made.together), ("as many others", made.others)):
        if whole is not None:
            table.append((f"{name} ablated, nats lost", whole[whole.names[0]]))
    facts = about(found, method=made.prefix.method, ablation="mean over rows", rows=made.prefix.n)
    return Finding("Induction heads", made, table, facts, {"heads": heads}, (made,))


def finding(
    asked: Asked,
    made: Any,
    rows: Rows,
    title: str,
    method: str,
    notes: Sequence[str] = (),
    parts: Sequence[Any] | None = None,
) -> Finding[Any]:
    """A result on prompts."""
    digest = digest_of_rows([{"text": t} for t in asked.texts])
    facts = about(asked.found, method=method, answer=asked.told, texts=len(asked.texts), data=digest)
    only = ["One text: no intervals. Give --text more than once."] if len(asked.texts) == 1 else []
    kept = [n for n in (*notes, *only) if not (only and n.startswith("Of one text"))]
    return Finding(title, made, rows, facts, {}, (made,) if parts is None else parts, kept)


METHODS: dict[str, Callable[..., Finding[Any]]] = {
    "dla": dla,
    "logit-lens": logit,
    "tuned-lens": tuned,
    "ig": gradients,
    "patching": patching,
    "induction": induction,
}
