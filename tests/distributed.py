"""Several gloo processes for a test: put many cases into one call, starting processes is what costs."""

from parallel.forked import run_ranks

__all__ = ["run_ranks"]
