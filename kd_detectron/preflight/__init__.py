"""Every check before the first training step, one module per topic."""
