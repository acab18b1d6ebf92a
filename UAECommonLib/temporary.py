"""Folders for the files of one job."""

from __future__ import annotations

import tempfile
from typing import Any

from uae.errors import ResourceError

__all__ = ["temporary_directory"]


def temporary_directory(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A new folder where the application keeps its temporary files; `cleanup` removes it.

    Raises:
        ResourceError: it cannot be made.
    """
    import slicer

    application: Any = getattr(slicer, "app", None)
    place = getattr(application, "temporaryPath", None)
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise ResourceError(
            f"no temporary folder can be made in {place or tempfile.gettempdir()} ({error.strerror or error}); check "
            "the disk, and the temporary directory in the application's settings"
        ) from error
