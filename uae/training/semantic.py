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
from uae.training.features import head_at_cells
from uae.training.prototypes import BACKGROUND, OUTSIDE, LabelledCells, prototype_loss
from uae.training.sampling import Pair, fine_positions
from uae.training.views import View, draw_view, patch_grid, read_mask, render_views

BACKGROUND_TIMES = 16
"""Unlabelled cells drawn for each labelled cell of one class: they are many and unlike each other (our choice)."""


@dataclass
class SemanticBatch:
    """Views of different volumes and the fine cells whose vectors the loss needs.

    Attributes:
        views: one of each volume.
        cells: per view (K, 3) int fine cells, z, y, x.
        classes: per view (K,) int class numbers.
        counts: per view (K,) float, how many cells of the view each stands for.
    """

    views: list[View]
    cells: list[Tensor]
    classes: list[Tensor]
    counts: list[Tensor]


def cell_classes(view: View) -> Tensor:
    """Class number of every fine cell of a view, (N,) int64 in C order; -1 outside the scan or the field of view."""
    shape = tuple(n // 2 for n in view.map.shape)
    positions = fine_positions(patch_grid(shape).reshape(-1, 3))
    found = read_mask(view.subject.classes, view.map.to_subject(positions)).astype(np.int64)
    return torch.from_numpy(np.where(view.mask_at(positions) > 0, found, -1))


def drawn_cells(rng: np.random.Generator, classes: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Cells of a view that stand for all of them: at most `most` of each class, BACKGROUND_TIMES as many without one.

    Args:
        rng: of the choice.
        classes: (N,) int class of every cell; OUTSIDE is left out.
        most: 0 for all cells.

    Returns:
        (K,) int cell numbers and (K,) float, how many cells each stands for.
    """
    chosen, counts = [], []
    for number in torch.unique(classes).tolist():
        if number == OUTSIDE:
            continue
        own = torch.nonzero(classes == number)[:, 0]
        limit = most * BACKGROUND_TIMES if number == BACKGROUND else most
        picked = own
        if most and len(own) > limit:
            picked = own[torch.from_numpy(rng.choice(len(own), limit, replace=False))]
        chosen.append(picked)
        counts.append(torch.full((len(picked),), len(own) / len(picked)))
    empty = torch.zeros(0)
    return (torch.cat(chosen), torch.cat(counts)) if chosen else (empty.long(), empty)


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
        batch = SemanticBatch([], [], [], [])
        shape = tuple(n // 2 for n in settings["patch"])
        for index in np.resize(order, count):
            subject, centres = self.labelled[index], self.centres[index]
            seed = centres[rng.integers(len(centres))]
            kinds = self._kinds(subject)
            view = draw_view(rng, subject, kinds[int(rng.integers(len(kinds)))], seed, settings, self.input_map)
            classes = cell_classes(view)
            chosen, counts = drawn_cells(rng.spawn(1)[0], classes, self.semantic_settings["cells_per_class"])
            batch.views.append(view)
            batch.cells.append(torch.stack(torch.unravel_index(chosen, shape), 1))
            batch.classes.append(classes[chosen])
            batch.counts.append(counts)
        return batch

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
        images = render_views(batch.views, self.input_map)[:, None].to(memory_format=torch.channels_last_3d)
        sizes = [len(own) for own in batch.cells]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        vectors = self.runner(self._semantic, images, owner.to(self.device), torch.cat(batch.cells).to(self.device))
        cells = [
            LabelledCells(own, classes.to(self.device), view.subject.annotated, counts.to(self.device))
            for own, classes, counts, view in zip(
                vectors.split(sizes), batch.classes, batch.counts, batch.views, strict=True
            )
        ]
        loss, excess = prototype_loss(cells, self.semantic_settings)
        figures = {"semantic": float(loss.detach()), "excess": float(np.mean(list(excess.values())) if excess else 0)}
        names = self.table.names if self.table else {}
        return loss, figures | {f"excess/{names.get(k, k)}": value for k, value in excess.items()}

    def _semantic(self, network: UAENet, images: Tensor, owner: Tensor, cells: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            pyramid = network.semantic.pyramid(network.stages(network.early(images))[:3])
            found = head_at_cells(network.semantic, pyramid, owner, cells)
        return F.normalize(found.float(), dim=1)
