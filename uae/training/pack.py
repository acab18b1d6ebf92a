"""Training volumes in one small file: 2 mm, cut to the body's box, int16. `python -m uae.training.pack --help`.

A packed file moves the work to another machine without the original scans: set `data.packed` to it. Phantoms are not
packed, they are made from their seeds.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from uae.errors import InputError, UAEError
from uae.files import atomic_path
from uae.training.subjects import BODY, Subject, as_tensor, lattice_cells

logger = logging.getLogger(__name__)

LIMIT_BYTES = 50 * 2**20
MARGIN_VOXELS = 8
"""Kept around the body's box: the table and some air, which views at its border show."""
QUANTA = (1, 2, 4, 8, 16)
"""Steps of HU (and of 1/4095 of an MR's range) tried until the file is small enough; noise of a CT is 10-30 HU."""
MR_LEVELS = 4095
INDEX = "index"


def body_box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """Box of the body (z, y, x) with a margin, within the array."""
    found = ndimage.find_objects((mask == BODY).astype(np.uint8))[0]
    return tuple(
        slice(max(s.start - MARGIN_VOXELS, 0), min(s.stop + MARGIN_VOXELS, n))
        for s, n in zip(found, mask.shape, strict=True)
    )


def write_packed(path: Path, subjects: list[Subject], limit_bytes: int = LIMIT_BYTES) -> int:
    """Write scans (not phantoms, no labels) to one compressed file of at most `limit_bytes`.

    Args:
        path: the .npz file.
        subjects: scans as `load_subjects` gives them.
        limit_bytes: the values are rounded to coarser steps until the file fits.

    Returns:
        The step of HU that was needed.

    Raises:
        InputError: even the coarsest step does not fit.
    """
    for quantum in QUANTA:
        packed = _packed(subjects, quantum)
        if len(packed) <= limit_bytes:
            with atomic_path(path) as temporary:
                temporary.write_bytes(packed)
            logger.info("%s: %d volumes, %.1f MiB, steps of %d HU", path, len(subjects), len(packed) / 2**20, quantum)
            return quantum
    raise InputError(f"{path}: {len(packed) / 2**20:.0f} MiB with the coarsest steps; pack fewer volumes")


def _packed(subjects: list[Subject], quantum: int) -> bytes:
    arrays: dict[str, Any] = {}
    index = []
    for number, subject in enumerate(subjects):
        box = body_box(subject.mask)
        values = subject.image[0, 0].numpy()[box] * (1 if subject.modality == "ct" else MR_LEVELS)
        inside = subject.mask[box] > 0
        rounded = np.where(inside, np.rint(values / quantum), 0).astype(np.int16)
        # differences along x: smaller numbers, which compress better
        arrays[f"image{number}"] = np.diff(rounded, axis=2, prepend=np.int16(0))
        arrays[f"mask{number}"] = subject.mask[box]
        index.append({"name": subject.name, "modality": subject.modality, "weight": subject.weight})
    arrays[INDEX] = np.array(json.dumps({"quantum": quantum, "subjects": index}))
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def read_packed(path: Path) -> list[Subject]:
    """Subjects of a packed file.

    Raises:
        InputError: no such file, or it is damaged.
    """
    try:
        with np.load(path) as stored:
            content = json.loads(str(stored[INDEX]))
            subjects = []
            for number, entry in enumerate(content["subjects"]):
                values = np.cumsum(stored[f"image{number}"], axis=2, dtype=np.int16).astype(np.float32)
                values *= content["quantum"] / (1 if entry["modality"] == "ct" else MR_LEVELS)
                mask = stored[f"mask{number}"]
                subject = Subject(entry["name"], entry["modality"], as_tensor(values), mask, weight=entry["weight"])
                subjects.append(replace(subject, body_cells=lattice_cells(mask == BODY)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"data.packed {path}: no usable packed file ({error}); make it again") from error
    return subjects


def main() -> int:
    """The command line."""
    from uae.bench.data import find_data
    from uae.training.config import read_config
    from uae.training.data import load_subjects

    parser = argparse.ArgumentParser(prog="python -m uae.training.pack", description=__doc__)
    parser.add_argument("--config", default="small", help="whose [data] volumes are packed")
    parser.add_argument("--data", help="folder of the volumes (default: UAE_DATA)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.npz")
    arguments = parser.parse_args()
    try:
        data = read_config(arguments.config)["data"] | {"phantom_seeds": (0, 0), "packed": ""}
        if any(entry.get("labels") for entry in data["volumes"]):
            logger.warning("labels are not packed; the semantic branch learns nothing from them there")
        subjects = load_subjects(data, find_data(arguments.data).root)
        quantum = write_packed(arguments.output, subjects)
    except UAEError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    size = arguments.output.stat().st_size / 2**20
    sys.stdout.write(f"written: {arguments.output} ({len(subjects)} volumes, {size:.1f} MiB, steps of {quantum} HU)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
