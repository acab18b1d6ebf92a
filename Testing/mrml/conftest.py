"""What the tests on real MRML share: a scene, an offscreen slice view with a mouse, and where the modules are."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("slicer") is None:  # a Python that slicer-core has no wheel for
    collect_ignore_glob = ["test_*.py"]

for folder in (ROOT, ROOT / "UAELandmark", ROOT / "UAERegistration"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture
def headless() -> Iterator[Any]:
    """A fresh scene with logics and file access (headless.Headless)."""
    from headless import Headless

    started = Headless()
    yield started
    started.close()


@pytest.fixture
def scene(headless: Any) -> Any:
    """The fresh scene itself."""
    return headless.scene


@pytest.fixture(scope="module")
def client(tiny_model: Path) -> Iterator[Any]:
    """One worker for all tests of a file, as for all scenes of one session of the application."""
    from landmark_cases import tiny_client

    made = tiny_client(tiny_model)
    yield made
    made.close()


@pytest.fixture(scope="session")
def gl(skip_or_fail: Callable[[str, str], None]) -> None:
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


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch, headless: Any) -> Any:
    """Stand-ins of what a panel needs of the desktop application (application.Application)."""
    from application import Application

    return Application(monkeypatch, headless)
