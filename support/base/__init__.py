"""What every script needs, without TensorFlow: flags, errors, signals, streams, files, progress."""
