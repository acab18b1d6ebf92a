"""Embeddings on disk: the file format, and a bounded cache under a key of everything that decides the numbers.

The format is a ZIP archive of `embedding.json` and `.npy` arrays (read without pickle). ZIP's checksums show damage.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.errors import InputError, UAEError
from uae.files import atomic_path
from uae.paths import cache_folder

if TYPE_CHECKING:
    from uae.geometry import Geometry
    from uae.models import Model
    from uae.volume import Volume

FORMAT = "uae-embedding-1"
SUFFIX = ".uae"
HEADER = "embedding.json"
DEFAULT_LIMIT_GB = 4.0
STALE_SECONDS = 3600.0
RECIPE_MODULES = (
    "uae.geometry", "uae.volume", "uae.preprocess", "uae.network", "uae.inference", "uae.lookup", "uae.embedding"
)  # fmt: skip

logger = logging.getLogger(__name__)


def write_archive(path: str | Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `header` (plain values) and arrays; the file appears whole or not at all.

    Raises:
        InputError, ResourceError: the file cannot be written.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(HEADER, json.dumps({"format": FORMAT, **header}))
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            # Masks shrink to almost nothing; half-precision features do not shrink.
            info.compress_type = zipfile.ZIP_DEFLATED if array.dtype == bool else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)


def read_archive(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what write_archive wrote.

    Raises:
        InputError: no such file, not such a file, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such embedding file; check the path or make it with `uae embed`")
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(HEADER))
            if header.get("format") != FORMAT:
                raise InputError(f"{path}: the embedding is of format {header.get('format')!r}; make it again")
            arrays = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as stream:
                        arrays[name.removesuffix(".npy")] = np.lib.format.read_array(stream, allow_pickle=False)
                        stream.read()  # to the end, where the checksum is compared
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError, AttributeError, NotImplementedError) as error:
        raise InputError(
            f"{path}: not an embedding file or damaged ({error}); make it again with `uae embed`"
        ) from error
    return header, arrays


@lru_cache(maxsize=1)
def recipe_sha256() -> str:
    """Hash of the code that turns voxels into an embedding: an entry made by other code is never used."""
    digest = hashlib.sha256(FORMAT.encode())
    for name in RECIPE_MODULES:
        spec = importlib.util.find_spec(name)
        digest.update(Path(spec.origin).read_bytes() if spec is not None and spec.origin else name.encode())
    return digest.hexdigest()


def _plain(geometry: Geometry) -> dict[str, list[float]]:
    return {
        "shape": list(geometry.shape),
        "spacing": geometry.spacing.tolist(),
        "origin": geometry.origin.tolist(),
        "direction": geometry.direction.tolist(),
    }


def cache_key(volume: Volume, model: Model, precision: str, lattice: Geometry | None = None) -> str:
    """Key of voxels, geometry, modality, preprocessing, weights and number type.

    Args:
        volume: the scan, modality decided.
        model: the weights.
        precision: name of the number type of the computation.
        lattice: the grid that the network grid continues, where one is given.
    """
    facts = {
        **_plain(volume.geometry),
        "lattice": None if lattice is None else _plain(lattice),
        "dtype": str(volume.array.dtype),
        "modality": volume.modality,
        "input_map": model.input_map.to_dict(),
        "model": model.sha256,
        "precision": precision,
        "recipe": recipe_sha256(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(memoryview(np.ascontiguousarray(volume.array)).cast("B"))
    return digest.hexdigest()


def cache_limit_bytes() -> int:
    """Size of the cache: UAE_CACHE_GB gigabytes, default 4; 0 switches the cache off.

    Raises:
        InputError: the environment variable is no number.
    """
    text = os.environ.get("UAE_CACHE_GB", str(DEFAULT_LIMIT_GB))
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise InputError(f"UAE_CACHE_GB={text!r} is not a number of gigabytes; set it to one, such as 4") from error


def read_cached(key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The entry of `key`, None where there is none; a damaged entry is removed and counts as none."""
    path = cache_folder() / f"{key}{SUFFIX}"
    if not path.is_file():
        return None
    try:
        found = read_archive(path)
        os.utime(path)  # the order of last use decides what is evicted first
    except (UAEError, OSError) as error:
        logger.warning("cached embedding is unusable and is computed again: %s", error)
        discard(key)
        return None
    return found


def discard(key: str) -> None:
    """Remove the entry of `key` where it is there and can be removed."""
    try:
        (cache_folder() / f"{key}{SUFFIX}").unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cached embedding cannot be removed: %s", error)


def write_cached(key: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Store an entry and evict the least recently used ones beyond the limit.

    A cache that cannot be written is no reason to fail: it is logged.
    """
    limit = cache_limit_bytes()
    size = sum(array.nbytes for array in arrays.values())
    if size > limit:
        logger.info("embedding of %.1f GB is not cached: the limit is %.1f GB", size / 1e9, limit / 1e9)
        return
    try:
        evict(limit - size)  # before writing: the folder never exceeds its limit
        write_archive(cache_folder() / f"{key}{SUFFIX}", header, arrays)
    except (UAEError, OSError) as error:
        logger.warning("the embedding is not cached: %s", error)


def evict(limit_bytes: int) -> None:
    """Delete the least recently used entries beyond `limit_bytes`, and what killed processes left half-written."""
    entries = []
    for path in cache_folder().glob(f"*{SUFFIX}"):
        try:
            status = path.stat()
            # Hidden names are files being written; an old one belongs to a process that was killed.
            if not path.name.startswith("."):
                entries.append((status.st_mtime, status.st_size, path))
            elif time.time() - status.st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another process evicted it
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
