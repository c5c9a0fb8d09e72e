"""Every error that edgeres raises on purpose.

::

    EdgeresError                    something the user can act on (exit code 1)
    ├── RecipeError                 a recipe or an option is wrong; lists every mistake
    ├── MissingPackageError         an optional package is needed; names the command that installs it
    ├── ModelError                  a model cannot be found, built or understood
    │   └── CheckpointError         weights do not fit; lists every tensor that does not
    ├── SampleError                 images, lists or arrays cannot be read
    ├── ExportError                 ONNX export failed, or does not agree with torch
    ├── CalibrationError            ranges cannot be found, or belong to another model
    ├── QuantizationError           the graph cannot be quantized
    │   └── LintError               a written graph breaks a rule that TensorRT depends on
    ├── BackendError                an engine cannot be compiled, opened or run
    ├── ClusterError                a cluster does not answer, or cannot give the very bits of this machine
    ├── SigningKeyError             a key is none, of another kind, or the wrong one of its pair
    └── BundleError                 a bundle is missing, incomplete or busy
        ├── IntegrityError          a bundle's file is not the one its manifest binds
        └── SignatureError          nobody who is trusted vouches for a bundle

A message says what is wrong, where, and what to do next. Anything else that escapes is a bug in edgeres.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see edgeres/__init__.py
if TYPE_CHECKING:
    from typing import Any, Iterable, List, Sequence, Tuple, Type


class EdgeresError(Exception):
    """The base of everything that edgeres raises on purpose. It can be pickled: worker processes raise it too."""

    def __reduce__(self) -> Tuple[Any, ...]:
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: Type[EdgeresError], arguments: Tuple[Any, ...]) -> EdgeresError:
    """Return an error with its message; ``__init__`` would want what the message was made from."""
    return kind.__new__(kind, *arguments)


class RecipeError(EdgeresError):
    """A recipe or an option is wrong. ``problems`` lists every mistake found, one sentence each."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where = where
        self.problems: List[str] = list(problems)
        super().__init__(numbered(where, self.problems))


class MissingPackageError(EdgeresError):
    """An optional package is needed. Build it with :meth:`for_extra`, so that the message names the command."""

    @classmethod
    def for_extra(cls, package: str, purpose: str, extra: str) -> MissingPackageError:
        return cls(f"{purpose} needs the package {package}. Install it: pip install 'edgeres[{extra}]'")


class ModelError(EdgeresError):
    """A model cannot be found, built or understood."""


class CheckpointError(ModelError):
    """Weights do not fit the model, or are not weights. ``problems`` lists every one."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where = where
        self.problems: List[str] = list(problems)
        super().__init__(numbered(where, self.problems))


class SampleError(EdgeresError):
    """Images, lists or arrays cannot be read."""


class ExportError(EdgeresError):
    """ONNX export failed, or its result does not agree with torch."""


class CalibrationError(EdgeresError):
    """Ranges cannot be found, or belong to another model, other samples or another preprocessing."""


class QuantizationError(EdgeresError):
    """The graph cannot be quantized."""


class LintError(QuantizationError):
    """A written graph breaks a rule that TensorRT depends on. ``problems`` lists every breach."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where = where
        self.problems: List[str] = list(problems)
        super().__init__(numbered(where, self.problems))


class BackendError(EdgeresError):
    """An engine cannot be compiled, opened or run."""


class ClusterError(EdgeresError):
    """A cluster does not answer, is not fit to give the very bits of this machine, or lost its workers."""


class SigningKeyError(EdgeresError):
    """A key is none, is of another kind, or is the wrong one of its pair. No message shows anything of a key."""


class BundleError(EdgeresError):
    """A bundle is missing, incomplete, or being written by somebody else."""


class IntegrityError(BundleError):
    """A bundle's file is not the one that its manifest binds."""


class SignatureError(BundleError):
    """Nobody who is trusted vouches for a bundle, or its signatures are damaged."""


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message; its type's name where there is no message.

    What torch, onnx and onnxruntime raise runs over many lines, or says nothing at all.
    """
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


def printable(text: str) -> str:
    """Return text with every control character but newline and tab escaped.

    File names and manifests come from outside, and a terminal obeys what they may hold.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


MOST_TOLD = 40  # problems in one message; another network's weights have hundreds, all for one reason


def numbered(where: str, problems: List[str]) -> str:
    """Join a place and what is wrong there into one message; several problems stand on lines of their own.

    Names in them come from outside: a line break in one must not make a line that looks like ours.
    """
    told = [unbroken(one) for one in problems[:MOST_TOLD]]
    if len(problems) == 1:
        return f"{unbroken(where)}: {told[0]}"
    more = [f"  … and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
    return "\n".join([f"{unbroken(where)}: {len(problems)} problems", *(f"  - {one}" for one in told), *more])


def few(names: Sequence[str], shown: int = 3) -> str:
    """Return names as words: the first ones, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(unbroken, names[:shown])) + more


def unbroken(text: str) -> str:
    """Return text with its line breaks escaped."""
    return text.replace("\n", "\\n")
