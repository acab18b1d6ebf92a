"""Model files, registries and the network's parameter counts."""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from uae.device import resolve_device
from uae.errors import InputError, ModelError
from uae.models import (
    default_model,
    list_models,
    load_model,
    register_model,
    save_model,
    update_thresholds,
    verify_models,
)
from uae.network import NetworkConfig, UAENet, parameter_count
from uae.preprocess import InputMap

SMALL = NetworkConfig.paper(semantic=False, width=4, head_channels=8)
META = {
    "name": "tiny",
    "version": "3",
    "round": 0,
    "training": {"steps": 5},
    "licence": "MIT",
    "modalities": ["ct", "mr"],
}


@pytest.fixture(autouse=True)
def own_model_folder(tmp_path, monkeypatch):
    """No test sees the user's own models, or only those it made."""
    monkeypatch.setenv("UAE_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def make(folder, name="tiny", seed=0, config=SMALL, **options):
    torch.manual_seed(seed)
    network = UAENet(config).eval()
    path = folder / f"{name}.pt"
    meta = {**META, "name": name}
    save_model(path, network.state_dict(), config, InputMap(), {"match": {"score": 0.7}}, meta, **options)
    return path, network


def shipped_names():
    return {entry["name"] for entry in list_models() if entry["shipped"]}


@pytest.mark.parametrize(("semantic", "count"), [(True, 33_333_184), (False, 32_832_960)])
def test_parameter_count_is_the_papers(semantic, count):
    assert parameter_count(UAENet(NetworkConfig.paper(semantic=semantic))) == count


def test_parameter_count_by_part():
    network = UAENet(NetworkConfig.paper(semantic=True))
    counts = [parameter_count(part) for part in (network.backbone, network.fine, network.coarse, network.semantic)]
    assert counts == [31_824_576, 500_224, 508_160, 500_224]
    assert sum(buffer.numel() for buffer in network.buffers()) == 9_749


def test_registered_model_loads_by_name_and_is_the_saved_network(own_model_folder):
    path, network = make(own_model_folder)
    entry = register_model(path)
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry["bytes"] == path.stat().st_size
    assert {"name", "version", "round", "file", "config", "input_map", "thresholds", "training", "intended_use"} <= set(
        entry
    )
    model = load_model("tiny")
    assert (model.name, model.version, model.sha256, model.config) == ("tiny", "3", entry["sha256"], SMALL)
    assert model.thresholds == {"match": {"score": 0.7}}
    x = torch.randn(1, 1, 16, 32, 32)
    with torch.inference_mode():
        expected, found = network(x), model.network("cpu")(x)
    for head in expected:
        assert (expected[head] - found[head]).abs().max() < 5e-3  # fp16 weights
    assert model.network("cpu") is model.network("cpu")


def test_folding_the_norms_changes_nothing(own_model_folder):
    torch.manual_seed(1)
    network = UAENet(SMALL)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    path = own_model_folder / "exact.pt"
    save_model(path, network.state_dict(), SMALL, InputMap(), {}, META, half=False)
    x = torch.randn(1, 1, 16, 32, 32)
    with torch.inference_mode():
        expected, found = network.eval()(x), load_model(path).network("cpu")(x)
    for head in expected:
        assert (expected[head] - found[head]).abs().max() < 1e-5


def test_weights_are_half_size_and_norms_are_not(own_model_folder):
    path, _ = make(own_model_folder)
    state = load_model(path).state
    assert state["backbone.layer1.0.conv1.conv.weight"].dtype == torch.float16
    assert state["backbone.conv1.bn.running_var"].dtype == torch.float32


def test_same_weights_give_the_same_hash(own_model_folder, tmp_path):
    first, _ = make(own_model_folder)
    second, _ = make(tmp_path / "elsewhere", name="tiny")
    assert first.read_bytes() == second.read_bytes()


def test_wrong_hash_is_an_error_by_name_and_by_file(own_model_folder):
    path, _ = make(own_model_folder)
    register_model(path)
    make(own_model_folder, seed=7)  # other weights under the same file name
    for what in ("tiny", path):
        with pytest.raises(ModelError, match="wrong hash"):
            load_model(what)
    result = {entry["name"]: entry for entry in verify_models()}["tiny"]
    assert not result["ok"] and "wrong hash" in result["reason"]


def test_verify_names_the_missing_file(own_model_folder):
    path, _ = make(own_model_folder)
    register_model(path)
    assert {entry["name"]: entry["ok"] for entry in verify_models()}["tiny"]
    path.unlink()
    result = {entry["name"]: entry for entry in verify_models()}["tiny"]
    assert not result["ok"] and "no such model file" in result["reason"]
    assert not {entry["name"]: entry for entry in list_models()}["tiny"]["present"]


def test_unknown_name_lists_what_is_there(own_model_folder):
    register_model(make(own_model_folder, name="alpha")[0])
    register_model(make(own_model_folder, name="beta")[0])
    with pytest.raises(ModelError, match=r"'gamma'.*alpha.*beta"):
        load_model("gamma")


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_executed(tmp_path, legacy):
    marker, path = tmp_path / "executed", tmp_path / "trap.pt"
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "meta": Trap(str(marker))},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ModelError, match="pickled code, which was not executed"):
        load_model(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"hello, this is no model", b"PK\x03\x04 broken", b"\x80\x02}q\x00."])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=str(path.name)):
        load_model(path)


def test_truncated_model_is_refused(own_model_folder):
    path, _ = make(own_model_folder)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"damaged|not a model"):
        load_model(path)


def test_weights_of_another_network_are_refused(own_model_folder):
    torch.manual_seed(0)
    other = UAENet(NetworkConfig.paper(semantic=False, width=8, head_channels=8)).state_dict()
    path = own_model_folder / "other.pt"
    save_model(path, other, SMALL, InputMap(), {}, META)
    with pytest.raises(ModelError, match="shape"):
        load_model(path)
    incomplete = {name: value for name, value in UAENet(SMALL).state_dict().items() if not name.startswith("coarse")}
    save_model(path, incomplete, SMALL, InputMap(), {}, META)
    with pytest.raises(ModelError, match="missing"):
        load_model(path)


def test_weights_that_are_not_finite_are_refused(own_model_folder):
    state = UAENet(SMALL).state_dict()
    state["fine.output.bias"][0] = float("nan")
    path = own_model_folder / "nan.pt"
    save_model(path, state, SMALL, InputMap(), {}, META)
    with pytest.raises(ModelError, match="not finite"):
        load_model(path)


def test_damaged_registry_is_an_error(own_model_folder):
    own_model_folder.mkdir()
    (own_model_folder / "models.json").write_text("{")
    with pytest.raises(ModelError, match="damaged model registry"):
        list_models()


def test_calibration_changes_limits_but_not_the_hash(own_model_folder):
    path, _ = make(own_model_folder)
    before = register_model(path)["sha256"]
    update_thresholds(own_model_folder, "tiny", {"match": {"score": 0.9}})
    model = load_model("tiny")
    assert model.thresholds == {"match": {"score": 0.9}} and model.sha256 == before
    with pytest.raises(ModelError, match="no model 'none'"):
        update_thresholds(own_model_folder, "none", {})


def test_a_new_version_takes_the_place_of_the_old_one(own_model_folder):
    register_model(make(own_model_folder, seed=0)[0])
    register_model(make(own_model_folder, seed=1)[0])
    entries = json.loads((own_model_folder / "models.json").read_text())["models"]
    assert [entry["name"] for entry in entries] == ["tiny"]
    load_model("tiny")


def test_meta_must_be_plain_values(own_model_folder):
    with pytest.raises(ModelError, match="plain values"):
        save_model(own_model_folder / "x.pt", {}, SMALL, InputMap(), {}, {"name": np.zeros(2)})
    assert not list(own_model_folder.glob("*"))


def test_default_model_by_modalities(own_model_folder):
    if "uae-s" not in shipped_names():
        assert default_model("ct", "ct") == "uae-m"
    register_model(make(own_model_folder, name="uae-s")[0])
    assert default_model("ct", "ct") == "uae-s"
    assert default_model("ct", "mr") == default_model("mr", "ct") == default_model("mr", "mr") == "uae-m"
    (own_model_folder / "uae-s.pt").unlink()  # listed, and not there: the user's folder hides what ships
    assert default_model("ct", "ct") == "uae-m"


def test_model_file_holds_no_code(own_model_folder):
    """The archive's pickle may only rebuild tensors and dictionaries."""
    path, _ = make(own_model_folder)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"uae" not in pickled.replace(b"uae-model-1", b"")


def test_listing_models_imports_no_torch(own_model_folder):
    register_model(make(own_model_folder)[0])
    code = (
        "import sys; from uae.models import list_models; assert any(e['name'] == 'tiny' for e in list_models());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", ""])
def test_unknown_device_is_an_input_error(name):
    with pytest.raises(InputError, match="--device"):
        resolve_device(name)


def test_cpu_and_auto_resolve():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("part", ["config", "input_map"])
def test_settings_of_a_newer_version_are_refused(own_model_folder, part):
    path, _ = make(own_model_folder)
    payload = torch.load(path, weights_only=True)
    payload[part]["name" if part == "input_map" else "attention"] = "new"
    torch.save(payload, path)
    with pytest.raises(ModelError, match="settings cannot be used"):
        load_model(path)
