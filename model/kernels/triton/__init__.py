"""FP8 kernels in Triton for GPUs from sm_90 on. Only the backend that runs them imports them."""
