"""Markdown tables of benchmark figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> str:
    """A figure with three digits, "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], first: str = "") -> list[str]:
    """Lines of a table: one row for each entry, one column for each of its figures."""
    lines = [f"| {first} | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, figures in rows.items():
        lines.append(f"| {name} | " + " | ".join(number(figures.get(column)) for column in columns) + " |")
    return lines
