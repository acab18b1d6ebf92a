"""Where the real volumes of the benchmarks lie and which of them may be used for what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from uae.errors import InputError
from uae.volume import Volume

DATA_VARIABLE = "UAE_DATA"
DEFAULT_DATA = "../shared/data"
"""Relative to the repository root."""

VALIDATION_CTS = ("ct_mij_abdpelvis", "ct_lidc0001_chest")
"""Subjects that choose settings and thresholds; weights are never trained on them."""

HELD_BACK = (
    *VALIDATION_CTS, "ct_riderpe_chest", "ct_ts_dicomslab", "ct_ts_heartcta", "ct_cip64_chest", "spine_tptbox",
    "mr_ukat", "mr_prostatex0000_pelvis", "head_mni_ctmr",
)  # fmt: skip
"""Beginnings of the names of all folders of the collection that are for validation or testing."""


@dataclass(frozen=True)
class DataFolder:
    """A folder that holds one sub-folder per subject."""

    root: Path

    def file(self, relative: str) -> Path:
        """Path of a file of the collection.

        Raises:
            InputError: the file is not there.
        """
        path = self.root / relative
        if not path.exists():
            raise InputError(f"{path} is missing; set {DATA_VARIABLE} or --data to the folder of the real volumes")
        return path

    def ct(self, subject: str) -> Volume:
        """The CT `subject`/ct.nii.gz with its modality set."""
        return self.volume(f"{subject}/ct.nii.gz", "ct")

    def volume(self, relative: str, modality: str) -> Volume:
        """A volume of the collection with its known modality."""
        volume = Volume.read(self.file(relative))
        volume.modality, volume.modality_reason = modality, "known from the collection"
        return volume


def find_data(data_dir: str | Path | None = None) -> DataFolder:
    """The data folder: the argument, else UAE_DATA, else the default beside the repository.

    Raises:
        InputError: there is no such folder.
    """
    given = data_dir or os.environ.get(DATA_VARIABLE)
    root = Path(given) if given else Path(__file__).resolve().parents[2] / DEFAULT_DATA
    if not root.is_dir():
        raise InputError(
            f"no real volumes under {root}; set {DATA_VARIABLE} or --data to the folder of the benchmark volumes"
        )
    return DataFolder(root.resolve())


def missing_data_reason(*relative: str) -> str | None:
    """Why a test on real volumes cannot run here, or None where all files are there."""
    try:
        folder = find_data()
        for name in relative:
            folder.file(name)
    except InputError as error:
        return str(error)
    return None
