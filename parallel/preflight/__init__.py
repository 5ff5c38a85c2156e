"""What the processes of a job find out about each other before the first step: clocks, links, groups."""
