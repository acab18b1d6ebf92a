"""The code of the tutorials and of the console pages runs as it stands there, and their pictures can be made."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("slicer")

import slicer.util
from landmark_cases import HILUM, LIVER, SPINE, add_points, add_scan

DOCUMENTS = Path(__file__).resolve().parents[2] / "Docs"


def code_of(name):
    """All Python blocks of a document, in order."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCUMENTS / name).read_text("utf-8"), re.DOTALL))


@pytest.fixture
def scans(scene, tmp_path, monkeypatch):
    """Small scans with the names of the sample pair, and points; files are written to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    return (
        add_scan(scene, "Phantom CT"),
        add_scan(scene, "Phantom MR"),
        add_points(scene, "Targets", (SPINE, LIVER, HILUM)),
    )


def test_code_of_the_landmark_console_page(scene, scans, tmp_path):
    ct, mr, points = scans
    names = {"ct": ct, "mr": mr, "followUp": add_scan(scene, "Follow-up"), "points": points}
    exec(code_of("user/landmark-console.md"), names)
    found, batch = names["found"], names["batch"]
    assert (tmp_path / "found.mrk.json").is_file()
    assert [found.GetNthControlPointLabel(index) for index in range(2)] == ["renamed", "P2"]
    assert found.GetNumberOfControlPoints() == 2
    assert len(batch.results) == 2 and not batch.failed
    assert len((tmp_path / "found.csv").read_text("utf-8").splitlines()) == 1 + 2 * 2


@pytest.mark.parametrize("name", ["tutorial_landmark.md", "tutorial_registration.md"])
def test_code_of_the_tutorials(scans, name):
    names = {"slicer": slicer}
    exec(code_of(name), names)
    if "landmark" in name:
        assert names["found"].GetNumberOfControlPoints() == 3
    else:
        assert names["outcome"].status in ("accepted", "review", "refused")
        assert names["moving"].GetParentTransformNode() is None


def test_a_picture_can_be_made(gl, headless, scene, tmp_path):
    from PIL import Image

    from uae.phantom import phantom_pair

    spec = importlib.util.spec_from_file_location("make_pictures", DOCUMENTS / "pictures" / "make_pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    from UAECommonLib.mrml import add_volume

    scan = add_volume(
        scene, phantom_pair(200_003, fixed_spacing=6.0, moving_spacing=(6.0, 6.0, 8.0)).fixed.to_sitk(), pictures.CT
    )
    points = add_points(scene)
    points.CreateDefaultDisplayNodes()
    points.GetDisplayNode().SetSelectedColor(0.0, 1.0, 0.0)
    middle = pictures.center_of(scan)
    points.AddControlPointWorld(middle.tolist(), pictures.SHOWN)
    pictures.prepare_display(scene)
    studio = pictures.Studio(headless, pixels=160)
    try:
        pictures.write(studio.row("a title", scan, middle, pictures.extent_of(scan)), tmp_path / "picture.png")
    finally:
        studio.close()
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
    assert pixels.shape == (160 + pictures.BAND, 3 * 160, 3)
    for plane in range(3):
        view = pixels[pictures.BAND :, plane * 160 : (plane + 1) * 160]
        assert (view.max(axis=2) > 100).mean() > 0.05, "the body is shown"
        y, x = np.nonzero(view[..., 1] - view[..., [0, 2]].max(axis=2) > 100)
        assert np.hypot(np.median(y) - 80, np.median(x) - 80) < 40, "the point is shown in the middle"
