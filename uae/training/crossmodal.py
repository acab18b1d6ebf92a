"""Training of UAE-M k: registered pairs of model k-1 and intra-subject pairs together in every mini-batch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from uae.errors import InputError
from uae.progress import Cancel, Progress
from uae.training import distributed
from uae.training.appearance import AppearanceTask, start_from
from uae.training.registrations import TABLE, load_registered, read_pairs, register_pairs
from uae.training.sampling import Pair, draw_pair
from uae.training.unregistered import make_pairs

logger = logging.getLogger(__name__)

FOLDER = "registrations"


class CrossModalTask(AppearanceTask):
    """Of the pairs of a step the last `crossmodal.inter_pairs` come from registered scans, the others are intra."""

    def __init__(
        self,
        config: dict[str, Any],
        root: Path,
        output: Path,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        settings = config["crossmodal"]
        self.inter_pairs = int(settings["inter_pairs"])
        if not 1 <= self.inter_pairs <= config["views"]["pairs_per_step"]:
            raise InputError(
                f"crossmodal.inter_pairs = {self.inter_pairs}: choose 1 to views.pairs_per_step "
                f"({config['views']['pairs_per_step']})"
            )
        pairs = self._pairs(config, root, output, progress, cancel)
        folder = output / FOLDER
        rows = register_pairs(pairs, settings, folder, config.get("device", "cpu"), progress, cancel)
        self.registered = load_registered(folder, rows)
        if not self.registered:
            reason = min(row.reason for row in rows)
            raise InputError(
                f"none of {len(rows)} pairs was registered with confidence ({reason}); see {folder / TABLE}"
            )
        logger.info("%d of %d pairs are trained on", len(self.registered), len(rows))
        super().__init__(config, root, progress, cancel)
        if not config["network"]["init"]:
            start_from(self.network, settings["model"])

    def set_up(self, config: dict[str, Any], shapes: Any, input_map: Any, subjects: list) -> None:
        """As the appearance task, with the registered pairs among the subjects."""
        super().set_up(config, shapes, input_map, [*subjects, *self.registered])
        self.settings["fov_negatives"] = int(config["crossmodal"]["fov_negatives"])
        self.inter_pairs = int(config["crossmodal"]["inter_pairs"])

    @staticmethod
    def _pairs(
        config: dict[str, Any], root: Path, output: Path, progress: Progress | None, cancel: Cancel | None
    ) -> list[tuple[Path, Path]]:
        """The user's pairs, and those that are made here (by the first process, for all)."""
        settings = config["crossmodal"]
        pairs = read_pairs(Path(settings["pairs"])) if settings["pairs"] else []
        first, last = settings["phantom_pairs"]
        if last > first or settings["simulated_pairs"]:
            table = output / "pairs" / "pairs.csv"
            if distributed.rank() == 0:
                make_pairs(config, root, table, progress, cancel)
            distributed.barrier()
            pairs += read_pairs(table)
        if not pairs:
            raise InputError(
                "no pairs to register; give crossmodal.pairs=pairs.csv, crossmodal.phantom_pairs=[0, 4] or "
                "crossmodal.simulated_pairs=1"
            )
        return pairs

    def draw(self, rng: np.random.Generator, index: int) -> Pair:
        """Pair `index` of a step: a registered one at the end of the mini-batch, else one of a single subject."""
        registered = index >= self.settings["pairs_per_step"] - self.inter_pairs
        return draw_pair(rng, self.subjects, self.settings, self.input_map, registered)
