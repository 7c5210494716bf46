"""Run the real packages, each in an environment of its own: they read ours, we theirs, numbers are equal.

``make parity`` calls it. Environments are made where ``--envs`` says, torch first, then the package under a
constraint that keeps torch as it is (several of them would replace it), and are used again next time.
``--keep`` replaces ``tests/parity/fixtures``, which continuous integration reads in their stead.

A further peer is one more entry of ``PEERS`` with a script in ``peers/``.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.format_cases import (
    CLOSE,
    FIXTURES,
    circuit_distance,
    circuit_report_distance,
    graph_distance,
    of_theirs,
    write_our_circuits,
    write_our_graphs,
    write_our_pages,
    write_ours,
)
from parity.loss_cases import loss_distance

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Distances = dict[str, float]
log = logging.getLogger("parity")


@dataclass(frozen=True)
class Peer:
    """A package to compare with.

    ``packages`` as pip names them; ``remove``: what they drag in that does not work beside our torch;
    ``source``: the option that names a folder with its source, for what is on no package index.
    ``theirs``: distances of our reading of their cases. ``ours``: write cases for them. ``judge``: distances
    from the report they write about those.
    """

    script: str
    packages: tuple[str, ...]
    theirs: Callable[[Path], Distances]
    ours: Callable[[Path], None] | None = None
    judge: Callable[[dict[str, Any]], Distances] | None = None
    remove: tuple[str, ...] = ()
    env: str = ""
    source: str | None = None


def cases(folder: Path) -> list[Path]:
    """The case folders below ``folder``."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def dictionaries(peer: str) -> Callable[[Path], Distances]:
    return lambda folder: {case.name: of_theirs(peer, case) for case in cases(folder)}


def numbers(report: dict[str, Any]) -> Distances:
    """The larger of two distances of each case; a loader that refused is infinitely far."""
    for name, found in report.items():
        if "error" in found:
            log.info("%s: %s", name, found["error"])
    return {n: max(r["features"], r["out"]) if "out" in r else float("inf") for n, r in report.items()}


def circuits(folder: Path) -> Distances:
    found = {
        path.stem: circuit_distance(path) for path in sorted(folder.glob("*.json")) if path.stem != "versions"
    }
    gpt2 = (folder / "gpt2.txt").read_text()
    return found | {"gpt2 nodes and edges": 0.0 if gpt2 == "158 32491" else float("inf")}


def graphs(report: dict[str, Any]) -> Distances:
    same = report["ours"] == {"nodes": 6, "links": 5, "different": []}
    return {"ours": 0.0 if same else float("inf")}


def columns(report: dict[str, list[str]]) -> Distances:
    """What Neuronpedia's schemas say about our files: 0, or inf and the first complaints."""
    for name, problems in report.items():
        for problem in problems[:5]:
            log.info("%s: %s", name, problem)
    return {name: float("inf") if problems else 0.0 for name, problems in report.items()}


PEERS: dict[str, Peer] = {
    "saelens": Peer(
        "saelens_side.py", ("sae-lens==6.54.12",), dictionaries("saelens"),
        lambda folder: write_ours("saelens", folder), numbers,
    ),
    "sparsify": Peer(
        "sparsify_side.py", ("eai-sparsify==1.3.3",), dictionaries("sparsify"),
        lambda folder: write_ours("sparsify", folder), numbers,
    ),
    "dictlearn": Peer(
        "dictlearn_side.py", ("dictionary-learning==0.1.0", "transformers<5"), dictionaries("dictlearn"),
        remove=("torchvision",),
    ),
    "tracer": Peer(
        "tracer_side.py", ("circuit-tracer==0.5.0",),
        lambda folder: {"tiny": graph_distance(folder / "graph")}, write_our_graphs, graphs,
    ),
    "mib": Peer(
        "mib_side.py", ("sae-lens==6.54.12",), circuits, write_our_circuits,
        lambda report: {"ours": circuit_report_distance(report)}, env="saelens", source="eap_ig",
    ),
    "neuronpedia": Peer(
        "neuronpedia_side.py", ("eai-sparsify==1.3.3",), lambda folder: {}, write_our_pages, columns,
        env="sparsify", source="neuronpedia",
    ),
    "trl": Peer(
        "trl_side.py", ("trl==1.16.0",),
        lambda folder: {case.name: loss_distance(case) for case in cases(folder)},
    ),
}  # fmt: skip


def environment(name: str, peer: Peer, envs: Path) -> Path:
    """The python of the peer's environment, made if it is not there. Torch comes first and stays."""
    folder = envs / f"venv-{peer.env or name}"
    python = folder / "bin" / "python"
    wanted = peer.packages[0].partition("==")[0]
    probe = [str(python), "-c", f"import importlib.metadata as m, torch; m.version({wanted!r})"]
    if python.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return python
    log.info("%s: making %s (once)", name, folder)
    venv.create(folder, clear=True, with_pip=True)
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    torch = pin[0] if pin else "torch"
    constraint = folder / "torch.txt"
    constraint.write_text(torch + "\n")
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-c", str(constraint), *peer.packages], check=True)
    if peer.remove:
        subprocess.run([str(python), "-m", "pip", "uninstall", "-y", "-qq", *peer.remove], check=True)
    return python


def call(python: Path, peer: Peer, verb: str, folder: Path, source: str | None) -> None:
    """Run the peer's side; its output is shown when it fails."""
    command = [
        str(python),
        str(HERE / "peers" / peer.script),
        verb,
        str(folder),
        *([source] if source else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer.script} {verb} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def run(name: str, peer: Peer, envs: Path, work: Path, source: str | None) -> dict[str, Distances]:
    """Both directions for one peer."""
    python = environment(name, peer, envs)
    theirs, ours = work / "theirs" / name, work / "ours" / name
    call(python, peer, "write", theirs, source)
    found = {"we read theirs": peer.theirs(theirs)}
    if peer.ours is not None and peer.judge is not None:
        ours.mkdir(parents=True)
        peer.ours(ours)
        call(python, peer, "check", ours, source)
        found["they read ours"] = peer.judge(json.loads((ours / "report.json").read_text("utf-8")))
    return found


def found_cases(folder: Path) -> bool:
    """Whether the peer wrote more than its versions."""
    return any(path.name != "versions.json" for path in folder.iterdir())


def keep(work: Path, names: list[str]) -> None:
    """Replace the fixtures of ``names`` by what those packages wrote, and say which versions did."""
    for name in names:
        shutil.rmtree(FIXTURES / name, ignore_errors=True)
        shutil.copytree(work / "theirs" / name, FIXTURES / name)
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    log.info("fixtures: %d bytes in all", size)
    if size > 200_000:
        raise SystemExit("fixtures must stay below 200 kB")


def show(name: str, versions: dict[str, str], found: dict[str, Distances]) -> bool:
    """Print a peer's table; whether all is close enough."""
    log.info("\n%s (%s)", name, ", ".join(f"{p} {v}" for p, v in versions.items()))
    fine = True
    for direction, distances in found.items():
        for case, value in distances.items():
            good = value <= CLOSE
            fine &= good
            log.info("  %-16s %-32s %.1e %s", direction, case, value, "" if good else "<-- differs")
    return fine


def main() -> int:
    """Parse, run, print; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", help=f"of {', '.join(PEERS)}; all when none is named")
    parser.add_argument("--envs", type=Path, default=ROOT / ".parity", help="where environments are made")
    parser.add_argument("--eap-ig", help="folder with EAP-IG's package 'eap', for MIB's files")
    parser.add_argument("--neuronpedia", help="folder with Neuronpedia's source, for its schemas")
    parser.add_argument("--keep", action="store_true", help="replace the fixtures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    unknown = set(options.peers) - PEERS.keys()
    if unknown:
        parser.error(f"no peer {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    fine, ran = True, []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in options.peers or PEERS:
            peer = PEERS[name]
            source = getattr(options, peer.source) if peer.source else None
            if peer.source and not source:
                log.info("\n%s: left out; name its source with --%s", name, peer.source.replace("_", "-"))
                continue
            found = run(name, peer, options.envs, work, source)
            about = json.loads((work / "theirs" / name / "versions.json").read_text("utf-8"))
            fine &= show(name, about["versions"], found)
            ran.append(name)
        if options.keep and fine:
            keep(work, [name for name in ran if found_cases(work / "theirs" / name)])
    log.info("\n%s", "all equal" if fine else "something differs")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
