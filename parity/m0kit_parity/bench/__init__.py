"""Timings on the machine at hand."""
