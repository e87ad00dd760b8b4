"""Edits: a selection of components, an operation on it and a strength."""
