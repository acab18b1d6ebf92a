"""Stages of the core in the words of the user."""

from __future__ import annotations

from UAECommonLib.i18n import _

__all__ = ["stage_label"]


def stage_label(stage: str) -> str:
    """A stage of the core in the words of the user; unknown ones as they are."""
    names = {
        "read": _("Reading the scans"),
        "embedding": _("Embedding the scans"),
        "match": _("Matching anatomy"),
        "refine": _("Refining inside the overlap"),
        "deeds": _("Deforming"),
        "taper": _("Fading the deformation out"),
    }
    return names.get(stage.split(" ", 1)[0].rstrip(":"), stage)
