"""Whether an artifact computes what PyTorch does, stage by stage."""
