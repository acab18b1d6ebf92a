"""What the core's tests share: private cache and model folders, the real volumes, a small scan, a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the cache and the models of the user who runs it."""
    root = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CACHE", str(root / "cache"))
        patch.setenv("UAE_MODELS", str(root / "models"))
        yield root


@pytest.fixture(scope="session")
def real_data() -> Callable[..., list[Path]]:
    """real_data("ct_x/ct.nii.gz", ...) gives the files under UAE_DATA, or skips the test and says what is missing."""
    from uae.bench.data import find_data, missing_data_reason

    def files(*relative: str) -> list[Path]:
        reason = missing_data_reason(*relative)
        if reason:
            pytest.skip(reason)
        folder = find_data()
        return [folder.file(name) for name in relative]

    return files


def torso_ct(shape: tuple[int, int, int] = (36, 44, 48), spacing: float = 4.0, seed: int = 0) -> sitk.Image:
    """A small CT-like scan: soft tissue in air with two lungs, a spine and noise, in Hounsfield units."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.85) ** 2 + (y / 0.75) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - 0.4 * side) / 0.3) ** 2 + (y / 0.45) ** 2 + ((z - 0.3) / 0.6) ** 2 < 1] = -800
    hu[(x / 0.12) ** 2 + ((y - 0.5) / 0.14) ** 2 < 1] = 400
    image = sitk.GetImageFromArray((hu + rng.normal(0, 12, shape)).astype(np.float32))
    image.SetSpacing((spacing, spacing, spacing))
    image.SetOrigin((-90.0, -80.0, 20.0))
    return image


@pytest.fixture(scope="session")
def small_ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT file of 36 x 44 x 48 voxels of 4 mm."""
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    sitk.WriteImage(torso_ct(), str(path))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with random weights: everything runs with it, and nothing it says is right."""
    import torch

    from uae.models import save_model
    from uae.network import NetworkConfig, UAENet
    from uae.preprocess import InputMap

    torch.manual_seed(0)
    config = NetworkConfig(
        stem="space_to_depth",
        channels=(4, 8, 8, 8),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        z_kernels=(3, 3, 3, 3),
        pool_z=False,
        head_channels=8,
    )
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    save_model(path, UAENet(config).state_dict(), config, InputMap("soft-tissue"), {}, {"name": "tiny", "version": "0"})
    return path
