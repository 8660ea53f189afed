"""Compares the training speed of Keras 3, this project and the baseline on the same network.

    python benchmarks/keras_training.py
    python benchmarks/keras_training.py --policy=mixed_bfloat16

Keras comes with TensorFlow. Its input uses tf.data and distorts the images in the same way. It runs
in its own process, because it needs TensorFlow's eager mode. The contenders take turns; while one
of them trains, the others are idle. The baseline is this project with --fast_ops=false.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time


def make_dataset(tf, folder, batch_size, queued):
    """Makes a typical Keras input: shuffled, decoded, distorted, batched and prefetched."""

    def distort(record):
        record = tf.io.decode_raw(record, tf.uint8)
        image = tf.transpose(tf.reshape(tf.cast(record[1:], tf.float32), [3, 32, 32]), [1, 2, 0])
        image = tf.image.random_crop(image, [24, 24, 3])
        image = tf.image.random_flip_left_right(image)
        image = tf.image.random_brightness(image, max_delta=63)
        image = tf.image.random_contrast(image, lower=0.2, upper=1.8)
        return tf.image.per_image_standardization(image), tf.cast(record[0], tf.int32)

    files = sorted(str(path) for path in pathlib.Path(folder).glob("data_batch_*.bin"))
    records = tf.data.FixedLengthRecordDataset(files, 1 + 3 * 32 * 32).repeat()
    records = records.shuffle(queued).map(distort, num_parallel_calls=tf.data.AUTOTUNE)
    return records.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def make_model(tf, keras):
    """Makes the tutorial's network from Keras layers, and a training step that matches it."""

    def normalization(name):
        return keras.layers.Lambda(
            lambda x: tf.nn.local_response_normalization(
                x, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, beta=0.75
            ),
            name=name,
            dtype="float32",  # the operation does not support bfloat16
        )

    def convolution(name, bias):
        return keras.layers.Conv2D(
            64,
            5,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=5e-2),
            bias_initializer=keras.initializers.Constant(bias),
            name=name,
        )

    def fully_connected(name, units):
        return keras.layers.Dense(
            units,
            activation="relu",
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.04),
            bias_initializer=keras.initializers.Constant(0.1),
            kernel_regularizer=keras.regularizers.L2(0.004 / 2),  # tf.nn.l2_loss halves the sum
            name=name,
        )

    model = keras.Sequential(
        [
            keras.Input([24, 24, 3]),
            convolution("conv1", bias=0.0),
            keras.layers.MaxPooling2D(3, strides=2, padding="same", name="pool1"),
            normalization("norm1"),
            convolution("conv2", bias=0.1),
            normalization("norm2"),
            keras.layers.MaxPooling2D(3, strides=2, padding="same", name="pool2"),
            keras.layers.Flatten(),
            fully_connected("local3", 384),
            fully_connected("local4", 192),
            keras.layers.Dense(
                10,
                kernel_initializer=keras.initializers.TruncatedNormal(stddev=1 / 192),
                name="softmax_linear",
                dtype="float32",
            ),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9999),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # on a CPU, a step takes twice as long with XLA
    )
    return model


def serve(folder, policy, batch_size, queued):
    """Trains as many steps as each line of stdin says, and prints the seconds per step."""
    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy(policy)
    batches = iter(make_dataset(tf, folder, batch_size, queued))
    model = make_model(tf, keras)
    assert model.count_params() == 1_068_298
    model.train_on_batch(*next(batches))
    print(keras.__version__, flush=True)
    for line in sys.stdin:
        steps = int(line)
        for _ in range(steps // 2 + 1):  # not timed: prefetched batches
            model.train_on_batch(*next(batches))
        start = time.perf_counter()
        for _ in range(steps):
            loss = model.train_on_batch(*next(batches))
        seconds = (time.perf_counter() - start) / steps
        assert loss == loss, "the loss is NaN"
        print(seconds, flush=True)


class KerasContender:
    """The counterpart of `compare.Contender` for a process that trains with Keras.

    Args:
      *arguments: those of `serve`.
    """

    def __init__(self, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self.version = self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"Keras failed with exit code {self._process.wait()}")
        return line.strip()

    def seconds_per_step(self, steps):
        print(steps, file=self._process.stdin, flush=True)
        return float(self._read())

    def close(self):
        self._process.communicate()


def main(argv=None):
    with tempfile.TemporaryDirectory() as data_dir:
        folder = compare.prepare_dataset(data_dir)
        queued = int(FLAGS.min_fraction_of_examples_in_queue * cifar10.num_examples_per_epoch())
        keras = KerasContender(folder, FLAGS.policy, compare.BATCH_SIZE, max(1, queued))
        print(f"{compare.describe_machine()}, Keras {keras.version}, {FLAGS.turns} turns\n")
        figures = compare.time_steps(
            {
                "baseline": compare.Contender(compare.build_training, fast_ops=False),
                "fast": compare.Contender(compare.build_training),
                "keras": keras,
            }
        )
    print("| | median | range |\n| --- | --- | --- |")
    for name, row in (("fast", "float32"), ("keras", f"Keras with tf.data, `{FLAGS.policy}`")):
        compare.print_row(
            f"training, {row} (baseline = 1)", compare.ratios(figures, "baseline", name)
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        import compare
        from absl import flags

        import cifar10
        from support import command_line

        FLAGS = flags.FLAGS
        command_line.forget_flags_of(__file__)
        flags.DEFINE_enum(
            "policy", "float32", ["float32", "mixed_bfloat16"], "Keras's dtype policy."
        )
        command_line.run(main)
