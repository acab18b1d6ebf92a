"""The extension configures, builds and installs without Slicer, and mistakes in its lists of files are found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).resolve().parent / "standin"
PARTS = ("CMakeLists.txt", "README.md", "LICENSE", "uae", "UAECommonLib", "UAELandmark", "UAERegistration", "Resources")
MODULES = "lib/Slicer-5.11/qt-scripted-modules"


def cmake(*arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("cmake", reason="the package cmake is not installed (pip install .[test])")
    command = [sys.executable, "-m", "cmake", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def compiler() -> None:
    """CMake looks for a compiler in every project."""
    if not (shutil.which("cc") and shutil.which("c++")):
        pytest.skip("no compiler, which CMake looks for")


def configure(source: Path, build: Path) -> subprocess.CompletedProcess[str]:
    return cmake(
        "-S", source, "-B", build, f"-DSlicer_DIR={STANDIN}", "-DCMAKE_INSTALL_PREFIX=" + str(build / "installed")
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the extension's sources."""
    target = tmp_path / "source äß"
    target.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, target / part)
    return target


def test_build_and_install_tree_give_the_package(source: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    done = configure(source, build)
    assert done.returncode == 0, done.stderr
    assert "UAELandmark" in done.stdout and "UAERegistration" in done.stdout
    for step in (("--build", build), ("--install", build)):
        done = cmake(*step)
        assert done.returncode == 0, done.stderr
    code = (
        "import json, sys; from pathlib import Path; import uae, uae.models, UAECommonLib.errors;"
        "print(json.dumps([uae.__file__, [m['present'] for m in uae.models.list_models()], 'torch' in sys.modules]))"
    )
    for tree in (build / MODULES, build / "installed" / MODULES):
        environment = {**os.environ, "PYTHONPATH": str(tree), "UAE_MODELS": str(tmp_path / "none")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        place, present, torch = json.loads(done.stdout)
        assert Path(place).is_relative_to(tree) and present and all(present) and not torch
        for module in ("UAELandmark", "UAERegistration"):
            assert (tree / f"{module}.py").is_file()
            assert (tree / "Resources" / "UI" / f"{module}.ui").is_file()


@pytest.mark.parametrize("module", ["UAELandmark", "UAERegistration"])
def test_an_unlisted_file_is_found(source: Path, tmp_path: Path, module: str) -> None:
    (source / module / f"{module}Lib" / "forgotten.py").write_text('"""Nobody installs me."""\n')
    done = configure(source, tmp_path / "build")
    assert done.returncode and "unlisted file" in done.stderr and "forgotten.py" in done.stderr


@pytest.mark.parametrize("module", ["UAELandmark", "UAERegistration"])
def test_a_missing_file_is_found(source: Path, tmp_path: Path, module: str) -> None:
    (source / module / f"{module}Lib" / "logic.py").unlink()
    done = configure(source, tmp_path / "build")
    assert done.returncode and "missing file" in done.stderr and "logic.py" in done.stderr


def test_a_missing_description_is_found(source: Path, tmp_path: Path) -> None:
    text = (source / "CMakeLists.txt").read_text()
    (source / "CMakeLists.txt").write_text(text.replace("set(EXTENSION_CONTRIBUTORS", "set(NOBODY"))
    done = configure(source, tmp_path / "build")
    assert done.returncode and "EXTENSION_CONTRIBUTORS" in done.stderr


def test_index_entry_names_this_extension() -> None:
    entry = json.loads((ROOT / "AnatomicalEmbedding.json").read_text())
    assert {"$schema", "category", "scm_url"} <= set(entry)
    lists = (ROOT / "CMakeLists.txt").read_text()
    assert f'EXTENSION_HOMEPAGE "{entry["scm_url"]}"' in lists
    assert 'EXTENSION_DEPENDS "{}"'.format(" ".join(entry["build_dependencies"])) in lists
