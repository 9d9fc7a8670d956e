"""A run's directory: config and plan, checkpoints, metrics, pictures, and who may use it."""
