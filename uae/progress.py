"""One way to report progress and to ask whether to stop, used by every long function."""

from __future__ import annotations

from collections.abc import Callable

from uae.errors import CancelledError

Progress = Callable[[str, float], None]
"""Called as progress(stage, fraction), fraction 0..1 within the stage."""

Cancel = Callable[[], bool]
"""Returns True once the user asked to stop."""


def report(progress: Progress | None, stage: str, fraction: float) -> None:
    """Report `fraction` (0..1) of `stage` where somebody listens."""
    if progress is not None:
        progress(stage, min(max(float(fraction), 0.0), 1.0))


def check_cancel(cancel: Cancel | None) -> None:
    """Raise CancelledError where the user asked to stop."""
    if cancel is not None and cancel():
        raise CancelledError("cancelled by the user; nothing was written")
