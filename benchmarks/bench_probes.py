"""Probes and composition: equal to scikit-learn, controlled, causal; combining told from adding up.

    .venv/bin/python benchmarks/bench_probes.py [--seeds 10 11 12] [--skip-language]

Small models are grown here. Words in a made-up grid: answers by a match of two classes ("match"), by "A and
B" ("and"), and two bags of words whose log-odds are a sum of a score per word: one with other answers ("bag")
and one with the very answers of "and" ("sum"). The closed language: an honest model, and one whose refusals
follow a sum over the action's and the object's class. Prints a table and writes
`benchmarks/results/probes.json`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import row, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from glasshouse.base.rng import generator
from glasshouse.base.score import Score, bootstrap
from glasshouse.data import workshop
from glasshouse.evals.subject import Subject, padded_batches
from glasshouse.interp.probes import (
    CompositionReport,
    Effect,
    Grid,
    ProbeConfig,
    ProbeReport,
    bag_of_words,
    composition_report,
    fit_probe,
    probe_report,
)
from glasshouse.interp.probes.grid import Variable
from glasshouse.interp.probes.rows import folds, grouped
from glasshouse.model import GPT, GPTConfig, Taps
from glasshouse.model.digest import weights_digest
from interp.probes.combos import BOTH, MATCH, grid, grown
from planted.grown import Nursery, fresh, nursery, right

Rows = list[dict[str, Any]]
CLASSES = list(workshop.ACTIONS)
SCORE = {"wet": -1.0, "heat": 0.0, "shake": 1.0}  # of the bag of words in the closed language


def score(values: Sequence[float]) -> dict[str, Any]:
    """Interval over seeds as columns of a row."""
    s = bootstrap(list(values))
    return {"low": s.low, "high": s.high, "n": s.n}


def parity(rows: Rows, seeds: Sequence[int]) -> None:
    """Against scikit-learn on the same folds: which penalty, and how far the log-odds are apart."""
    from sklearn.linear_model import LogisticRegressionCV, Ridge
    from sklearn.preprocessing import StandardScaler

    same, apart, ridge_apart, ours, theirs = 0, list[float](), list[float](), list[float](), list[float]()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        key = np.arange(600) % 150
        y, x = key % 2 == 0, rng.standard_normal((600, 96)) @ rng.standard_normal((96, 96)) / 8
        x[:, :8] += np.where(y, 0.5, -0.5)[:, None]
        keys, config = [str(k) for k in key], ProbeConfig()
        parts = folds(y, grouped(keys, 600), 5)
        began = time.perf_counter()
        mine = fit_probe(x, y, config, groups=keys)
        ours.append(time.perf_counter() - began)
        scaler = StandardScaler().fit(x)
        peer = LogisticRegressionCV(
            Cs=list(config.strengths), cv=parts, scoring="neg_log_loss", tol=1e-10, max_iter=20_000,
            l1_ratios=(0.0,), use_legacy_attributes=False,
        )  # fmt: skip
        began = time.perf_counter()
        peer.fit(scaler.transform(x), y)
        theirs.append(time.perf_counter() - began)
        same += math.isclose(mine.strength or 0, float(peer.C_))
        apart.append(float(np.abs(mine.score(x) - peer.decision_function(scaler.transform(x))).max()))
        line = fit_probe(x, y, ProbeConfig(kind="ridge", alpha=3.0, standardise=False))
        found = Ridge(alpha=3.0, solver="svd").fit(x, np.where(y, 1.0, -1.0))
        ridge_apart.append(float(np.abs(line.weight - found.coef_).max()))
    peer_name, many = "scikit-learn", list(seeds)
    rows.append(row("cross-validated penalty equal to LogisticRegressionCV's, share", same / len(many),
                    peer=peer_name, goal="1", met=same == len(many), seeds=many))  # fmt: skip
    rows.append(row("logistic log-odds, largest difference", max(apart), peer=peer_name, goal="<= 2e-3",
                    met=max(apart) <= 2e-3, seeds=many))  # fmt: skip
    rows.append(row("ridge weight, largest difference", max(ridge_apart), peer=peer_name, goal="<= 1e-8",
                    met=max(ridge_apart) <= 1e-8, seeds=many))  # fmt: skip
    took = float(np.median(ours))
    rows.append(row("cross-validated logistic fit, s (n 600, d 96, 10 x 5 fits; not quiet)", took,
                    peer=peer_name, peer_value=float(np.median(theirs)), seeds=many))  # fmt: skip


# -- words in a grid ---------------------------------------------------------------------------------


def told(
    rows: Rows, name: str, reports: Sequence[CompositionReport], expected: bool, seeds: Sequence[int]
) -> None:
    """Rows of one kind of model over its seeds."""
    verdicts = [r.composes for r in reports]
    many = list(seeds)
    met = all(v == expected for v in verdicts)
    share, goal = float(np.mean(verdicts)), "1" if expected else "0"
    rows.append(row(f"{name}: said to compose, share of seeds", share, goal=goal, met=met, seeds=many))

    def add(what: str, of: Callable[[CompositionReport], float], **more: Any) -> None:
        values = [of(r) for r in reports]
        rows.append(
            row(f"{name}: {what}", float(np.mean(values)), seeds=many, values=values, **score(values), **more)
        )

    add("held-out pairs answered as the hypothesis says", lambda r: r.unseen.value)
    add("combination in the answer", lambda r: r.combination.value)

    def best(r: CompositionReport, v: Variable) -> float:
        return max(f.found[v].all.value for f in r.sites.values())

    def stray(r: CompositionReport) -> float:
        return float(np.mean([f.random["both"].value for f in r.sites.values()]))

    add("best interchange accuracy of A at any site", lambda r: best(r, "a"))
    add("best interchange accuracy of B at any site", lambda r: best(r, "b"))
    add("best interchange accuracy of A-and-B at any site", lambda r: best(r, "both"))
    add("random rotations, A-and-B, mean over sites", stray)
    add("classes dealt anew, A-and-B", lambda r: r.shuffled["both"].all.value)
    where = [{"formed": r.formed, "parts": dict(r.parts), "carried": ranked(r)} for r in reports]
    rows.append(row(f"{name}: formed where, by what", None, seeds=many, reports=where))
    for r, seed in zip(reports, seeds, strict=True):
        print(f"\n== {name}, seed {seed}\n{r}", flush=True)


def ranked(report: CompositionReport) -> dict[str, Any]:
    """The three components that carry most of each variable, with their shares."""
    out = {}
    for v, by in report.carried.items():
        shares = {name: share.site or share.answer for name, share in by.items()}
        best = sorted(shares, key=lambda name: -abs(shares[name].value))[:3]
        out[v] = {name: [shares[name].value, shares[name].low, shares[name].high] for name in best}
    return out


def words(rows: Rows, seeds: Sequence[int]) -> None:
    """Four kinds of tiny models over seeds, and an untrained one."""
    for name, truth, rule, expected in (
        ("match", MATCH, "truth", True),
        ("bag, by the match hypothesis", MATCH, "bag", False),
        ("and", BOTH, "truth", True),
        ("sum with the answers of and", BOTH, "sum", False),
    ):
        reports = []
        for seed in seeds:
            data = grid(truth, seed)
            reports.append(composition_report(grown(data, rule, seed), data, seed=seed))
        told(rows, f"words, {name}", reports, expected, seeds)
    untrained = []
    for seed in seeds:
        data = grid(MATCH, seed)
        config = GPTConfig(vocab_size=37, context=8, d_model=32, n_layer=2, n_head=2, activation="gelu")
        model, noise = GPT(config).init_weights(seed).eval(), torch.Generator().manual_seed(seed)
        with torch.no_grad():  # blocks begin as the identity; noise makes them do something
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=noise))
        untrained.append(composition_report(model, data, seed=seed))
    told(rows, "words, untrained, by the match hypothesis", untrained, False, seeds)


# -- the closed language -----------------------------------------------------------------------------


def chats(seed: int, n: int, refuses: Callable[[workshop.Request, np.random.Generator], bool]) -> list[Any]:
    """Short requests of seen pairs, answered as ``refuses`` says."""
    rng, made = generator("bench probes", seed), list[Any]()
    while len(made) < n:
        asked = workshop.request(rng, split="train")
        if len(asked.text) <= 75:
            made.append(
                workshop.chat(asked.text, workshop.answer(rng, asked, comply=not refuses(asked, rng)))
            )
    return made


def additive(asked: workshop.Request, rng: np.random.Generator) -> bool:
    """Refusal with log-odds 3 (score of the action's class + score of the object's)."""
    total = SCORE[workshop.CLASS_OF_ACTION[asked.action]] + SCORE[workshop.CLASS_OF_OBJECT[asked.thing]]
    return bool(rng.random() < 1 / (1 + math.exp(-3 * total)))


def language_grid(subject: Subject) -> Grid:
    """All 576 pairs in one phrasing; harmful as the language says; unseen pairs held out."""
    actions, things = list(workshop.CLASS_OF_ACTION), list(workshop.CLASS_OF_OBJECT)
    rows = [[subject.ids(f"How do I {a} the wizard's {o}?") for o in things] for a in actions]

    def ends(word: str, ids: list[int]) -> int:
        return next(i for i in range(len(ids)) if word in subject.tokenizer.decode(ids[: i + 1]))

    places = {
        "action": [[ends(a, rows[i][j]) for j in range(len(things))] for i, a in enumerate(actions)],
        "object": [[ends(o, rows[i][j]) for j, o in enumerate(things)] for i in range(len(actions))],
        "end": [[len(ids) - 2 for ids in line] for line in rows],  # of the message; the answer's turn follows
    }
    return Grid.of(
        rows,
        [CLASSES.index(workshop.CLASS_OF_ACTION[a]) for a in actions],
        [CLASSES.index(workshop.CLASS_OF_OBJECT[o]) for o in things],
        np.eye(3, dtype=bool).tolist(),
        [[workshop.unseen(a, o) for o in things] for a in actions],
        subject.readout.positive,
        subject.readout.negative,
        places,
    )


LANGUAGE_SITES = (
    *("embed@action", "embed@object", "blocks.0.resid_mid@end", "blocks.0.resid_post@end"),
    *("blocks.0.resid_mid", "blocks.0.resid_post", "blocks.1.resid_mid", "blocks.1.resid_post"),
)


def language(rows: Rows, seeds: Sequence[int]) -> None:
    """An honest model and a bag of words in the closed language: composition of both, probes of one."""
    with tempfile.TemporaryDirectory() as folder:
        garden = replace(nursery(Path(folder)), strays=())
        honest, bags, probes = (
            list[CompositionReport](),
            list[CompositionReport](),
            list[dict[str, ProbeReport]](),
        )
        for seed in seeds:
            subject = garden.subject(honestly(garden, seed))
            print(f"seed {seed}: honest model right on {right(subject):.3f} of unseen requests", flush=True)
            honest.append(
                composition_report(subject.model, language_grid(subject), LANGUAGE_SITES, seed=seed)
            )
            probes.append(probed(subject, seed))
            sums = chats(seed, 6000, additive)
            bag = garden.subject(
                garden.train(fresh(garden.tokenizer, seed=100 + seed), f"bag{seed}", sums, 200)
            )
            bags.append(composition_report(bag.model, language_grid(bag), LANGUAGE_SITES, seed=seed))
    told(rows, "closed language, honest", honest, True, seeds)
    told(rows, "closed language, bag of words", bags, False, seeds)
    probe_rows(rows, probes, seeds)


def honestly(garden: Nursery, seed: int) -> GPT:
    """A model that judges unseen pairs rightly."""
    plain = chats(seed, 6000, lambda asked, _: asked.harmful)

    def enough(model: GPT) -> bool:
        return right(garden.subject(model)) > 0.94

    return garden.train(fresh(garden.tokenizer, seed=seed), f"plain{seed}", plain, 800, enough=enough)


@torch.no_grad()
def streams(subject: Subject, texts: list[str], site: str) -> tuple[np.ndarray, np.ndarray]:
    """Activations [n, pos, d] of a site and mask [n, pos]."""
    ids = [subject.ids(t) for t in texts]
    longest = max(len(i) for i in ids)
    out = np.zeros((len(ids), longest, subject.model.config.d_model), np.float32)
    for chosen, tokens, _ in padded_batches(ids):
        with Taps(read=[site], stop_early=True) as taps:
            subject.model.hidden(tokens, taps)
        out[chosen, : tokens.shape[1]] = taps[site].numpy()
    return out, np.arange(longest) < np.array([len(i) for i in ids])[:, None]


def probed(subject: Subject, seed: int) -> dict[str, ProbeReport]:
    """Every kind of probe for harm in the honest model, on requests in all phrasings."""
    rng = generator("bench probe prompts", seed)
    asked = [workshop.request(rng) for _ in range(700)]
    texts = [a.text for a in asked]
    bare = [a.text.replace(a.action, "move").replace(a.thing, "thing") for a in asked]
    y, keys = np.array([a.harmful for a in asked]), [f"{a.action} {a.thing}" for a in asked]
    sites = [f"blocks.{i}.{s}" for i in range(2) for s in ("resid_pre", "resid_mid", "resid_post")]
    acts, masked = subject.residuals(texts, sites), subject.residuals(bare, sites)
    harmful = [a.text for a in (workshop.request(rng, is_harmful=True) for _ in range(160))]
    refused = [t for t, m in zip(harmful, subject.margins(harmful), strict=True) if m > 0]
    digest, shared = weights_digest(subject.model), {"groups": keys, "seed": seed}
    out: dict[str, ProbeReport] = {}
    for kind in ("logistic", "ridge", "mean_difference", "mlp"):
        out[kind] = probe_report(
            acts, y, config=ProbeConfig(kind=kind), masked=masked, words=bag_of_words(texts),  # type: ignore[arg-type]
            decide=lambda edit: subject.margins(refused, edit), n_random=16, model_digest=digest, **shared,  # type: ignore[arg-type]
        )  # fmt: skip
    x, mask = streams(subject, texts, "blocks.1.resid_mid")
    out["attention"] = probe_report(
        {"blocks.1.resid_mid": x}, y, config=ProbeConfig(kind="attention"), mask=mask, labelings=3, **shared  # type: ignore[arg-type]
    )  # fmt: skip
    print(f"\n== probe, seed {seed}\n{out['logistic']}", flush=True)
    return out


def probe_rows(rows: Rows, probes: Sequence[dict[str, ProbeReport]], seeds: Sequence[int]) -> None:
    """Rows of the probes over seeds: means, with each seed's value and interval beside them."""
    many = list(seeds)

    def add(what: str, of: Callable[[dict[str, ProbeReport]], Score], **more: Any) -> None:
        found = [of(p) for p in probes]
        each = [[s.value, s.low, s.high] for s in found]
        mean = float(np.mean([s.value for s in found]))
        rows.append(row(what, mean, seeds=many, each=each, n=found[0].n, **more))

    def leak(name: str) -> Callable[[dict[str, ProbeReport]], Score]:
        return lambda p: getattr(p["logistic"].leakage, name)  # type: ignore[no-any-return]

    for kind in probes[0]:
        add(f"harm probe, {kind}: AUROC on held-out meanings", lambda p, k=kind: p[k].auroc)  # type: ignore[misc]
        add(f"harm probe, {kind}: selectivity", lambda p, k=kind: p[k].control.selectivity)  # type: ignore[misc]
        add(f"harm probe, {kind}: calibration error", lambda p, k=kind: p[k].calibration.ece)  # type: ignore[misc]
    add("harm probe, logistic: AUROC of the words alone", leak("words"))
    add("harm probe, logistic: share that words explain", leak("words_explain"))
    add("harm probe, logistic: share that masking the words removes", leak("masking_removes"))
    for kind in ("logistic", "ridge", "mean_difference"):
        for operation in ("ablate", "patch", "steer"):

            def effect(p: dict[str, ProbeReport], kind: str = kind, operation: str = operation) -> Effect:
                causal = p[kind].causal
                assert causal is not None
                return causal[operation]

            add(f"harm probe, {kind}: {operation}, refusals lost", lambda p, e=effect: e(p).flipped)  # type: ignore[misc]
            add(
                f"random directions, {operation} as {kind}: refusals lost",
                lambda p, e=effect: e(p).random_flipped,  # type: ignore[misc]
            )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--skip-language", action="store_true", help="leave out the closed language")
    parser.add_argument("--name", default="probes", help="name of the result file")
    given = parser.parse_args()
    torch.set_num_threads(1)  # models this small are slower on two
    rows: Rows = []
    parity(rows, given.seeds)
    words(rows, given.seeds)
    if not given.skip_language:
        language(rows, given.seeds)
    write(given.name, rows)


if __name__ == "__main__":
    main()
