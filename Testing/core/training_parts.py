"""Small scans, networks and tasks for the tests of the training."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from uae.geometry import Geometry
from uae.network import NetworkConfig
from uae.preprocess import InputMap
from uae.training.config import read_config
from uae.volume import Volume

SMALL_VIEWS = ["views.patch=[16, 32, 32]", "views.positions=16", "views.negatives_per_view=32"]
NARROW = NetworkConfig(
    stem="space_to_depth",
    channels=(4, 4, 8, 8),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    z_kernels=(3, 3, 3, 3),
    pool_z=False,
    planar_stages=2,
    head_channels=8,
)


def small_config(*changes: str) -> dict:
    """The shipped configuration on small patches."""
    return read_config("small", [*SMALL_VIEWS, "optimiser.steps=6", "optimiser.warmup=2", *changes])


def tissue_block(seed: int = 3, shape: tuple[int, int, int] = (40, 56, 60)) -> Volume:
    """A block of smooth tissue in air, 2 mm, HU."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 120, (8, 10, 10))
    index = np.stack(np.meshgrid(*[np.linspace(0, n - 1, m) for n, m in zip((8, 10, 10), shape)], indexing="ij"))
    array = map_coordinates(coarse, index, order=3) + 40
    array[:, :6], array[:, -6:], array[:, :, :6], array[:, :, -6:] = -1000, -1000, -1000, -1000
    geometry = Geometry(shape, np.full(3, 2.0), np.array([-50.0, 10.0, 300.0]), np.eye(3))
    return Volume(array.astype(np.float32), geometry, "ct")


def small_task(kind: type, config: dict, subjects: list, **attributes):
    """A task of class `kind` on given subjects with a narrow network, without reading any data."""
    torch.manual_seed(0)
    task = kind.__new__(kind)
    task.device = torch.device("cpu")
    for name, value in attributes.items():
        setattr(task, name, value)
    shapes = NetworkConfig(**{**NARROW.to_dict(), "semantic": task.semantic})
    task.set_up(config, shapes, InputMap(), subjects)
    return task
