"""Measurements on validation data: what the embedding, the matches and the registrations are worth, and calibration."""
