"""The slab-wise pass of the network against one dense pass, and what happens where memory ends."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from uae import inference
from uae.errors import CancelledError, ResourceError
from uae.inference import run_model, run_network, slab_slices
from uae.network import NetworkConfig, UAENet

CONFIGS = {
    "paper": NetworkConfig.paper(semantic=True, width=8, head_channels=16),
    "light": replace(NetworkConfig.light(semantic=True), channels=(8, 16, 16, 16), head_channels=16),
}
SHAPE = (48, 16, 32)


def make(config):
    """A network whose every part matters: random norms and biases, so that zero padding is visible."""
    torch.manual_seed(5)
    network = UAENet(config)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif name.endswith(("running_mean", "bias")):
            value.normal_()
    return network.eval()


def image():
    return np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)


def dense(network):
    with torch.inference_mode():
        return {head: value[0].numpy() for head, value in network(torch.from_numpy(image())[None, None]).items()}


def largest_difference(found, expected):
    assert set(found) == set(expected)
    return max(float(np.abs(found[head].astype(np.float32) - expected[head]).max()) for head in expected)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_slabs_equal_one_dense_pass(name):
    network = make(CONFIGS[name])
    expected = dense(network)
    for slab in (2, 6, 10, 18, 34, None):  # 24, 8, 5, 3, 2 slabs (odd numbers, a thin last one) and one
        assert largest_difference(run_network(network, image(), torch.float32, slab=slab), expected) < 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_comparison_notices_a_halo_that_is_too_short(name, monkeypatch):
    network = make(CONFIGS[name])
    expected = dense(network)
    half = network.early_halo // 2 // network.early_stride * network.early_stride
    monkeypatch.setattr(UAENet, "early_halo", property(lambda _: half))
    assert largest_difference(run_network(network, image(), torch.float32, slab=10), expected) > 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_memory_bound_decides_the_slabs(name):
    config = NetworkConfig.paper() if name == "paper" else NetworkConfig.light()
    torso = (336, 256, 256)
    sizes = [slab_slices(config, torso, 4, memory) for memory in (100, 1000, 4000, 16000)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert min(sizes[0]) >= 2
    assert slab_slices(config, torso, 2, 4000) > sizes[2]


def test_result_does_not_depend_on_the_memory_bound():
    network = make(CONFIGS["light"])
    small, large = (run_network(network, image(), torch.float32, memory_mb) for memory_mb in (1.0, 2000.0))
    assert largest_difference(small, {head: value.astype(np.float32) for head, value in large.items()}) < 1e-3


def test_half_precision_pass_points_the_same_way():
    network = make(CONFIGS["paper"])  # the smaller one: a CPU without bf16 emulates it very slowly
    part = image()[:16, :, :16]
    expected, found = (run_network(network, part, dtype, slab=8) for dtype in (torch.float32, torch.bfloat16))
    for head in expected:
        assert (expected[head] * found[head]).sum(axis=0).min() > 0.99


def test_cancel_stops_between_slabs():
    calls = []
    with pytest.raises(CancelledError):
        run_network(
            make(CONFIGS["light"]), image(), torch.float32, slab=16, cancel=lambda: len(calls) or calls.append(1)
        )


def test_progress_rises_to_one():
    seen = []
    run_network(make(CONFIGS["light"]), image(), torch.float32, slab=16, progress=lambda _, value: seen.append(value))
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 4


def fake_model():
    return SimpleNamespace(network=lambda device: str(device))


def test_out_of_gpu_memory_takes_thinner_slabs_then_the_cpu(monkeypatch, caplog):
    calls = []

    def fails_on_gpu(network, image, dtype, memory_mb, progress, cancel):
        calls.append((network, memory_mb))
        if network != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return {"fine": None}

    monkeypatch.setattr(inference, "run_network", fails_on_gpu)
    monkeypatch.setattr(inference, "inference_dtype", lambda _: torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e9, 2e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert run_model(fake_model(), image(), torch.device("cuda:0"), 4000) == {"fine": None}
    bounds = [memory for device, memory in calls if device == "cuda:0"]
    assert bounds[0] == 1000 and bounds == sorted(bounds, reverse=True) and len(bounds) > 1
    assert calls[-1] == ("cpu", 4000)
    assert any(record.levelname == "WARNING" and "CPU" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_out_of_memory_is_a_resource_error(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(inference, "run_network", fails)
    with pytest.raises(ResourceError, match="memory"):
        run_model(fake_model(), image(), torch.device("cpu"))


def test_other_errors_are_not_hidden(monkeypatch):
    def fails(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(inference, "run_network", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        run_model(fake_model(), image(), torch.device("cpu"))
