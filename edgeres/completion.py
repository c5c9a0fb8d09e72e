"""What a shell offers behind a word of the command line: models, targets, bundles, and files by their ending."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from typing import Any, Callable, Iterator, List, Tuple

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], List[CompletionItem]]

DEPTH = 3  # folders below what was typed in which bundles are looked for
MOST = 20_000  # entries of folders that are looked at, files too: a shell waits for the answer


def models(context: click.Context, parameter: click.Parameter, incomplete: str) -> List[CompletionItem]:
    """Return the names of ``edgeres models``, and ONNX files."""
    from edgeres.architectures import ARCHITECTURES

    names = [name for name in ARCHITECTURES if name.startswith(incomplete)]
    return [*map(CompletionItem, names), *paths(".onnx", bundles=False)(context, parameter, incomplete)]


def targets(context: click.Context, parameter: click.Parameter, incomplete: str) -> List[CompletionItem]:
    """Return what ``edgeres compile --list-targets`` names."""
    from edgeres.recipe import TARGETS

    return [CompletionItem(name) for name in TARGETS if name.startswith(incomplete)]


def paths(*endings: str, bundles: bool = True) -> Complete:
    """Return what completes a bundle, or a file of one of these endings; where there is none, any path."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> List[CompletionItem]:
        found = [*(_bundles(incomplete) if bundles else ()), *_files(incomplete, endings)]
        # A shell that knows this kind completes paths by itself, where nothing follows.
        own = CompletionItem(incomplete, type="file" if endings or not bundles else "dir")
        return [own, *map(CompletionItem, sorted(found))]

    return complete


def _entries(folder: str, left: Iterator[int], beginning: str = "") -> Iterator[Tuple[str, Any]]:
    """Yield the path of each name in a folder that begins so, and what it is; hidden names where that is asked for.

    Args:
        left: gives one for each entry that may still be looked at.
    """
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        for _, entry in zip(left, entries):  # in this order, an entry more than may be is not asked for
            if entry.name.startswith(beginning or ".") is bool(beginning):
                yield os.path.join(folder, entry.name), entry


def _is_folder(entry: Any, links: bool) -> bool:
    """Whether an entry is a folder, or where ``links`` count, a link to one; most file systems tell without a look."""
    try:
        return bool(entry.is_dir(follow_symlinks=links))
    except OSError:
        return False


def _bundles(incomplete: str) -> Iterator[str]:
    """Yield the bundles below what was typed, those that are nearest first."""
    left = iter(range(MOST))
    folder, beginning = os.path.split(incomplete)
    waiting = deque((path, DEPTH) for path, entry in _entries(folder, left, beginning) if _is_folder(entry, True))
    while waiting:
        path, depth = waiting.popleft()
        if os.path.isfile(os.path.join(path, "manifest.json")):
            yield path
        elif depth > 1:
            inner = (path for path, entry in _entries(path, left) if _is_folder(entry, False))
            waiting.extend((path, depth - 1) for path in inner)


def _files(incomplete: str, endings: Tuple[str, ...]) -> Iterator[str]:
    """Yield the files of these endings whose path begins as what was typed."""
    folder, beginning = os.path.split(incomplete)
    for path, _ in _entries(folder, iter(range(MOST)), beginning) if endings else ():
        if path.lower().endswith(endings) and os.path.isfile(path):
            yield path
