"""The command `uae` (also `python -m uae`): the one place that prints, and that turns errors into exit codes."""

from uae.cli.run import main

__all__ = ["main"]
