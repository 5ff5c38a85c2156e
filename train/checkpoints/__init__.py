"""Checkpoints of a run: planned by torch DCP, stored without pickle, verified before use."""
