"""What is split where: gradient buffers, sharded optimizer state, schedules of microbatches."""
