"""Values of training settings that mean something: a misspelled word or a zero must not show up hours later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uae.deeds.presets import PRESETS
from uae.errors import InputError
from uae.registration.adareg import ACCEPTED, REVIEW

WORDS: dict[str, tuple[str, ...]] = {
    "network.kind": ("light", "paper"),
    "network.input_map": ("soft-tissue", "released"),
    "loss.coarse": ("positions", "cells"),
    "semantic.modalities": ("ct", "all"),
    "semantic.reduction": ("sum", "mean"),
    "optimiser.kind": ("adamw", "sgd"),
    "optimiser.schedule": ("cosine", "constant"),
}
MODALITIES = ("ct", "mr")
VERDICTS = (ACCEPTED, REVIEW)
EXAMPLE = '{ file = "a.nii.gz", modality = "ct" }'


def _numbers(value: Any, count: int) -> bool:
    return len(value) == count and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value)


def _whole(value: Any, count: int) -> bool:
    return _numbers(value, count) and all(n == int(n) for n in value)


def _range(value: Any) -> bool:
    return _numbers(value, 2) and value[0] <= value[1]


def _seeds(value: Any) -> bool:
    return _whole(value, 2) and 0 <= value[0] <= value[1]


def _patch(value: Any) -> bool:
    return _whole(value, 3) and min(value) >= 8 and all(n % 2 == 0 for n in value)


def _positive(value: Any) -> bool:
    return value > 0


def _counts(value: Any) -> bool:
    return value == int(value) and value >= 1


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.phantom_seeds": (_seeds, "[first, last) with 0 <= first <= last"),
    "crossmodal.phantom_pairs": (_seeds, "[first, last) with 0 <= first <= last"),
    "views.patch": (_patch, "three even numbers of 8 or more: z, y, x"),
    "semantic.patch": (lambda value: not value or _patch(value), "empty, or three even numbers of 8 or more"),
    "loss.weights": (lambda value: _numbers(value, 3) and min(value) >= 0, "three numbers: joint, fine, coarse"),
    "optimiser.betas": (lambda value: _numbers(value, 2), "two numbers"),
    **dict.fromkeys(
        ("views.scale", "views.deform_mm", "contrast.blur_mm", "contrast.thick_factor", "contrast.gamma"),
        (_range, "[low, high]"),
    ),
    **dict.fromkeys(
        (
            "optimiser.steps", "optimiser.checkpoint_every", "views.pairs_per_step", "views.negatives_per_view",
            "semantic.volumes_per_step", "validation.cases",
        ),
        (_counts, "a whole number of 1 or more"),
    ),
    **dict.fromkeys(
        ("optimiser.learning_rate", "loss.temperature", "semantic.temperature"), (_positive, "a number above 0")
    ),
    "crossmodal.verdicts": (lambda value: value and set(value) <= set(VERDICTS), f"some of {', '.join(VERDICTS)}"),
    "crossmodal.preset": (lambda value: value in PRESETS, f"one of {', '.join(PRESETS)}"),
    "views.positions": (lambda value: value == int(value) and value >= 2, "a whole number of 2 or more"),
}  # fmt: skip


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse values that no setting can have.

    Args:
        config: a whole configuration; kinds are checked already.

    Raises:
        InputError: naming the setting, its value and what may stand there.
    """
    for key, words in WORDS.items():
        table, name = key.split(".")
        if config[table][name] not in words:
            raise InputError(f"{key} = {config[table][name]!r}: choose one of: {', '.join(words)}")
    for key, (fits, meaning) in RULES.items():
        table, name = key.split(".")
        if not fits(config[table][name]):
            raise InputError(f"{key} = {config[table][name]!r}: {meaning} is needed")
    for entry in config["data"]["volumes"]:
        if not isinstance(entry, dict) or not entry.get("file"):
            raise InputError(f"data.volumes: {entry!r} names no file; write {EXAMPLE}")
        if entry.get("modality") not in MODALITIES:
            raise InputError(
                f"data.volumes: {entry['file']} has modality {entry.get('modality')!r}; "
                f"choose one of: {', '.join(MODALITIES)}"
            )
