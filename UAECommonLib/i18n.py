"""`_()`: Slicer's translation inside the application, the text itself elsewhere."""

from __future__ import annotations

__all__ = ["_"]

try:
    from slicer.i18n import tr as _
except ImportError:

    def _(text: str) -> str:
        """The text as it stands."""
        return text
