"""The demo measures what is written: with the truth itself as the result the whole error must vanish."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from uae import demo
from uae.phantom import FIRST_TEST_SEED, phantom_pair, truth_field


@pytest.fixture(scope="module")
def pair():
    return phantom_pair(demo.DEMO_SEED, fixed_spacing=6.0, moving_spacing=(6.0, 6.0, 6.0))


def test_the_demo_uses_a_seed_that_nothing_was_trained_on():
    assert demo.DEMO_SEED >= FIRST_TEST_SEED == 200000


def test_measure_finds_no_error_in_the_truth_and_the_smooth_part_without_the_field(pair, tmp_path):
    # written by SimpleITK alone, so that a mistake in our own writer could not cancel one in the measurement
    linear = sitk.AffineTransform(3)
    linear.SetMatrix(pair.rigid.matrix[:3, :3].ravel().tolist())
    linear.SetTranslation(pair.rigid.matrix[:3, 3].tolist())
    sitk.WriteTransform(linear, str(tmp_path / "rigid.tfm"))
    field = truth_field(pair)
    image = sitk.GetImageFromArray(np.asarray(field.vectors, dtype=np.float64), isVector=True)
    image.SetSpacing(field.geometry.spacing.tolist())
    image.SetOrigin(field.geometry.origin.tolist())
    sitk.WriteImage(image, str(tmp_path / "displacement.nii.gz"))
    report = {
        "status": "accepted",
        "seconds": {"total": 1.0},
        "device": "cpu",
        "model": {"name": "truth", "version": "1"},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))

    summary = demo.measure(pair, tmp_path)

    assert summary["initial_landmark_mm"] > 60
    assert summary["deformable_tre_mm"] < 0.05
    assert 0.5 < summary["best_rigid_tre_mm"] <= summary["rigid_tre_mm"] < 8
    assert summary["best_rigid_tre_mm"] == pytest.approx(pair.rigid_floor_mm, abs=0.3)
    assert {"rigid_landmark_mm", "seconds", "device", "model"} <= set(summary)


def test_the_points_of_the_error_are_body_voxels_of_the_mr(pair):
    points = demo.body_points(pair)
    assert 1000 < len(points) <= demo.TRE_POINTS
    assert pair.moving_labels.geometry.contains(points).all()
    assert (pair.moving_labels.sample(points, fill=0, order=0) > 0).all()
