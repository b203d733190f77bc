"""Training of WindowKV's task classifier: its prompts, their texts, its weights."""
