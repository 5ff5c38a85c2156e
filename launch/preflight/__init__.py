"""Whether the machines of a job are fit to start it."""
