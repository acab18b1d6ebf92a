"""Headless training of the embeddings: views, losses, branches, registered pairs, and a loop that resumes exactly."""
