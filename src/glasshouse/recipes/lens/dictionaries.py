"""`lens.train`: a dictionary of features on one site of a model, judged on text it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.atomic import write_json, write_text
from glasshouse.base.errors import UsageError, VerificationError, suggest
from glasshouse.base.score import Score, bootstrap, rate
from glasshouse.interp.dictionaries import (
    ARCHITECTURES,
    Dictionary,
    DifferenceStream,
    LiveStream,
    Source,
    Trained,
    quality,
    spliced,
    token_kinds,
    train_dictionary,
)
from glasshouse.interp.dictionaries.config import TOP_K
from glasshouse.interp.dictionaries.quality import kept
from glasshouse.interp.dictionaries.stream import capture
from glasshouse.interp.formats import check_fits, read_saelens, read_sparsify, write_saelens
from glasshouse.interp.reading import sites_of
from glasshouse.page.result import result_page
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.lens.data import Rows, Target, about, opened, text_rows
from glasshouse.recipes.lens.report import Finding
from glasshouse.train import Progress
from glasshouse.train.memory import available_bytes

COPIES = (
    6  # of a dictionary's numbers while it trains: weights, gradients, two moments, a checkpoint, a spare
)
K = 16


def train(
    model: Target,
    site: str,
    *,
    architecture: str = "topk",
    width: int = 1024,
    k: int | None = None,
    to: str | None = None,
    text: str | Path | None = None,
    tokens: int = 500_000,
    against: Target | None = None,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Finding[Dictionary]:
    """Train a dictionary of ``width`` features on ``site`` and judge it on held-out text.

    ``to``: the site that a transcoder writes. ``against``: an earlier checkpoint; the dictionary is then of
    what changed between the two. ``tokens``: activations seen in training. ``out``: a new SAELens folder;
    beside it, at ``<out>.run``, lies the training's own run, which ``resume`` goes on with.
    Raises UsageError for a site that does not exist, a dictionary larger than memory, or an ``out`` that is
    there; DataError for too little text or activations that are not finite.
    """
    found = opened(model)
    site = one_site(found, site)
    config = config_of(architecture, site, width, k, to)
    check_memory(found, config, batch_size)
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists():
        raise UsageError(f"{folder} is there already; name a new folder (or judge it: --check {folder})")
    rows = text_rows(found, text, tokens)
    source = source_of(found, rows.train, config, against, batch_size, seed)
    done = train_dictionary(
        source,
        site,
        config,
        steps=max(1, tokens // batch_size),
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        save_every=max(1, tokens // batch_size // 10),
        log_every=max(1, tokens // batch_size // 100),
        device=device,
        run=None if folder is None else f"{folder}.run",
        resume=resume,
        progress=progress,
    )
    judged = judge(found, done.dictionary, rows, against=against, trained=done)
    return judged if folder is None else written(judged, folder)


def check(
    model: Target, folder: str | Path, *, site: str | None = None, text: str | Path | None = None
) -> Finding[Dictionary]:
    """Judge a SAELens or sparsify folder on a model that it must fit: by digest, site and width.

    CheckpointError when it does not, or is damaged.
    """
    found, folder = opened(model), Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give a SAELens or a sparsify folder")
    here = None if site is None else one_site(found, site)
    if (folder / "sae.safetensors").is_file():
        dictionary = read_sparsify(folder, model=found.model, site=here)
    else:
        dictionary = read_saelens(folder, model=found.model, site=here)
    check_fits(dictionary, found.model, site=here)
    if not dictionary.config.site:
        raise UsageError(f"{folder} does not say which site it reads: give --site")
    return judge(found, dictionary, text_rows(found, text, 1), name=folder.name)


def one_site(found: Loaded, site: str) -> str:
    """The one site that a name means; UsageError with the nearest names otherwise."""
    if site.endswith(".mlp_in") and site.replace("mlp_in", "mlp_pre") in found.model.sites():
        return site  # what an MLP reads: made from the stream, for transcoders
    sites = sites_of(found.model, site)
    if len(sites) != 1:
        raise UsageError(f"{site!r} is {len(sites)} sites; a dictionary reads one, such as {sites[0]!r}")
    return sites[0]


def config_of(architecture: str, site: str, width: int, k: int | None, to: str | None) -> dict[str, Any]:
    """The dictionary's config, as far as it is known without the model. UsageError for what does not fit."""
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"no architecture {architecture!r}.{suggest(architecture, ARCHITECTURES)} "
            f"There are {', '.join(ARCHITECTURES)}"
        )
    if k is not None and architecture not in TOP_K:
        raise UsageError(f"--k is for {', '.join(TOP_K)}; {architecture} has none")
    config: dict[str, Any] = {"architecture": architecture, "site": site, "d_sae": width}
    if architecture in TOP_K:
        config["k"] = min(K, width) if k is None else k
    if architecture == "matryoshka":
        config["prefixes"] = tuple(
            sorted({max(1, width // 8), max(1, width // 4), max(1, width // 2), width})
        )
    return config if to is None else config | {"site_out": to}


def check_memory(found: Loaded, config: Mapping[str, Any], batch_size: int) -> None:
    """UsageError when the dictionary and one batch of its features do not fit into memory, naming what would.

    Activations are streamed and never all in memory; the dictionary and a batch are.
    """
    free, d_in = available_bytes(), found.model.config.d_model
    per_feature = 4 * (2 * d_in * COPIES + 3 * batch_size)
    if free is not None and config["d_sae"] * per_feature > free:
        most = free // per_feature
        raise UsageError(
            f"{config['d_sae']:,} features of width {d_in} need about "
            f"{config['d_sae'] * per_feature / 1e9:,.1f} GB while they train and {free / 1e9:,.1f} GB are "
            f"free: at most about {most:,} fit (--width); or fewer activations at once (--batch)"
        )


def source_of(
    found: Loaded,
    rows: Tensor,
    config: Mapping[str, Any],
    against: Target | None,
    batch_size: int,
    seed: int,
) -> Source:
    """Activations to train on, read when they are needed."""
    sites = [config["site"], *([config["site_out"]] if "site_out" in config else [])]
    if against is None:
        return LiveStream(found.model, rows, sites, batch_size=batch_size, seed=seed)
    before = opened(against)
    if before.tokenizer.digest() != found.tokenizer.digest():
        raise UsageError(
            "the two models have different tokenizers; a difference needs the same tokens in both"
        )
    return DifferenceStream(
        before.model, found.model, rows, sites, mode="difference", batch_size=batch_size, seed=seed
    )


def judge(
    found: Loaded,
    dictionary: Dictionary,
    rows: Rows,
    *,
    against: Target | None = None,
    trained: Trained | None = None,
    name: str = "",
) -> Finding[Dictionary]:
    """The dictionary with its quality on held-out rows."""
    config, notes = dictionary.config, list[str]()
    facts = about(
        found,
        site=config.site if config.site_out is None else f"{config.site} to {config.site_out}",
        dictionary=f"{config.architecture}, {config.d_in} to {config.d_sae} features"
        + (f", k {config.k}" if config.k else ""),
        text=rows.source,
    )
    if against is not None:
        facts["against"] = opened(against).checkpoint
        scores, measured = difference_quality(found, dictionary, rows.held, against)
        notes.append("A difference has no place in one model: loss recovered is not defined for it.")
    else:
        scores, measured = site_quality(found, dictionary, rows.held, notes)
    facts["judged_on"] = measured
    title = f"Dictionary {name}".strip() + f" of {facts['site']}"
    data = {"config": config.model_dump(mode="json")}
    parts = () if trained is None else (trained,)
    return Finding(title, dictionary, list(scores.items()), facts, data, parts, notes)


def site_quality(
    found: Loaded, dictionary: Dictionary, held: Tensor, notes: list[str]
) -> tuple[dict[str, Score], str]:
    """`quality`, with concepts where the text is enough for them."""
    with suppress(VerificationError):
        judged = quality(dictionary, found.model, held, concepts=token_kinds(found.tokenizer, held))
        return judged.scores, judged.measured
    try:
        judged = quality(dictionary, found.model, held)
        notes.append("Sparse probing and absorption were not measured: too little text for the token kinds.")
        return judged.scores, judged.measured
    except VerificationError as error:
        scores = kept(spliced(found.model, held, dictionary))  # raises again if nothing at all can be said
        notes.append(f"Of loss and concepts nothing was measured: {error}.")
        return scores, f"{dictionary.config.site}, {len(held)} rows, {held.numel()} positions"


@torch.no_grad()
def difference_quality(
    found: Loaded, dictionary: Dictionary, held: Tensor, against: Target
) -> tuple[dict[str, Score], str]:
    """Variance explained, L0 and dead share of a difference dictionary, row by row."""
    config, models = dictionary.config, [opened(m).model for m in (against, found)]

    def change(rows: Tensor) -> Tensor:
        """What changed [positions, width] on some rows."""
        before, after = (capture(m, rows.to(m.device), [config.site])[config.site] for m in models)
        return (after - before).float().cpu().flatten(0, 1)

    missed, spread, active = (np.zeros(len(held)) for _ in range(3))
    fired = torch.zeros(config.d_sae, dtype=torch.bool)
    middle = torch.stack([change(part).mean(0) for part in held.split(1)]).mean(0)
    for number, row in enumerate(held.split(1)):
        x = change(row)
        features = dictionary.encode(x)
        missed[number] = float((x - dictionary(x)).square().sum())
        spread[number] = float((x - middle).square().sum())
        active[number] = float((features != 0).sum()) / len(x)
        fired |= (features != 0).any(0)

    def explained(at: np.ndarray) -> float:
        i = at.astype(int)
        return float(1 - missed[i].sum() / max(spread[i].sum(), 1e-30))

    scores = {
        "variance explained": bootstrap(np.arange(len(held)), explained),
        "L0": bootstrap(active),
        "dead": rate(int((~fired).sum()), config.d_sae),
    }
    return scores, f"{config.site}, {len(held)} rows, {held.numel()} positions"


def written(judged: Finding[Dictionary], folder: Path) -> Finding[Dictionary]:
    """Write the SAELens folder, with our numbers and page in it, which other loaders pass over."""
    write_saelens(folder, judged.found, model_name=str(judged.about["model"]))
    write_json(folder / "quality.json", judged.to_dict())
    write_text(folder / "quality.html", result_page(judged.title, judged.markup()))
    return judged
