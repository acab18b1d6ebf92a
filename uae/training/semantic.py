"""Training of the semantic branch (SEA, UAE-S): appearance steps and prototypical contrastive steps in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uae.errors import InputError
from uae.network import UAENet
from uae.training import distributed
from uae.training.appearance import AppearanceTask
from uae.training.data import class_cells
from uae.training.prototypes import LabelledCells, prototype_loss
from uae.training.sampling import Pair, fine_positions
from uae.training.views import View, draw_view, patch_grid, read_mask, render_views


@dataclass
class SemanticBatch:
    """Views of different volumes and the class of every fine cell of each, (N,) int in C order of the fine grid."""

    views: list[View]
    classes: list[Tensor]


def cell_classes(view: View) -> Tensor:
    """Class number of every fine cell of a view, (N,) int64 in C order; -1 outside the scan or the field of view."""
    shape = tuple(n // 2 for n in view.map.shape)
    positions = fine_positions(patch_grid(shape).reshape(-1, 3))
    found = read_mask(view.subject.classes, view.map.to_subject(positions)).astype(np.int64)
    return torch.from_numpy(np.where(view.mask_at(positions) > 0, found, -1))


class SemanticTask(AppearanceTask):
    """With probability `semantic.probability` a step trains the semantic head, else the appearance heads."""

    semantic = True

    def set_up(self, config: dict[str, Any], shapes: Any, input_map: Any, subjects: list) -> None:
        """As the appearance task; labelled subjects are needed.

        Raises:
            InputError: no subject has labels.
        """
        super().set_up(config, shapes, input_map, subjects)
        self.semantic_settings = config["semantic"]
        self.labelled = [s for s in self.subjects if s.classes is not None and s.annotated]
        if not self.labelled:
            raise InputError(
                "the semantic branch needs labels; give data.phantom_seeds, data.totalsegmentator or labels to volumes"
            )
        self.centres = [class_cells(s) for s in self.labelled]
        used = [i for i, centres in enumerate(self.centres) if len(centres)]
        if not used:
            raise InputError("the label maps name no voxel of any class; check their name tables")
        self.labelled, self.centres = [self.labelled[i] for i in used], [self.centres[i] for i in used]

    def prepare(self, rng: np.random.Generator) -> list[Pair] | SemanticBatch:
        """Draw which branch is trained, then its data."""
        if rng.random() >= self.semantic_settings["probability"]:
            return super().prepare(rng)
        count = self.semantic_settings["volumes_per_step"]
        return self._draw_volumes(rng.spawn(distributed.world())[distributed.rank()], count)

    def _draw_volumes(self, rng: np.random.Generator, count: int) -> SemanticBatch:
        settings = {**self.settings, "patch": self.semantic_settings["patch"] or self.settings["patch"]}
        order = rng.permutation(len(self.labelled))
        views, classes = [], []
        for index in np.resize(order, count):
            subject, centres = self.labelled[index], self.centres[index]
            seed = centres[rng.integers(len(centres))]
            kinds = self._kinds(subject)
            view = draw_view(rng, subject, kinds[int(rng.integers(len(kinds)))], seed, settings, self.input_map)
            views.append(view)
            classes.append(cell_classes(view))
        return SemanticBatch(views, classes)

    def _kinds(self, subject: Any) -> list[str]:
        """Contrasts under which labels are shown: the papers' semantic branch sees CT; ours more, if asked to."""
        if subject.modality == "mr":
            return ["mr"]
        if self.semantic_settings["modalities"] == "ct":
            return ["ct"]
        return ["ct", "mr-like"] + (["partner"] if subject.partner is not None else [])

    def step(self, prepared: list[Pair] | SemanticBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss of a prepared step of either branch."""
        if isinstance(prepared, SemanticBatch):
            return self.semantic_step(prepared)
        return self.appearance(prepared)

    def semantic_step(self, batch: SemanticBatch) -> tuple[Tensor, dict[str, float]]:
        """Prototypical contrastive loss over the pooled cells of all volumes of the step."""
        images = render_views(batch.views, self.input_map)[:, None]
        vectors = self.runner(self._semantic, images.to(memory_format=torch.channels_last_3d))
        cells = [
            LabelledCells(own, classes.to(self.device), view.subject.annotated)
            for own, classes, view in zip(vectors, batch.classes, batch.views, strict=True)
        ]
        loss, excess = prototype_loss(cells, self.semantic_settings)
        figures = {"semantic": float(loss.detach()), "excess": float(np.mean(list(excess.values())) if excess else 0)}
        names = self.table.names if self.table else {}
        return loss, figures | {f"excess/{names.get(k, k)}": value for k, value in excess.items()}

    def _semantic(self, network: UAENet, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            found = network.semantic(network.stages(network.early(images))[:3])
        return F.normalize(found.float(), dim=1).flatten(2).transpose(1, 2)

