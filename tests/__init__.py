import os

# torch asks the name server who 127.0.0.1 is at both ends of a connection to a store (c10d::formatSockAddr),
# and waits for one that is silent. No test needs a name that this machine does not know by itself.
os.environ.setdefault("RES_OPTIONS", "attempts:0")
