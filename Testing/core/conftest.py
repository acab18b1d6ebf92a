"""What the core's tests share: a small scan on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import SimpleITK as sitk
from small_scans import torso_ct


@pytest.fixture(scope="session")
def small_ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT file of 36 x 44 x 48 voxels of 4 mm."""
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    sitk.WriteImage(torso_ct(), str(path))
    return path
