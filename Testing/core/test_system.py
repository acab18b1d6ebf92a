"""The whole chain with the weights that ship: the same anatomy stored differently, known maps through written files,
and pairs that must be refused.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from uae.cli import main
from uae.embedding import Embedding, embed
from uae.errors import ModelError
from uae.geometry import Geometry
from uae.matching import match_points, nearest
from uae.models import load_model
from uae.registration.relate import relate
from uae.volume import Volume, resample

NOISE_HU = 15.0


@pytest.fixture(scope="module")
def model():
    try:
        return load_model("uae-m")
    except ModelError as error:
        pytest.skip(f"no trained weights here: {error}")


@pytest.fixture(scope="module")
def crop(real_data) -> Volume:
    """192 x 192 x 128 mm of a validation CT: heart, aorta, spine, part of both lungs."""
    whole = Volume.read(real_data("ct_lidc0001_chest/ct.nii.gz")[0])
    z, y, x = slice(20, 84), slice(44, 140), slice(44, 140)
    part = whole.geometry
    geometry = Geometry((64, 96, 96), part.spacing, part.index_to_mm(np.array([[44.0, 44, 20]]))[0], part.direction)
    return Volume(whole.array[z, y, x].copy(), geometry, "ct")


@pytest.fixture(scope="module")
def template(model, crop) -> Embedding:
    return embed(crop, model, cache=False)


@pytest.fixture(scope="module")
def places(template) -> np.ndarray:
    """200 places (N, 3) mm in the patient, not within 16 mm of the crop's border."""
    cells = np.argwhere(template.body & template.valid)
    inner = (cells >= 4).all(1) & (cells < np.array(template.body.shape) - 4).all(1)
    chosen = np.random.default_rng(0).choice(np.flatnonzero(inner), 200, replace=False)
    return template.fine_geometry.index_to_mm(cells[chosen][:, ::-1].astype(float))


def noisy(volume: Volume, seed: int) -> Volume:
    noise = np.random.default_rng(seed).normal(0, NOISE_HU, volume.array.shape)
    return volume.replace((volume.array + noise).astype(np.float32))


def errors(model, template: Embedding, places: np.ndarray, volume: Volume, seed: int) -> np.ndarray:
    query = embed(noisy(volume, seed), model, cache=False)
    inside = volume.geometry.contains(places, margin_voxels=-1.0)
    found, _ = nearest(template, query, places[inside])
    return np.linalg.norm(found - places[inside], axis=1)


def stored_differently(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """Array axes permuted and flipped, header with them: every voxel keeps its millimetres."""
    array = np.transpose(volume.array, order)
    axes = [2 - axis for axis in order][::-1]
    spacing, direction = volume.geometry.spacing[axes], volume.geometry.direction[:, axes]
    origin = volume.geometry.origin.copy()
    for axis, flip in enumerate(flips):
        if flip:
            index = 2 - axis
            origin = origin + direction[:, index] * spacing[index] * (array.shape[axis] - 1)
            direction = direction.copy()
            direction[:, index] *= -1
            array = np.flip(array, axis)
    return Volume(np.ascontiguousarray(array), Geometry(array.shape, spacing, origin, direction), volume.modality)


def test_geometry_of_all_48_axis_orders(model, crop, template, places):
    found = []
    ways = itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))
    for seed, (order, flips) in enumerate(ways):
        again = stored_differently(crop, order, flips)
        corner = np.array([[3.0, 5.0, 7.0]])
        assert crop.sample(crop.geometry.index_to_mm(corner))[0] == pytest.approx(
            again.sample(crop.geometry.index_to_mm(corner))[0], abs=1e-2
        )
        found.append(errors(model, template, places, again, seed))
    found = np.concatenate(found)
    assert len(found) > 48 * 150
    assert np.median(found) <= 2.0 and np.percentile(found, 95) <= 4.0


def resampled(crop: Volume, spacing, degrees: float, shift_voxels: float) -> Volume:
    direction = Rotation.from_rotvec(np.radians(degrees) * np.array([0.5, -0.6, 0.62])).as_matrix()
    spacing = np.asarray(spacing, float)
    size = np.ceil(crop.geometry.extent_mm / spacing).astype(int)
    center = crop.geometry.center_mm() + shift_voxels * spacing
    origin = center - direction @ (spacing * (size - 1) / 2)
    grid = Geometry(tuple(int(n) for n in size[::-1]), spacing, origin, direction)
    return resample(crop, grid, antialias=True)


@pytest.mark.parametrize(
    ("spacing", "degrees", "shift", "median", "p95"),
    [
        pytest.param((2, 2, 2), 30.0, 0.0, 2.0, 4.0, id="turned 30 degrees"),
        pytest.param((2, 2, 2), 0.0, 1.3, 2.0, 4.0, id="shifted 1.3 voxels"),
        pytest.param((1, 1, 5), 0.0, 0.0, 2.0, 5.0, id="1x1x5 mm"),
    ],
)
def test_geometry_of_other_grids(model, crop, template, places, spacing, degrees, shift, median, p95):
    """As `uae match` does it: the pair's own alignment, the second pass, then every point with the default method."""
    query = noisy(resampled(crop, spacing, degrees, shift), 99)
    relation = relate(crop, query, template, embed(query, model, cache=False), model, cache=False)
    # A turned crop shows other tissue at its corners; only what is well inside both is compared.
    near = places[np.linalg.norm(places - crop.geometry.center_mm(), axis=1) < 62.0] if degrees else places
    near = near[query.geometry.contains(near, margin_voxels=-1.0)]
    matches = match_points(
        relation.fixed, relation.moving, near, prior=relation.found.transform, prior_verdict=relation.found.verdict,
        limits=model.thresholds.get("match"),
    )  # fmt: skip
    found = np.linalg.norm([match.point_mm - place for match, place in zip(matches, near, strict=True)], axis=1)
    assert len(found) > 40
    assert np.median(found) <= median and np.percentile(found, 95) <= p95


def test_known_map_is_recovered_through_the_written_files(model, tmp_path):
    """Phantom pair, more than 60 mm and 10 degrees apart and deformed, through `uae register` and SimpleITK alone."""
    from uae.demo import body_points
    from uae.demo import main as demo
    from uae.phantom import phantom_pair
    from uae.registration.rigid import arun

    assert demo(["--output", str(tmp_path), "--device", "cpu"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["initial_landmark_mm"] > 60
    assert summary["rigid_landmark_mm"] <= 5
    assert summary["deformable_tre_mm"] < summary["rigid_tre_mm"]
    pair = phantom_pair(summary["seed"])
    moving = body_points(pair)[::20]
    fixed = pair.moving_to_fixed.apply(moving)
    linear = sitk.ReadTransform(str(tmp_path / "result" / "rigid.tfm"))
    field = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(tmp_path / "result" / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    )
    rigid = np.array([linear.TransformPoint(p) for p in fixed.tolist()])
    both = np.array([linear.TransformPoint(field.TransformPoint(p)) for p in fixed.tolist()])
    floor = np.linalg.norm(arun(fixed, moving).apply(fixed) - moving, axis=1).mean()
    assert np.linalg.norm(rigid - moving, axis=1).mean() <= floor + 3
    assert np.linalg.norm(both - moving, axis=1).mean() < np.linalg.norm(rigid - moving, axis=1).mean()


NO_OVERLAP = [
    ("ct_flt001_chest_fu/ct.nii.gz", "ct_flt001_abdthigh/ct.nii.gz", "ct", "ct"),
    ("spine_tptbox/mr_C6_t2.nii.gz", "spine_tptbox/ct_L3.nii.gz", "mr", "ct"),
    ("head_mni_ctmr/ct_ts_brain_atlas_1mm.nii.gz", "mr_prostatex0000_pelvis/t2_tra.nii.gz", "ct", "mr"),
    ("ct_lidc0001_chest/ct.nii.gz", "lower half of ct_mij_abdpelvis/ct.nii.gz", "ct", "ct"),
]


@pytest.mark.parametrize("pair", NO_OVERLAP, ids=[pair[0].split("/")[0] for pair in NO_OVERLAP])
def test_refuse_pairs_without_overlap_in_both_orders(model, real_data, tmp_path, pair):
    files = []
    for name in pair[:2]:
        path = real_data(name.removeprefix("lower half of "))[0]
        if name.startswith("lower half"):
            image = sitk.ReadImage(str(path))
            half = image[:, :, : image.GetDepth() // 2]
            path = tmp_path / "lower_half.nii.gz"
            sitk.WriteImage(half, str(path))
        files.append(path)
    for fixed, moving in ((0, 1), (1, 0)):
        output = tmp_path / f"order{fixed}"
        command = ["register", str(files[fixed]), str(files[moving]), "--output", str(output)]
        command += ["--fixed-modality", pair[2 + fixed], "--moving-modality", pair[2 + moving], "--device", "cpu"]
        assert main(command) == 3
        assert [p.name for p in Path(output).iterdir()] == ["report.json"]
        assert json.loads((output / "report.json").read_text())["status"] == "refused"
