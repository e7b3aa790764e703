"""The PyTorch reference, checkpoints to prove things on, and the comparison with an artifact."""
