"""What the tests on real MRML share: a scene, an offscreen slice view with a mouse, and where the modules are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = set(filter(None, os.environ.get("UAE_REQUIRE", "").split(",")))
"""What must be there: a test that misses "gl" or "data" then fails instead of being skipped."""

for folder in (ROOT, ROOT / "UAELandmark", ROOT / "UAERegistration"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def skip_or_fail(kind: str, reason: str) -> None:
    """Skip a test for want of `kind`, or fail it where UAE_REQUIRE names that kind."""
    if kind in REQUIRED:
        pytest.fail(f"UAE_REQUIRE={kind}: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def private_user_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the cache and the models of the user who runs it."""
    root = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CACHE", str(root / "cache"))
        patch.setenv("UAE_MODELS", str(root / "models"))
        yield root


@pytest.fixture
def headless() -> Iterator[Any]:
    """A fresh scene with logics and file access (headless.Headless)."""
    pytest.importorskip("slicer", reason="slicer-core is not installed (pip install .[test])")
    from headless import Headless

    started = Headless()
    yield started
    started.close()


@pytest.fixture
def scene(headless: Any) -> Any:
    """The fresh scene itself."""
    return headless.scene


@pytest.fixture(scope="session")
def gl() -> None:
    """Skips (or fails, see UAE_REQUIRE) where nothing can be rendered."""
    from offscreen import gl_problem

    problem = gl_problem()
    if problem:
        skip_or_fail("gl", problem)


@pytest.fixture
def slice_view(gl: None, headless: Any) -> Iterator[Callable[..., Any]]:
    """slice_view("Red", "Axial") makes an offscreen slice view of the test's scene (offscreen.SliceView)."""
    from offscreen import SliceView

    views: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        views.append(SliceView(headless, *arguments, **options))
        return views[-1]

    yield make
    for view in views:
        view.close()


@pytest.fixture(scope="session")
def real_data() -> Callable[..., list[Path]]:
    """real_data("ct_x/ct.nii.gz", ...) gives the files under UAE_DATA, or skips (see UAE_REQUIRE)."""
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
