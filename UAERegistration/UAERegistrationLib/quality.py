"""The figures of a registration as rows for people: what was asked, what came out, whether it may fail a case."""

from __future__ import annotations

import html
from typing import Any

from UAECommonLib.i18n import _

__all__ = ["quality_html", "quality_rows", "verdict"]

NOT_MEASURED = "-"
COLORS = {"accepted": "#2e7d32", "review": "#b26a00", "refused": "#c62828"}


def verdict(report: dict[str, Any]) -> str:
    """The verdict with its reason, in a few words."""
    names = {"accepted": _("ACCEPTED"), "review": _("REVIEW"), "refused": _("REFUSED")}
    return f"{names.get(report.get('status'), _('UNKNOWN'))}: {report.get('reason', '')}"


def quality_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every figure of the panel, in the order in which they are read.

    Args:
        report: what report.json holds; refused ones lack the transform.

    Returns:
        Texts; "-" stands for what was not measured.
    """
    matches, refinement = report.get("matches") or {}, report.get("refinement") or {}
    shift = report.get("shift_mm")
    rows = [
        (_("Shift LR, AP, CC"), ", ".join(f"{v:+.1f}" for v in shift) + " mm" if shift else NOT_MEASURED),
        (_("Rotation"), _value(report.get("rotation_deg"), "{:.1f}°")),
        (_("Overlap of the smaller body"), _value(report.get("overlap_percent"), "{:.0f} %")),
        (_("Matches found (mutual)"), _value(matches.get("mutual"), "{:d}")),
        (_("Matches that agree"), _value(matches.get("inliers"), "{:d}")),
        (_("Held-out matches within 10 mm"), _share(matches.get("heldout_within_10mm"), 0)),
        (_("Held-out residual, median"), _value(matches.get("heldout_residual_median_mm"), "{:.1f} mm")),
        (_("Refinement moved"), _refinement(refinement)),
    ]
    deformable = report.get("deformable")
    if deformable:
        rows += [
            (_("Folding in the body (Jacobian <= 0)"), _share(deformable.get("folding"), 2)),
            (_("Inverse consistency"), _value(deformable.get("inverse_consistency_mm"), "{:.1f} mm")),
            (_("Largest deformation"), _value(deformable.get("largest_mm"), "{:.1f} mm")),
            (
                _("Held-out residual, rigid part only"),
                _value(deformable.get("heldout_residual_before_mm"), "{:.1f} mm"),
            ),
            (_("Held-out residual, deformed"), _value(deformable.get("heldout_residual_after_mm"), "{:.1f} mm")),
        ]
    for role, name in (("fixed", _("Fixed scan")), ("moving", _("Moving scan"))):
        scan = (report.get("inputs") or {}).get(role) or {}
        rows.append((name, f"{scan.get('file', '')}, {str(scan.get('modality', '')).upper()}"))
    model = report.get("model") or {}
    rows += [
        (_("Model"), f"{model.get('name', NOT_MEASURED)} {model.get('version', '')}".strip()),
        (_("Device"), str(report.get("device") or NOT_MEASURED)),
        (_("Time"), _value((report.get("seconds") or {}).get("total"), "{:.0f} s")),
    ]
    return rows


def _refinement(figures: dict[str, Any]) -> str:
    if not figures.get("used"):
        return f"{NOT_MEASURED} ({figures['reason']})" if figures.get("reason") else NOT_MEASURED
    return f"{figures['moved_mm']:.1f} mm, {figures['moved_deg']:.1f}°"


def _share(value: float | None, digits: int) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f} %"


def _value(value: Any, text: str) -> str:
    return NOT_MEASURED if value is None else text.format(value)


def quality_html(report: dict[str, Any], outdated: str = "") -> str:
    """The panel as HTML: outdated mark, figures, use.

    Args:
        report: what report.json holds.
        outdated: what changed since; empty where nothing did.
    """
    parts = []
    if outdated:
        text = _("OUTDATED: {reason}; align again").format(reason=outdated)
        parts.append(f'<p style="color:{COLORS["refused"]}"><b>{html.escape(text)}</b></p>')
    cells = "".join(
        f"<tr><td>{html.escape(name)}&nbsp;&nbsp;</td><td>{html.escape(value)}</td></tr>"
        for name, value in quality_rows(report)
    )
    parts.append(f"<table>{cells}</table>")
    if report.get("deformable"):
        parts.append(f"<p>{html.escape(_('The deformable part is contour support, not dose.'))}</p>")
    parts.append(f"<p>{html.escape(_('Research software, not a medical device.'))}</p>")
    return "".join(parts)
