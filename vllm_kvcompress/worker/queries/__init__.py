"""Where the queries that policies score with come from."""
