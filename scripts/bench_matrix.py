#!/usr/bin/env python3
"""What a build matrix saves: its rows built one by one in empty folders, and then together, in another empty folder.

By default the handwritten digits with four rows: int8 for the CPU, for a GPU and for RTX, and fp16 for a GPU. All of it
runs in this process; the first row alone also pays for loading the libraries, so a small build comes before all.

    python scripts/bench_matrix.py [RECIPE.toml]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import edgeres
from edgeres.matrix import build_rows
from edgeres.recipe import dossier
from edgeres.rows import load_rows

ROWS = """
[[targets]]
target = "cpu"
[[targets]]
target = "gpu"
[[targets]]
target = "rtx"
[[targets]]
precision = "fp16"
target = "gpu"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe with [[targets]]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        recipe = options.recipe or Path(place) / "digits.toml"
        if options.recipe is None:
            recipe.write_text((dossier() / "recipes/digits-int8.toml").read_text("utf-8") + ROWS, "utf-8")
        rows = load_rows(recipe)
        if rows is None:
            parser.error(f"{recipe} has no [[targets]]")
        edgeres.build(calibration_count=20, budget_minutes=0, backend="cpu", out=Path(place) / "first")
        alone = []
        for number, row in enumerate(rows):
            start = time.perf_counter()
            build_rows([row], Path(place) / f"alone{number}")
            alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        matrix = build_rows(rows, Path(place) / "together")
        together = time.perf_counter() - start
    print("| row | alone, s | together, s | not run again |\n| --- | ---: | ---: | --- |")
    for row, seconds in zip(matrix.rows, alone, strict=True):
        print(f"| {row.name} | {seconds:.1f} | {row.seconds:.1f} | {', '.join(row.reused)} |")
    print(f"| all | {sum(alone):.1f} | {together:.1f} | {100 * (1 - together / sum(alone)):.0f} % less time |")


if __name__ == "__main__":
    main()
