"""Jobs of several processes on this machine."""
