"""Several gloo processes for a test: put many cases into one call, starting processes is what costs."""

from parallel.forked import run_ranks

__all__ = ["GLOO_S", "run_ranks"]

GLOO_S = 0.02
"""gloo's threads let go of the tensors of an exchange this soon after it is over, also when busy."""
