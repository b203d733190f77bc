"""Score, select and copy: what a compaction plan makes a worker do."""
