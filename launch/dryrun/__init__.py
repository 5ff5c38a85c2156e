"""One rank of a big job, run dry: its real training steps on tensors that have no memory."""
