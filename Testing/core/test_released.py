"""Released checkpoints: the import against an independent, literal forward pass written from the layer tables."""

import pytest
import torch
import torch.nn.functional as F

from uae.errors import ModelError
from uae.models import import_released, list_models, load_model
from uae.released import our_name, released_kind, released_shapes

WIDTHS = {1: 64, 2: 128, 3: 256, 4: 512}


@pytest.fixture(autouse=True)
def own_model_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("UAE_MODELS", str(tmp_path / "models"))


def random_checkpoint(semantic, semantic_trained=True):
    """Tensors by name, shapes written out from the published layout; values such that activations stay in range."""
    random = torch.Generator().manual_seed(11)
    state = {}

    def normed(name, *shape):
        fan = shape[1] * shape[2] * shape[3] * shape[4]
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=random) * (2.0 / fan) ** 0.5
        state[f"{name}.bn.weight"] = torch.rand(shape[0], generator=random) + 0.5
        state[f"{name}.bn.bias"] = torch.randn(shape[0], generator=random) * 0.3
        state[f"{name}.bn.running_mean"] = torch.randn(shape[0], generator=random) * 0.3
        state[f"{name}.bn.running_var"] = torch.rand(shape[0], generator=random) + 0.5
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(20000)

    def biased(name, *shape):
        fan = shape[1] * shape[2] * shape[3] * shape[4]
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=random) * fan**-0.5
        state[f"{name}.conv.bias"] = torch.randn(shape[0], generator=random) * 0.2

    normed("backbone.conv1", 64, 1, 3, 7, 7)
    state["backbone.conv1.conv.weight"] *= 0.05  # the input runs to 205
    for layer, width in WIDTHS.items():
        before = 64 if layer == 1 else width // 2
        z = 1 if layer < 3 else 3
        normed(f"backbone.layer{layer}.0.conv1", width, before, z, 3, 3)
        normed(f"backbone.layer{layer}.0.conv2", width, width, z, 3, 3)
        normed(f"backbone.layer{layer}.0.downsample", width, before, 1, 1, 1)
        normed(f"backbone.layer{layer}.1.conv1", width, width, z, 3, 3)
        normed(f"backbone.layer{layer}.1.conv2", width, width, z, 3, 3)
    for head in ("neck", "semantic_head") if semantic else ("neck",):
        for index, width in enumerate((64, 128, 256)):
            biased(f"{head}.lateral_convs.{index}", 128, width, 1, 1, 1)
        biased(f"{head}.fpn_convs.0", 128, 128, 3, 3, 3)
    biased("read_out_head.lateral_convs.0", 128, 512, 1, 1, 1)
    biased("read_out_head.fpn_convs.0", 128, 128, 3, 3, 3)
    if semantic and not semantic_trained:
        for name in state:
            if name.startswith("semantic_head") and name.endswith("bias"):
                state[name].zero_()
    return state


def write(path, state, prefix="", meta=None, optimizer=False):
    payload = {"meta": meta or {"iter": 20000, "time": "Mon"}, "state_dict": {prefix + k: v for k, v in state.items()}}
    if optimizer:
        payload["optimizer"] = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.02}]}
    torch.save(payload, path)
    return path


def literal_forward(w, x):
    """The layer tables, line by line; eval mode, eps 1e-5."""

    def bn(name, y):
        p = [w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(y, *p, training=False, eps=1e-5)

    def conv(name, y, stride=(1, 1, 1)):
        kernel = w[f"{name}.conv.weight"]
        padding = [size // 2 for size in kernel.shape[2:]]
        return F.conv3d(y, kernel, w.get(f"{name}.conv.bias"), stride, padding)

    def stage(layer, y, stride):
        name = f"backbone.layer{layer}.0"
        z = F.relu(bn(f"{name}.conv1", conv(f"{name}.conv1", y, stride)))
        z = bn(f"{name}.conv2", conv(f"{name}.conv2", z))
        y = F.relu(z + bn(f"{name}.downsample", conv(f"{name}.downsample", y, stride)))
        name = f"backbone.layer{layer}.1"
        z = F.relu(bn(f"{name}.conv1", conv(f"{name}.conv1", y)))
        return F.relu(bn(f"{name}.conv2", conv(f"{name}.conv2", z)) + y)

    y = F.relu(bn("backbone.conv1", conv("backbone.conv1", x)))
    c1 = F.max_pool3d(stage(1, y, (1, 2, 2)), kernel_size=(2, 1, 1), stride=(2, 1, 1))
    c2 = stage(2, c1, (1, 2, 2))
    c3 = stage(3, c2, (1, 2, 2))
    c4 = stage(4, c3, (2, 2, 2))

    def pyramid(head):
        p3 = conv(f"{head}.lateral_convs.2", c3)
        p2 = conv(f"{head}.lateral_convs.1", c2) + F.interpolate(p3, size=c2.shape[2:], mode="nearest")
        p1 = conv(f"{head}.lateral_convs.0", c1) + F.interpolate(p2, size=c1.shape[2:], mode="nearest")
        return conv(f"{head}.fpn_convs.0", p1)

    found = {
        "fine": pyramid("neck"),
        "coarse": conv("read_out_head.fpn_convs.0", conv("read_out_head.lateral_convs.0", c4)),
    }
    if "semantic_head.fpn_convs.0.conv.weight" in w:
        found["semantic"] = pyramid("semantic_head")
    return {head: value / value.norm(dim=1, keepdim=True) for head, value in found.items()}


def compare(model, state, heads):
    x = torch.rand((1, 1, 16, 48, 48), generator=torch.Generator().manual_seed(3)) * 255 - 50
    with torch.inference_mode():
        expected, found = literal_forward(state, x), model.network("cpu")(x)
    assert set(found) == heads
    assert found["fine"].shape == (1, 128, 8, 24, 24) and found["coarse"].shape == (1, 128, 4, 3, 3)
    for head in heads:
        assert (expected[head] - found[head]).abs().max() < 1e-4
        # A comparison of features that are all alike would prove nothing.
        assert float(found[head].std(dim=(0, 2, 3, 4)).mean()) > 1e-2


def test_released_uae_s_checkpoint_equals_literal_forward(tmp_path):
    state = random_checkpoint(semantic=True)
    model = import_released(write(tmp_path / "SAMv2_iter_20000.pth", state, prefix="module.", optimizer=True))
    assert model.name == "released-uae-s" and model.meta["kind"] == "uae-s"
    assert model.meta["trained_heads"] == ["fine", "coarse", "semantic"] and model.meta["untrained_heads"] == []
    assert (
        sum(value.numel() for name, value in model.state.items() if "running" not in name and value.ndim) == 33_333_184
    )
    compare(model, state, {"fine", "coarse", "semantic"})
    entry = next(entry for entry in list_models() if entry["name"] == "released-uae-s")
    assert entry["modalities"] == ["ct"] and not entry["shipped"]


def test_released_uae_m_checkpoint_says_that_its_semantic_head_is_untrained(tmp_path):
    state = random_checkpoint(semantic=True, semantic_trained=False)
    model = import_released(write(tmp_path / "file.pth", state))
    assert model.name == "released-uae-m" and model.input_map.name == "released"
    assert model.meta["trained_heads"] == ["fine", "coarse"] and model.meta["untrained_heads"] == ["semantic"]
    assert model.thresholds["match"]["score"] == 0.8 and model.thresholds["adareg_score"] == 0.75
    assert load_model("released-uae-m").sha256 == model.sha256
    compare(model, {k: v for k, v in state.items() if not k.startswith("semantic")}, {"fine", "coarse"})


def test_released_layout_has_the_published_tensors():
    shapes = released_shapes(semantic=True)
    assert shapes == {name: tuple(value.shape) for name, value in random_checkpoint(semantic=True).items()}
    assert len(shapes) == 21 + 105 + 8 + 4 + 8


def test_released_names_map_to_ours_one_to_one():
    names = [our_name(name) for name in released_shapes(semantic=True)]
    assert len(set(names)) == len(names)
    assert our_name("neck.lateral_convs.2.conv.bias") == "fine.lateral.2.bias"
    assert our_name("read_out_head.fpn_convs.0.conv.weight") == "coarse.output.weight"


@pytest.mark.parametrize(
    ("semantic", "bias", "meta", "file", "kind"),
    [
        (False, 1.0, {}, "x.pth", "sam"),
        (False, 1.0, {}, "CrossSAM_inter_1.pth", "uae-m"),
        (True, 0.0, {}, "x.pth", "uae-m"),
        (True, 0.5, {}, "x.pth", "uae-s"),
        (True, 0.5, {"config": "type='dual_head_mri_ct'"}, "x.pth", "uae-m"),
        (True, 0.5, {"config": "type='dual_head_mean_vector'"}, "x.pth", "uae-s"),
    ],
)
def test_released_kind_is_found_out(semantic, bias, meta, file, kind):
    state = {"neck.fpn_convs.0.conv.bias": torch.ones(2)}
    if semantic:
        state["semantic_head.fpn_convs.0.conv.bias"] = torch.full((2,), bias)
    assert released_kind(state, meta, file) == kind


def test_released_checkpoint_with_other_tensors_is_refused(tmp_path):
    state = random_checkpoint(semantic=False)
    wrong = dict(state)
    del wrong["neck.fpn_convs.0.conv.bias"]
    with pytest.raises(ModelError, match=r"missing.*neck\.fpn_convs"):
        import_released(write(tmp_path / "a.pth", wrong))
    wrong = {**state, "roi_head.weight": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"unknown.*roi_head"):
        import_released(write(tmp_path / "b.pth", wrong))
    wrong = {**state, "backbone.conv1.conv.weight": torch.zeros(64, 1, 7, 7, 7)}
    with pytest.raises(ModelError, match=r"backbone\.conv1.*shape"):
        import_released(write(tmp_path / "c.pth", wrong))
    with pytest.raises(ModelError, match="has no semantic head"):
        import_released(write(tmp_path / "d.pth", state), kind="uae-s")
    assert not [entry for entry in list_models() if not entry["shipped"]]


def test_released_checkpoint_cannot_take_the_name_of_our_model(tmp_path):
    path = write(tmp_path / "sam.pth", random_checkpoint(semantic=False))
    for name in ("uae-m", "../evil"):
        with pytest.raises(ModelError, match="cannot be used"):
            import_released(path, name=name)


def test_released_checkpoint_must_be_imported_first(tmp_path):
    path = tmp_path / "sam.pth"
    torch.save({"meta": {}, "state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(ModelError, match="uae models import"):
        load_model(path)
    with pytest.raises(ModelError, match="of another network"):
        import_released(path)
    torch.save({"meta": {}}, path)
    with pytest.raises(ModelError, match="state_dict"):
        import_released(path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_released_checkpoint_with_pickled_code_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    torch.save({"meta": Trap(str(marker)), "state_dict": {}}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="not executed"):
        import_released(tmp_path / "evil.pth")
    assert not marker.exists()
