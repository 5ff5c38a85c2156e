"""What surrounds a job: plans, dry runs, checks before the start, and starting it on one machine or many."""
