"""Errors a user can act on. Each carries the exit code of the command line (contract, section 4)."""

from __future__ import annotations


class UAEError(Exception):
    """Base of every expected failure: the message says the cause and the next step in one line."""

    exit_code = 2


class InputError(UAEError):
    """An input file, image, point list or option cannot be used (exit 2)."""


class ModalityError(InputError):
    """CT or MR cannot be decided from the image; the message names the option that decides it."""


class ModelError(InputError):
    """A model file is missing, damaged, of another architecture, or not safe to read."""


class NoConfidentResultError(UAEError):
    """The computation ended, but its result must not be trusted (exit 3)."""

    exit_code = 3


class ResourceError(UAEError):
    """Memory or disk is exhausted (exit 4)."""

    exit_code = 4


class CancelledError(UAEError):
    """The user stopped the work; nothing half-written is left (exit 130)."""

    exit_code = 130
