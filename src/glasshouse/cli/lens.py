"""`glasshouse lens`: train a dictionary, probe a concept, find a circuit, attribute an answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli import show

if TYPE_CHECKING:
    from glasshouse.recipes.lens import Finding

app = typer.Typer(
    help="See inside a model: features, probes, circuits, attribution.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run, a checkpoint in one, or a Hugging Face folder.")
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Draws other rows.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Texts are messages of a user; look where the answer begins.")
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Write the numbers there, and a page beside it (.html)."),
]


@app.callback()
def group() -> None:
    """See inside a model: features, probes, circuits, attribution.

    Every command prints one table of numbers with intervals, and what they were measured on.
    """


@app.command("train")
def train(
    model: Model,
    site: Annotated[
        str | None, typer.Option(metavar="SITE", help="Where it reads, such as blocks.2.resid_post.")
    ] = None,
    architecture: Annotated[
        str, typer.Option(metavar="NAME", help="l1, gated, topk, batchtopk, jumprelu or matryoshka.")
    ] = "topk",
    width: Annotated[int, typer.Option(min=1, metavar="N", help="How many features.")] = 1024,
    k: Annotated[
        int | None, typer.Option("--k", min=1, metavar="N", help="Active features, for the top-k kinds [16].")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="SITE", help="Train a transcoder that writes this site.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to read (.txt, .jsonl); default: the run's own data, or the books."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Activations to train on.")] = 500_000,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL2", help="Of what changed since that model or checkpoint.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Activations in an update.")] = 1024,
    lr: Annotated[
        float | None, typer.Option(metavar="RATE", help="Peak learning rate; default: by the width.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The SAELens folder to write; its training is in DIR.run."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in DIR.run.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Judge a SAELens or sparsify folder on this model; nothing is trained."
        ),
    ] = None,
    seed: Seed = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Train a dictionary of features.

    An SAE, a transcoder (--to), or one of a difference (--against). With --out a killed training goes on with
    --resume, bit for bit. Quality is measured on held-out text.
    """
    from glasshouse.base.errors import UsageError
    from glasshouse.recipes import lens
    from glasshouse.train import make_progress

    if check is not None:
        tell(lens.check_dictionary(model, check, site=site, text=text))
        return
    if site is None:
        raise UsageError("name the site that the dictionary reads: --site blocks.0.resid_post, for example")
    if resume and out is None:
        raise UsageError("--resume goes on with what --out DIR began: give --out too")
    progress = make_progress(quiet=quiet)
    try:
        found = lens.train(
            model, site, architecture=architecture, width=width, k=k, to=to, text=text, tokens=tokens,
            against=against, batch_size=batch, lr=lr, seed=seed, out=out, resume=resume, device=device,
            progress=progress,
        )  # fmt: skip
    finally:
        progress.close()
    tell(found)
    if out is not None:
        show.row("written", f"{out} (SAELens folder), {out}/quality.html, {out}.run")


@app.command("probe")
def probe(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE.jsonl",
            help='Lines of {"text", "label"[, "group"][, "evidence": [words]]}; '
            "or 'workshop', harm in the closed language.",
        ),
    ] = "workshop",
    kind: Annotated[
        str, typer.Option(metavar="NAME", help="logistic, ridge, mean_difference, mlp or attention.")
    ] = "logistic",
    sites: Annotated[
        str, typer.Option("--site", metavar="SITES", help="Sites to read, a name or pattern.")
    ] = "blocks.*.resid_post",
    chat: Chat = False,
    right: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Causal effect: on the logit of this continuation ...")
    ] = None,
    wrong: Annotated[str | None, typer.Option(metavar="TEXT", help="... less that of this one.")] = None,
    out: Out = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the probe itself into this new folder.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Read a concept, with every control.

    Can it be read, what else could explain that, and does the model use it?

    Held-out AUROC, control task, calibration, leakage, causal effect, and the sweep over sites.
    """
    from glasshouse.recipes import lens

    found = lens.probe(model, data, kind=kind, sites=sites, chat=chat, right=right, wrong=wrong, seed=seed)
    tell(found)
    if save is not None:
        show.row("written", found.found.probe.save(save))
    write(found, out)


@app.command("circuit")
def circuit(
    model: Model,
    pairs: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help='induction, refusal (in the closed language), or a file of {"clean", "corrupt", "right", '
            '"wrong"}.',
        ),
    ],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="exact, eap, eap-ig, eap-ig-activations, acdc or masks.")
    ] = "eap-ig",
    ablation: Annotated[
        str | None, typer.Option(metavar="NAME", help="corrupt, zero, mean or resample [corrupt].")
    ] = None,
    edges: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Its size; default: the least that recovers 80% where it is found."
        ),
    ] = None,
    chat: Chat = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="circuit.json", help="Write the circuit (MIB's format), a page and a .report.json."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="circuit.json", help="Measure that circuit on this model; find none."),
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(metavar="other.json", help="Say what changed since that circuit.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Find the edges that carry a behaviour.

    Found on half of the rows, measured on the others beside random circuits of equal size.
    """
    from glasshouse.recipes import lens

    if check is not None:
        found = lens.check_circuit(model, check, pairs, ablation=ablation, chat=chat, seed=seed, diff=diff)
        tell(found)
        write(found, out)
        return
    found = lens.circuit(
        model, pairs, method=method, ablation=ablation or "corrupt", edges=edges, chat=chat, seed=seed,
        out=out, diff=diff,
    )  # fmt: skip
    tell(found)
    for name in found.found.edges[:10]:
        show.row("edge", f"{name}  {found.found.scores[found.found.graph.number[name]]:+.3g}")
    if out is not None:
        show.row("written", out)
        write(found, out.with_suffix(".report.json"), out.with_suffix(".html"))


@app.command("attribute")
def attribute(
    model: Model,
    text: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; more than one for intervals.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="dla, ig, patching, logit-lens, tuned-lens or induction.")
    ] = "dla",
    target: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The answer; default: the model's own first choice.")
    ] = None,
    wrong: Annotated[str | None, typer.Option(metavar="TEXT", help="The answer it is compared with.")] = None,
    corrupt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="patching: a twin of each --text, of as many tokens."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for the lenses; default: the run's data, or the books."),
    ] = None,
    chat: Chat = False,
    out: Out = None,
    seed: Seed = 0,
) -> None:
    """Say where an answer comes from.

    dla: what each part writes into the logit. ig: which tokens. patching: which parts restore the answer.
    The lenses: what each layer would say. induction: which heads do it.
    """
    from glasshouse.recipes import lens

    found = lens.attribute(
        model, text or [], method=method, target=target, wrong=wrong, corrupt=corrupt or [], text=data,
        chat=chat, seed=seed,
    )  # fmt: skip
    tell(found)
    write(found, out)


def tell(found: Finding[Any]) -> None:
    """Print a finding: its table on standard output, what it lacks on standard error."""
    show.line(found.title)
    for text in found.lines():
        show.line(text)


def write(found: Finding[Any], out: Path | None, page: Path | None = None) -> None:
    """Write a finding as JSON and as a page, and say where."""
    if out is not None:
        for path in found.save(out, page=page):
            show.row("written", path)
