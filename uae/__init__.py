"""Anatomical embeddings of CT and MR: landmark matching and registration in patient millimetres."""

__version__ = "0.1.0"
