"""Carrying m0kit and an artifact to a machine without a network: wheels with hashes, a list of them, one folder."""
