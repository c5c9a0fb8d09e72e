"""Samples: folders of images, list files and arrays, in a fixed order, as uint8 RGB frames and as network inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple, Union

import numpy as np

from edgeres.errors import MissingPackageError, SampleError
from edgeres.files import is_url
from edgeres.samples.arrays import from_arrays, open_array
from edgeres.samples.collection import Samples, Source
from edgeres.samples.hygiene import examine
from edgeres.samples.listing import IMAGE_ENDINGS, Listing, list_file, list_folder
from edgeres.samples.stores import is_tar, list_tars, list_url, local_path
from edgeres.samples.tars import expanded

__all__ = ["Samples", "decoders", "examine", "open_samples", "picture", "samples_from_arrays"]

LIST_ENDINGS = (".txt", ".lst")
ARRAY_ENDINGS = (".npy", ".npz")


def open_samples(source: Union[str, Path], *, count: Optional[int] = None, labelled: bool = False) -> Samples:
    """Return the samples of a folder, a list file or an array file, in an order that depends on nothing but them.

    - A folder is read recursively and sorted by relative path; hidden files and folders are left out. With
      ``labelled`` it has one subfolder per class, whose sorted names are the labels 0, 1, …; images that lie in no
      subfolder have no labels.
    - A list file (.txt, .lst) names one image per line, relative to itself, with an integer label behind it or without;
      ``#`` begins a comment. Its order is kept.
    - A ``.tar`` holds images as a folder does, or as WebDataset's shards do, with labels in ``.cls`` files beside them.
      ``shard-{0000..0012}.tar`` stands for several, and so does a folder that holds tars and no images. Samples are
      those that unpacking all into one folder would give.
    - A URL (``s3://``, ``gs://``, …) names a folder or tars in a store that fsspec reaches.
    - ``.npy`` holds uint8 (N, H, W, 3), RGB; ``.npz`` holds such an array as ``images`` and, if any, ``labels``.

    Labels of list files and of ``.npz`` are read whether ``labelled`` is set or not.

    Args:
        count: take so many, spread evenly over the order, so that classes stay in balance; all if there are fewer.

    Raises:
        SampleError: there is no such source, it holds no sample, or what it holds is ambiguous or malformed.
        MissingPackageError: images need Pillow; URLs need fsspec, and many a package of the store's own.
    """
    source = _plain_url(source) if isinstance(source, str) and is_url(source) else source
    samples = Samples(str(source), _source(source, labelled))
    return samples if count is None else samples.subset(count)


def samples_from_arrays(images: np.ndarray, labels: Optional[np.ndarray] = None) -> Samples:
    """Return samples of frames that are already in memory; they are not copied.

    Args:
        images: uint8 (N, H, W, 3), RGB, 0…255.
        labels: integers (N,), 0 or more.

    Raises:
        SampleError: the arrays are not such.
    """
    return Samples("images", from_arrays(images, labels, "images"))


def picture(samples: Samples, index: int, side: int) -> Tuple[bytes, str, Tuple[int, int]]:
    """Return a small picture of a sample, its MIME type, and its (width, height): no side is longer than ``side``.

    Raises:
        SampleError: its file cannot be read.
        MissingPackageError: pictures need Pillow.
    """
    try:
        from edgeres.samples.images import encoded
    except ImportError:
        raise MissingPackageError.for_extra("Pillow", "pictures of samples", "images") from None
    return encoded(samples.glimpse(index, side), side)


def decoders() -> str:
    """Return which libraries images are decoded with, and their versions: one of another version may give other pixels.

    Nothing can be decoded where Pillow is missing.
    """
    try:
        from edgeres.samples import images
    except ImportError:
        return "none"
    return images.decoders()


def _plain_url(url: str) -> str:
    """Return a URL without what ends it; a path of this machine where it names one."""
    return local_path(url) or url.rstrip("/")


def _source(source: Union[str, Path], labelled: bool) -> Source:
    if isinstance(source, str) and is_url(source):
        return _images(list_url(source, labelled))
    path = Path(source)
    ending = path.suffix.lower()
    try:
        if is_tar(path.name) and not path.is_dir():
            tars = (str(path),) if path.exists() else expanded(str(path))
            return _images(list_tars(tars, labelled, str(path)))
        if path.is_dir():
            return _images(list_folder(path, labelled))
        if not path.exists():
            raise SampleError(
                f"{path} does not exist. Name a folder of images, a list file (.txt) or an array file (.npy, .npz)."
            )
    except OSError as problem:
        raise SampleError(f"cannot read {path}: {problem.strerror or problem}. Check its permissions.") from None
    if not path.is_file():
        raise SampleError(f"{path} is a pipe or a device, not an ordinary file. Save what it gives into one.")
    if ending in LIST_ENDINGS:
        return _images(list_file(path))
    if ending in ARRAY_ENDINGS:
        return open_array(path)
    if ending in IMAGE_ENDINGS:
        raise SampleError(f"{path} is a single image. Name the folder that it lies in, or a list file (.txt).")
    raise SampleError(
        f"{path} is none of the sources that edgeres reads. Name a folder of images, a list file "
        f"({', '.join(LIST_ENDINGS)}) or an array file ({', '.join(ARRAY_ENDINGS)})."
    )


def _images(listing: Listing) -> Source:
    # Entered late: a robot that serves arrays has no Pillow.
    try:
        from edgeres.samples.images import ImageSource
    except ImportError:
        raise MissingPackageError.for_extra("Pillow", "reading image files", "images") from None
    return ImageSource(listing)
