"""What both modules share: the offer of torch, the sample pair, the figures of the panel."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from uae.errors import InputError, UAEError
from UAECommonLib import sample_data, torch_offer
from UAECommonLib.devices import list_devices
from UAECommonLib.mrml import FLIP, flip_matrix, flip_points


@pytest.fixture
def without_torch(monkeypatch):
    """An application without torch whose extension installs it when asked; holds what was called."""
    calls = []
    monkeypatch.setattr(torch_offer, "torch_is_here", lambda: bool(calls))

    class Utils:
        def installTorch(self, askConfirmation=True):
            calls.append(askConfirmation)

    module = types.ModuleType("PyTorchUtils")
    module.PyTorchUtilsLogic = Utils
    monkeypatch.setitem(sys.modules, "PyTorchUtils", module)
    return calls


def test_torch_is_installed_only_after_a_yes(without_torch):
    asked = []
    with pytest.raises(InputError, match="PyTorch"):
        torch_offer.ensure_torch(lambda text: asked.append(text) or False)
    assert not without_torch and "needs PyTorch" in asked[0]
    torch_offer.ensure_torch(lambda _text: True)
    assert without_torch == [False]  # asked once, by us
    torch_offer.ensure_torch(lambda _text: pytest.fail("asked although torch is there"))


def test_a_missing_extension_is_named(without_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "PyTorchUtils", None)
    with pytest.raises(InputError, match="Extensions Manager"):
        torch_offer.ensure_torch(lambda _text: True)


def test_changed_packages_are_reported(without_torch, monkeypatch):
    monkeypatch.setattr(torch_offer, "_versions", lambda: {"numpy": "2" if without_torch else "1"})
    with pytest.raises(InputError, match="numpy 1 -> 2"):
        torch_offer.ensure_torch(lambda _text: True)


def test_sample_pair_is_made_once_and_whole(scene, monkeypatch, tmp_path):
    monkeypatch.setenv("UAE_CACHE", str(tmp_path / "cache äß" / "embeddings"))
    ct, mr = sample_data.load_sample(scene)
    assert ct.GetImageData().GetDimensions()[0] > 10 and mr.GetName() == "Phantom MR"
    monkeypatch.setattr(sample_data, "make_runner", lambda: pytest.fail("made a second time"))
    folder = sample_data.sample_folder()
    assert {"ct.nii.gz", "mr.nii.gz", "landmarks_ct.csv"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_sample_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("UAE_CACHE", str(tmp_path / "cache" / "embeddings"))
    monkeypatch.setattr(sample_data, "SEED", -1)
    with pytest.raises(UAEError, match="seed"):
        sample_data.sample_folder()
    assert not list((tmp_path / "cache" / "samples").iterdir())


def test_patient_frames_flip_both_ways():
    matrix = np.arange(16.0).reshape(4, 4)
    np.testing.assert_array_equal(flip_matrix(flip_matrix(matrix)), matrix)
    np.testing.assert_array_equal(flip_points([[1, 2, 3]]), [[-1, -2, 3]])
    assert np.array_equal(FLIP @ FLIP, np.eye(4))


def test_panel_names_what_was_not_measured():
    from UAECommonLib.stages import stage_label
    from UAERegistrationLib.quality import quality_html, quality_rows

    rows = dict(quality_rows({"status": "refused", "matches": {"mutual": 20, "heldout_within_10mm": 0.25}}))
    assert rows["Rotation"] == "-" and rows["Matches found (mutual)"] == "20"
    assert rows["Held-out matches within 10 mm"] == "25 %"
    report = {
        "shift_mm": [1.0, -2.0, 30.0], "rotation_deg": 3.14,
        "refinement": {"used": True, "moved_mm": 1, "moved_deg": 2},
        "deformable": {"folding": 0.001, "inverse_consistency_mm": 0.2, "largest_mm": 8.0},
    }  # fmt: skip
    rows = dict(quality_rows(report))
    assert rows["Shift LR, AP, CC"] == "+1.0, -2.0, +30.0 mm" and rows["Refinement moved"] == "1.0 mm, 2.0°"
    assert "contour support, not dose" in quality_html(report) and "<b>" in quality_html(report, "<b>moved")
    assert "&lt;b&gt;moved" in quality_html(report, "<b>moved")
    assert stage_label("match") != "match" and stage_label("something new") == "something new"


def test_devices_come_from_a_child_process():
    found = []
    runner = list_devices(found.append)
    assert runner.wait(timeout=300)
    assert found[0]["cpu"].startswith("cpu (")
