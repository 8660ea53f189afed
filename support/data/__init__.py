"""The dataset, without TensorFlow: records, where they come from, and what becomes of images."""
