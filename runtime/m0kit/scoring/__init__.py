"""From a pair to its score: prepare, schedule, run, result."""
