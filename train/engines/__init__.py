"""The optimizer engines: who sums gradients, holds optimizer state, and updates the weights."""
