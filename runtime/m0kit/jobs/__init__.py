"""Scoring large files, and going on after whatever stopped it."""
