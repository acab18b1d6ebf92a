"""The files of a registration as another program reads them: SimpleITK alone, and a JSON reader."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk

from uae.errors import InputError
from uae.geometry import Geometry
from uae.registration import pipeline
from uae.registration.adareg import ACCEPTED, REFUSED, REVIEW, AdaRegResult
from uae.registration.deformable import crop_geometry
from uae.registration.output import OWNED, write_result
from uae.registration.pipeline import RegisterOptions, RegistrationResult, deform
from uae.registration.refine import RefineResult
from uae.registration.relate import Relation
from uae.registration.summary import build_report, linear_figures
from uae.transform import Affine, DisplacementField, Rigid
from uae.volume import Volume

REPORT_KEYS = {
    "status", "reason", "fixed_to_moving", "shift_mm", "rotation_deg", "center_mm", "overlap_percent", "matches",
    "refinement", "deformable", "model", "device", "seconds", "inputs", "versions",
}  # fmt: skip


def flipped(angles=(12.0, -25.0, 8.0)):
    """An oblique direction whose second index axis runs backwards."""
    return Rigid.from_euler_deg(*angles).rotation @ np.diag([1.0, -1.0, 1.0])


def blob(points, center):
    return 1000.0 * np.exp(-np.square((points - center) / (25.0, 18.0, 14.0)).sum(axis=1)) + 2.0 * points[:, 0] / 10.0


@pytest.fixture
def result():
    """A registration made by hand: oblique flipped anisotropic fixed, smaller moving, known rigid and known u."""
    fixed_grid = Geometry((14, 40, 36), (2.5, 2.0, 5.0), (-300.0, 120.0, 900.0), flipped())
    center = fixed_grid.center_mm()
    linear = Rigid.from_euler_deg(4.0, 7.0, 20.0, translation=(60.0, -35.0, 12.0), center=center)
    moving_center = linear.apply(center[None])[0]
    moving_grid = Geometry((24, 26, 28), (2.0, 2.2, 2.4), (0, 0, 0), flipped((0.0, 10.0, -30.0)))
    moving_grid = Geometry(
        moving_grid.shape, moving_grid.spacing, moving_center - moving_grid.center_mm(), moving_grid.direction
    )
    fixed = Volume(blob(fixed_grid.grid_points_mm(), center).reshape(fixed_grid.shape), fixed_grid, modality="ct")
    moving = Volume(
        blob(moving_grid.grid_points_mm(), moving_center).reshape(moving_grid.shape) + 50.0, moving_grid, modality="mr"
    )
    grid = Geometry((15, 16, 17), (6.0, 6.0, 6.0), center - 45.0, np.eye(3))
    distance = np.linalg.norm(grid.grid_points_mm() - center, axis=1)
    bump = np.clip(1.0 - distance / 40.0, 0.0, None)[:, None] * np.array([6.0, -4.0, 5.0])
    field = DisplacementField(bump.reshape(*grid.shape, 3).astype(np.float32), grid)
    rng = np.random.default_rng(0)
    points = center + rng.uniform(-20, 20, (40, 3))
    found = AdaRegResult(
        ACCEPTED, "all agree", linear, 60, 40, 30, 8, 0.9, 0.05, 2.0, 1.9, points, linear.apply(points),
        np.arange(40) < 30, np.arange(40) >= 32, np.ones(40), 11.0, {"inliers": 30, "inlier_median_mm": float("nan")},
    )  # fmt: skip
    refined = RefineResult(linear, 1.5, 0.4, True, "refined inside the overlap", False, 0.5, 0.7)
    made = RegistrationResult(ACCEPTED, "all agree", fixed, moving, linear, field, False, found, refined)
    made.report = build_report(
        ACCEPTED, "all agree", linear, center, 92.0, found, refined,
        {"preset": "default", "folding": 0.0, "inverse_consistency_mm": 0.3, "largest_mm": 8.0},
        None, "cpu", {"total": 1.0}, fixed, moving,
    )  # fmt: skip
    return made


def itk_chain(folder, linear="rigid.tfm"):
    """The composition as the contract states it, by SimpleITK alone: a point meets the grid first, then the linear
    file."""
    image = sitk.ReadImage(str(folder / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    return sitk.CompositeTransform([sitk.ReadTransform(str(folder / linear)), sitk.DisplacementFieldTransform(image)])


def test_geometry_written_transforms_carry_points_as_the_known_map(result, tmp_path):
    write_result(result, tmp_path / "out")
    chain = itk_chain(tmp_path / "out")
    center = result.fixed.geometry.center_mm()
    points = center + np.random.default_rng(1).uniform(-60, 60, (300, 3))
    expected = result.linear.apply(points + result.field.displacement(points))
    np.testing.assert_allclose([chain.TransformPoint(p.tolist()) for p in points], expected, atol=0.01)
    assert np.linalg.norm(expected - result.linear.apply(points), axis=1).max() > 3.0


def test_geometry_moving_in_fixed_is_one_resampling_on_the_fixed_grid(result, tmp_path):
    write_result(result, tmp_path)
    written = sitk.ReadImage(str(tmp_path / "moving_in_fixed.nii.gz"))
    reference = result.fixed.to_sitk()
    assert written.GetSize() == reference.GetSize()
    np.testing.assert_allclose(written.GetSpacing(), reference.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(written.GetOrigin(), reference.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(written.GetDirection(), reference.GetDirection(), atol=1e-5)
    expected = sitk.Resample(
        result.moving.to_sitk(), reference, itk_chain(tmp_path), sitk.sitkLinear, result.moving.minimum
    )
    np.testing.assert_allclose(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(expected), atol=0.1)


def test_geometry_mask_says_where_the_moving_scan_ends(result, tmp_path):
    write_result(result, tmp_path)
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "moving_in_fixed_mask.nii.gz")))
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "moving_in_fixed.nii.gz")))
    inside = result.moving.geometry.contains(result.transform.apply(result.fixed.geometry.grid_points_mm()))
    assert 0.05 < inside.mean() < 0.95
    np.testing.assert_array_equal(mask.ravel() > 0, inside)
    np.testing.assert_allclose(image.ravel()[~inside], result.moving.minimum, atol=1e-3)
    result.moving.modality = "ct"
    write_result(result, tmp_path)
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "moving_in_fixed.nii.gz")))
    assert (image.ravel()[~inside] == -1024.0).all()


def test_output_report_has_every_key_and_only_finite_numbers(result, tmp_path):
    write_result(result, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= REPORT_KEYS
    np.testing.assert_allclose(report["fixed_to_moving"], result.linear.matrix)
    np.testing.assert_allclose(report["shift_mm"], (60.0, -35.0, 12.0), atol=1e-9)
    assert report["rotation_deg"] == pytest.approx(result.linear.rotation_angle_deg())
    assert report["matches"]["heldout_within_10mm"] == 0.9
    assert report["matches"]["features"]["inlier_median_mm"] is None
    assert report["refinement"] | {"moved_mm": 1.5, "moved_deg": 0.4, "used": True} == report["refinement"]
    assert set(report["inputs"]) == {"fixed", "moving"}
    assert report["inputs"]["moving"]["modality"] == "mr" and len(report["inputs"]["moving"]["sha256"]) == 64


def test_output_report_of_a_known_5_mm_shift():
    """LR, AP, CC are told apart by a shift along each, whatever the place of the centre."""
    for axis in range(3):
        shift = np.zeros(3)
        shift[axis] = 5.0
        figures = linear_figures(Rigid.from_euler_deg(0, 0, 0, translation=shift), np.array([10.0, 20.0, 700.0]))
        np.testing.assert_allclose(figures["shift_mm"], shift)
    stretched = Affine(np.diag([1.1, 0.9, 1.0, 1.0]) @ Rigid.from_euler_deg(0, 0, 15).matrix)
    assert 14.0 < linear_figures(stretched, np.zeros(3))["rotation_deg"] < 16.5


def test_output_overview_is_a_picture(result, tmp_path):
    write_result(result, tmp_path)
    picture = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "overview.png")))
    assert picture.shape[0] > 500 and picture.shape[1] > 1500
    assert picture[..., :3].std() > 10


def test_output_replaces_an_older_result_and_leaves_other_files(result, tmp_path):
    write_result(result, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    result.field, result.affine = None, True
    written = {path.name for path in write_result(result, tmp_path)}
    assert written == {
        "report.json",
        "affine.tfm",
        "moving_in_fixed.nii.gz",
        "moving_in_fixed_mask.nii.gz",
        "overview.png",
    }
    assert set(os.listdir(tmp_path)) == written | {"notes.txt"}


def test_refuse_writes_only_the_report(result, tmp_path):
    write_result(result, tmp_path)
    result.status = result.report["status"] = REFUSED
    assert [path.name for path in write_result(result, tmp_path)] == ["report.json"]
    assert os.listdir(tmp_path) == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["status"] == REFUSED


def test_output_failure_leaves_the_old_result_whole(result, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    write_result(result, folder)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uae.report.write_overview", broken)
    with pytest.raises(Exception, match="disk is full"):
        write_result(result, folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert os.listdir(tmp_path) == ["out"]
    assert set(before) == set(OWNED) - {"affine.tfm"}


class Model:
    name, version, sha256, thresholds = "test", "1", "0" * 64, {}


@pytest.fixture
def registered(result, monkeypatch):
    """`register` with the network and the matching replaced by given outcomes."""
    grid = Geometry((20, 20, 20), (6.0, 6.0, 6.0), result.fixed.geometry.center_mm() - 60.0, np.eye(3))

    class Body:
        fine_geometry = geometry = grid
        body = valid = np.ones(grid.shape, bool)

    def run(verdict, refined, **options):
        found = result.adareg
        found.verdict, found.reason = verdict, f"by the limits: {verdict}"
        monkeypatch.setattr("uae.embedding.embed", lambda *_, **__: Body())
        monkeypatch.setattr(pipeline, "relate", lambda *_, **__: Relation(found, Body(), Body(), (Body(), Body())))
        monkeypatch.setattr(pipeline, "refine_rigid", lambda *_, **__: refined)
        return pipeline.register(result.fixed, result.moving, Model(), RegisterOptions(device="cpu", **options))

    return run


def test_refuse_keeps_the_candidate_but_runs_no_refinement(registered, result):
    refused = registered(REFUSED, None)
    assert refused.status == REFUSED and refused.refinement is None
    assert refused.linear is result.linear
    assert set(refused.report) >= REPORT_KEYS


def test_refine_that_runs_away_allows_review_at_most(registered, result):
    runaway = RefineResult(result.linear, 14.0, 2.0, False, "moved a body corner by 14.0 mm and was discarded", True)
    reviewed = registered(ACCEPTED, runaway)
    assert reviewed.status == reviewed.report["status"] == REVIEW
    assert "14.0 mm" in reviewed.report["reason"]
    np.testing.assert_array_equal(reviewed.linear.matrix, result.linear.matrix)


def test_refine_is_taken_over_when_it_stays_within_limits(registered, result):
    moved = Rigid(Rigid.from_euler_deg(0, 0, 0, translation=(1, 0, 0)).matrix @ result.linear.matrix)
    refined = registered(ACCEPTED, RefineResult(moved, 1.0, 0.0, True, "refined"))
    assert refined.status == ACCEPTED
    np.testing.assert_array_equal(refined.report["fixed_to_moving"], moved.matrix)
    assert registered(ACCEPTED, None, refine=False).linear is result.linear


def test_refuse_masks_that_belong_to_another_image(registered, result):
    elsewhere = Geometry((4, 4, 4), (5.0, 5.0, 5.0), (5000.0, 0, 0), np.eye(3))
    with pytest.raises(InputError, match="fixed mask"):
        registered(ACCEPTED, None, fixed_mask=Volume(np.ones((4, 4, 4), np.uint8), elsewhere))


def test_deeds_alone_writes_the_same_files(result, tmp_path):
    done = deform(result.fixed, result.moving, result.linear)
    assert done.status == REVIEW
    names = {path.name for path in write_result(done, tmp_path)}
    assert names == set(OWNED) - {"affine.tfm"}
    assert set(done.report) >= REPORT_KEYS
    assert {"preset", "folding", "inverse_consistency_mm"} <= set(done.report["deformable"])
    vectors = done.field.vectors
    assert not vectors[0].any() and not vectors[:, -1].any() and not vectors[:, :, 0].any()
    with pytest.raises(InputError, match="linear"):
        deform(result.fixed, result.moving, result.field)


def test_geometry_crop_holds_its_points_with_a_margin():
    grid = Geometry((30, 40, 50), (1.0, 2.0, 3.0), (0, 0, 0), flipped())
    points = grid.index_to_mm(np.array([[10.2, 5.0, 12.0], [20.0, 39.0, 13.0]]))
    crop = crop_geometry(grid, points, 6.0)
    first = grid.mm_to_index(crop.origin[None])[0]
    np.testing.assert_allclose(first, np.round(first), atol=1e-9)
    np.testing.assert_allclose(first, (4.0, 2.0, 10.0), atol=1e-9)
    np.testing.assert_allclose(first + crop.size - 1, (26.0, 39.0, 15.0), atol=1e-9)


def test_deeds_counts_fixed_anatomy_only_where_the_moving_scan_reaches(result, monkeypatch):
    """Fixed anatomy beyond the moving scan has no counterpart and would drag the overlap along."""
    seen = {}

    def stop(*_, **options):
        seen.update(options)
        raise InputError("far enough")

    monkeypatch.setattr("uae.deeds.register", stop)
    with pytest.raises(InputError, match="far enough"):
        deform(result.fixed, result.moving, result.linear)
    mask = seen["fixed_mask"]
    points = mask.geometry.grid_points_mm()
    expected = result.moving.geometry.contains(result.linear.apply(points))
    assert 0.1 < expected.mean() < 0.95
    assert ((mask.array.ravel() > 0) == expected).mean() > 0.999
