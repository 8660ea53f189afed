"""Trains the tutorial's network with Keras 3: a contender of compare.py.

    python benchmarks/keras_contender.py FOLDER BATCH_SIZE QUEUED

The input uses tf.data and distorts the images in the same way; QUEUED is the number of images to
shuffle. It runs in its own process because Keras needs TensorFlow's eager mode. See turns.py for
what it reads and prints.
"""

import pathlib
import sys

import keras
import tensorflow as tf
import turns


def make_dataset(folder, batch_size, queued):
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


def make_model():
    """Makes the tutorial's network from Keras layers, and a training step that matches it."""

    def normalization(name):
        return keras.layers.Lambda(
            lambda x: tf.nn.local_response_normalization(
                x, depth_radius=4, bias=1.0, alpha=0.001 / 9.0, beta=0.75
            ),
            name=name,
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
            ),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9999),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # on a CPU, a step takes twice as long with XLA
    )
    return model


def main(folder, batch_size, queued):
    batches = iter(make_dataset(folder, batch_size, queued))
    model = make_model()
    assert model.count_params() == 1_068_298

    def run(steps):
        for _ in range(steps):
            loss = model.train_on_batch(*next(batches))
        assert loss == loss, "the loss is NaN"

    run(1)
    turns.serve(run, warm_up_steps=lambda steps: steps // 2 + 1)  # takes the prefetched batches


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
