"""Trains the same network in Keras, and prints its row: its speed against the stock formulation's.

    python benchmarks/keras_training.py
    python benchmarks/keras_training.py --policy=mixed_bfloat16

Keras 3 comes with TensorFlow. The input is tf.data's, with the same distortions. Keras works in a
process of its own, as it needs TensorFlow's eager mode; it, the stock formulation and this project
take turns, with the others idle.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

BENCHMARKS = pathlib.Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS.parent))


def _make_dataset(tf, folder, batch_size, queued):
    """Makes what a Keras user feeds: decoded, shuffled, distorted, batched, prefetched."""

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
    records = records.shuffle(queued) if queued else records
    records = records.map(distort, num_parallel_calls=tf.data.AUTOTUNE)
    return records.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def _make_model(tf, keras):
    """Makes the tutorial's network, with what Keras has for each of its parts."""

    def normalize(name):
        return keras.layers.Lambda(
            lambda x: tf.nn.local_response_normalization(
                x, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, beta=0.75
            ),
            name=name,
            dtype="float32",  # the op has no bfloat16
        )

    def convolve(name, bias):
        return keras.layers.Conv2D(
            64,
            5,
            padding="same",
            activation="relu",
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=5e-2),
            bias_initializer=keras.initializers.Constant(bias),
            name=name,
        )

    def connect(name, units):
        return keras.layers.Dense(
            units,
            activation="relu",
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.04),
            bias_initializer=keras.initializers.Constant(0.1),
            kernel_regularizer=keras.regularizers.L2(0.004 / 2),  # Keras does not halve the sum
            name=name,
        )

    model = keras.Sequential(
        [
            keras.Input([24, 24, 3]),
            convolve("conv1", bias=0.0),
            keras.layers.MaxPooling2D(3, strides=2, padding="same", name="pool1"),
            normalize("norm1"),
            convolve("conv2", bias=0.1),
            normalize("norm2"),
            keras.layers.MaxPooling2D(3, strides=2, padding="same", name="pool2"),
            keras.layers.Flatten(),
            connect("local3", 384),
            connect("local4", 192),
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
        # What Keras would choose, XLA, takes twice as long here.
        jit_compile=False,
    )
    return model


def serve(folder, policy, batch_size, queued):
    """Takes a turn for each line on stdin, its number of steps; prints the seconds per step."""
    import keras
    import tensorflow as tf

    keras.config.set_dtype_policy(policy)
    batches = iter(_make_dataset(tf, folder, batch_size, queued))
    model = _make_model(tf, keras)
    assert model.count_params() == 1068298
    model.train_on_batch(*next(batches))
    print(keras.__version__, flush=True)
    for line in sys.stdin:
        steps = int(line)
        for _ in range(steps // 2 + 1):
            model.train_on_batch(*next(batches))
        start = time.perf_counter()
        for _ in range(steps):
            loss = model.train_on_batch(*next(batches))
        seconds = (time.perf_counter() - start) / steps
        assert loss == loss, "the loss is not a number"
        print(seconds, flush=True)


class KerasTraining:
    """A process that trains in Keras; `seconds_per_step` is one turn of it."""

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
            raise SystemExit(f"Keras has ended with exit code {self._process.wait()}")
        return line.strip()

    def seconds_per_step(self, steps):
        print(steps, file=self._process.stdin, flush=True)
        return float(self._read())

    def close(self):
        self._process.communicate()


def main():
    with tempfile.TemporaryDirectory() as folder:
        records = compare.make_records(folder)
        keras = KerasTraining(records, FLAGS.policy, compare.BATCH_SIZE, FLAGS.queued)
        print(f"{compare.describe_machine()}, Keras {keras.version}, {FLAGS.turns} turns\n")
        fraction = compare.find_queued_fraction(records)
        trainings = {
            "stock": compare.stock_training(records, fraction),
            "own": compare.own_training(records, fraction),
            "keras": keras,
        }
        figures = compare.take_turns(FLAGS.turns, compare.make_timers(trainings))
        for training in trainings.values():
            training.close()
    print("| | median | range |\n| --- | --- | --- |")
    names = {
        "own": "training, float32 (stock = 1)",
        "keras": f"Keras with tf.data, `{FLAGS.policy}` (stock = 1)",
    }
    for name, row in names.items():
        compare.print_row(row, compare.ratios(figures, "stock", name))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        import compare
        from absl import flags

        from cifar10_runtime import run

        FLAGS = flags.FLAGS
        flags.DEFINE_enum(
            "policy", "float32", ["float32", "mixed_bfloat16"], "Keras's dtype policy."
        )
        run(main)
