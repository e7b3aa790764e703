"""What a machine is, and what suits it."""
