"""Plots and pages for reports."""
