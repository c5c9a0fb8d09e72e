"""The nouns of what goes in: a file, how frames become input, samples and what was found about them, a file's grids."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import msgspec

# Python 3.8 (JetPack 5) evaluates these annotations through typing, so they are spelled the old way.


class FileRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in a bundle: its path relative to the bundle, its SHA-256 (hex) and its size in bytes."""

    path: str
    sha256: str
    bytes: int


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a camera frame becomes the network's input; the same for calibration, validation and serving.

    ``size`` is (height, width) in pixels. ``resize`` scales the short side to so many pixels before the centre crop
    (None: frames are cropped only). ``mean`` and ``std`` are per channel, in units of 0…1, in the network's ``color``
    order; frames themselves are always RGB. ``fit`` is ``crop``, or ``letterbox``: the whole frame is scaled into
    ``size``, in the middle, and the rest filled with the colour ``pad`` (red, green, blue, 0…255).
    """

    size: Tuple[int, int]
    resize: Optional[int] = None
    mean: Tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: Tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: str = "rgb"
    fit: str = "crop"
    pad: Optional[Tuple[int, int, int]] = None

    @property
    def batch_size(self) -> int:
        """How many samples to run at once: enough to keep a few cores busy, few enough that every activation of a
        ResNet-50 batch, exposed for calibration, fits in half a gigabyte. Results do not depend on it."""
        return max(1, min(64, 12 * 224 * 224 // (self.size[0] * self.size[1])))


class SampleSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which samples were used, in order: ``names`` and ``sha256`` run in parallel; ``digest`` covers both.

    ``source`` is the name of the folder or file that they come from.
    """

    source: str
    digest: str
    names: Tuple[str, ...]
    sha256: Tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.names)


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was found about samples. ``text`` says what, where, and what to do next.

    ``severity`` is ``warning``, or ``note`` where too few samples are concerned to matter. ``count`` is how many are,
    ``names`` are the first of them.
    """

    kind: str
    severity: str
    text: str
    count: int
    names: Tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One statistic of images, in calibration and validation samples: the medians, and how far apart the two are.

    ``distance`` is the largest difference of the two distribution functions, 0…1; ``chance`` is what so many samples of
    one kind stay below; ``far`` says whether it is worth a warning. The medians are in units of a pixel's full scale,
    or ratios.
    """

    statistic: str
    calibration: float
    validation: float
    distance: float
    chance: float
    far: bool


class Hygiene(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found about the calibration samples before anything was computed from them.

    ``calibration`` and ``validation`` are how many samples were looked at; hashes were compared of all.
    """

    calibration: int
    validation: int
    findings: Tuple[Finding, ...]
    comparisons: Tuple[Comparison, ...] = ()

    @property
    def warnings(self) -> Tuple[str, ...]:
        return tuple(finding.text for finding in self.findings if finding.severity == "warning")


class FileGrid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The grid that a user's file puts a tensor on: ``scale`` × the whole numbers from ``low`` to ``high``.

    ``scale`` is in the tensor's own units per step; ``low`` and ``high`` are counted from what stands for zero, so int8
    with zero point 0 is −128 to 127, and uint8 with zero point 0 is 0 to 255.
    """

    scale: float
    low: int
    high: int


class Imported(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file that was quantized already says of itself, by the names of the float network within it.

    ``activations`` has a grid by tensor; ``weights`` the steps of each output channel, by initializer, where they are
    symmetric int8; ``float_layers`` are the weighted nodes that the file leaves in float. ``changes`` says in words
    what of the file no TensorRT reads, and what became of it. ``tool`` is who made it, empty where nothing tells.
    """

    tool: str
    activations: Dict[str, FileGrid]
    weights: Dict[str, Tuple[float, ...]]
    float_layers: Tuple[str, ...]
    changes: Tuple[str, ...]
