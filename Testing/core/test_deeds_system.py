"""DEEDS as a whole: backends, threads, memory, the affine start, what is written and what is refused."""

import logging

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from uae import deeds
from uae.cli import main
from uae.deeds import solver
from uae.deeds.backend import numba_kernels
from uae.deeds.cost import ControlGrid, block_samples, data_cost
from uae.deeds.mind import mind_ssc, unpack
from uae.deeds.presets import PRESETS, Level, Preset
from uae.deeds.tree import build_tree, propagate
from uae.errors import InputError, ResourceError
from uae.registration.pipeline import deform
from uae.transform import Affine
from uae.volume import Geometry, Volume, resample_with_mask

needs_numba = pytest.mark.skipif(numba_kernels() is None, reason="no numba")
SMALL = Preset("small", deeds.make_levels((6, 4), (2, 2), (2, 1)), "test")


def texture(shape, seed=0, sigma=2.0):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (ndimage.gaussian_filter(noise, sigma) * 2000).astype(np.float32)


def volume(array, spacing=(2.0, 2.0, 2.0), direction=None, origin=(5.0, -40.0, 100.0)):
    direction = np.eye(3) if direction is None else direction
    return Volume(array, Geometry(array.shape, np.array(spacing), np.array(origin), direction), "mr")


@pytest.fixture(scope="module")
def moved():
    """A texture and the same two, one and three voxels away."""
    whole = texture((44, 42, 46))
    return volume(whole[4:36, 5:35, 6:40]), volume(whole[2:34, 4:34, 3:37])


def random_words(shape, seed):
    levels = np.random.default_rng(seed).integers(0, 6, (*shape, 12)).astype(np.uint64)
    codes = (np.uint64(1) << levels) - np.uint64(1)
    return np.bitwise_or.reduce(codes << (np.uint64(5) * np.arange(12, dtype=np.uint64)), axis=-1)


ALL_LEVELS = sorted({(level.step, level.radius, level.quantisation) for p in PRESETS.values() for level in p.levels})


@needs_numba
@pytest.mark.parametrize(("step", "radius", "quantisation"), ALL_LEVELS)
def test_deeds_cost_is_exact_for_every_level_of_the_presets(step, radius, quantisation):
    shape = (2 * step + 1, 3 * step + 2, 3 * step + 3)
    level = Level(step, radius, quantisation)
    fixed, moving = random_words(shape, 1), random_words(shape, 2)
    fixed[:step, :, : step // 2] = random_words((), 0) * 0 + np.uint64(sum(7 << (5 * c) for c in range(12)))
    here, there = unpack(fixed), unpack(moving)
    for sampling, border in (("original", "edge"), ("stride2", "neutral")):
        preset = Preset("test", (level,), "test", sampling=sampling, border=border)
        grid = ControlGrid.over(shape, step)
        cost = data_cost(fixed, moving, grid, level, preset, backend="numba")
        samples = block_samples(step, sampling)
        rng = np.random.default_rng(step)
        for _ in range(40):
            node = tuple(int(rng.integers(0, n)) for n in grid.counts)
            shift = rng.integers(-radius, radius + 1, 3)
            places = np.array(grid.offset) + np.array(node) * step + samples
            targets = places + shift * quantisation
            inside = np.clip(targets, 0, np.array(shape) - 1)
            other = there[tuple(inside.T)]
            own = here[tuple(places.T)]
            outside = (inside != targets).any(axis=1)[:, None] & (border == "neutral")
            distance = np.abs(own - np.where(outside, 3, other))
            known = (own != 3).any(axis=1) | (border == "edge")
            expected = 0.5 * step / (1.6 * quantisation) * (distance.sum(axis=1) * known).mean()
            label = np.ravel_multi_index(tuple(shift + radius), (level.side,) * 3)
            assert cost[np.ravel_multi_index(node, grid.counts), label] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", ["numpy", pytest.param("numba", marks=needs_numba), "torch:cpu"])
def test_deeds_cost_in_small_blocks_is_the_same(backend):
    fixed, moving = random_words((22, 17, 19), 3), random_words((22, 17, 19), 4)
    level = Level(4, 1, 2)
    preset = Preset("test", (level,), "test")
    grid = ControlGrid.over(fixed.shape, 4)
    whole = data_cost(fixed, moving, grid, level, preset, backend=backend, block_mb=1000)
    parts = data_cost(fixed, moving, grid, level, preset, backend=backend, block_mb=0.001)
    np.testing.assert_array_equal(whole, parts)


@needs_numba
def test_deeds_popcount_is_an_intrinsic_of_the_compiler():
    from numba import njit

    from uae.deeds.vector import popcount_4

    @njit
    def one_block(address):
        popcount_4(address, address, address, address, address, address, 1, 0, 1, 0, 0, address)

    one_block.compile("void(int64)")
    assert "llvm.ctpop.v8i64" in "".join(one_block.inspect_llvm().values())


@needs_numba
def test_deeds_kernels_are_kept_on_disk():
    kernels = numba_kernels()
    for name in ("hamming_planes", "send_messages", "mind_words", "warp_planes"):
        assert getattr(kernels, name)._cache._cache_path


@pytest.mark.parametrize("q", [1, 2, 3])
def test_deeds_torch_descriptors_are_equal(q):
    image = texture((15, 18, 17))
    np.testing.assert_array_equal(mind_ssc(image, q, backend="torch:cpu"), mind_ssc(image, q, backend="numpy"))


@pytest.mark.parametrize("other", ["torch:cpu", pytest.param("numba", marks=needs_numba)])
def test_deeds_backends_agree_on_labels_and_energy(other):
    image = texture((36, 33, 38))
    level = Level(4, 2, 1)
    preset = Preset("test", (level,), "test")
    grid = ControlGrid.over(image.shape, 4)
    words = mind_ssc(image, 1, backend="numpy")
    searched = np.roll(words, (1, 2, -1), axis=(0, 1, 2))
    inherited = np.random.default_rng(1).uniform(-2, 2, (grid.nodes, 3))
    results = []
    for backend in ("numpy", other):
        cost = data_cost(words, searched, grid, level, preset, backend=backend)
        results.append(propagate(cost, build_tree(image, grid, "numpy"), inherited, level.side, backend=backend))
    (labels, energy), (others, other_energy) = results
    assert np.mean(labels == others) >= 0.9999
    assert other_energy == pytest.approx(energy, rel=1e-5)


def test_deeds_torch_gives_the_same_field(moved):
    preset = Preset("tiny", deeds.make_levels((6,), (1,), (3,)), "test", polish=1)
    fields = [deeds.register(*moved, preset=preset, backend=backend).field.vectors for backend in ("auto", "torch:cpu")]
    assert np.mean(np.abs(fields[0] - fields[1]).max(axis=-1) < 1e-3) >= 0.9999


def test_deeds_threads_change_nothing(moved):
    one, two = (deeds.register(*moved, preset=SMALL, threads=threads).field.vectors for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_deeds_finds_the_shift_of_whole_voxels(moved):
    # fixed voxel i shows whole[i + (4, 5, 6)], moving voxel i shows whole[i + (2, 4, 3)]
    found = deeds.register(*moved, preset="default").field.vectors[8:-8, 8:-8, 8:-8]
    error = np.linalg.norm(found - np.array([6.0, 2.0, 4.0]), axis=-1) / 2.0
    assert np.mean(error < 0.25) >= 0.95


def test_deeds_falls_back_to_less_memory_with_a_message(moved, monkeypatch, caplog):
    expected = deeds.register(*moved, preset=SMALL).field.vectors
    asked = []

    def scarce(*args, **kwargs):
        asked.append(kwargs["block_mb"])
        if kwargs["block_mb"] > 50:
            raise MemoryError
        return data_cost(*args, **kwargs)

    monkeypatch.setattr(solver, "data_cost", scarce)
    with caplog.at_level(logging.WARNING):
        found = deeds.register(*moved, preset=SMALL, block_mb=100.0).field.vectors
    np.testing.assert_array_equal(found, expected)
    assert asked[0] == 100.0
    assert "not enough memory" in caplog.text


def test_deeds_out_of_memory_is_told(moved, monkeypatch):
    def none(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(solver, "data_cost", none)
    with pytest.raises(ResourceError, match="smaller region"):
        deeds.register(*moved, preset=SMALL)


def test_deeds_other_errors_do_not_start_again(moved, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(solver, "data_cost", broken)
    with pytest.raises(RuntimeError, match="something else"):
        deeds.register(*moved, preset=SMALL)


def turned(degrees, scale=(1.0, 1.0, 1.0)):
    a = np.deg2rad(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    return about_z @ about_y @ np.diag(scale)


def test_deeds_affine_step_finds_an_affine_map():
    moving = volume(texture((64, 64, 64), sigma=2.5))
    centre = moving.geometry.center_mm()
    matrix = np.eye(4)
    matrix[:3, :3] = turned(6, (1.06, 0.95, 1.04))
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + np.array([6.0, -4.0, 3.0])
    truth = Affine(matrix)
    fixed, _ = resample_with_mask(moving, moving.geometry, truth)
    found = deeds.register(fixed, moving, preset=SMALL, affine=True)
    points = fixed.geometry.index_to_mm(np.random.default_rng(0).uniform(16, 48, (500, 3)))
    before = np.linalg.norm(points - truth.apply(points), axis=1).mean()
    after = np.linalg.norm(found.linear.apply(points) - truth.apply(points), axis=1).mean()
    assert before > 7.0
    assert after < 1.5
    together = found.linear.apply(found.field.apply(points))
    assert np.linalg.norm(together - truth.apply(points), axis=1).mean() < after + 0.3


def test_deeds_affine_step_is_not_accepted_where_it_does_not_help(moved):
    same = moved[0]
    found = deeds.register(same, same, preset=SMALL, affine=True)
    np.testing.assert_array_equal(found.linear.matrix, np.eye(4))
    assert np.abs(found.field.vectors).max() == 0.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (2.0, 2.0, 2.0)])
def test_deeds_geometry_oblique_storage_equals_its_canonical_copy(moved, spacing):
    fixed = moved[0]
    middle, shape = moved[1].geometry.center_mm(), (22, 100, 100) if spacing[2] == 5.0 else (50, 50, 50)
    direction = turned(20)
    origin = middle - direction @ ((np.array(shape[::-1]) - 1) / 2 * np.array(spacing))
    stored = Geometry(shape, np.array(spacing), origin, direction)
    oblique, _ = resample_with_mask(moved[1], stored)
    oblique.modality = "mr"
    canonical, seen = resample_with_mask(oblique, fixed.geometry, antialias=True)
    canonical.modality = "mr"
    first = deeds.register(fixed, oblique, preset=SMALL).field.vectors
    second = deeds.register(fixed, canonical, preset=SMALL, moving_mask=seen).field.vectors
    assert np.percentile(np.linalg.norm(first - second, axis=-1), 95) < 0.1


def test_deeds_geometry_written_files_carry_the_volume_in_simpleitk(moved, tmp_path):
    from uae.registration.output import write_result

    fixed, moving = moved
    result = deform(fixed, moving, Affine(np.array([[1, 0, 0, 1.5], [0, 1, 0, -1], [0, 0, 1, 0.5], [0, 0, 0, 1.0]])))
    write_result(result, tmp_path / "out")
    linear = sitk.ReadTransform(str(next((tmp_path / "out").glob("*.tfm"))))
    grid = sitk.ReadImage(str(tmp_path / "out" / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    chain = sitk.CompositeTransform([linear, sitk.DisplacementFieldTransform(grid)])
    reference = fixed.to_sitk()
    carried = sitk.GetArrayFromImage(sitk.Resample(moving.to_sitk(), reference, chain, sitk.sitkLinear, -9999.0))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "moving_in_fixed.nii.gz")))
    inside = carried > -9999.0
    assert inside.mean() > 0.5
    spread = float(moving.array.std())
    assert np.abs(carried - ours)[inside].max() < 0.01 * spread
    points = fixed.geometry.index_to_mm(np.random.default_rng(2).uniform(6, 24, (200, 3)))
    there = np.array([chain.TransformPoint(point.tolist()) for point in points])
    np.testing.assert_allclose(result.transform.apply(points), there, atol=0.01)


def write(path, array, origin=(0.0, 0.0, 0.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 2.0, 2.0))
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.mark.parametrize(
    ("case", "word"),
    [("constant", "all voxels have"), ("nan", "NaN"), ("far", "overlap"), ("tiny", "too small"), ("mask", "empty")],
)
def test_deeds_bad_input_on_the_command_line_writes_nothing(case, word, tmp_path, capsys):
    good = texture((30, 28, 32))
    moving, more = good.copy(), []
    fixed_array, origin = good, (0.0, 0.0, 0.0)
    if case == "constant":
        moving[:] = 5.0
    elif case == "nan":
        moving[3, 4, 5] = np.nan
    elif case == "far":
        origin = (900.0, 0.0, 0.0)
    elif case == "tiny":
        fixed_array, moving = good[:8], good[:8]
    else:
        more = ["--fixed-mask", write(tmp_path / "mask.nrrd", np.zeros(good.shape, np.uint8))]
    files = [write(tmp_path / "fixed.nrrd", fixed_array), write(tmp_path / "moving.nrrd", moving, origin)]
    options = ["--fixed-modality", "mr", "--moving-modality", "mr", "--output", str(tmp_path / "out"), *more]
    assert main(["deform", *files, *options]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_deeds_unknown_torch_device_is_refused(moved):
    with pytest.raises(InputError, match="backend"):
        deeds.register(*moved, backend="torch:abacus")


def test_deeds_folds_outside_the_overlap_lower_the_verdict(moved, monkeypatch):
    from dataclasses import replace

    from uae.registration import deformable

    real = deformable.taper
    monkeypatch.setattr(deformable, "taper", lambda *args: replace(real(*args), folding_outside=7))
    result = deform(*moved)
    assert result.status == "review"
    assert "folds at 7 nodes" in result.reason
    assert result.report["deformable"]["folding_outside_overlap_nodes"] == 7
