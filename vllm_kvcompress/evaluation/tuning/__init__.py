"""``kvcompress tune``: the cheapest setting that keeps a target on somebody's own prompts."""
