"""The parametric torso: its anatomy is plausible, its correspondences and the truth of its pairs are exact."""

import json

import numpy as np
import pytest
from scipy import ndimage

from uae.errors import InputError
from uae.phantom import (
    FIRST_TEST_SEED,
    TRAINING_SEEDS,
    VALIDATION_SEEDS,
    correspondence,
    labels_at,
    make_phantom,
    phantom_pair,
    truth_field,
    write_sample,
)
from uae.phantom.correspond import body_lattice, on_lattice, subject_map
from uae.phantom.render import mr_values
from uae.phantom.tissues import TISSUE
from uae.points import read_points
from uae.transform import Composite, Rigid, read_transform
from uae.volume import Volume

SEEDS = (FIRST_TEST_SEED + 10, FIRST_TEST_SEED + 11, FIRST_TEST_SEED + 12)

# Millilitres: lower and upper ends of what adults have (wide, because people differ).
VOLUMES_ML = {
    "liver": (900, 2300), "spleen": (80, 450), "kidney_left": (90, 280), "kidney_right": (90, 280),
    "bladder": (60, 400), "lung_left": (1000, 3800), "lung_right": (1100, 4200), "myocardium": (120, 420),
    "aorta": (110, 400), "stomach": (200, 900), "vertebra_L3": (20, 75), "vertebra_T6": (8, 35),
    "hip_bone_left": (170, 600),
    "psoas_left": (100, 420), "gallbladder": (12, 90), "rib_left_5": (15, 70), "pancreas": (20, 140),
}  # fmt: skip


@pytest.fixture(scope="module", params=SEEDS[:2])
def phantom(request):
    return make_phantom(request.param, 4.0)


@pytest.fixture(scope="module")
def two():
    return make_phantom(SEEDS[0], 5.0, ct=False, mr=False), make_phantom(SEEDS[1], 5.0, ct=False, mr=False)


@pytest.fixture(scope="module")
def pair():
    return phantom_pair(FIRST_TEST_SEED + 20, fixed_spacing=5.0, moving_spacing=(4.0, 4.0, 6.0))


def of_label(phantom, name):
    number = {n: k for k, n in phantom.label_names.items()}[name]
    return phantom.labels.array == number


def away_from_borders(labels):
    """Voxels (N, 3) in x, y, z whose 26 neighbours all carry the same label, not counting the outside."""
    same = ndimage.minimum_filter(labels, 3) == ndimage.maximum_filter(labels, 3)
    same &= labels > 0
    same[[0, -1]], same[:, [0, -1]], same[:, :, [0, -1]] = False, False, False
    return np.argwhere(same)[:, ::-1].astype(float)


def at_index(labels, index_xyz):
    x, y, z = np.round(index_xyz).astype(int).T
    return labels[z, y, x]


def jacobian_determinant(transform, points, delta=0.5):
    columns = []
    for axis in range(3):
        step = np.zeros(3)
        step[axis] = delta
        columns.append((transform.apply(points + step) - transform.apply(points - step)) / (2 * delta))
    return np.linalg.det(np.stack(columns, axis=2))


def some_body_points(phantom, count=400):
    cells = np.argwhere(phantom.labels.array > 0)[:, ::-1].astype(float)
    chosen = cells[np.random.default_rng(0).choice(len(cells), count, replace=False)]
    return phantom.labels.geometry.index_to_mm(chosen)


def test_phantom_structures_have_human_volumes(phantom):
    cell = phantom.labels.geometry.voxel_volume_mm3 / 1000.0
    counts = np.bincount(phantom.labels.array.ravel(), minlength=256)
    volume = {name: counts[number] * cell for number, name in phantom.label_names.items()}
    assert sum(ml > 0.5 for ml in volume.values()) >= 90
    wrong = {name: volume[name] for name, (low, high) in VOLUMES_ML.items() if not low <= volume[name] <= high}
    assert not wrong
    trunk = counts[1:].sum() * cell / 1000
    assert 20 < trunk < 75, "litres from the neck to the thighs"


def test_phantom_stands_upright_in_lps(phantom):
    marks = phantom.landmarks
    assert len(marks) >= 30
    assert marks["kidney_left_lateral"][0] > marks["kidney_right_lateral"][0] + 60
    assert marks["vertebra_L3"][1] > marks["sternum_bottom"][1] + 60
    heights = [marks[f"vertebra_{name}"][2] for name in ("T1", "T6", "T12", "L3", "L5")]
    assert heights == sorted(heights, reverse=True)
    size = phantom.labels.geometry.extent_mm
    assert 330 < size[0] < 560 and 200 < size[1] < 420 and 500 < size[2] < 780


def home_of(landmark):
    """The structure in which a landmark lies (the beginning of its name)."""
    homes = {
        "carina": "trachea", "aortic": "aorta", "heart_apex": "myocardium", "bladder": "bladder", "liver_dome": "liver",
        "gallbladder": "gallbladder", "sternum": "sternum", "symphysis": "hip_bone", "sacral": "sacrum",
        "spleen": "spleen", "hip_joint": "femur", "lung": "lung", "iliac_crest": "hip_bone", "rib_5": "rib_",
        "kidney_left": "kidney_left", "kidney_right": "kidney_right",
    }  # fmt: skip
    return next((home for start, home in homes.items() if landmark.startswith(start)), landmark)


def test_phantom_landmarks_lie_in_their_structures(phantom):
    near = 2.5 * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])
    around = np.array(list(phantom.landmarks.values()))[:, None] + near
    labels = labels_at(around.reshape(-1, 3), phantom.to_canonical, phantom.seed).reshape(-1, len(near))
    lost = {}
    for name, numbers in zip(phantom.landmarks, labels):
        found = {phantom.label_names.get(int(number), "outside") for number in numbers}
        if not any(structure.startswith(home_of(name)) for structure in found):
            lost[name] = found
    assert not lost


def test_phantom_ct_is_in_hounsfield_units(phantom):
    mean = {
        name: phantom.ct.array[of_label(phantom, name)].mean() for name in ("subcutaneous_fat", "lung_left", "liver")
    }
    assert -125 < mean["subcutaneous_fat"] < -60 and -900 < mean["lung_left"] < -650 and 30 < mean["liver"] < 160
    assert phantom.ct.array[phantom.labels.array == 0].min() >= -1024
    assert np.median(phantom.ct.array[:, 0]) < -900
    assert np.percentile(phantom.ct.array[of_label(phantom, "femur_left")], 95) > 400
    assert phantom.ct.modality == "ct" and phantom.mr.modality == "mr"


def test_phantom_mr_is_dark_where_there_is_no_signal(phantom):
    level = np.percentile(phantom.mr.array, 99)
    assert phantom.mr.array.min() >= 0
    assert np.median(phantom.mr.array[phantom.labels.array == 0]) < 0.12 * level
    assert np.median(phantom.mr.array[of_label(phantom, "lung_right")]) < 0.35 * level


def test_phantom_contrasts_differ_between_seeds():
    names = ("liver", "spleen", "kidney_cortex", "fat", "muscle", "urine", "csf", "arterial")
    orders = set()
    for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + 8):
        means, _ = mr_values(seed)
        orders.add(tuple(np.argsort([means[TISSUE[name]] for name in names])))
    assert len(orders) >= 6


def test_phantom_is_deterministic():
    first, again, other = (make_phantom(seed, 7.0, part="pelvis") for seed in (SEEDS[0], SEEDS[0], SEEDS[1]))
    for name in ("ct", "mr", "labels"):
        a, b = getattr(first, name), getattr(again, name)
        assert a.geometry.same_as(b.geometry) and np.array_equal(a.array, b.array)
    assert not first.ct.geometry.same_as(other.ct.geometry) or not np.array_equal(first.ct.array, other.ct.array)


def test_phantom_correspondence_carries_landmarks_and_labels(two):
    a, b = two
    there = correspondence(a, b)
    names = sorted(set(a.landmarks) & set(b.landmarks))
    assert len(names) >= 30
    of_a, of_b = (np.array([p.landmarks[name] for name in names]) for p in (a, b))
    assert np.linalg.norm(of_a - of_b, axis=1).mean() > 5.0, "two people differ"
    assert np.linalg.norm(there.apply(of_a) - of_b, axis=1).max() < 0.1
    index = away_from_borders(a.labels.array)
    index = index[np.random.default_rng(1).choice(len(index), 4000, replace=False)]
    carried = there.apply(a.labels.geometry.index_to_mm(index))
    assert (labels_at(carried, b.to_canonical, b.seed) == at_index(a.labels.array, index)).mean() > 0.97
    # The painted volume of b says the same wherever it covers the point.
    seen = b.labels.geometry.contains(carried, 0.0)
    near = at_index(b.labels.array, b.labels.geometry.mm_to_index(carried[seen]))
    assert (near == at_index(a.labels.array, index[seen])).mean() > 0.9


def test_phantom_maps_are_inverted_exactly_and_never_fold(two):
    a, b = two
    points = some_body_points(a)
    there = correspondence(a, b)
    assert np.abs(there.inverse().apply(there.apply(points)) - points).max() < 0.01
    canonical = body_lattice(25.0)
    for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + 20):
        to_canonical = subject_map(seed)
        assert jacobian_determinant(to_canonical, to_canonical.inverse().apply(canonical)).min() > 0.1


def test_phantom_grid_agrees_with_loose_points():
    phantom = make_phantom(
        SEEDS[2], (3.0, 4.0, 5.0), ct=False, mr=False, part="abdomen", pose=Rigid.from_euler_deg(8, -6, 25)
    )
    geometry = phantom.labels.geometry
    points = geometry.grid_points_mm()
    chosen = np.random.default_rng(2).choice(len(points), 3000, replace=False)
    exact = phantom.to_canonical.apply(points[chosen])
    assert np.abs(on_lattice(geometry, phantom.to_canonical).reshape(3, -1).T[chosen] - exact).max() < 0.1
    loose = labels_at(points[chosen], phantom.to_canonical, phantom.seed)
    assert (loose == phantom.labels.array.ravel()[chosen]).mean() > 0.985


def test_phantom_thick_slices_blur_along_z():
    thin = make_phantom(SEEDS[0], 4.0, ct=False, part=(20.0, 120.0))
    thick = make_phantom(SEEDS[0], 4.0, ct=False, part=(20.0, 120.0), mr_slice_mm=12.0)
    rough = [np.abs(np.diff(p.mr.array, axis=0)).mean() for p in (thin, thick)]
    assert rough[1] < 0.8 * rough[0]


def test_phantom_refuses_bad_input():
    for wrong in ({"spacing": 0.0}, {"spacing": float("nan")}, {"part": "leg"}, {"part": (100.0, 50.0)}):
        with pytest.raises(InputError):
            make_phantom(SEEDS[0], **wrong)
    with pytest.raises(InputError):
        phantom_pair(SEEDS[0], moving_extent=(10.0, 10.0, 4.0))


def test_phantom_seed_ranges_are_disjoint():
    assert TRAINING_SEEDS[-1] < VALIDATION_SEEDS[0] <= VALIDATION_SEEDS[-1] < FIRST_TEST_SEED


def test_pair_truth_carries_labels(pair):
    grid = pair.moving_labels.geometry
    for labels, geometry, transform, other in (
        (pair.moving_labels.array, grid, pair.moving_to_fixed, pair.fixed_labels),
        (pair.fixed_labels.array, pair.fixed_labels.geometry, pair.fixed_to_moving, pair.moving_labels),
    ):
        index = away_from_borders(labels)
        carried = transform.apply(geometry.index_to_mm(index))
        seen = other.geometry.contains(carried, 0.0)
        assert seen.sum() > 500
        found = at_index(other.array, other.geometry.mm_to_index(carried[seen]))
        assert (found == at_index(labels, index[seen])).mean() > 0.95
    # Exact up to the borders; without the smooth part it is not, so the test can tell.
    index = np.argwhere(pair.moving_labels.array > 0)[::5, ::-1].astype(float)
    start, expected = grid.index_to_mm(index), at_index(pair.moving_labels.array, index)
    with_motion, without = (
        (labels_at(transform.apply(start), pair.fixed_to_canonical, pair.seed) == expected).mean()
        for transform in (pair.moving_to_fixed, pair.rigid.inverse())
    )
    assert with_motion > 0.995 and without < 0.95


def test_pair_is_displaced_turned_and_deformed_as_promised(pair):
    names = list(pair.moving_landmarks)
    fixed, moving = (np.array([marks[n] for n in names]) for marks in (pair.fixed_landmarks, pair.moving_landmarks))
    assert len(names) >= 10 and set(pair.fixed_landmarks) == set(names)
    assert np.linalg.norm(moving - fixed, axis=1).min() > 60
    assert np.linalg.norm(pair.fixed_to_moving.apply(fixed) - moving, axis=1).max() < 0.05
    assert 10 <= pair.rigid.rotation_angle_deg() <= 20
    cells = np.argwhere(pair.moving_labels.array > 0)[::7, ::-1].astype(float)
    points = pair.moving_labels.geometry.index_to_mm(cells)
    assert len(cells) * 7 > 0.7 * pair.moving_labels.array.size, "most of the MR shows the body"
    true = pair.moving_to_fixed.apply(points)
    length = np.linalg.norm(pair.motion.apply(true) - true, axis=1)
    assert 5.0 <= length.max() <= 8.0
    assert length.max() == pytest.approx(pair.max_deformation_mm, abs=0.4)
    a, b = points - points.mean(axis=0), true - true.mean(axis=0)
    u, _, vt = np.linalg.svd(a.T @ b)
    turn = vt.T @ np.diag([1, 1, np.linalg.det(vt.T @ u.T)]) @ u.T
    floor = np.linalg.norm(a @ turn.T - b, axis=1).mean()
    assert 1.0 < floor <= 3.0
    assert floor == pytest.approx(pair.rigid_floor_mm, abs=0.25)
    assert np.abs(pair.fixed_to_moving.apply(true) - points).max() < 0.01
    assert jacobian_determinant(pair.motion, some_body_points_of_pair(pair)).min() > 0.5


def some_body_points_of_pair(pair):
    cells = np.argwhere(pair.fixed_labels.array > 0)[::31, ::-1].astype(float)
    return pair.fixed_labels.geometry.index_to_mm(cells)


def test_pair_images_show_what_the_labels_say(pair):
    names = {name: number for number, name in pair.label_names.items()}
    level = np.percentile(pair.moving.array, 99)
    assert np.median(pair.moving.array[pair.moving_labels.array == 0]) < 0.12 * level
    body = pair.moving.array[pair.moving_labels.array > 0]
    assert np.median(body) > 2 * np.median(pair.moving.array[pair.moving_labels.array == 0])
    fat = pair.fixed.array[pair.fixed_labels.array == names["subcutaneous_fat"]]
    assert -125 < np.median(fat) < -75


def test_sample_files_hold_the_truth(pair, tmp_path):
    write_sample(tmp_path, pair.seed, pair)
    truth = Composite(
        [read_transform(tmp_path / "truth_displacement.nii.gz"), read_transform(tmp_path / "truth_rigid.tfm")]
    )
    ct, mr = read_points(tmp_path / "landmarks_ct.csv"), read_points(tmp_path / "landmarks_mr.csv")
    assert ct.labels == mr.labels and len(ct.labels) >= 10
    assert np.linalg.norm(truth.apply(ct.points) - mr.points, axis=1).max() < 0.05
    inside = some_body_points_of_pair(pair)
    assert np.linalg.norm(truth_field(pair).apply(inside) - pair.motion.apply(inside), axis=1).max() < 0.05
    for name, volume in (("ct", pair.fixed), ("mr", pair.moving)):
        read = Volume.read(tmp_path / f"{name}.nii.gz")
        assert read.geometry.same_as(volume.geometry) and np.allclose(read.array, volume.array, atol=1e-2)
    assert np.array_equal(Volume.read(tmp_path / "labels.nii.gz", label=True).array, pair.fixed_labels.array)
    facts = json.loads((tmp_path / "truth.json").read_text())
    assert facts["seed"] == pair.seed and facts["rigid_floor_mm"] <= 3.0
    assert json.loads((tmp_path / "label_names.json").read_text())["1"] == "skin"
