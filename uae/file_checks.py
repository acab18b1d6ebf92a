"""What ITK passes over in silence: short NIfTI files (filled with zeros), NaN (read as 0), spacing of 0 or less."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from uae.errors import InputError

CHUNK_BYTES = 1 << 22
FLOAT_TYPES = {16: "f4", 64: "f8"}
"""NIfTI data type codes whose voxels can be NaN."""
META_SPACING = re.compile(rb"^\s*Element(?:Spacing|Size)\s*=([^\r\n]*)", re.MULTILINE)


@dataclass(frozen=True)
class NiftiHeader:
    """The part of a NIfTI-1 or NIfTI-2 header that is checked; byte order "<" or ">"."""

    order: str
    dim: tuple[int, ...]
    pixdim: tuple[float, ...]
    datatype: int
    bitpix: int
    vox_offset: int


def parse_nifti_header(data: bytes) -> NiftiHeader | None:
    """The header at the beginning of a .nii file, or None where it is no single-file NIfTI (nifti1.h, nifti2.h)."""
    for order in "<>":
        size = struct.unpack_from(order + "i", data)[0] if len(data) >= 4 else 0
        if size == 348 and len(data) >= 348 and data[344:347] == b"n+1":
            dim = struct.unpack_from(order + "8h", data, 40)
            datatype, bitpix = struct.unpack_from(order + "2h", data, 70)
            pixdim = struct.unpack_from(order + "8f", data, 76)
            offset = struct.unpack_from(order + "f", data, 108)[0]
        elif size == 540 and len(data) >= 540 and data[4:7] == b"n+2":
            datatype, bitpix = struct.unpack_from(order + "2h", data, 12)
            dim = struct.unpack_from(order + "8q", data, 16)
            pixdim = struct.unpack_from(order + "8d", data, 104)
            offset = struct.unpack_from(order + "q", data, 168)[0]
        else:
            continue
        if not (1 <= dim[0] <= 7 and np.isfinite(offset) and offset >= 0):
            return None
        return NiftiHeader(order, dim[1 : dim[0] + 1], pixdim[1 : dim[0] + 1], datatype, bitpix, int(offset))
    return None


def check_file(path: Path) -> None:
    """Refuse a damaged or unusable image file by its bytes, before ITK reads it.

    Raises:
        InputError: empty, truncated, not a .gz, zero or negative spacing, NaN or infinite voxels.
    """
    name = path.name.lower()
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; copy or export it again")
    if name.endswith((".mha", ".mhd")):
        _check_meta_spacing(path)
    elif name.endswith(".gz"):
        try:
            with gzip.open(path, "rb") as stream:
                _check_stream(path, stream)
        except EOFError as error:
            raise InputError(f"{path}: the file is truncated (it ends early); copy or download it again") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: not a readable .gz file ({error}); copy or download it again") from error
    elif name.endswith(".nii"):
        with path.open("rb") as stream:
            _check_stream(path, stream)


def _check_stream(path: Path, stream: BinaryIO) -> None:
    """Read to the end; where it is NIfTI, check spacing, length and finiteness on the way."""
    start = stream.read(540)
    header = parse_nifti_header(start)
    if header is None:
        while stream.read(CHUNK_BYTES):
            pass
        return
    if not all(p > 0 and np.isfinite(p) for p in header.pixdim[:3]):
        text = " x ".join(f"{p:g}" for p in header.pixdim[:3])
        raise InputError(f"{path}: spacing {text} mm in the header (zero, negative or no number); export it again")
    expected = int(np.prod(np.maximum(header.dim, 1), dtype=np.int64)) * header.bitpix // 8
    stream.seek(header.vox_offset)
    kind = FLOAT_TYPES.get(header.datatype)
    seen = bad = 0
    while data := stream.read(CHUNK_BYTES):
        if kind is not None:
            data_of_image = data[: max(expected - seen, 0)]
            voxels = np.frombuffer(data_of_image, header.order + kind, count=len(data_of_image) // int(kind[1]))
            bad += len(voxels) - int(np.count_nonzero(np.isfinite(voxels)))
        seen += len(data)
    if seen < expected:
        share = 100 * seen // expected
        raise InputError(f"{path}: the file is truncated ({share} % of its voxels); copy or download it again")
    if bad:
        raise InputError(f"{path}: {bad} voxels are NaN or infinite; replace them (for CT by -1024) first")


def _check_meta_spacing(path: Path) -> None:
    with path.open("rb") as stream:
        match = META_SPACING.search(stream.read(20_000))
    if match is None:
        return
    text = match.group(1).decode("ascii", "replace").strip()
    try:
        good = all(float(v) > 0 for v in text.split())
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{path}: spacing {text} in the header (zero, negative or no number); export the image again")
