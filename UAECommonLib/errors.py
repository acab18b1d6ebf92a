"""What can go wrong between the scene and the core; each message says the cause and the next step."""

from __future__ import annotations

from uae.errors import InputError, UAEError

__all__ = ["SceneChangedError", "UnsuitableNodeError"]


class UnsuitableNodeError(InputError):
    """A node cannot be used as it is: not linear, sheared, empty, or of the wrong kind."""


class SceneChangedError(UAEError):
    """The scene was closed or edited while the work ran, so that its result has no place any more."""

    exit_code = 2
