"""Metrics of the field against cases worked out by hand, and against SimpleITK's own filters."""

import sys

import numpy as np
import pytest
import SimpleITK as sitk

from uae.bench.metrics_field import landmark_row, lesion_row, log_slope, registration_row
from uae.bench.metrics_surface import label_centroids, surface_distances, surface_points
from uae.bench.resources import run_child, thread_environment
from uae.errors import InputError, ResourceError
from uae.geometry import Geometry
from uae.quality import dice, inverse_consistency, jacobian_statistics, tre
from uae.transform import DisplacementField, Rigid
from uae.volume import Volume

SPACING = np.array([0.8, 1.5, 3.0])


def oblique(shape, spacing=SPACING):
    direction = Rigid.from_euler_deg(10.0, -20.0, 30.0).rotation
    return Geometry(shape, spacing, np.array([5.0, -40.0, 12.0]), direction)


def test_landmark_row_by_hand():
    truth = np.zeros((4, 3))
    found = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 10.0], [-6.0, 0.0, 8.0], [0.0, 0.0, 0.0]])  # 5, 10, 10, 0 mm
    row = landmark_row(found, truth)
    assert row["points"] == 4
    assert row["med_mm"] == pytest.approx(6.25)
    assert row["med_std_mm"] == pytest.approx(np.sqrt((25 + 100 + 100) / 4 - 6.25**2))
    assert (row["med_x_mm"], row["med_y_mm"], row["med_z_mm"]) == pytest.approx((9 / 4, 1.0, 18 / 4))
    assert row["med_y_std_mm"] == pytest.approx(np.sqrt(3.0))
    assert row["max_mm"] == pytest.approx(10.0)
    assert row["within_5mm"] == pytest.approx(0.5)
    assert row["within_10mm"] == pytest.approx(1.0)
    with pytest.raises(InputError):
        landmark_row(np.zeros((0, 3)), np.zeros((0, 3)))


def test_lesion_row_both_readings():
    """Distances 3, 7, 10, 12 mm; radii 4, 7, 20, none; sizes 3, 9, 11, 30 mm."""
    truth = np.zeros((4, 3))
    found = np.array([[3.0, 0, 0], [0, 7.0, 0], [0, 0, 10.0], [0, 0, 12.0]])
    row = lesion_row(found, truth, np.array([4.0, 7.0, 20.0, np.nan]), np.array([3.0, 9.0, 11.0, 30.0]), [1, 1, 0, 0])
    assert row["cpm_10mm_dlt"] == pytest.approx(3 / 4)  # 3 <= 4, 7 <= 7, 10 <= 10
    assert row["cpm_radius_dlt"] == pytest.approx(3 / 4)  # 3 < 4, not 7 < 7, 10 < 20, without a radius: a hit
    assert row["cpm_10mm_tlt"] == pytest.approx(1 / 4)  # not 3 < 3, 7 < 9, not 10 < 10
    assert row["cpm_radius_tlt"] == pytest.approx(3 / 4)  # not 3 < 3, 7 < 9, 10 < 11, 12 < 30
    assert row["cpm_10mm_plain"] == pytest.approx(3 / 4)
    assert row["in_box"] == pytest.approx(1 / 2)
    with pytest.raises(InputError, match="one box"):
        lesion_row(found, truth, np.ones(4), np.ones(4), [True])


def test_registration_row_by_hand():
    cases = [
        {"tre_mm": 5.0, "floor_mm": 0.0, "status": "accepted", "seconds": 1.0, "peak_mb": 10.0},
        {"tre_mm": 12.0, "floor_mm": 6.0, "status": "accepted", "seconds": 3.0, "peak_mb": 30.0},
        {"tre_mm": 40.0, "floor_mm": 6.0, "status": "accepted", "seconds": 9.0, "peak_mb": 20.0},
        {"tre_mm": 40.0, "floor_mm": 0.0, "status": "refused"},
        {"tre_mm": None, "floor_mm": 0.0, "status": "failed"},
    ]
    row = registration_row(cases)
    assert row["success_rate"] == pytest.approx(1 / 5)
    assert row["within_10mm_of_floor"] == pytest.approx(2 / 5)
    assert row["confident_failure_rate"] == pytest.approx(1 / 5)
    assert row["refusal_rate"] == row["no_estimate_rate"] == pytest.approx(1 / 5)
    assert row["median_tre_mm"] == pytest.approx(40.0)
    assert row["p95_tre_mm"] is None
    assert row["median_seconds"] == pytest.approx(3.0)
    assert row["peak_mb"] == pytest.approx(30.0)
    assert registration_row(cases[3:])["median_tre_mm"] is None
    with pytest.raises(InputError):
        registration_row([])


def test_log_slope():
    assert log_slope([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1.0)
    assert log_slope([1, 2, 4], [5, 20, 80]) == pytest.approx(2.0)
    assert log_slope([1], [3]) is None


def two_boxes(shape=(12, 20, 24)):
    """The same box twice, the second 3 voxels further along x: 2.4 mm."""
    arrays = np.zeros((2, *shape), np.uint8)
    arrays[0, 3:9, 5:15, 4:14] = 1
    arrays[1, 3:9, 5:15, 7:17] = 1
    return arrays


@pytest.mark.parametrize("geometry", [Geometry((12, 20, 24), SPACING, np.zeros(3), np.eye(3)), oblique((12, 20, 24))])
def test_surface_distances_of_shifted_plates(geometry):
    """Thin plates 3 voxels apart: each surface point has its image straight across."""
    plates = np.zeros((2, 12, 20, 24), np.uint8)
    plates[0, :, :, 5] = 2
    plates[1, :, :, 8] = 2
    found = surface_distances(*plates, geometry)[2]
    assert found == pytest.approx({"mda_mm": 2.4, "hd95_mm": 2.4, "hausdorff_mm": 2.4})
    assert surface_distances(plates[0], plates[0], geometry)[2]["hausdorff_mm"] == 0.0
    assert surface_distances(plates[0], plates[1] * 0, geometry) == {}
    with pytest.raises(InputError, match="not on the grid"):
        surface_distances(plates[0], plates[1][1:], geometry)


@pytest.mark.parametrize("geometry", [Geometry((12, 20, 24), SPACING, np.zeros(3), np.eye(3)), oblique((12, 20, 24))])
def test_surface_distances_agree_with_itk(geometry):
    """ITK: the distance map of each surface, read at the other surface's voxels, and its Hausdorff filter."""
    first, second = two_boxes()
    images = [Volume(array, geometry).to_sitk() for array in (first, second)]
    contours = [sitk.BinaryContour(image, fullyConnected=False) for image in images]
    maps = [
        sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True))
        for c in contours
    ]
    surfaces = [sitk.GetArrayFromImage(c) > 0 for c in contours]
    both = np.concatenate([np.abs(maps[1][surfaces[0]]), np.abs(maps[0][surfaces[1]])])
    found = surface_distances(first, second, geometry)[1]
    assert len(surface_points(first > 0, geometry)) == surfaces[0].sum()
    assert found["mda_mm"] == pytest.approx(both.mean(), abs=1e-4)
    assert found["hd95_mm"] == pytest.approx(np.percentile(both, 95), abs=1e-4)
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*contours)
    assert found["hausdorff_mm"] == pytest.approx(hausdorff.GetHausdorffDistance(), abs=1e-4)


def test_dice_agrees_with_itk_and_hand():
    first, second = two_boxes()
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(array) for array in (first, second)))
    assert dice(first, second)[1] == pytest.approx(overlap.GetDiceCoefficient()) == pytest.approx(0.7)


def test_label_centroids_are_patient_millimetres():
    geometry = oblique((12, 20, 24))
    labels = np.zeros(geometry.shape, np.uint8)
    labels[4:7, 10, 3:6] = 3
    found = label_centroids(labels, geometry)
    np.testing.assert_allclose(found[3], geometry.index_to_mm([[4.0, 10.0, 5.0]])[0])
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(Volume(labels, geometry).to_sitk())
    np.testing.assert_allclose(found[3], shape.GetCentroid(3), atol=1e-6)
    assert label_centroids(labels * 0, geometry) == {}


def test_jacobian_counts_folds_in_the_body_and_agrees_with_itk():
    """u_x = -1.5 x on one half folds it: 1 + du/dx = -0.5; the other half stretches by 1.2."""
    geometry = Geometry((8, 10, 20), np.array([1.0, 2.0, 3.0]), np.zeros(3), np.eye(3))
    x = geometry.grid_points_mm()[:, 0].reshape(geometry.shape)
    vectors = np.zeros((*geometry.shape, 3))
    vectors[..., 0] = np.where(x < 10.0, -1.5 * x, 0.2 * x)
    field = DisplacementField(vectors, geometry)
    body = np.zeros(geometry.shape, bool)
    body[2:6, 2:8, 2:8] = True
    assert jacobian_statistics(field, body)["folding"] == pytest.approx(1.0)
    other = np.zeros(geometry.shape, bool)
    other[2:6, 2:8, 12:18] = True
    found = jacobian_statistics(field, other)
    assert found["folding"] == 0.0
    assert found["median"] == pytest.approx(1.2)
    itk = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field.to_sitk_image()))
    np.testing.assert_allclose(field.jacobian_determinant()[1:-1, 1:-1, 1:-1], itk[1:-1, 1:-1, 1:-1], atol=1e-6)


def test_tre_and_inverse_consistency_by_hand():
    move = Rigid.from_euler_deg(0, 0, 90.0, translation=(10.0, 0.0, 0.0))
    points = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 5.0]])
    moved = np.array([[10.0, 1.0, 0.0], [8.0, 0.0, 5.0]])
    assert tre(move, points, moved)["max"] == pytest.approx(0.0, abs=1e-9)
    assert tre(move, points, moved + np.array([0.0, 3.0, 4.0]))["mean"] == pytest.approx(5.0)
    assert inverse_consistency(move, move.inverse(), points)["max"] == pytest.approx(0.0, abs=1e-9)
    back = Rigid.from_rotation(np.eye(3), np.array([-10.0, 0.0, 2.0]))
    away = inverse_consistency(Rigid.from_rotation(np.eye(3), np.array([10.0, 0.0, 0.0])), back, points)
    assert away["mean"] == pytest.approx(2.0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_child_reports_its_own_memory_and_time():
    program = (
        "import sys, time\nblock = bytearray(150_000_000)\nblock[::4096] = b'1' * len(block[::4096])\ntime.sleep(0.2)"
    )
    own = run_child([sys.executable, "-c", program], thread_environment(1), "a test")
    assert own.peak_mb == pytest.approx(165.0, abs=25.0)
    assert own.seconds >= 0.2
    assert 0.0 < own.cpu_seconds < own.seconds + 1.0
    small = run_child([sys.executable, "-c", "print('hello')"], {}, "a test")
    assert small.peak_mb < 60.0
    assert small.output.strip() == "hello"
    with pytest.raises(ResourceError, match=r"a test: ended with code 3: .*bad"):
        run_child([sys.executable, "-c", "import sys; print('bad'); sys.exit(3)"], {}, "a test")
    with pytest.raises(ResourceError, match="stopped after"):
        run_child([sys.executable, "-c", "import time; time.sleep(60)"], {}, "a test", timeout_s=0.5)
