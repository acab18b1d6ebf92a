"""Training of the appearance branch with aggressive contrast augmentation (SAM; UAE-M0)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uae.bench.data import find_data
from uae.device import resolve_device
from uae.errors import InputError
from uae.network import NetworkConfig, UAENet
from uae.preprocess import InputMap
from uae.progress import Cancel, Progress
from uae.training import distributed
from uae.training.data import load_subjects
from uae.training.features import coarse_cells, step_features
from uae.training.labels import ClassTable
from uae.training.loop import Trainer, Validate
from uae.training.losses import PairFeatures, appearance_loss, coarse_cells_loss
from uae.training.sampling import Pair, draw_pair
from uae.training.subjects import Subject
from uae.training.views import render_views

logger = logging.getLogger(__name__)


def network_config(settings: dict[str, Any], semantic: bool) -> NetworkConfig:
    """Shapes of the network that the table [network] asks for.

    Raises:
        InputError: unknown kind.
    """
    kind = settings["kind"]
    if kind == "light":
        return NetworkConfig.light(semantic=semantic)
    if kind == "paper":
        width, channels = int(settings.get("width", 64)), int(settings.get("head_channels", 128))
        return NetworkConfig.paper(semantic=semantic, width=width, head_channels=channels)
    raise InputError(f"network.kind = {kind!r}: unknown; use light or paper")


class Runner(nn.Module):
    """Calls a function with the network from inside `forward`, where DistributedDataParallel watches the gradients."""

    def __init__(self, network: UAENet) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(network, *arguments)`."""
        return work(self.network, *arguments)


class AppearanceTask:
    """What the loop needs of the appearance branch: a network and the loss of one seeded step."""

    semantic = False

    def __init__(
        self, config: dict[str, Any], root: Path, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> None:
        self.table = ClassTable() if self.semantic else None
        self.device = resolve_device(config.get("device", "auto"))
        subjects = load_subjects(
            config["data"], root, progress, cancel, self.table, config["contrast"], config["synthetic"]
        )
        shapes = network_config(config["network"], self.semantic)
        self.set_up(config, shapes, InputMap(config["network"]["input_map"]), subjects)
        if config["network"]["init"]:
            start_from(self.network, config["network"]["init"])

    def set_up(
        self, config: dict[str, Any], shapes: NetworkConfig, input_map: InputMap, subjects: list[Subject]
    ) -> None:
        """Take over settings and subjects and make the network; `device` must be set."""
        self.config = config
        self.settings = {**config["views"], **config["contrast"], **config["synthetic"], "fov_negatives": 0}
        self.loss_settings = config["loss"]
        self.input_map, self.network_config = input_map, shapes
        self.network = UAENet(shapes).to(self.device, memory_format=torch.channels_last_3d)
        self.subjects = [subject.on(self.device) for subject in subjects]
        self.runner: nn.Module = Runner(self.network)
        self.branch_probabilities: dict[str, float] = {}

    def distribute(self) -> None:
        """Wrap the network for several processes: synchronised BatchNorm on GPUs, averaged gradients."""
        if distributed.world() == 1:
            return
        if self.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
            self.runner = Runner(self.network)
        self.runner = nn.parallel.DistributedDataParallel(self.runner, find_unused_parameters=self.semantic)

    def prepare(self, rng: np.random.Generator) -> list[Pair]:
        """Draw the pairs of this process for one step, not rendered yet; each from its own child of `rng`."""
        children = rng.spawn(self.settings["pairs_per_step"])
        return [self.draw(child, index) for index, child in enumerate(children) if index in self._own()]

    def _own(self) -> list[int]:
        return distributed.own_share(range(self.settings["pairs_per_step"]))

    def draw(self, rng: np.random.Generator, index: int) -> Pair:
        """Draw pair `index` of a step."""
        return draw_pair(rng, self.subjects, self.settings, self.input_map)

    def step(self, pairs: list[Pair]) -> tuple[Tensor, dict[str, float]]:
        """Run the network on prepared pairs and return the loss of this process and its figures."""
        return self.appearance(pairs)

    def appearance(self, pairs: list[Pair]) -> tuple[Tensor, dict[str, float]]:
        """Appearance loss of prepared pairs."""
        views = [view for pair in pairs for view in pair.all_views]
        images = render_views(views, self.input_map)[:, None]
        images = images.to(memory_format=torch.channels_last_3d)
        cells = self.loss_settings["coarse"] == "cells"
        features, coarse = self.runner(self._features, images, pairs)
        weights = list(self.loss_settings["weights"])
        if cells:
            weights[2] = 0.0
        settings = {**self.loss_settings, "weights": weights}
        loss, figures = appearance_loss(features, settings, distributed.gather_pool(features))
        if cells:
            extra = self._coarse_cells(pairs, coarse)
            figures["coarse"] = float(extra.detach())
            loss = loss + self.loss_settings["weights"][2] * extra
        return loss, figures

    def _features(self, network: UAENet, images: Tensor, pairs: list[Pair]) -> tuple[list[PairFeatures], Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            maps = network.stages(network.early(images))
            pyramid, coarse = network.fine.pyramid(maps[:3]), network.coarse(maps[3:])
            return step_features(network, pyramid, coarse, pairs), coarse

    def _coarse_cells(self, pairs: list[Pair], coarse: Tensor) -> Tensor:
        """The papers' coarse loss (all coarse cells as queries), averaged over pairs."""
        stride = self.network_config.coarse_stride
        first, found = 0, []
        for pair in pairs:
            found.append(coarse_cells(pair, coarse[first : first + 2], stride))
            first += len(pair.all_views)
        own = torch.stack([torch.cat(vectors) for vectors, _, _ in found])
        everyone = distributed.gather(own)
        offset = distributed.rank() * len(pairs)
        losses = []
        for index, (pair, (vectors, places, valid)) in enumerate(zip(pairs, found, strict=True)):
            others = [i for i in range(len(everyone)) if i != offset + index]
            generator = torch.Generator().manual_seed(pair.seed)
            loss = coarse_cells_loss(
                vectors, places, valid, everyone[others].flatten(0, 1), self.loss_settings, generator
            )
            losses.append(coarse.sum() * 0.0 if loss is None else loss)
        return torch.stack(losses).mean()


def start_from(network: UAENet, model: str) -> None:
    """Load the weights of a trained model; heads that it lacks keep their first values.

    Raises:
        ModelError: no such model.
        InputError: it is of another architecture.
    """
    from uae.models import load_model

    state = load_model(model).state_dict()
    own = network.state_dict()
    missing = [name for name in own if name not in state and not name.startswith("semantic.")]
    other = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    if missing or other or set(state) - set(own) - {name for name in state if name.startswith("semantic.")}:
        raise InputError(f"network.init = {model!r}: another architecture; use the network.kind it was trained with")
    network.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
    logger.info("weights start from %s", model)


def train(
    config: dict[str, Any],
    output: str | Path,
    root: str | Path | None = None,
    resume: bool = False,
    budget_minutes: float | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    branch: str = "appearance",
    explicit: frozenset[str] = frozenset(),
    validate: Validate | None = None,
) -> Path:
    """Train a branch.

    Args:
        config: see `configs/small.toml`; `device` and `threads` may stand at its top.
        output: folder of checkpoints, `log.jsonl`, TensorBoard curves and the exported model.
        root: folder of the training data; default the one that UAE_DATA names.
        resume: go on from the last checkpoint in `output`.
        budget_minutes: stop (resumable) after this much time, loading and registering pairs among it; the schedule
            counts steps, not minutes.
        progress: called after every step.
        cancel: asked before every step.
        branch: "appearance", "semantic" or "crossmodal".
        explicit: settings that may differ from those the run was started with.
        validate: measures a model file every `validation.every` steps.

    Returns:
        The exported model file (EMA weights).

    Raises:
        InputError: a bad configuration or data, or settings that differ from those of the resumed run.
        ResourceError: the disk is full.
        CancelledError: stopped by the user; the last checkpoint stays.
    """
    from uae.training.config import complete

    config = complete(config, branch)
    if "threads" in config:
        torch.set_num_threads(int(config["threads"]))
    start = time.monotonic()
    folder = data_root(config, branch, root)
    config["device"] = distributed.join(config.get("device", "auto"))
    try:
        if branch != "semantic" or config["semantic"]["probability"] < 1:
            distributed.own_share(range(config["views"]["pairs_per_step"]))
        torch.manual_seed(int(config["optimiser"]["seed"]))
        task = make_task(branch, config, folder, Path(output), progress, cancel)
        task.distribute()
        trainer = Trainer(task, config, Path(output), branch, explicit, validate)
        if budget_minutes is not None:
            budget_minutes -= (time.monotonic() - start) / 60
        return trainer.run(resume, budget_minutes, progress, cancel)
    finally:
        distributed.leave()


def data_root(config: dict[str, Any], branch: str, root: str | Path | None) -> Path:
    """Folder of the training data; where no scan is asked for (phantoms, packed volumes), it need not exist.

    Raises:
        InputError: there is no such folder.
    """
    data = config["data"]
    scans = [] if data["packed"] else data["volumes"]
    made = branch == "crossmodal" and config["crossmodal"]["simulated_pairs"]
    if root is not None or scans or data["totalsegmentator"] or made:
        return find_data(root).root
    try:
        return find_data().root
    except InputError:
        return Path.cwd()


def make_task(
    branch: str, config: dict[str, Any], root: Path, output: Path, progress: Progress | None, cancel: Cancel | None
) -> AppearanceTask:
    """The task of a branch.

    Raises:
        InputError: unknown branch, or its data cannot be used.
    """
    if branch == "semantic":
        from uae.training.semantic import SemanticTask

        return SemanticTask(config, root, progress, cancel)
    if branch == "crossmodal":
        from uae.training.crossmodal import CrossModalTask

        return CrossModalTask(config, root, output, progress, cancel)
    if branch != "appearance":
        raise InputError(f"unknown branch {branch!r}; use appearance, semantic or crossmodal")
    return AppearanceTask(config, root, progress, cancel)
