"""A run and its files: the training session, checkpoints, charts."""
