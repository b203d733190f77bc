"""Stock vLLM against the plugin, as servers."""
