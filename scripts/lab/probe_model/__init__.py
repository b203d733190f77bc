"""Training of the probe model of examples/."""
