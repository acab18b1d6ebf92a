"""Adapters of the public layouts, each on a tiny folder made in that layout, and their messages for what is missing."""

import json

import numpy as np
import pytest

from uae.bench.datasets import landmarks, learn2reg, lesions, paired, totalsegmentator
from uae.errors import InputError
from uae.geometry import Geometry
from uae.transform import Rigid
from uae.volume import Volume

OBLIQUE = Rigid.from_euler_deg(5.0, 10.0, -20.0).rotation


def grid(shape=(10, 12, 14), spacing=(0.8, 0.8, 3.0), origin=(-20.0, 30.0, 5.0), direction=OBLIQUE):
    return Geometry(shape, np.array(spacing), np.array(origin), direction)


def write(path, geometry, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.random.default_rng(0).normal(size=geometry.shape).astype(np.float32)
    Volume(array, geometry).write(path)


# ---- DLS lesion pairs

TARGET = grid(origin=(4.0, -7.0, 90.0))


def dls_entry(**changes):
    return {
        "source": "000016_01_01_002-014.nii.gz", "target": "000016_02_01_223-283.nii.gz",
        "source center": [3.0, 4.0, 2.0], "target center": [5.5, 6.0, 4.0],
        "target box": [4.0, 3.0, 2.0, 4.0, 6.0, 5.0],
        "source box": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "target recist diameter": [5.0, 3.0],
        "source spacing": [0.8, 0.8, 3.0], "target spacing": [0.8, 0.8, 3.0], **changes,
    }  # fmt: skip


def dls(folder, entries, sub="data", images="images"):
    write(folder / images / "000016_01_01_002-014.nii.gz", grid())
    write(folder / images / "000016_02_01_223-283.nii.gz", TARGET)
    (folder / sub).mkdir(exist_ok=True)
    (folder / sub / "test.json").write_text(json.dumps(entries))
    return folder


def test_lesions(tmp_path):
    assert not lesions.is_layout(tmp_path)
    folder = dls(tmp_path, {"0001": dls_entry(), "0002": dls_entry(**{"target recist diameter": None})})
    assert lesions.is_layout(folder)
    first, second = lesions.read_lesions(folder)
    assert (first.name, first.group, first.modalities) == ("0001", "test", ("ct", "ct"))
    np.testing.assert_allclose(first.template_points, grid().index_to_mm([[3.0, 4.0, 2.0]]), atol=1e-4)
    np.testing.assert_allclose(first.query_points, TARGET.index_to_mm([[5.5, 6.0, 4.0]]), atol=1e-4)
    assert first.figures["radius_mm"][0] == pytest.approx(2.5 * 0.8, rel=1e-5)
    assert first.figures["size_mm"][0] == pytest.approx(np.sqrt(3.2**2 + 4.8**2 + 15.0**2), rel=1e-5)
    assert np.isnan(second.figures["radius_mm"][0])
    inside = TARGET.index_to_mm([[4.0, 3.0, 2.0], [7.99, 8.99, 6.99]])
    outside = TARGET.index_to_mm([[8.001, 5.0, 4.0], [5.0, 5.0, 1.999], [5.0, 5.0, 7.001]])
    assert all(lesions.in_box(first, point[None], TARGET)[0] for point in inside + 1e-9 * OBLIQUE.sum(axis=1))
    assert not any(lesions.in_box(first, point[None], TARGET)[0] for point in outside)


def test_lesions_with_slices_the_other_way(tmp_path):
    folder = dls(tmp_path, [dls_entry()], sub=".", images="Images_nifti")
    pair = lesions.read_lesions(folder, reversed_slices=True)[0]
    np.testing.assert_allclose(pair.query_points, TARGET.index_to_mm([[5.5, 6.0, 9.0 - 4.0]]), atol=1e-4)
    # planes 2..6 of 10 become 3..7
    np.testing.assert_allclose(pair.figures["box"][0], [[4.0, 3.0, 3.0], [8.0, 9.0, 8.0]])


def test_lesions_say_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        lesions.read_lesions(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"test\.json is missing"):
        lesions.read_lesions(tmp_path)
    folder = dls(tmp_path, {"7": dls_entry(target="other.nii.gz")})
    with pytest.raises(InputError, match=r"other\.nii\.gz is missing \(an image that test\.json names\)"):
        lesions.read_lesions(folder)
    with pytest.raises(InputError, match="unknown split"):
        lesions.read_lesions(folder, "all")
    for broken, words in (
        ({"7": {"target": "a"}}, "has no"), ({"7": dls_entry(**{"target box": [1, 2]})}, "must be 6 numbers"),
        ({"7": dls_entry(**{"source center": [1, 2, "x"]})}, "not a number"), ([], "no lesion pairs"),
        (7, "a table of lesion pairs"), ({"7": dls_entry(**{"target recist diameter": [5.0, None]})}, "not a number"),
    ):  # fmt: skip
        (folder / "data" / "test.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=words):
            lesions.read_lesions(folder)
    (folder / "data" / "test.json").write_text("{")
    with pytest.raises(InputError, match="not a JSON file"):
        lesions.read_lesions(folder)


# ---- chest CT landmarks

HEADER = "image,phase,label,x_lps_mm,y_lps_mm,z_lps_mm\n"


def chest(folder, text, names=("a", "b", "c")):
    for name in names:
        write(folder / "images" / f"{name}.nii.gz", grid())
    (folder / "landmarks.csv").write_text(text)
    return folder


def test_landmarks_by_phase(tmp_path):
    rows = (
        "a,CE,carina,1,2,3\na,CE,apex,4,5,6\nb,CE,carina,7,8,9\nb,CE,other,0,0,0\nc,NC,carina,1,1,1\nc,NC,apex,2,2,2\n"
    )
    folder = chest(tmp_path, HEADER + rows)
    assert landmarks.is_layout(folder)
    pairs = {pair.name: pair for pair in landmarks.read_landmarks(folder)}
    assert {name: pair.group for name, pair in pairs.items()} == {
        "a > b": "CE-CE", "a > c": "CE-NC", "c > a": "NC-CE", "c > b": "NC-CE",
    }  # fmt: skip
    assert pairs["a > b"].labels == ["carina"]
    np.testing.assert_allclose(pairs["a > c"].template_points, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_allclose(pairs["a > c"].query_points, [[1, 1, 1], [2, 2, 2]])
    assert [pair.name for pair in landmarks.read_landmarks(folder, template="b")] == ["b > a", "b > c"]


def test_landmarks_in_voxels(tmp_path):
    folder = chest(tmp_path, "image,label,x,y,z\na,carina,1,2,3\nb.nii.gz,carina,4,4,4\n")
    pair = landmarks.read_landmarks(folder)[0]
    np.testing.assert_allclose(pair.query_points, grid().index_to_mm([[4.0, 4.0, 4.0]]), atol=1e-4)
    assert pair.group == "all"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,label,x,y\na,c,1,2\n", "coordinates are missing"),
        ("picture,label\na,c\n", "'image' is missing"),
        ("image,label,x,y,z\na,c,1,2,x\n", "not a number"),
        ("image,label,x,y,z\nzzz,c,1,2,3\n", r"zzz\.nii\.gz is missing"),
        ("image,label,x,y,z\na,c,1,2,3\nb,d,1,2,3\n", "no landmark is common"),
        ("image,label,x,y,z\n", "empty"),
    ],
)
def test_landmarks_say_what_is_wrong(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        landmarks.read_landmarks(chest(tmp_path, text))


def test_landmarks_without_a_table_or_template(tmp_path):
    with pytest.raises(InputError, match=r"landmarks\.csv is missing"):
        landmarks.read_landmarks(tmp_path)
    folder = chest(tmp_path, "image,label,x,y,z\na,c,1,2,3\nb,c,1,2,3\n")
    with pytest.raises(InputError, match="no image 'q'"):
        landmarks.read_landmarks(folder, template="q")


# ---- CT-MR pairs with painted landmarks


def blob(geometry, places):
    array = np.zeros(geometry.shape, np.uint8)
    for number, (x, y, z) in places.items():
        array[z - 1 : z + 2, y - 1 : y + 2, x - 1 : x + 2] = number
    return array


def test_paired(tmp_path):
    mr = grid(shape=(8, 16, 16), spacing=(1.2, 1.2, 4.0), origin=(100.0, 0.0, 0.0))
    write(tmp_path / "p1" / "ct.nii.gz", grid())
    write(tmp_path / "p1" / "t1.nii.gz", mr)
    write(tmp_path / "p1" / "ct_landmarks.nii.gz", grid(), blob(grid(), {1: (3, 4, 5), 2: (9, 9, 3), 5: (9, 3, 8)}))
    write(tmp_path / "p1" / "t1_mask.nii.gz", mr, blob(mr, {2: (4, 5, 3), 5: (12, 9, 5), 7: (4, 12, 3)}))
    (tmp_path / "readme").mkdir()
    assert paired.is_layout(tmp_path)
    (pair,) = paired.read_pairs(tmp_path)
    assert (pair.name, pair.labels, pair.modalities) == ("p1", ["2", "5"], ("ct", "mr"))
    np.testing.assert_allclose(pair.fixed_points, grid().index_to_mm([[9, 9, 3], [9, 3, 8]]), atol=1e-3)
    np.testing.assert_allclose(pair.moving_points, mr.index_to_mm([[4, 5, 3], [12, 9, 5]]), atol=1e-3)
    assert pair.moving.name == "t1.nii.gz"


def test_paired_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no sub-folder with"):
        paired.read_pairs(tmp_path)
    write(tmp_path / "p1" / "ct.nii.gz", grid())
    with pytest.raises(InputError, match="no mr, mri, t1, t2 image"):
        paired.read_pairs(tmp_path)
    write(tmp_path / "p1" / "mr.nii.gz", grid())
    with pytest.raises(InputError, match=r"ct_landmarks\.nii\.gz is missing"):
        paired.read_pairs(tmp_path)
    for name, number in (("ct", 1), ("mr", 2)):
        write(tmp_path / "p1" / f"{name}_landmarks.nii.gz", grid(), blob(grid(), {number: (3, 4, 5)}))
    with pytest.raises(InputError, match="no number in common"):
        paired.read_pairs(tmp_path)


# ---- Learn2Reg


def l2r(folder, **content):
    for number in ("0000", "0001"):
        geometry = grid(origin=(0.0, 0.0, 0.0) if number == "0000" else (50.0, 0.0, 0.0))
        write(folder / "imagesTr" / f"Abdomen_0001_{number}.nii.gz", geometry)
        write(folder / "labelsTr" / f"Abdomen_0001_{number}.nii.gz", geometry, blob(geometry, {1: (3, 3, 3)}))
        (folder / "keypointsTr").mkdir(exist_ok=True)
        (folder / "keypointsTr" / f"Abdomen_0001_{number}.csv").write_text("1,2,3\n4.5,5,6\n")
    pairs = [{"fixed": "./imagesTr/Abdomen_0001_0000.nii.gz", "moving": "./imagesTr/Abdomen_0001_0001.nii.gz"}]
    description = {"name": "Abdomen", "modality": {"0": "MR", "1": "CT"}, "registration_val": pairs, **content}
    (folder / "Abdomen_dataset.json").write_text(json.dumps(description))
    return folder


def test_learn2reg(tmp_path):
    assert not learn2reg.is_layout(tmp_path)
    folder = l2r(tmp_path)
    assert learn2reg.is_layout(folder)
    (pair,) = learn2reg.read_pairs(folder)
    assert pair.modalities == ("mr", "ct")
    assert (pair.fixed_labels.parent.name, pair.moving_labels.name) == ("labelsTr", "Abdomen_0001_0001.nii.gz")
    index = [[1, 2, 3], [4.5, 5, 6]]
    np.testing.assert_allclose(pair.fixed_points, grid(origin=(0.0, 0.0, 0.0)).index_to_mm(index), atol=1e-4)
    np.testing.assert_allclose(pair.moving_points, grid(origin=(50.0, 0.0, 0.0)).index_to_mm(index), atol=1e-4)
    for file in (folder / "labelsTr").iterdir():
        file.unlink()
    for file in (folder / "keypointsTr").iterdir():
        file.rename(file.parent.parent / file.name)
    bare = learn2reg.read_pairs(folder)[0]
    assert (bare.fixed_labels, bare.fixed_points, bare.labels) == (None, None, [])


def test_learn2reg_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"no \*dataset\.json"):
        learn2reg.read_pairs(tmp_path)
    folder = l2r(tmp_path)
    with pytest.raises(InputError, match=r"no pairs under 'registration_test' \(it has val\)"):
        learn2reg.read_pairs(folder, "test")
    with pytest.raises(InputError, match="unknown split"):
        learn2reg.read_pairs(folder, "all")
    (folder / "keypointsTr" / "Abdomen_0001_0001.csv").write_text("1,2,3\n")
    with pytest.raises(InputError, match="1 points for 2"):
        learn2reg.read_pairs(folder)
    (folder / "keypointsTr" / "Abdomen_0001_0001.csv").write_text("x,y,z\n")
    with pytest.raises(InputError, match="not a table of numbers"):
        learn2reg.read_pairs(folder)
    l2r(folder, registration_val=[{"fixed": "./imagesTr/none.nii.gz", "moving": "./imagesTr/none.nii.gz"}])
    with pytest.raises(InputError, match=r"none\.nii\.gz is missing"):
        learn2reg.read_pairs(folder)
    l2r(folder, registration_val=[["a", "b"]])
    with pytest.raises(InputError, match="needs 'fixed' and 'moving'"):
        learn2reg.read_pairs(folder)


# ---- TotalSegmentator


def subject(folder, name, places, image="ct.nii.gz"):
    write(folder / name / image, grid())
    for structure, place in places.items():
        write(folder / name / "segmentations" / f"{structure}.nii.gz", grid(), blob(grid(), {1: place}))


def test_totalsegmentator(tmp_path):
    subject(tmp_path, "s0001", {"liver": (4, 4, 4), "spleen": (8, 8, 5), "aorta": (1, 5, 5)})
    subject(tmp_path, "s0002", {"liver": (5, 5, 5), "spleen": (8, 8, 8)})
    subject(tmp_path, "s0003", {"liver": (6, 6, 6)})
    (tmp_path / "meta.csv").write_text("image_id;age;split\ns0001;50;test\ns0002;60;test\ns0003;70;train\n")
    assert totalsegmentator.is_layout(tmp_path)
    (pair,) = totalsegmentator.read_pairs(tmp_path)
    # the aorta is cut off in the template, the spleen in the other subject
    assert (pair.name, pair.labels) == ("s0001 > s0002", ["liver"])
    np.testing.assert_allclose(pair.template_points, grid().index_to_mm([[4, 4, 4]]), atol=1e-3)
    np.testing.assert_allclose(pair.query_points, grid().index_to_mm([[5, 5, 5]]), atol=1e-3)
    names = [p.name for p in totalsegmentator.read_pairs(tmp_path, split=None, template="s0003")]
    assert names == ["s0003 > s0001", "s0003 > s0002"]


def test_totalsegmentator_says_what_is_missing(tmp_path):
    subject(tmp_path, "s0001", {"liver": (4, 4, 4)})
    with pytest.raises(InputError, match="fewer than two subjects"):
        totalsegmentator.read_pairs(tmp_path)
    subject(tmp_path, "s0002", {"spleen": (4, 4, 4)}, "mri.nii.gz")
    with pytest.raises(InputError, match="no structure of s0001"):
        totalsegmentator.read_pairs(tmp_path)
    with pytest.raises(InputError, match="no subject 's9'"):
        totalsegmentator.read_pairs(tmp_path, template="s9")
    (tmp_path / "meta.csv").write_text("image_id;age\ns0001;50\n")
    with pytest.raises(InputError, match="'split' is missing"):
        totalsegmentator.read_pairs(tmp_path)
