"""What multiplies in FP8: plain torch, the Triton kernels, or Transformer Engine behind an adapter."""
