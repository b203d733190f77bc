"""What only this project runs: benchmarks, figures, oracles, training. Not part of the package."""
