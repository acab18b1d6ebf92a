"""The benchmark of clicks on a small scan: its figures are there and say what they are called."""

from __future__ import annotations

import numpy as np
import pytest

from uae.bench.match import WARM_UP, measure, torso_pair
from uae.errors import InputError


def test_every_click_is_timed_to_its_first_and_final_answer(small_ct, tiny_model, tmp_path):
    query = tmp_path / "Zweitscan ü.nii.gz"
    query.write_bytes(small_ct.read_bytes())
    points = np.array([(4.0, 36.0, 60.0), (-40.0, 0.0, 50.0), (30.0, -5.0, 110.0), (0.0, 20.0, 80.0)])
    options = ["--device", "cpu", "--threads", "1", "--model", str(tiny_model)]
    figures = measure(small_ct, query, points, points, options)
    assert figures["model"]["name"] == "tiny" and figures["device"].startswith("cpu")
    assert figures["prepare_again_s"] < figures["prepare_s"]
    for method in ("auto", "fixed-point"):
        found = figures[method]
        assert found["clicks"] == len(points) - WARM_UP
        assert 0 < found["first_median_s"] < found["final_median_s"] <= found["final_max_s"]
        assert found["median_mm"] < 4.0  # the same voxels


def test_an_unusable_scan_is_told(small_ct, tmp_path):
    with pytest.raises(InputError, match="none"):
        measure(small_ct, tmp_path / "none.nii.gz", np.zeros((4, 3)), options=["--device", "cpu"])


def test_truth_of_the_torso_pair_lies_at_the_same_anatomy(tmp_path, monkeypatch):
    """The MR is rendered from the body itself: at the true places its labels are the CT's."""
    import uae.bench.match as bench

    monkeypatch.setattr(bench, "SPACING_MM", 6.0)
    pair = torso_pair(tmp_path, 200)
    from uae.phantom import make_phantom
    from uae.phantom.subject import labels_at
    from uae.transform import Rigid

    fixed = make_phantom(bench.SEED, 6.0, mr=False)
    pose = Rigid.from_euler_deg(*bench.POSE_DEG, translation=bench.POSE_MM)
    moved = make_phantom(bench.SEED, (6.0, 6.0, 12.0), ct=False, mr=False, pose=pose)
    assert (
        np.mean(
            labels_at(pair.points, fixed.to_canonical, bench.SEED)
            == labels_at(pair.truth, moved.to_canonical, bench.SEED)
        )
        > 0.99
    )
    assert np.linalg.norm(pair.truth - pair.points, axis=1).min() > 50
