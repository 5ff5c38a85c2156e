"""Memory allocator settings of the process."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; returns whether that was possible. Call before torch allocates."""
    return False
