"""Records of every step and where they go: metrics.jsonl, console, Weights & Biases."""
