"""Train dictionaries: `train_dictionary` for one, `train_dictionaries` for several on the same activations.

    trained = train_dictionary(
        model, "blocks.1.resid_post", {"architecture": "topk", "d_sae": 1024, "k": 16}, tokens=rows, steps=500
    )
    trained.dictionary

With ``run`` the training is a run like any other: a folder with ledger, metrics and checkpoints, which gates
can judge and which a killed process resumes bit for bit. Without, it happens in a temporary folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.config import Frozen, parse
from glasshouse.base.digest import digest_of
from glasshouse.base.errors import UsageError
from glasshouse.base.keys import signing_key
from glasshouse.base.ledger import Ledger
from glasshouse.base.plan import DataPlan, Phase
from glasshouse.base.run import RunFolder
from glasshouse.draw import Axes, Series, line_chart, styled, table
from glasshouse.interp.dictionaries.bank import Bank, BankTrainee, Sites, bank_loss, read_dictionaries, warm
from glasshouse.interp.dictionaries.config import DictionaryConfig
from glasshouse.interp.dictionaries.core import ActivationBatch, Dictionary
from glasshouse.interp.dictionaries.start import fit_start
from glasshouse.interp.dictionaries.stream import LiveStream, Source, StoreStream, TensorStream
from glasshouse.interp.reading.store import ActivationStore
from glasshouse.model.digest import weights_digest
from glasshouse.train import (
    Gate,
    Progress,
    Settings,
    Stage,
    StageConfig,
    enter_run,
    environment,
    run_stages,
)

SAMPLE = 4096  # activations that set scales and the first b_dec


class TrainingConfig(Frozen):
    """How long and how fast. ``lr`` None: 2e-4 / sqrt(d_sae / 2^14) for each (the rule of Gao et al. 2024,
    sec. 3, that rates fall with the root of the width, with sparsify's constant).
    """

    steps: int = 1000
    batch_size: int = 4096
    lr: float | None = None
    clip_norm: float | None = 1.0
    warmup_share: float = 0.05
    decay_share: float = 0.2
    resample_every: int = 0
    save_every: int = 0
    gate_every: int = 0
    log_every: int = 50
    seed: int = 0
    dtype: str = "fp32"
    device: str = "cpu"

    def rate(self, config: DictionaryConfig) -> float:
        """The peak learning rate of a dictionary."""
        return self.lr if self.lr is not None else 2e-4 / (config.d_sae / 2**14) ** 0.5

    def stage(self) -> StageConfig:
        """As a stage of the loop."""
        shared = ("steps", "batch_size", "clip_norm", "warmup_share", "decay_share")
        numbers = {name: getattr(self, name) for name in (*shared, "gate_every", "save_every", "log_every")}
        # A loss far out of the ordinary may be one of several dictionaries'; what is not finite never counts.
        fixed = {"optimizer": "adamw", "adam_beta2": 0.999, "weight_decay": 0.0, "on_spike": "log"}
        named = {"name": "dictionary", "objective": "dictionary", "monitor_every": 0}
        return parse(StageConfig, numbers | fixed | named, "train_dictionaries")


@dataclass(frozen=True)
class Trained:
    """Dictionaries by name, the rows of metrics.jsonl, and the run's folder if it was kept."""

    dictionaries: dict[str, Dictionary]
    rows: list[dict[str, Any]]
    run: Path | None = None

    @property
    def dictionary(self) -> Dictionary:
        """The only dictionary. UsageError when there are several."""
        if len(self.dictionaries) != 1:
            raise UsageError(
                f"there are {len(self.dictionaries)}: take one of {', '.join(self.dictionaries)}"
            )
        return next(iter(self.dictionaries.values()))

    def _repr_html_(self) -> str:
        """Variance explained over training, and what every dictionary ended with."""
        rows = [row for row in self.rows if row["kind"] == "train"]
        alone = len(self.dictionaries) == 1
        lines, ends = [], []
        for i, (name, dictionary) in enumerate(self.dictionaries.items()):
            before = "" if alone else f"{name}/"
            points = [(float(row["update"]), row[f"{before}variance_explained"]) for row in rows]
            lines.append(Series(name, tuple(points), i))
            last = {key: rows[-1][f"{before}{key}"] for key in ("variance_explained", "l0", "dead")}
            ends.append((name, dictionary.config.architecture, *(f"{value:.3f}" for value in last.values())))
        head = ("dictionary", "architecture", "variance explained", "L0", "dead")
        axes = Axes("step", "variance explained")
        chart = line_chart(lines, "Training", "variance explained by each dictionary, by step", axes)
        return styled(chart, table(head, ends, "on the last batches", numeric=(2, 3, 4)))


def train_dictionary(
    data: Any,
    site: str,
    config: DictionaryConfig | Mapping[str, Any],
    *,
    tokens: Any = None,
    start: Dictionary | None = None,
    **how: Any,
) -> Trained:
    """Train one dictionary on the activations of ``site``; see `train_dictionaries`.

    ``config`` as a mapping may leave out ``site``, ``d_in`` and ``d_out``; with ``site_out`` it is a
    transcoder. Activations are then scaled to mean norm sqrt(d_in) unless it says otherwise.
    """
    whole = config.model_dump() if isinstance(config, DictionaryConfig) else dict(config)
    whole["site"] = whole.get("site") or site
    if whole["site"] != site:
        raise UsageError(f"the config says site {whole['site']!r}, the call {site!r}: give one of them")
    starts = None if start is None else {"main": start}
    return train_dictionaries(data, {"main": whole}, tokens=tokens, starts=starts, **how)


def train_dictionaries(
    data: Any,
    configs: Mapping[str, DictionaryConfig | Mapping[str, Any]],
    *,
    tokens: Any = None,
    starts: Mapping[str, Dictionary] | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    **training: Any,
) -> Trained:
    """Train every dictionary of ``configs`` on one stream of activations, each as if it were alone.

    ``data``: a model (with ``tokens`` int64 [n, pos]), an `ActivationStore`, {site: activations [n, width]},
    or any `Source`. ``starts``: earlier dictionaries to go on from. Further arguments: `TrainingConfig`'s.
    Raises UsageError for a site that does not exist or does not fit, DataError for activations that are not
    finite, TrainingError when the loss is not several times in a row, and what `run_stages` raises.
    """
    how = parse(TrainingConfig, training, "train_dictionaries")
    source = as_source(data, sites_of(configs), tokens, how)
    complete = {name: completed(config, source) for name, config in configs.items()}
    if source.batch_size != how.batch_size:
        how = how.model_copy(update={"batch_size": source.batch_size})
    with ExitStack() as stack:
        kept = Path(run) if run is not None else None
        home = None if kept else stack.enter_context(tempfile.TemporaryDirectory())
        folder = RunFolder(kept or Path(str(home)) / "run").create()
        stack.enter_context(folder.lock())
        ledger = Ledger(folder.ledger, signing_key(home))
        settings = Settings(how.dtype, threads=torch.get_num_threads(), device=how.device)
        recipe = _recipe(complete, how, source, starts or {})
        now = environment(settings.threads, how.dtype, settings.muon_dtype, device=how.device)
        begun = len(ledger) > 0
        enter_run(ledger, recipe_digest=recipe, environment=now, resume=resume and begun)
        rates = {name: how.rate(config) for name, config in complete.items()}
        outcome = run_stages(
            lambda: first(complete, source, how.seed, starts or {}, fit=not begun),
            [_stage(how, source)],
            run=folder,
            ledger=ledger,
            gate=gate,
            seed=how.seed,
            settings=settings,
            resume=resume,
            progress=progress,
            objectives={"dictionary": bank_loss},
            trainee=BankTrainee(rates, how.resample_every, how.seed),
        )
        rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        found = read_dictionaries(outcome.checkpoint)
    return Trained({name: found[name].eval() for name in complete}, rows, kept)


def sites_of(configs: Mapping[str, DictionaryConfig | Mapping[str, Any]]) -> list[str]:
    """Every site that a config reads or writes. UsageError when one names none."""
    if not configs:
        raise UsageError("there is no dictionary to train: give at least one config")
    sites: list[str] = []
    for name, config in configs.items():
        whole = config.model_dump() if isinstance(config, DictionaryConfig) else config
        if not whole.get("site"):
            raise UsageError(f"dictionary '{name}' does not say which site it reads: set site")
        sites += [whole["site"], *([whole["site_out"]] if whole.get("site_out") else [])]
    return list(dict.fromkeys(sites))


def as_source(data: Any, sites: Iterable[str], tokens: Any, how: TrainingConfig) -> Source:
    """``data`` as a stream of activations of ``sites``."""
    sites, size = list(sites), how.batch_size
    if isinstance(data, ActivationStore):
        return StoreStream(data, sites, batch_size=size, seed=how.seed)
    if isinstance(data, Mapping):
        return TensorStream(data, batch_size=size, seed=how.seed)
    if hasattr(data, "digests") and hasattr(data, "batch"):
        source: Source = data
        return source
    if not hasattr(data, "sites"):
        raise UsageError(
            f"cannot read activations from a {type(data).__name__}: give a model, store or source"
        )
    if tokens is None:
        raise UsageError("to read activations from a model, give rows of tokens [n, pos] as tokens=")
    return LiveStream(data, tokens, sites, batch_size=size, seed=how.seed)


def completed(config: DictionaryConfig | Mapping[str, Any], source: Source) -> DictionaryConfig:
    """``config`` with widths and model digest of ``source``. UsageError when they differ."""
    whole = config.model_dump() if isinstance(config, DictionaryConfig) else dict(config)
    if not isinstance(config, DictionaryConfig):
        whole.setdefault("normalize_activations", "expected_average_only_in")
    written = whole.get("site_out") or (whole["site"] if whole.get("d_out") else None)
    for key, site in (("d_in", whole["site"]), ("d_out", written)):
        if site is None:
            continue
        if site not in source.widths:
            raise UsageError(f"the activations have no site {site!r}, only {', '.join(source.widths)}")
        if whole.setdefault(key, source.widths[site]) != source.widths[site]:
            raise UsageError(f"{key} is {whole[key]}, but {site} is {source.widths[site]} wide")
    if whole.get("model_digest", "") not in ("", source.model_digest):
        raise UsageError(
            f"the config is for a model with weights {whole['model_digest'][:12]}..., the activations are of "
            f"{source.model_digest[:12]}...: leave model_digest out, or read that model"
        )
    return parse(DictionaryConfig, {**whole, "model_digest": source.model_digest}, f"site {whole['site']}")


def first(
    configs: Mapping[str, DictionaryConfig],
    source: Source,
    seed: int,
    starts: Mapping[str, Dictionary],
    fit: bool,
) -> Bank:
    """The dictionaries before the first update. ``fit``: look at activations for scales and middles; not
    needed where a checkpoint will take their place.
    """
    acts = source.batch(0) if fit else {}
    made = {}
    for name, config in configs.items():
        dictionary = Dictionary(config).init_weights(seed)
        if name in starts:
            warm(dictionary, starts[name])
        elif fit:
            here = Sites({site: x[:SAMPLE] for site, x in acts.items()}).of(config)
            fit_start(dictionary, ActivationBatch(here.x.cpu(), None if here.y is None else here.y.cpu()))
        made[name] = dictionary
    return Bank(made)


def _stage(how: TrainingConfig, source: Source) -> Stage:
    digests = source.digests()
    plan = DataPlan(phases=(Phase(from_step=0, weights=dict.fromkeys(digests, 1.0)),), digests=digests)
    names = tuple(sorted(digests))
    return Stage(how.stage(), lambda step, _: Sites(source.batch(step), names), plan)


def _recipe(
    configs: Mapping[str, DictionaryConfig],
    how: TrainingConfig,
    source: Source,
    starts: Mapping[str, Dictionary],
) -> str:
    """The digest of all that decides the run's bits."""
    unknown = sorted(starts.keys() - configs.keys())
    if unknown:
        raise UsageError(f"a start for '{unknown[0]}', which is not among {', '.join(configs)}")
    return digest_of(
        {
            "configs": {name: config.model_dump(mode="json") for name, config in configs.items()},
            "training": how.model_dump(mode="json"),
            "activations": source.digests(),
            "starts": {name: weights_digest(d) for name, d in starts.items()},
        }
    )
