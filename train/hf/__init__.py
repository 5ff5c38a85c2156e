"""DeepSeek's open-weights folders, read and written."""
