"""Where this package meets vLLM: hooks, options, checks."""
