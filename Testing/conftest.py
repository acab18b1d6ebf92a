"""What all tests share: private cache and model folders, the real volumes, a tiny model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REQUIRED = set(filter(None, os.environ.get("UAE_REQUIRE", "").split(",")))
"""What must be there: a test that misses "gl" or "data" then fails instead of being skipped."""


@pytest.fixture(scope="session", autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the cache and the models of the user who runs it."""
    root = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CACHE", str(root / "cache"))
        patch.setenv("UAE_MODELS", str(root / "models"))
        yield root


@pytest.fixture(scope="session")
def skip_or_fail() -> Callable[[str, str], None]:
    """skip_or_fail(kind, reason) skips a test for want of `kind`, or fails it where UAE_REQUIRE names that kind."""

    def decide(kind: str, reason: str) -> None:
        if kind in REQUIRED:
            pytest.fail(f"UAE_REQUIRE={kind}: {reason}")
        pytest.skip(reason)

    return decide


@pytest.fixture(scope="session")
def real_data(skip_or_fail: Callable[[str, str], None]) -> Callable[..., list[Path]]:
    """real_data("ct_x/ct.nii.gz", ...) gives the files under UAE_DATA, or skips the test and says what is missing."""
    from uae.bench.data import find_data, missing_data_reason

    def files(*relative: str) -> list[Path]:
        reason = missing_data_reason(*relative)
        if reason:
            skip_or_fail("data", reason)
        folder = find_data()
        return [folder.file(name) for name in relative]

    return files


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
