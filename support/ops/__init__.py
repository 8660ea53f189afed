"""TensorFlow: its import, faster operations, and summaries."""
