"""A study of the embedding benchmark: named cases, measured one by one so that an interrupted run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.bench.data import DataFolder, find_data
from uae.bench.embedding import any_matches, match_record, pair_score_of
from uae.bench.metrics import is_confident, point_errors
from uae.embedding import Embedding, embed
from uae.errors import InputError
from uae.json_values import plain
from uae.matching import Match
from uae.progress import Cancel, Progress, check_cancel, report
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.models import Model

logger = logging.getLogger(__name__)

SIDES = (0, 3, 5, 7)
"""Edges L of the seed cube that the papers compare; 0, no cube, stands for the nearest neighbour."""
PRODUCT_SIDE = 5
FAILURE_MM = 20.0
"""A match farther off than about one vertebral level is a failure."""
REMEMBERED = 3
"""Embeddings of whole torsos kept in memory (some 300 MB each)."""


def method_name(side: int) -> str:
    """Key of a method's figures: "nearest" for side 0, else "fixed_point_<side>"."""
    return "nearest" if side == 0 else f"fixed_point_{side}"


def match_kind(side: int) -> str:
    """Name of the method whose calibrated limits hold for a side."""
    return "nearest" if side == 0 else "fixed-point"


def check_sides(sides: Sequence[int]) -> tuple[int, ...]:
    """The sides, each once.

    Raises:
        InputError: one is neither 0 nor an odd number above it, or there is none.
    """
    wrong = [side for side in sides if side < 0 or (side and side % 2 == 0)]
    if wrong or not sides:
        raise InputError(f"side {wrong[0] if wrong else '-'} of the seed cube; give 0 (nearest) or odd numbers, as 3,5")
    return tuple(dict.fromkeys(sides))


@dataclass
class Setup:
    """What the cases of all studies share.

    Attributes:
        model: the weights with their thresholds.
        data_dir: folder of the real volumes; UAE_DATA or the default where None. Looked for only when it is needed.
        device: as in `embed`.
        quick: fewer cases.
        sides: of the seed cube, see SIDES.
        cancel: asked between and within cases.
    """

    model: Model
    data_dir: str | Path | None = None
    device: str = "auto"
    quick: bool = False
    sides: tuple[int, ...] = SIDES
    cancel: Cancel | None = None
    _memory: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def data(self) -> DataFolder:
        """The real volumes.

        Raises:
            InputError: no such folder.
        """
        return find_data(self.data_dir)

    def embed(self, volume: Volume, cache: bool = True) -> Embedding:
        """Embedding of a volume by the model."""
        return embed(volume, self.model, device=self.device, cache=cache, cancel=self.cancel)

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key, made again where REMEMBERED others have been asked for since."""
        if key not in self._memory:
            while len(self._memory) >= REMEMBERED:
                del self._memory[next(iter(self._memory))]
            self._memory[key] = make()
        self._memory[key] = self._memory.pop(key)
        return self._memory[key]

    def match(self, template: Embedding, query: Embedding, points: np.ndarray, side: int) -> list[Match]:
        """Matches of points (N, 3) LPS mm under limits that every match passes; side 0: nearest neighbours."""
        if side == 0:
            return any_matches(template, query, points, "nearest", cancel=self.cancel)
        score = pair_score_of(self.model, "fixed-point")
        return any_matches(template, query, points, "fixed-point", pair_score=score, side=side, cancel=self.cancel)

    def records(
        self, template: Embedding, query: Embedding, points: np.ndarray, truth: np.ndarray | None
    ) -> dict[str, list[dict[str, Any]]]:
        """By method the records (`uae.bench.embedding.match_record`) of points (N, 3) with true places (N, 3) mm."""
        places = [None] * len(points) if truth is None else list(truth)
        return {
            method_name(side): [
                match_record(match, match_kind(side), place)
                for match, place in zip(self.match(template, query, points, side), places, strict=True)
            ]
            for side in self.sides
        }


@dataclass(frozen=True)
class Study:
    """One kind of measurement.

    Attributes:
        name: key in the JSON.
        cases: names of the cases for a setup.
        measure: a case's plain record.
        summarise: figures of the records under a model's thresholds.
        settings: what besides the model decides a record; records under other settings are measured again.
        test: reports test subjects; never for choosing anything.
    """

    name: str
    cases: Callable[[Setup], list[str]]
    measure: Callable[[Setup, str], dict[str, Any]]
    summarise: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], dict[str, Any]]
    settings: Callable[[Setup], dict[str, Any]] = lambda setup: {}
    test: bool = False


def run_study(
    study: Study,
    setup: Setup,
    earlier: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the cases of a study that are not in `earlier`.

    Args:
        study: what is measured.
        setup: the model and how much is measured.
        earlier: result of another run; its records count, all of them, where model and settings are the same.
        save: called with the result so far after every case.
        progress: told the share of cases done, stage: the study's name.

    Returns:
        The study's figures, `meta`, and `cases`: the records, each with its `case`.

    Raises:
        InputError: no data.
        CancelledError: the user stopped; what was saved stays.
    """
    settings = study.settings(setup)
    meta = plain({"model_sha256": setup.model.sha256, "thresholds": setup.model.thresholds.get("match"), **settings})
    known: dict[str, dict[str, Any]] = {}
    if earlier and earlier.get("meta") == meta:
        known = {record["case"]: record for record in earlier.get("cases", [])}
    wanted = study.cases(setup)

    def result() -> dict[str, Any]:
        order = [*wanted, *(name for name in known if name not in wanted)]
        records = [known[name] for name in order if name in known]
        figures = study.summarise(records, setup.model.thresholds) if records else {}
        return plain({**figures, "meta": meta, "cases": records})

    for count, name in enumerate(wanted):
        report(progress, study.name, count / len(wanted))
        check_cancel(setup.cancel)
        if name in known:
            continue
        known[name] = plain({"case": name, **study.measure(setup, name)})
        logger.info("%s: %s (%d of %d)", study.name, name, count + 1, len(wanted))
        if save is not None:
            save(result())
    report(progress, study.name, 1.0)
    return result()


def error_figures(records: Sequence[Mapping[str, Any]], limits: Mapping[str, Any] | None) -> dict[str, float]:
    """Figures of match records with errors.

    Args:
        records: of `uae.bench.embedding.match_record`.
        limits: a model's thresholds["match"].

    Returns:
        `uae.bench.metrics.point_errors`; over_20mm (share of failures); confident_share; confident_over_10mm: share of
        the confident ones (0 where there is none); matches.
    """
    errors = np.array([record["error_mm"] for record in records], dtype=np.float64)
    sure = np.array([is_confident(record, limits) for record in records], dtype=bool)
    over = errors > 10.0
    return {
        "matches": len(records),
        **point_errors(errors),
        "over_20mm": float((errors > FAILURE_MM).mean()),
        "confident_share": float(sure.mean()),
        "confident_over_10mm": float(over[sure].mean()) if sure.any() else 0.0,
    }


def by_method(
    records: Sequence[Mapping[str, Any]], figures: Callable[[list[Any]], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """`figures` of the matches of all records together, by method."""
    methods = list(records[0]["matches"]) if records else []
    return {name: figures([match for record in records for match in record["matches"][name]]) for name in methods}
