"""Text to token shards, and token shards to the samples of a run; imports none of our packages."""
