"""Writing with SimpleITK so that a file appears whole or not at all, also when the disk fills up."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import SimpleITK as sitk

from uae.errors import InputError
from uae.files import atomic_path

WRITABLE = (".nii.gz", ".nii", ".nrrd", ".mha")
UNCOMPRESSED = (".nii", ".mha")
PROBE_BYTES = 1 << 16


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Silence ITK's warnings on stderr: what matters is checked here and said in our words."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def write_with_itk(path: Path, write: Callable[[str], None]) -> None:
    """Let ITK write `path`: `write` is called with a temporary name that becomes `path` on success.

    Raises:
        InputError: ITK cannot write there.
        ResourceError: the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            write(str(temporary))
        except RuntimeError as error:
            _probe_space(path.parent)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise OSError(errno.EIO, f"cannot be written ({lines[-1] if lines else 'unknown cause'})") from error
        # ITK reports success for a NIfTI or text file that was cut short by a full disk (our measurement, 2.5.7).
        _probe_space(path.parent)


def _probe_space(folder: Path) -> None:
    """Raise the operating system's error where the folder takes no more bytes."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(bytes(PROBE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())


def write_image(image: sitk.Image, path: str | Path) -> None:
    """Write an image (scalars or vectors) under a name of WRITABLE, whole or not at all.

    Raises:
        InputError: unknown suffix or no permission.
        ResourceError: the disk is full.
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith(WRITABLE):
        raise InputError(f"{path}: images are written as {', '.join(WRITABLE)}; choose one of these endings")
    write_with_itk(path, lambda file: sitk.WriteImage(image, file, useCompression=not name.endswith(UNCOMPRESSED)))
