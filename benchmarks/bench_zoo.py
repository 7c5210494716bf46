"""The zoo as benchmark rows: what is found, missed and wrongly raised on models with planted faults.

Grows nothing: `glasshouse zoo run DIR` does, in slices; this reads its result files. Writes
`benchmarks/results/zoo.json` and prints its rows; `glasshouse zoo score DIR --markdown` prints the table of
docs/zoo.md.

    .venv/bin/python benchmarks/bench_zoo.py --zoo runs/zoo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import row, write
from glasshouse.recipes.zoo import run as zoos
from glasshouse.recipes.zoo import table


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, default=Path("runs/zoo"))
    options = parser.parse_args()
    zoo = zoos.open_zoo(options.zoo)
    found = zoos.scored(zoo)
    seeds = sorted({j.seed for j in zoo.jobs})
    rows = []
    for record in table.records(found):
        metric, value = record.pop("metric"), record.pop("value")
        rows.append(row(metric, value, seeds=len(seeds), **record))
    about = {k: found.about[k] for k in ("planned", "done", "workers", "again", "method")}
    rows.append(row("hours of the whole zoo", found.about["hours"], seeds=len(seeds), **about))
    write("zoo", rows)


if __name__ == "__main__":
    main()
