"""The gradient-parity matrix: every parallel layout against one process."""
