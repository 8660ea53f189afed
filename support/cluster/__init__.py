"""Synchronous training on several machines, configured by the environment variable TF_CONFIG."""
