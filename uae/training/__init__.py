"""Headless training of the embeddings: views, losses, a loop that resumes exactly, and the appearance branch."""
