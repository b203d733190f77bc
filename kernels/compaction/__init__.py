"""A compaction: which tokens survive, and their copy to other pages."""
