"""Run the blocks of documentation pages as the tests do, and show what they print; put it into the pages with --write.

    python scripts/run_docs.py [--write] [--bundle FOLDER] PAGE.md ...

A page's blocks run in order in a new folder. With ``--write``, an output that is shown and is no longer what is printed
is replaced; look at the diff before you commit it, and put ``...`` where machines differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/outside"))

from pages import BARE, Block, difference, environment_of, prepare, run_page, untrue, warm_command

import edgeres


def write(page: Path, ran: list[tuple[Block, str]]) -> None:
    """Replace what a page shows and what is not printed any more; of one machine also where only numbers differ."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for block, printed in reversed(ran):
        if block.shown is None:
            continue
        stale = not block.exact and "..." not in block.shown
        if stale or difference(block.shown, printed, block.exact):
            start, end = block.output
            lines[start:end] = [line.rstrip() for line in printed.rstrip("\n").split("\n")]
    page.write_text("\n".join(lines), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the blocks of documentation pages.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put what is printed into the pages")
    parser.add_argument("--bundle", type=Path, help="the embedded default, built already (default: built anew)")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as work, warm_command() as server:
        bundle = options.bundle
        for number, page in enumerate(options.pages):
            folder = Path(work, str(number))
            folder.mkdir()
            if page.name not in BARE and bundle is None:
                bundle = Path(edgeres.build(out=Path(work, "digits-int8")).path)
            prepare(folder, None if page.name in BARE else bundle)
            ran = run_page(page, folder, environment_of(Path(work, f"tools{number}"), server))
            for block, printed in ran:
                print(f"== {page}:{block.line}\n{block.code}{printed}")
            found = untrue(ran)
            wrong += len(found)
            print("\n".join(found), file=sys.stderr)
            if options.write:
                write(page, ran)
    return 1 if wrong and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
