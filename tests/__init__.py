import os

# torch asks the name server who 127.0.0.1 is at both ends of a connection to a store (c10d::formatSockAddr).
# One that is silent for a moment holds up all processes, by 10 s for each server in /etc/resolv.conf.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
