"""The CIFAR-10 model of the tutorial: inputs, inference, loss, train.

    images, labels = distorted_inputs()
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, global_step)

1,068,298 parameters; about 19.5 million multiply-adds per image for inference. The architecture
follows Alex Krizhevsky's cuda-convnet, with fully connected layers at the top, or with the locally
connected ones that cuda-convnet has there (1,116,490 parameters). Both numbers are for CIFAR-10's
ten classes and crops of 24 x 24 pixels; the layers follow other data.
"""

import math
import re

from absl import flags

import cifar10_data
import cifar10_input
import cifar10_summaries
from cifar10_runtime import GPUS, check_flags, tf

FLAGS = flags.FLAGS

flags.DEFINE_integer(
    "batch_size",
    128,
    "Images per batch (in training: per tower and step).",
    lower_bound=1,
    upper_bound=2**20,
)
flags.DEFINE_string("data_dir", "/tmp/cifar10_data", "Folder that holds the data sets.")
flags.register_validator("data_dir", bool, "it must name a folder")
flags.DEFINE_string(
    "data_url",
    cifar10_data.DATA_URL,
    "Source of cifar-10-binary.tar.gz where data_dir has no CIFAR-10 yet: http(s)://, file:// or "
    "a path. Its SHA-256 must be the original's.",
)
flags.DEFINE_boolean(
    "synthetic_data",
    False,
    "Use a generated stand-in for CIFAR-10 (ten kinds of coloured shapes); needs no network.",
)
flags.DEFINE_enum(
    "top_layers",
    "full",
    ["full", "local"],
    "What local3 and local4 are: fully connected layers, or locally connected ones, whose filters "
    "are not shared between the positions of an image.",
)
flags.DEFINE_boolean(
    "use_fp16",
    False,
    "Compute in 16 bits where that is safe (float16 on GPUs, bfloat16 on CPUs); variables and "
    "checkpoints stay float32.",
)

IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

# The recipe; flags of these names change it for a run.
MOVING_AVERAGE_DECAY = 0.9999  # per step, of the learned variables
NUM_EPOCHS_PER_DECAY = 350.0  # epochs until the learning rate decays
LEARNING_RATE_DECAY_FACTOR = 0.1
INITIAL_LEARNING_RATE = 0.1
WEIGHT_DECAY = 0.004  # of the top layers, times half the sum of the squared weights

flags.DEFINE_float(
    "initial_learning_rate",
    INITIAL_LEARNING_RATE,
    "Learning rate, until it decays; what a step multiplies the gradients by. Over 0.",
)
flags.DEFINE_float(
    "num_epochs_per_decay",
    NUM_EPOCHS_PER_DECAY,
    "Epochs (as many images each as there are to train on, over all towers) until the learning "
    "rate decays, and again. Over 0.",
)
flags.DEFINE_float(
    "learning_rate_decay_factor",
    LEARNING_RATE_DECAY_FACTOR,
    "What the learning rate is multiplied by when it decays; over 0. 1: it never does.",
)
flags.DEFINE_float(
    "moving_average_decay",
    MOVING_AVERAGE_DECAY,
    "Share of a learned variable's moving average that a step leaves as it is; the rest is the "
    "variable's new value. 0 or more, and under 1.",
)
flags.DEFINE_float(
    "weight_decay",
    WEIGHT_DECAY,
    "What half the sum of the squared weights of local3 and of local4 (and, with "
    "--top_layers=local, of softmax_linear) is multiplied by in the loss; 0: no weight decay.",
)
check_flags(
    ["initial_learning_rate", "num_epochs_per_decay"],
    lambda value: 0 < value <= 1e9,  # such that float32 and int64 hold what comes of it
    "it must be more than 0, a thousand million at most",
)
check_flags(
    ["learning_rate_decay_factor"],
    lambda value: 0 < value <= 1,
    "it must be more than 0, 1 at most",
)
check_flags(
    ["moving_average_decay"], lambda value: 0 <= value < 1, "it must be 0 or more, and less than 1"
)
check_flags(
    ["weight_decay"],
    lambda value: 0 <= value <= 1e9,
    "it must be 0 or more, a thousand million at most",
)

# Per step, of the losses that TensorBoard shows; not a part of the recipe.
LOSS_AVERAGE_DECAY = 0.9

# Collections of what a run looks at after each step: scalars that are finite if all is well, each
# named for the tensor that it stands for within the scope; and the learning rate of that step.
MUST_BE_FINITE = "must_be_finite"
FINITE_SCOPE = "must_be_finite/"
LEARNING_RATE = "learning_rate"

# The operations of tower N are named tower_N/..., see cifar10_multi_gpu_train.py.
TOWER_NAME = "tower"

DATA_URL = cifar10_data.DATA_URL


def maybe_download_and_extract():
    """Makes sure that the data set the flags ask for is in place, and checks every record of it.

    Returns:
      The path of the folder with the record files.

    Raises:
      cifar10_data.DataError: it cannot be had, or a record is wrong.
    """
    if FLAGS.synthetic_data:
        if cifar10_data.find_folder(FLAGS.data_dir) == FLAGS.data_dir:
            raise cifar10_data.DataError(
                f"{FLAGS.data_dir} holds records, which --synthetic_data would leave aside; leave "
                "that flag away, or name another folder with --data_dir"
            )
        folder = cifar10_data.maybe_generate_synthetic(FLAGS.data_dir)
    else:
        folder = cifar10_data.maybe_download_and_extract(FLAGS.data_dir, FLAGS.data_url)
    cifar10_data.check_records(folder)
    return folder


def find_data_folder():
    """Returns the path of the folder with the record files that the flags ask for."""
    if FLAGS.synthetic_data:
        return f"{FLAGS.data_dir}/{cifar10_data.SYNTHETIC_FOLDER}"
    return cifar10_data.find_folder(FLAGS.data_dir)


def find_class_names():
    """Returns the names of the data set's classes; see `cifar10_data.read_class_names`."""
    return cifar10_data.read_class_names(find_data_folder())


def count_examples_per_epoch():
    """Returns how many images there are to train on; CIFAR-10's number where there are no files."""
    try:
        return cifar10_data.count_records(find_data_folder(), eval_data=False)
    except (FileNotFoundError, NotADirectoryError):  # as for a graph that is only looked at
        return NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN


def make_change_check(eval_data):
    """Returns a function that raises DataError if the records change; see `ChangeCheck`."""
    return cifar10_data.ChangeCheck(find_data_folder(), eval_data)


def distorted_inputs(batch_size=None, shard=None):
    """Makes the training input from what the flags say; see `cifar10_input.distorted_inputs`.

    Args:
      batch_size: int; the flag `batch_size` where None.
      shard: (index, count) of the part of the records to read; all where None.

    Returns:
      images, float32 [batch_size, crop_size, crop_size, 3], and labels, int32 [batch_size].
    """
    return cifar10_input.distorted_inputs(
        find_data_folder(),
        batch_size or FLAGS.batch_size,
        FLAGS.min_fraction_of_examples_in_queue,
        FLAGS.num_preprocess_threads,
        cifar10_input.Distortion(
            FLAGS.max_brightness_delta,
            FLAGS.min_contrast_factor,
            FLAGS.max_contrast_factor,
            FLAGS.random_flip,
        ),
        shard,
        FLAGS.crop_size,
    )


def inputs(eval_data, num_epochs=None):
    """Makes the evaluation input from what the flags say; see `cifar10_input.inputs`.

    Args:
      eval_data: bool; True for the test file, False for the training files.
      num_epochs: how often each record comes; None for ever.

    Returns:
      images, float32 [batch_size, crop_size, crop_size, 3], and labels, int32 [batch_size].
    """
    return cifar10_input.inputs(
        eval_data, find_data_folder(), FLAGS.batch_size, num_epochs, FLAGS.crop_size
    )


def _variable_on_cpu(name, shape, initializer):
    """Makes, or in later towers finds, a float32 variable in the memory that towers share."""
    with tf.device("/cpu:0"):
        return tf.get_variable(name, shape, tf.float32, initializer)


def _variable_with_weight_decay(name, shape, stddev, weight_decay):
    """Makes a variable that starts as a truncated normal, and returns its value.

    Args:
      name: string.
      shape: list of ints.
      stddev: float; the standard deviation before truncation at twice that.
      weight_decay: float or None; adds `weight_decay * l2_loss(variable)` to the losses, where
        l2_loss is half the sum of squares.
    """
    variable = _variable_on_cpu(name, shape, tf.truncated_normal_initializer(stddev=stddev))
    # Read once for both uses, or a variable on another machine would be sent twice a step.
    value = tf.convert_to_tensor(variable)
    if weight_decay is not None:
        decay = tf.multiply(tf.nn.l2_loss(value), weight_decay, name="weight_decay")
        tf.add_to_collection("losses", decay)
    return value


def _tag(operation):
    """Turns an operation's name into a TensorBoard tag: `tower_0/conv1/weights`: `weights/conv1`.

    The kind comes first, so that TensorBoard shows the layers of one kind side by side; the tower
    goes, so that the tags are the same for any number of towers.
    """
    name = re.sub(f"^{TOWER_NAME}_[0-9]+/", "", operation.name)
    return "/".join(reversed(name.split("/")))


def _summarize_activation(activation, layer):
    """Adds a histogram of a layer's output, and the share of it that is zero; returns it."""
    # A model that is built again over the same variables, as a later tower is, would only repeat
    # the summaries of the first.
    if not tf.get_variable_scope().reuse:
        cifar10_summaries.histogram(f"activations/{layer}", activation)
        cifar10_summaries.sparsity(f"sparsity/{layer}", activation)
    return activation


def _convolution(images, layer, channels, bias):
    """5 x 5 convolution, bias, ReLU: [batch, n, n, m] to [batch, n, n, channels].

    Args:
      images: float32 [batch, n, n, m].
      layer: string; the variables' scope.
      channels: int; the number of filters.
      bias: float; what the biases start at.
    """
    with tf.variable_scope(layer):
        shape = [5, 5, images.shape.as_list()[3], channels]
        kernel = _variable_with_weight_decay("weights", shape, stddev=5e-2, weight_decay=None)
        biases = _variable_on_cpu("biases", [channels], tf.constant_initializer(bias))
        convolved = tf.nn.conv2d(images, kernel, strides=[1, 1, 1, 1], padding="SAME")
        activation = tf.nn.relu(tf.nn.bias_add(convolved, biases), name=layer)
        return _summarize_activation(activation, layer)


def _pool(images, name):
    """3 x 3 max pool with stride 2: [batch, n, n, m] to [batch, n / 2, n / 2, m]."""
    return tf.nn.max_pool(
        images, ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1], padding="SAME", name=name
    )


# Local response normalization, section 3.3 of the AlexNet paper, with the constants of cuda-convnet
# (which divides alpha by the size of the window; TensorFlow does not).
_LRN_RADIUS = 4  # channels on each side
_LRN_ALPHA = 0.001 / 9.0
_LRN_BETA = 0.75


def _window_sums(rows, scale):
    """Sums each channel and its neighbours within _LRN_RADIUS, times `scale`: [n, m] to [n, m].

    A multiplication by a banded matrix of ones: processors do that at full speed, which makes up
    for the additions of zeros.
    """
    channels = rows.shape.as_list()[1]
    band = tf.linalg.band_part(tf.ones([channels, channels]), _LRN_RADIUS, _LRN_RADIUS)
    return tf.matmul(rows, scale * band)


@tf.custom_gradient
def _lrn(rows):
    """Gives x / s^0.75 with s = 1 + alpha * (window sum of x^2), and its gradient."""
    # As a bias, the 1 is added within the multiplication, not in a pass of its own.
    ones = tf.ones(rows.shape.as_list()[1:])
    sums = tf.nn.bias_add(_window_sums(tf.square(rows), _LRN_ALPHA), ones)
    root = tf.rsqrt(sums)
    scale = root * tf.sqrt(root)  # s^-0.75, without the cost of a general power
    normalized = rows * scale

    def gradient(upstream):
        # dx = dy / s^0.75 - 2 * alpha * beta * x * (window sum of dy * y / s)
        shared = _window_sums(upstream * normalized / sums, 2.0 * _LRN_ALPHA * _LRN_BETA)
        return upstream * scale - rows * shared

    return normalized, gradient


def local_response_normalization(images, name):
    """Divides each value by a power of what its 9 neighbouring channels have at the same place.

    The result is `tf.nn.lrn`'s, to the last bits of a float32, in a quarter of the time on a CPU.

    Args:
      images: float32 [batch, n, n, m].
      name: string; the name of the operation.

    Returns:
      float32 [batch, n, n, m].
    """
    shape = images.shape.as_list()
    with tf.name_scope(name) as scope:
        rows = tf.reshape(images, [-1, shape[3]])
        return tf.reshape(_lrn(rows), [-1, *shape[1:]], name=scope)


def _fully_connected(features, layer, units, stddev, bias, weight_decay, relu=True):
    """Fully connected layer, with ReLU unless `relu` is false: [batch, n] to [batch, units].

    Args:
      features: float32 [batch, n].
      layer: string; the variables' scope.
      units: int.
      stddev: float; the spread of the weights at the start.
      bias: float; what the biases start at.
      weight_decay: float or None; see `_variable_with_weight_decay`.
      relu: bool.
    """
    with tf.variable_scope(layer):
        shape = [features.shape.as_list()[1], units]
        weights = _variable_with_weight_decay("weights", shape, stddev, weight_decay)
        biases = _variable_on_cpu("biases", [units], tf.constant_initializer(bias))
        product = tf.matmul(features, weights)
        if relu:
            activation = tf.nn.relu(product + biases, name=layer)
        else:
            activation = tf.add(product, biases, name=layer)
        return _summarize_activation(activation, layer)


def _locally_connected(images, layer, channels, stddev, bias, weight_decay):
    """3 x 3 filters of each position's own, padding 1, bias, ReLU: [b, n, n, m] to [b, n, n, c].

    As a convolution, but its filters are not shared: position (y, x) has the filters weights[y, x],
    [3, 3, m, c], and the biases biases[y, x], [c].

    Args:
      images: float32 [batch, n, n, m].
      layer: string; the variables' scope.
      channels: int; the number of filters.
      stddev: float; the spread of the weights at the start.
      bias: float; what the biases start at.
      weight_decay: float or None; see `_variable_with_weight_decay`.
    """
    height, width, depth = images.shape.as_list()[1:]
    with tf.variable_scope(layer):
        shape = [height, width, 3, 3, depth, channels]
        weights = _variable_with_weight_decay("weights", shape, stddev, weight_decay)
        shape = [height, width, channels]
        biases = _variable_on_cpu("biases", shape, tf.constant_initializer(bias))
        # Position first: then each has a matrix product of its own, and they lie in a row.
        padded = tf.pad(tf.transpose(images, [1, 2, 0, 3]), [[1, 1], [1, 1], [0, 0], [0, 0]])
        windows = [  # by tf.slice, whose gradient is many times faster than that of padded[...]
            tf.slice(padded, [y, x, 0, 0], [height, width, -1, -1])
            for y in range(3)
            for x in range(3)
        ]
        patches = tf.concat(windows, axis=3)  # [height, width, batch, 3 * 3 * depth]
        product = tf.matmul(
            patches, tf.reshape(weights, [height, width, 3 * 3 * depth, channels])
        )  # [height, width, batch, channels]
        sums = tf.transpose(product, [2, 0, 1, 3])
        activation = tf.nn.relu(sums + biases, name=layer)
        return _summarize_activation(activation, layer)


def _flatten(images):
    """Makes a row of each image: [batch, n, n, m] to [batch, n * n * m]."""
    return tf.reshape(images, [-1, math.prod(images.shape.as_list()[1:])], name="features")


def inference(images, num_classes=None):
    """Builds the model up to the logits.

    Args:
      images: float32 [batch, 24, 24, 3] from `distorted_inputs` or `inputs`; the batch may be of
        any size, or of a size that is not known yet, and the images of another, which the layers
        follow.
      num_classes: int; as many as the data set has where None.

    Returns:
      Logits, float32 [batch, num_classes]. They are not normalized; `tf.nn.softmax` makes
      probabilities.
    """
    if num_classes is None:
        num_classes = len(find_class_names())
    conv1 = _convolution(images, "conv1", channels=64, bias=0.0)  # [batch, 24, 24, 64]
    pool1 = _pool(conv1, "pool1")  # [batch, 12, 12, 64]
    norm1 = local_response_normalization(pool1, "norm1")

    conv2 = _convolution(norm1, "conv2", channels=64, bias=0.1)  # [batch, 12, 12, 64]
    norm2 = local_response_normalization(
        conv2, "norm2"
    )  # this time before the pool, as in cuda-convnet
    pool2 = _pool(norm2, "pool2")  # [batch, 6, 6, 64]

    decay = FLAGS.weight_decay
    if FLAGS.top_layers == "local":
        # Source: layers-conv-local-11pct.cfg and layer-params-conv-local-11pct.cfg of cuda-convnet,
        # where biases start at 0 unless it is said otherwise.
        local3 = _locally_connected(
            pool2, "local3", channels=32, stddev=0.04, bias=0.0, weight_decay=decay
        )  # [batch, 6, 6, 32]
        local4 = _locally_connected(
            local3, "local4", channels=32, stddev=0.04, bias=0.0, weight_decay=decay
        )  # [batch, 6, 6, 32]
        features = _flatten(local4)  # [batch, 1152]
    else:
        local3 = _fully_connected(
            _flatten(pool2),  # [batch, 2304]
            "local3",
            units=384,
            stddev=0.04,
            bias=0.1,
            weight_decay=decay,
        )  # [batch, 384]
        features = _fully_connected(
            local3, "local4", units=192, stddev=0.04, bias=0.1, weight_decay=decay
        )  # [batch, 192]
    # No softmax here: the loss below takes logits, which is faster and numerically safer.
    return _fully_connected(
        features,
        "softmax_linear",
        units=num_classes,
        stddev=1.0 / features.shape.as_list()[1],
        bias=0.0,
        weight_decay=decay if FLAGS.top_layers == "local" else None,
        relu=False,
    )  # [batch, num_classes]


def loss(logits, labels, scope=None):
    """Adds the cross-entropy to the collection `losses`, and sums that collection.

    Args:
      logits: float32 [batch, classes] from `inference`.
      labels: int [batch]; 0 to classes - 1.
      scope: string; only losses in this name scope count, as one tower's do. All where None.

    Returns:
      float32 []; the mean cross-entropy of the batch, in nats, plus the weight decay terms.
    """
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.cast(labels, tf.int64), logits=logits, name="cross_entropy_per_example"
    )
    tf.add_to_collection("losses", tf.reduce_mean(cross_entropy, name="cross_entropy"))
    total_loss = tf.add_n(tf.get_collection("losses", scope), name="total_loss")
    tf.add_to_collection(MUST_BE_FINITE, total_loss)
    return total_loss


def decayed_learning_rate(global_step, examples_per_step, examples_per_epoch=None):
    """Returns the learning rate at a step, and shows it in TensorBoard.

    It falls to a tenth every 350 epochs (or as the flags say), at once, not gradually. An epoch is
    as many examples as there are to train on, whoever consumes them: with N towers it takes N times
    fewer steps.

    Args:
      global_step: int []; how many updates there have been.
      examples_per_step: int; the images that one update consumes, over all towers.
      examples_per_epoch: int; the data set's where None.

    Returns:
      float32 [].
    """
    if examples_per_epoch is None:
        examples_per_epoch = count_examples_per_epoch()
    steps_per_epoch = examples_per_epoch / examples_per_step
    learning_rate = tf.train.exponential_decay(
        FLAGS.initial_learning_rate,
        global_step,
        decay_steps=max(1, int(steps_per_epoch * FLAGS.num_epochs_per_decay)),
        decay_rate=FLAGS.learning_rate_decay_factor,
        staircase=True,
        name="learning_rate",
    )
    cifar10_summaries.scalar("learning_rate", learning_rate)
    tf.add_to_collection(LEARNING_RATE, learning_rate)
    return learning_rate


def make_optimizer(learning_rate):
    """Returns the optimizer: gradient descent; with dynamic loss scaling if float16 is used.

    float16 has no numbers as small as many gradients are. So the loss is multiplied by a large
    scale, and the gradients are divided by it; a step with gradients that overflow changes nothing
    but halves the scale, and 2,000 steps without one double it.

    Args:
      learning_rate: float32 [].
    """
    optimizer = tf.train.GradientDescentOptimizer(learning_rate)
    if not (FLAGS.use_fp16 and GPUS):
        return optimizer  # bfloat16, on CPUs, has the range of float32

    def make_local(next_creator, **arguments):
        return next_creator(**{**arguments, "collections": [tf.GraphKeys.LOCAL_VARIABLES]})

    # Not in checkpoints, so that those are the same for every precision: a run starts its own.
    with tf.device("/cpu:0"), tf.variable_creator_scope(make_local):
        scale = tf.mixed_precision.DynamicLossScale()
    return tf.mixed_precision.MixedPrecisionLossScaleOptimizer(optimizer, scale)


def average_losses(tower_losses):
    """Averages each loss over the towers, and keeps and shows its moving average over the steps.

    One batch's loss is noisy; TensorBoard shows the moving average under the loss's name, and the
    batch's own value under that name with `_raw`.

    Args:
      tower_losses: for each tower the list of its losses, float32 [] each, in the same order.

    Returns:
      The operation that updates the moving averages.
    """
    with tf.device("/cpu:0"), tf.name_scope("loss_averages"):
        means = {
            _tag(losses[0].op): tf.reduce_mean(tf.stack(losses), name=_tag(losses[0].op))
            for losses in zip(*tower_losses, strict=True)
        }
        averages = tf.train.ExponentialMovingAverage(
            LOSS_AVERAGE_DECAY,
            zero_debias=True,  # or the curves would start near 0
            name="avg",
        )
        averages_op = averages.apply(list(means.values()))
        with tf.control_dependencies([averages_op]):  # shown are the averages with this step's loss
            for tag, mean in means.items():
                cifar10_summaries.scalar(f"{tag}_raw", mean)
                cifar10_summaries.scalar(tag, averages.average(mean))
    return averages_op


def update_variables(optimizer, gradients, global_step):
    """Shows the gradients, applies them, and then, and only then, updates the moving averages.

    Args:
      optimizer: from `make_optimizer`.
      gradients: list of (gradient, variable).
      global_step: int64 [] variable; counts this update.

    Returns:
      The operation that does all of it.
    """
    watch_gradients(optimizer, gradients)
    update_op = apply_gradients(optimizer, gradients, global_step)
    with tf.control_dependencies([update_op]):  # shown is what the step has made of them
        summarize_variables(gradients)
    return update_op


def watch_gradients(optimizer, gradients):
    """Shows gradients in TensorBoard, and has them checked after each step.

    Args:
      optimizer: from `make_optimizer`.
      gradients: list of (gradient, variable).
    """
    scales_loss = isinstance(optimizer, tf.mixed_precision.MixedPrecisionLossScaleOptimizer)
    for gradient, variable in gradients:
        if scales_loss:  # where one that overflows is no error, as it would be to a histogram
            gradient = tf.where_v2(tf.is_finite(gradient), gradient, 0.0)
        else:
            with tf.name_scope(FINITE_SCOPE):  # a sum has no infinity or NaN but from its terms
                total = tf.reduce_sum(gradient, name=f"gradients/{variable.op.name}")
            tf.add_to_collection(MUST_BE_FINITE, total)
        cifar10_summaries.histogram(f"gradients/{variable.op.name}", gradient)


def summarize_variables(gradients):
    """Shows the variables of a list of (gradient, variable) in TensorBoard."""
    for _, variable in gradients:
        cifar10_summaries.histogram(_tag(variable.op), variable)


def apply_gradients(optimizer, gradients, global_step):
    """Applies gradients, counts the step, then updates the moving averages; see `update_variables`.

    Returns:
      The operation that does all of it.
    """
    with tf.name_scope("update"):
        # Counted here, because loss scaling skips updates, and a step that is skipped is a step.
        apply_gradients_op = optimizer.apply_gradients(gradients)
        with tf.control_dependencies([apply_gradients_op]):
            count_op = tf.assign_add(global_step, 1)
        averages = tf.train.ExponentialMovingAverage(FLAGS.moving_average_decay, global_step)
        with tf.control_dependencies([count_op]):
            return averages.apply(tf.trainable_variables())


def train(total_loss, global_step, examples_per_step=None):
    """Builds one training step: gradients, update, moving averages.

    Args:
      total_loss: float32 [] from `loss`.
      global_step: int64 [] variable; counts the updates.
      examples_per_step: int; the images of a batch; the flag `batch_size` where None.

    Returns:
      The operation that trains on one batch.
    """
    optimizer = make_optimizer(
        decayed_learning_rate(global_step, examples_per_step or FLAGS.batch_size)
    )
    gradients = optimizer.compute_gradients(total_loss)
    return tf.group(
        average_losses([[*tf.get_collection("losses"), total_loss]]),
        update_variables(optimizer, gradients, global_step),
        name="train",
    )
