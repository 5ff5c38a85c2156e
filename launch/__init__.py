"""Starting jobs on one machine or many."""
