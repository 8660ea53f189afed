"""The dataset, without TensorFlow: record files, their sources, and conversion of images."""
