"""What a recipe will need on a cluster, and which layout is best, before a device is booked."""
