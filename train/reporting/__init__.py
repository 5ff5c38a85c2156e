"""What a run came to: its records read back, the figures of the report, the closing table."""
