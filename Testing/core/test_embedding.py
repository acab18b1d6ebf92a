"""Embedding: positions of cells, look-up at points, files and the cache."""

import io
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates

from uae import embedding as embedding_module
from uae import embedding_cache
from uae.embedding import Embedding, embed, pca_volume
from uae.errors import CancelledError, InputError
from uae.geometry import Geometry
from uae.models import load_model, save_model
from uae.network import NetworkConfig, UAENet
from uae.preprocess import InputMap
from uae.volume import Volume

CONFIGS = {
    "paper": NetworkConfig.paper(semantic=True, width=4, head_channels=8),
    "light": replace(NetworkConfig.light(), channels=(4, 8, 12, 16), head_channels=8),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UAE_MODELS", str(tmp_path / "models"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), CONFIGS[request.param])


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("light"), CONFIGS["light"])


def make_model(folder, config, seed=3):
    torch.manual_seed(seed)
    path = folder / "test.pt"
    save_model(path, UAENet(config).state_dict(), config, InputMap(), {}, {"name": "test", "version": "1"})
    return load_model(path)


def scan(seed=0, tilt=20.0):
    """A CT of an ellipsoid with structure, oblique to the patient's axes: 40 x 42 x 44 voxels of 2.5 x 2.2 x 2.4 mm."""
    shape = (40, 42, 44)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).normal(size=shape) * 60
    array = np.where(z**2 + (y / 0.8) ** 2 + (x / 0.9) ** 2 < 0.9, 40 + noise + 100 * np.sin(9 * x), -1000)
    c, s = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return Volume(
        array.astype(np.float32), Geometry(shape, (2.2, 2.4, 2.5), (-31.0, 12.5, 407.0), direction), "ct", "test"
    )


def random_embedding(seed=0, semantic=False, coarse=(3, 2, 2), factor=(4, 8, 8)):
    random = np.random.default_rng(seed)

    def unit(*shape):
        values = random.normal(size=shape)
        return (values / np.linalg.norm(values, axis=0)).astype(np.float16)

    fine = tuple(a * b for a, b in zip(coarse, factor))
    valid = np.ones(fine, dtype=bool)
    valid[:, :, -3:] = False
    return Embedding(
        fine=unit(6, *fine),
        coarse=unit(5, *coarse),
        semantic=unit(4, *fine) if semantic else None,
        geometry=Geometry(tuple(2 * n for n in fine), (2, 2, 2), (-10.0, 20.0, 30.0), np.eye(3)),
        valid=valid,
        body=valid & (random.random(fine) < 0.4),
        model_sha256="ab" * 32,
        modality="mr",
        meta={"model": "test"},
    )


def by_scipy(values, index):
    """Independent trilinear look-up with clamped ends, unit length: (N, C)."""
    found = np.stack([map_coordinates(v.astype(float), index.T, order=1, mode="nearest") for v in values], axis=1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_geometry_of_the_levels(model):
    found = embed(scan(), model, "cpu", cache=False)
    for grid, stride in ((found.fine_geometry, (2, 2, 2)), (found.coarse_geometry, model.config.coarse_stride)):
        sz, sy, sx = stride
        for k in ((0, 0, 0), (1, 1, 1)):
            voxel = [sx * k[0] + (sx - 1) / 2, sy * k[1] + (sy - 1) / 2, sz * k[2] + (sz - 1) / 2]
            np.testing.assert_allclose(
                grid.index_to_mm([k]), found.geometry.origin + 2.0 * np.array([voxel]), atol=1e-9
            )
    assert found.fine.shape[1:] == tuple(n // 2 for n in found.geometry.shape)
    assert [n % s for n, s in zip(found.geometry.shape, model.config.coarse_stride)] == [0, 0, 0]


def test_cells_outside_the_scan_are_invalid_and_body_is_valid(light):
    volume = scan(tilt=35.0)
    found = embed(volume, light, "cpu", cache=False)
    index = volume.geometry.mm_to_index(found.fine_geometry.grid_points_mm())
    inside = np.all((index > -0.5) & (index < np.array(volume.array.shape[::-1]) - 0.5), axis=1).reshape(
        found.valid.shape
    )
    assert not (found.valid & ~inside).any()
    assert (found.valid & inside).sum() > 0.98 * inside.sum()
    assert not (found.body & ~found.valid).any() and found.body.any()
    assert found.body.mean() < found.valid.mean()


@pytest.mark.parametrize("semantic", [False, True])
def test_descriptors_are_trilinear_unit_heads(semantic):
    found = random_embedding(semantic=semantic)
    found.valid[:] = True
    points = found.geometry.origin + np.random.default_rng(1).uniform(-2, 1, size=(200, 3)) + [[20.0, 30.0, 25.0]]
    points[:3] = found.geometry.corners_mm()[[0, 3, 7]]  # clamped at the border
    voxel = ((points - found.geometry.origin) / 2.0)[:, ::-1]
    fine, coarse = (voxel - 0.5) / 2, (voxel - [3.5, 7.5, 7.5]) / [8, 16, 16]
    parts = [by_scipy(found.fine, fine), by_scipy(found.coarse, coarse)]
    if semantic:
        parts.append(by_scipy(found.semantic, fine))
    expected = np.concatenate(parts, axis=1) / np.sqrt(len(parts))
    np.testing.assert_allclose(found.descriptors(points), expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0)


def test_dot_product_of_descriptors_is_the_mean_cosine_of_the_heads():
    found = random_embedding(semantic=True)
    a, b = found.cell_descriptors(np.array([[1, 2, 3], [7, 9, 4]]))
    cosines = []
    start = 0
    for name in found.heads:
        stop = start + len(getattr(found, name))
        u, v = a[start:stop], b[start:stop]
        cosines.append(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
        start = stop
    assert start == found.dimension
    assert a @ b == pytest.approx(np.mean(cosines), abs=1e-6)


def test_cell_descriptors_are_descriptors_at_their_centres():
    found = random_embedding(semantic=True)
    cells = np.argwhere(found.valid)[::7]
    points = found.fine_geometry.index_to_mm(cells[:, ::-1])
    np.testing.assert_allclose(found.cell_descriptors(cells), found.descriptors(points), atol=1e-5)
    fine = found.fine[:, cells[:, 0], cells[:, 1], cells[:, 2]].T.astype(np.float32)
    fine /= np.linalg.norm(fine, axis=1, keepdims=True)
    np.testing.assert_allclose(found.cell_descriptors(cells)[:, :6] * np.sqrt(3), fine, atol=1e-5)
    with pytest.raises(IndexError):
        found.cell_descriptors(np.array([[0, 0, found.fine.shape[3]]]))


def test_search_matrix_holds_all_body_cells():
    found = random_embedding(semantic=True)
    cells, matrix = found.search_matrix()
    np.testing.assert_array_equal(cells, np.argwhere(found.body))
    np.testing.assert_allclose(matrix, found.cell_descriptors(cells), atol=1e-5)
    assert found.search_matrix()[1] is matrix


def test_search_matrix_of_a_large_scan_is_half_precision(monkeypatch):
    monkeypatch.setattr(embedding_module, "SEARCH_FP32_BYTES", 1000)
    found = random_embedding()
    cells, matrix = found.search_matrix()
    assert matrix.dtype == np.float16
    np.testing.assert_allclose(matrix, found.cell_descriptors(cells), atol=1e-3)


def test_invalid_cells_take_no_part():
    found = random_embedding()
    edge = found.fine.shape[3] - 4  # last valid column
    points = found.fine_geometry.index_to_mm([[edge + 0.4, 3.0, 4.0], [edge + 2.0, 3.0, 4.0], [-50.0, 3.0, 4.0]])
    before = found.descriptors(points)
    found.fine[..., -3:] = 1.0
    np.testing.assert_array_equal(found.descriptors(points), before)
    assert np.linalg.norm(before[0]) == pytest.approx(1.0, abs=1e-5)
    assert not before[1].any()  # no valid cell around it


def test_no_points_give_no_descriptors():
    assert random_embedding().descriptors(np.zeros((0, 3))).shape == (0, 11)


@pytest.mark.parametrize("semantic", [False, True])
def test_saved_embedding_is_read_back_bit_by_bit(tmp_path, semantic):
    found = random_embedding(semantic=semantic)
    found.save(tmp_path / "a.uae")
    again = Embedding.load(tmp_path / "a.uae")
    for name in ("fine", "coarse", "semantic", "valid", "body"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.geometry.same_as(found.geometry, 1e-12)
    assert (again.model_sha256, again.modality, again.meta) == (found.model_sha256, "mr", {"model": "test"})


def test_damaged_embedding_files_are_refused(tmp_path):
    path = tmp_path / "a.uae"
    random_embedding().save(path)
    whole = path.read_bytes()
    position = whole.index(b"NUMPY") + 400
    flipped = whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
    for content in (whole[:-100], flipped, b"", b"no embedding at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not an embedding file or damaged"):
            Embedding.load(path)
    with pytest.raises(InputError, match="no such embedding"):
        Embedding.load(tmp_path / "none.uae")


def test_embedding_file_with_pickled_objects_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    random_embedding().save(tmp_path / "a.uae")
    with zipfile.ZipFile(tmp_path / "a.uae") as old, zipfile.ZipFile(tmp_path / "b.uae", "w") as new:
        for name in old.namelist():
            new.writestr(name, buffer.getvalue() if name == "fine.npy" else old.read(name))
    with pytest.raises(InputError, match="damaged"):
        Embedding.load(tmp_path / "b.uae")


@pytest.mark.parametrize("name", ["fine", "coarse", "valid"])
def test_incomplete_embedding_file_is_refused(tmp_path, name):
    found = random_embedding()
    header, arrays = found._to_archive()
    embedding_cache.write_archive(
        tmp_path / "a.uae", header, {key: value for key, value in arrays.items() if key != name}
    )
    with pytest.raises(InputError, match="incomplete"):
        Embedding.load(tmp_path / "a.uae")


def count_runs(monkeypatch):
    runs = []
    original = embedding_module.run_model
    monkeypatch.setattr(embedding_module, "run_model", lambda *a, **k: runs.append(1) or original(*a, **k))
    return runs


def test_second_embedding_comes_from_the_cache(light, own_cache, monkeypatch):
    runs = count_runs(monkeypatch)
    first, second = embed(scan(), light, "cpu"), embed(scan(), light, "cpu")
    assert len(runs) == 1 and len(list(own_cache.iterdir())) == 1
    for name in ("fine", "coarse", "valid", "body"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert second.meta == first.meta and second.meta["model"] == "test"


def test_cache_key_knows_everything_that_matters(light, tmp_path, monkeypatch):
    volume = scan()
    keys = [embedding_cache.cache_key(volume, light, "float32")]
    assert embedding_cache.cache_key(scan(), light, "float32") == keys[0]
    array = volume.array.copy()
    array[3, 4, 5] += 1
    keys.append(embedding_cache.cache_key(volume.replace(array), light, "float32"))
    g = volume.geometry
    for change in ({"origin": g.origin + 0.1}, {"spacing": g.spacing * 1.01}, {"direction": np.eye(3)}):
        moved = replace(g, **change)
        keys.append(embedding_cache.cache_key(volume.replace(volume.array, moved), light, "float32"))
    keys.append(embedding_cache.cache_key(Volume(volume.array, g, "mr"), light, "float32"))
    keys.append(embedding_cache.cache_key(volume, light, "bfloat16"))
    keys.append(embedding_cache.cache_key(volume, make_model(tmp_path, CONFIGS["light"], seed=9), "float32"))
    monkeypatch.setattr(embedding_cache, "recipe_sha256", lambda: "other code")
    keys.append(embedding_cache.cache_key(volume, light, "float32"))
    assert len(set(keys)) == len(keys) == 9


def test_damaged_cache_entry_is_computed_again(light, own_cache, monkeypatch, caplog):
    first = embed(scan(), light, "cpu")
    (entry,) = own_cache.iterdir()
    for content in (entry.read_bytes()[:-500], b"rubbish"):
        entry.write_bytes(content)
        runs = count_runs(monkeypatch)
        again = embed(scan(), light, "cpu")
        assert len(runs) == 1 and "computed again" in caplog.text
        np.testing.assert_array_equal(again.fine, first.fine)
        runs.clear()
        embed(scan(), light, "cpu")
        assert not runs  # the entry is whole again


def test_cache_evicts_the_least_recently_used(own_cache, monkeypatch):
    header, arrays = random_embedding()._to_archive()
    embedding_cache.write_cached("a", header, arrays)
    size = (own_cache / "a.uae").stat().st_size
    monkeypatch.setenv("UAE_CACHE_GB", str(3.5 * size / 1e9))
    for age, name in enumerate("abc"):
        embedding_cache.write_cached(name, header, arrays)
        os.utime(own_cache / f"{name}.uae", (1000 + age, 1000 + age))
    assert embedding_cache.read_cached("a") is not None  # used again: now b is the oldest
    embedding_cache.write_cached("d", header, arrays)
    assert sorted(path.stem for path in own_cache.iterdir()) == ["a", "c", "d"]
    assert sum(path.stat().st_size for path in own_cache.iterdir()) <= 3.5 * size


def test_what_killed_processes_left_is_removed(own_cache):
    own_cache.mkdir()
    old, new = own_cache / ".123.a.uae", own_cache / ".456.b.uae"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    embedding_cache.evict(10**9)
    assert not old.exists() and new.exists()


def test_embedding_larger_than_the_cache_is_not_stored(light, own_cache, monkeypatch):
    monkeypatch.setenv("UAE_CACHE_GB", "0")
    embed(scan(), light, "cpu")
    assert not own_cache.exists() or not list(own_cache.iterdir())
    monkeypatch.setenv("UAE_CACHE_GB", "much")
    monkeypatch.setattr("uae.embedding._compute", None)  # told before the work
    with pytest.raises(InputError, match="UAE_CACHE_GB"):
        embed(scan(), light, "cpu")


def test_cache_that_cannot_be_written_is_no_failure(light, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("UAE_CACHE", str(blocked))
    assert embed(scan(), light, "cpu").fine.any()
    assert "not cached" in caplog.text


def test_cancel_leaves_nothing_in_the_cache(light, own_cache):
    with pytest.raises(CancelledError):
        embed(scan(), light, "cpu", cancel=lambda: True)
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_features_are_those_of_the_network_on_the_prepared_image(model):
    from uae.preprocess import prepare

    volume = scan()
    found = embed(volume, model, "cpu", memory_mb=3, cache=False)
    prepared = prepare(volume, model.input_map, model.config.coarse_stride)
    network = UAENet(model.config)
    network.load_state_dict(model.state_dict())
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(prepared.image)[None, None])
    for name, value in expected.items():
        assert np.abs(value[0].numpy() - getattr(found, name)).max() < 1e-3


def test_principal_components_picture(light, tmp_path):
    found = embed(scan(), light, "cpu", cache=False)
    found.write_pca(tmp_path / "pca.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "pca.nii.gz"))
    assert image.GetNumberOfComponentsPerPixel() == 3
    np.testing.assert_allclose(image.GetOrigin(), found.fine_geometry.origin, atol=1e-3)
    np.testing.assert_allclose(image.GetSpacing(), (4, 4, 4), atol=1e-6)
    picture = sitk.GetArrayFromImage(image)
    assert not picture[~found.body].any()
    assert (picture[found.body].std(axis=0) > 20).all()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(pca_volume(found)), picture)
