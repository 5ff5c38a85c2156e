"""The optimizer engines: who sums gradients, holds optimizer state and its shards, and updates the weights."""
