"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uae.errors import InputError, ResourceError


def as_user_error(error: OSError, path: Path) -> Exception:
    """Translate an operating system error on `path` into the error a user should read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; free some space or choose another --output")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return InputError(f"{path}: no permission to write here; choose another --output")
    return InputError(f"{path}: {error.strerror or error}; check the path")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, with its full suffix; rename on success, remove on failure.

    Args:
        path: the file to appear.

    Yields:
        A name in the same folder that the caller writes to.

    Raises:
        InputError: the folder cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise as_user_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
