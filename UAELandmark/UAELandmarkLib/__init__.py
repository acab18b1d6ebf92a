"""Landmarks by example: parameters (saved in the scene), logic (no widget needed) and widget."""
