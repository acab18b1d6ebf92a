"""Whole DEEDS registrations against deformations that are known by construction."""

import logging
import threading

import numpy as np
import pytest

from uae import deeds
from uae.deeds.backend import numba_kernels
from uae.errors import CancelledError, InputError
from uae.transform import Affine, Composite
from uae.volume import Geometry, Volume

SHAPE = (48, 44, 52)
SPACING = 2.0
EYE = np.eye(3)


def anatomy(points, seed=0):
    """A texture defined at every point of space (N, 3) mm, wavelengths of 13 to 60 mm."""
    rng = np.random.default_rng(seed)
    values = np.zeros(len(points))
    for _ in range(48):
        direction = rng.standard_normal(3)
        wave = 2 * np.pi / rng.uniform(13, 60) * direction / np.linalg.norm(direction)
        values += np.cos(points @ wave + rng.uniform(0, 2 * np.pi))
    return 60.0 * values


def bend(points, amplitude):
    """A smooth displacement (N, 3) mm of at most about `amplitude`, wavelengths of 90 to 130 mm."""
    x, y, z = points.T
    return (amplitude / 1.7) * np.stack(
        [np.sin(2 * np.pi * y / 110 + 0.5), np.sin(2 * np.pi * z / 130 - 1), np.cos(2 * np.pi * x / 120)], axis=1
    )


def box(shape=SHAPE, spacing=(SPACING,) * 3, origin=(-50.0, 30.0, 200.0), direction=EYE):
    return Geometry(shape, np.array(spacing, float), np.array(origin, float), np.array(direction, float))


def image(function, geometry):
    values = function(geometry.grid_points_mm()).reshape(geometry.shape).astype(np.float32)
    return Volume(values, geometry, modality="mr")


def inner(geometry, margin_mm=16.0):
    """Voxel centres (N, 3) of the working grid away from its border."""
    points = geometry.grid_points_mm()
    low, high = geometry.bounds_mm()
    return points[np.all((points > low + margin_mm) & (points < high - margin_mm), axis=1)]


@pytest.fixture(scope="module")
def bent():
    """Fixed, moving, true u and result of one smooth deformation of 7 mm."""

    def truth(points):
        return bend(points, 7.0)

    fixed = image(lambda p: anatomy(p + truth(p)), box())
    moving = image(anatomy, box())
    return fixed, moving, truth, deeds.register(fixed, moving)


def test_deeds_identity_is_zero():
    volume = image(anatomy, box((40, 36, 44)))
    result = deeds.register(volume, volume)
    assert np.abs(result.field.vectors).max() == 0.0
    assert np.abs(result.inverse.vectors).max() == 0.0
    assert result.jacobian["min"] == pytest.approx(1.0)
    assert result.jacobian["folding"] == 0.0


@pytest.mark.parametrize(
    ("preset", "shift"),
    [
        ("default", (4.0, -6.0, 2.0)),
        ("default", (3.0, -5.0, 1.0)),
        ("crosssam", (4.0, -6.0, 2.0)),
        ("large-motion", (4.0, -6.0, 2.0)),
    ],
)
def test_deeds_shift_is_recovered_to_a_quarter_voxel(preset, shift):
    fixed = image(lambda p: anatomy(p + shift), box())
    result = deeds.register(fixed, image(anatomy, box()), preset=preset)
    points = inner(fixed.geometry)
    error = np.linalg.norm(result.field.displacement(points) - shift, axis=1) / SPACING
    assert np.mean(error < 0.25) >= 0.95


def test_deeds_faithful_shift_is_recovered_to_its_label_step():
    shift = np.array([4.0, -6.0, 2.0])
    fixed = image(lambda p: anatomy(p + shift), box())
    result = deeds.register(fixed, image(anatomy, box()), preset="faithful")
    points = inner(fixed.geometry)
    error = np.linalg.norm(result.field.displacement(points) - shift, axis=1) / SPACING
    assert np.mean(error < 0.75) >= 0.95  # half a voxel on each axis: the original has no sub-voxel end


def test_deeds_smooth_deformation_is_recovered(bent):
    fixed, _, truth, result = bent
    points = inner(fixed.geometry)
    before = np.linalg.norm(truth(points), axis=1).mean()
    after = np.linalg.norm(result.field.displacement(points) - truth(points), axis=1).mean()
    assert after < 0.1 * before
    assert result.jacobian["folding"] == 0.0
    assert result.jacobian["min"] > 0.3
    assert result.overlap > 0.8
    assert [level["step"] for level in result.levels] == [8, 7, 6, 5, 4]
    hamming = [np.mean(level["hamming"]) for level in result.levels if level["step"] in (6, 5)]
    assert hamming[1] < hamming[0]  # the same descriptors, one level later
    assert set(result.seconds) == {"prepare", "levels", "finish", "total"}


def test_deeds_inverse_field_undoes_the_field(bent):
    fixed, _, _, result = bent
    points = inner(fixed.geometry)
    back = result.field.apply(result.inverse.apply(points))
    assert np.linalg.norm(back - points, axis=1).max() < 0.1
    assert result.consistency_mm < 0.5


def test_deeds_swapping_fixed_and_moving_gives_the_inverse(bent):
    fixed, moving, _, result = bent
    swapped = deeds.register(moving, fixed)
    points = inner(fixed.geometry)
    there_and_back = swapped.field.apply(result.field.apply(points))
    assert np.linalg.norm(there_and_back - points, axis=1).mean() < 0.5 * SPACING


def test_deeds_other_contrast_gives_the_same_motion(bent):
    fixed, moving, truth, _ = bent
    values = moving.array
    strange = Volume(np.cos(values / 250.0).astype(np.float32) * 0.01, moving.geometry, modality="mr")
    result = deeds.register(fixed, strange)
    points = inner(fixed.geometry)
    before = np.linalg.norm(truth(points), axis=1).mean()
    after = np.linalg.norm(result.field.displacement(points) - truth(points), axis=1).mean()
    assert after < 0.5 * before


def flipped(volume):
    """The same anatomy in the same place, stored with two axes reversed and two axes exchanged."""
    geometry = volume.geometry
    array = volume.array[::-1, :, ::-1].transpose(1, 0, 2)
    corner = np.array([geometry.shape[2] - 1, 0, geometry.shape[0] - 1])
    direction = geometry.direction * np.array([-1, 1, -1])
    order = [0, 2, 1]
    stored = Geometry(array.shape, geometry.spacing[order], geometry.index_to_mm(corner)[0], direction[:, order])
    return Volume(np.ascontiguousarray(array), stored, modality=volume.modality)


def test_deeds_geometry_flipped_storage_gives_the_same_millimetres(bent):
    fixed, moving, _, result = bent
    other = deeds.register(flipped(fixed), flipped(moving))
    points = inner(fixed.geometry)
    difference = np.linalg.norm(other.field.displacement(points) - result.field.displacement(points), axis=1)
    assert np.percentile(difference, 99) < 0.1


def turned(degrees):
    a = np.deg2rad(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    return about_z @ about_x


@pytest.mark.parametrize("case", ["oblique", "anisotropic"])
def test_deeds_geometry_other_sampling_of_the_moving_image(bent, case):
    fixed, _, truth, result = bent
    middle = fixed.geometry.center_mm()
    if case == "oblique":
        shape, spacing, direction = (70, 70, 70), (2.0, 2.0, 2.0), turned(25)
    else:
        shape, spacing, direction = (24, 110, 110), (1.0, 1.0, 5.0), EYE
    half = direction @ ((np.array(shape[::-1]) - 1) / 2 * np.array(spacing))
    moving = image(anatomy, box(shape, spacing, middle - half, direction))
    other = deeds.register(fixed, moving)
    points = inner(fixed.geometry)
    difference = np.linalg.norm(other.field.displacement(points) - result.field.displacement(points), axis=1)
    assert np.median(difference) < 0.5
    error = np.linalg.norm(other.field.displacement(points) - truth(points), axis=1).mean()
    assert error < 0.35 * np.linalg.norm(truth(points), axis=1).mean()


def test_deeds_geometry_oblique_fixed_image(bent):
    _, moving, truth, _ = bent
    direction = turned(15)
    half = direction @ ((np.array(SHAPE[::-1]) - 1) / 2 * SPACING)
    geometry = box(direction=direction, origin=moving.geometry.center_mm() - half)
    fixed = image(lambda p: anatomy(p + truth(p)), geometry)
    result = deeds.register(fixed, moving)
    points = inner(moving.geometry, 24.0)
    error = np.linalg.norm(result.field.displacement(points) - truth(points), axis=1).mean()
    assert error < 0.35 * np.linalg.norm(truth(points), axis=1).mean()


@pytest.mark.parametrize("amplitude", [0.0, 5.0])
def test_deeds_initial_affine_is_composed(amplitude):
    matrix = np.eye(4)
    matrix[:3, :3] = turned(20) @ np.diag([1.05, 0.97, 1.02])
    matrix[:3, 3] = [60.0, -35.0, 20.0]
    initial = Affine(matrix)
    fixed = image(lambda p: anatomy(p + bend(p, amplitude)), box())
    # The moving scan holds the anatomy carried by A, and is large enough to cover the fixed box.
    centre = initial.apply(fixed.geometry.center_mm()[None])[0]
    shape = (72, 72, 72)
    geometry = box(shape, origin=centre - (np.array(shape) - 1) / 2 * SPACING)
    moving = image(lambda p: anatomy(initial.inverse().apply(p)), geometry)
    result = deeds.register(fixed, moving, initial)
    points = inner(fixed.geometry)
    true_place = initial.apply(points + bend(points, amplitude))
    found = Composite([result.field, initial]).apply(points)
    error = np.linalg.norm(found - true_place, axis=1).mean()
    assert error < 0.5 + 0.2 * amplitude / 1.7
    if amplitude == 0.0:
        assert np.linalg.norm(result.field.displacement(points), axis=1).mean() < 0.5


def test_deeds_small_moving_field_of_view_leaves_no_streaks(bent):
    fixed, moving, truth, _ = bent
    low = fixed.geometry.bounds_mm()[0]
    part = Volume(moving.array[14:], box((SHAPE[0] - 14, *SHAPE[1:]), origin=low + 1 + np.array([0, 0, 28.0])), "mr")
    result = deeds.register(fixed, part)
    points = inner(fixed.geometry)
    seen = part.geometry.contains(points + truth(points), -6)
    assert 0.3 < seen.mean() < 1.0
    error = np.linalg.norm(result.field.displacement(points[seen]) - truth(points[seen]), axis=1)
    assert error.mean() < 0.35 * np.linalg.norm(truth(points), axis=1).mean()
    assert result.overlap < 0.85


def test_deeds_masks_hide_disturbed_parts(bent):
    fixed, moving, truth, _ = bent
    rng = np.random.default_rng(0)
    noisy = moving.array.copy()
    noisy[:, :, 26:] = 500 * rng.standard_normal(noisy[:, :, 26:].shape)
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, :, :26] = 1
    result = deeds.register(fixed, Volume(noisy, moving.geometry, "mr"), moving_mask=Volume(mask, moving.geometry),
                            fixed_mask=Volume(np.ones(SHAPE, np.uint8), fixed.geometry))  # fmt: skip
    points = inner(fixed.geometry)
    seen = points[:, 0] < fixed.geometry.center_mm()[0] - 8
    error = np.linalg.norm(result.field.displacement(points[seen]) - truth(points[seen]), axis=1).mean()
    assert error < 0.35 * np.linalg.norm(truth(points), axis=1).mean()


def test_deeds_region_is_the_working_grid(bent):
    fixed, moving, truth, _ = bent
    region = box((36, 34, 38), origin=fixed.geometry.origin + 8)
    result = deeds.register(fixed, moving, region=region, threads=1)
    assert result.field.geometry.same_as(region)
    points = inner(region)
    error = np.linalg.norm(result.field.displacement(points) - truth(points), axis=1).mean()
    assert error < 0.4 * np.linalg.norm(truth(points), axis=1).mean()


@pytest.mark.skipif(numba_kernels() is None, reason="no numba")
def test_deeds_without_numba_gives_the_same_field():
    shape = (30, 28, 32)
    fixed, moving = image(lambda p: anatomy(p + bend(p, 5)), box(shape)), image(anatomy, box(shape))
    results = [deeds.register(fixed, moving, backend=backend) for backend in ("numpy", "numba")]
    assert [r.backend for r in results] == ["numpy", "numba"]
    np.testing.assert_array_equal(results[0].field.vectors, results[1].field.vectors)


def test_deeds_missing_numba_is_announced(monkeypatch, caplog):
    import sys

    from uae.deeds import backend

    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "uae.deeds.kernels", raising=False)
    monkeypatch.delattr(deeds, "kernels", raising=False)
    backend._import_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert backend.resolve_backend("auto") == "numpy"
        assert "[fast]" in caplog.text
        with pytest.raises(InputError, match="numba"):
            backend.resolve_backend("numba")
    finally:
        backend._import_kernels.cache_clear()


def test_deeds_kernels_that_do_not_compile_are_replaced(monkeypatch, caplog, bent):
    from uae.deeds import backend, warm

    def broken():
        raise RuntimeError("no such intrinsic")

    monkeypatch.setattr(warm, "warm_up", broken)
    fixed, moving, _, _ = bent
    try:
        with caplog.at_level(logging.WARNING):
            result = deeds.register(fixed, moving, preset=deeds.Preset("one", (deeds.Level(8, 1, 1),), "a test"))
        assert result.backend == "numpy" and "cannot compile here (no such intrinsic)" in caplog.text
    finally:
        backend._gave_up.clear()


def test_deeds_cancel_inside_a_level_stops_both_threads(bent):
    fixed, moving, _, _ = bent
    stages = []

    def progress(stage, fraction):
        assert 0.0 <= fraction <= 1.0
        stages.append(stage)

    with pytest.raises(CancelledError):
        deeds.register(fixed, moving, progress=progress, cancel=lambda: "deeds level 2/5" in stages)
    assert "deeds level 3/5" not in stages
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deeds")]


def test_deeds_progress_names_each_level_once_in_order():
    shape = (30, 28, 32)
    seen = []
    volume = image(anatomy, box(shape))
    deeds.register(volume, volume, progress=lambda stage, fraction: seen.append((stage, fraction)))
    assert list(dict.fromkeys(stage for stage, _ in seen)) == [
        "deeds preparation", *(f"deeds level {n}/5" for n in range(1, 6)),
        "deeds polish 1/2", "deeds polish 2/2", "deeds result",
    ]  # fmt: skip
    for stage in {stage for stage, _ in seen}:
        fractions = [fraction for name, fraction in seen if name == stage]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0 or stage == "deeds preparation"


def test_deeds_small_region_drops_coarse_levels_with_a_warning(caplog):
    volume = image(anatomy, box((16, 18, 20)))
    with caplog.at_level(logging.WARNING):
        result = deeds.register(volume, volume)
    assert [level["step"] for level in result.levels] == [5, 4]
    assert "3 coarse" in caplog.text


def test_deeds_bad_input_is_refused():
    good = image(anatomy, box((30, 28, 32)))
    geometry = good.geometry
    broken = good.array.copy()
    broken[3, 4, 5] = np.nan
    far = Affine(np.array([[1, 0, 0, 900], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float))
    empty = Volume(np.zeros(geometry.shape, np.uint8), geometry)
    left, right = np.zeros(geometry.shape, np.uint8), np.zeros(geometry.shape, np.uint8)
    left[:, :, :10], right[:, :, 20:] = 1, 1
    cases = [
        ("constant", {"fixed": Volume(np.full(geometry.shape, 40.0), geometry, "ct")}),
        ("constant", {"moving": Volume(np.full(geometry.shape, 40.0), geometry, "ct")}),
        ("NaN", {"moving": Volume(broken, geometry, "mr")}),
        ("moving image does not reach", {"initial": far}),
        ("fixed image does not reach", {"region": box((30, 30, 30), origin=(900, 0, 0))}),
        ("fixed mask is empty", {"fixed_mask": empty}),
        ("moving mask is empty", {"moving_mask": empty}),
        ("share only 0 voxels", {"fixed_mask": Volume(left, geometry), "moving_mask": Volume(right, geometry)}),
        ("too small", {"region": box((11, 20, 20))}),
        ("unknown DEEDS preset", {"preset": "best"}),
        ("spacing", {"spacing": 0.0}),
        ("too large", {"spacing": 0.2, "region": box((400, 400, 400))}),
        ("unknown DEEDS backend", {"backend": "gpu"}),
    ]
    for message, change in cases:
        arguments = {"fixed": good, "moving": good, **change}
        with pytest.raises(InputError, match=message):
            deeds.register(**arguments)
    with pytest.raises(InputError, match="equally many"):
        deeds.make_levels((8, 7), (4, 3), (2,))
    with pytest.raises(InputError, match="no level"):
        deeds.Preset("mine", (), "test")
    with pytest.raises(InputError, match="unusable"):
        deeds.Preset("mine", (deeds.Level(0, 1, 1),), "test")
    with pytest.raises(InputError, match="border"):
        deeds.Preset("mine", (deeds.Level(4, 1, 1),), "test", border="none")


def test_deeds_presets_are_those_of_their_sources():
    presets = deeds.PRESETS
    assert set(presets) == {"faithful", "default", "after-rigid", "large-motion", "crosssam"}
    assert [level.reach for level in presets["after-rigid"].levels] == [12, 8, 6, 3, 2]
    assert [level.reach for level in presets["faithful"].levels] == [40, 28, 18, 10, 4]
    assert [level.labels for level in presets["faithful"].levels] == [4913, 3375, 2197, 1331, 729]
    assert [level.mind_step for level in presets["faithful"].levels] == [3, 3, 2, 2, 1]
    assert [level.reach for level in presets["crosssam"].levels] == [18, 10, 8, 3]
    assert [level.radius for level in presets["default"].levels] == [6, 5, 4, 3, 2]
    assert all(preset.source for preset in presets.values())
