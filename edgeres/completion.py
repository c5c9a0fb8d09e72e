"""What a shell offers behind a word of the command line: models, targets, bundles, and files by their ending."""

from __future__ import annotations

import os
from typing import Callable, Iterator, List, Tuple

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], List[CompletionItem]]

DEPTH = 3  # folders below what was typed in which bundles are looked for
MOST = 2_000  # entries of folders that are looked at: a shell waits for the answer


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


def _entries(folder: str, beginning: str = "") -> Iterator[str]:
    """Yield the path of each name in a folder that begins so; hidden names where that is asked for."""
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return
    for name in names:
        if name.startswith(beginning or ".") is bool(beginning):
            yield os.path.join(folder, name)


def _bundles(incomplete: str) -> Iterator[str]:
    """Yield the bundles below what was typed."""
    left = MOST
    waiting = [(path, DEPTH) for path in _entries(*os.path.split(incomplete)) if os.path.isdir(path)]
    while waiting and left:
        path, depth = waiting.pop()
        left -= 1
        if os.path.isfile(os.path.join(path, "manifest.json")):
            yield path
        elif depth > 1:
            inner = (path for path in _entries(path) if os.path.isdir(path) and not os.path.islink(path))
            waiting += [(path, depth - 1) for path in inner]


def _files(incomplete: str, endings: Tuple[str, ...]) -> Iterator[str]:
    """Yield the files of these endings whose path begins as what was typed."""
    for path in _entries(*os.path.split(incomplete)) if endings else ():
        if path.lower().endswith(endings) and os.path.isfile(path):
            yield path
