"""`NullSpaceOptimizer`: the contract of `torch.optim`, the modes, and what stands behind one wrapper."""
