"""What can go wrong with the processes of a job, and the exit code of those that it ends. Free of torch."""

EXIT_LOST = 4
"""A process of the job died or hung, and the others were ended; the last checkpoint is kept."""


class ProcessError(Exception):
    """The processes of a job cannot find each other: the launcher's variables or the network are wrong."""


class LostRankError(Exception):
    """A process of the job died or hung while this one needed it.

    The message is printed once in the whole job, by parallel/watchdog.py; whoever catches this only has to
    leave.
    """
