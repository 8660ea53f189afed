"""The CIFAR-10 model of the tutorial: inputs, inference, loss and training.

    images, labels = distorted_inputs()
    logits = inference(images)
    total_loss = loss(logits, labels)
    train_op = train(total_loss, global_step)

For ten classes and crops of 24 x 24 pixels, the model has 1,068,298 parameters, and inference takes
about 18.5 million multiply-adds per image (the original text says 19.5). The architecture follows
Alex Krizhevsky's cuda-convnet, with fully connected instead of locally connected layers at the top.
"""

import re

from absl import flags

import cifar10_input
from support.base import options
from support.base.worker import ALONE
from support.data import dataset, download, synthetic
from support.data.settings import TrainingSettings
from support.ops import fast_nn, graph_notes, summaries, tensorflow_v1, updates
from support.ops.tensorflow_v1 import conditionals_without_functions, tf

FLAGS = flags.FLAGS

# Constants of the dataset; see cifar10_input.py.
IMAGE_SIZE = cifar10_input.IMAGE_SIZE
NUM_CLASSES = cifar10_input.NUM_CLASSES
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10_input.NUM_EXAMPLES_PER_EPOCH_FOR_EVAL

# Constants of the training process. Each is the default of the flag with its name in lowercase.
INITIAL_LEARNING_RATE = 0.1  # per update
NUM_EPOCHS_PER_DECAY = 350.0  # epochs between decays of the learning rate
LEARNING_RATE_DECAY_FACTOR = 0.1
MOVING_AVERAGE_DECAY = 0.9999  # per update, of the trainable variables
WEIGHT_DECAY = 0.004  # of local3 and local4; multiplies half the sum of their squared weights

# Decay per step of the averaged losses in TensorBoard. It does not affect training.
LOSS_AVERAGE_DECAY = 0.9

# The operations of tower N are named tower_N/...; see cifar10_multi_gpu_train.py.
TOWER_NAME = "tower"

DATA_URL = download.DATA_URL

options.register_constants(globals())  # as defaults of flags
options.DEFINE_path("data_dir", "/tmp/cifar10_data", "Folder for the dataset.")
options.DEFINE_integer(
    "batch_size", 128, "Number of images in a batch (in training, per tower or worker).", 1
)
options.DEFINE_boolean(
    "use_fp16",
    False,
    "Compute in 16 bits where that is safe (float16 on GPUs, bfloat16 on CPUs). Variables and "
    "checkpoints stay float32.",
)
options.define("model")  # --weight_decay and others; see the table in support/base/options.py


def maybe_download_and_extract():
    """Downloads or generates the dataset if it is missing, checks it, and returns its folder.

    Raises DataError if it cannot be downloaded or generated, or if a record is invalid.
    """
    if FLAGS.synthetic_data:
        folder = synthetic.maybe_generate(FLAGS.data_dir)
    else:
        folder = download.maybe_download_and_extract(FLAGS.data_dir, FLAGS.data_url)
    dataset.check_dataset(folder, options.constant("NUM_CLASSES"))
    return folder


def find_dataset(class_names=None):
    """Returns the `Dataset` that the flags name; see `cifar10_input.find_dataset`."""
    folder = dataset.find_folder(FLAGS.data_dir, FLAGS.synthetic_data)
    return cifar10_input.find_dataset(folder, class_names)


def training_settings(class_names=None, examples_per_step=None):
    """Returns the `TrainingSettings` that the flags and the dataset describe.

    `class_names` are those of the dataset if None. `examples_per_step` is the number of images per
    step, over all towers or workers; None if not training.
    """
    found = find_dataset(class_names)
    return TrainingSettings(
        class_names=found.class_names,
        examples_per_epoch=found.num_examples_per_epoch_for_train,
        crop_size=FLAGS.crop_size,
        top_layers=FLAGS.top_layers,
        random_flip=FLAGS.random_flip,
        examples_per_step=examples_per_step,
    )


def distorted_inputs(batch_size=None, shard=(0, 1)):
    """Returns the training input that the flags describe; see `cifar10_input.distorted_inputs`."""
    batch_size = batch_size or FLAGS.batch_size
    return cifar10_input.distorted_inputs(find_dataset().folder, batch_size, shard)


def inputs(eval_data, num_epochs=None):
    """Returns the evaluation input that the flags describe; see `cifar10_input.inputs`."""
    return cifar10_input.inputs(eval_data, find_dataset().folder, FLAGS.batch_size, num_epochs)


def _variable_on_cpu(name, shape, initializer):
    """Creates a float32 variable in the CPU's memory, or returns that of an earlier tower."""
    with tf.device("/cpu:0"):
        return tf.get_variable(name, shape, tf.float32, initializer)


def _variable_with_weight_decay(name, shape, stddev, wd, read=False):
    """Creates a variable with truncated normal values, and adds its weight decay to the losses.

    Returns the variable, or its value if `read` is true. In a cluster, the value then crosses the
    network only once per step.
    """
    variable = _variable_on_cpu(name, shape, tf.truncated_normal_initializer(stddev=stddev))
    value = tf.convert_to_tensor(variable)
    if wd is not None:
        weight_decay = tf.multiply(tf.nn.l2_loss(value), wd, name="weight_decay")
        tf.add_to_collection("losses", weight_decay)
    return value if read else variable


def _name_without_tower(operation):
    return re.sub(f"^{TOWER_NAME}_[0-9]+/", "", operation.name)


def _tag(operation):
    """Returns `weights/conv1` for `conv1/weights`: TensorBoard then groups the layers by kind."""
    return "/".join(reversed(_name_without_tower(operation).split("/")))


def _activation_summary(x):
    """Shows a histogram and the sparsity of `x`, the output of a layer, in TensorBoard."""
    if tf.get_variable_scope().reuse:  # another tower: only the first one is summarized
        return
    layer = re.sub(r"^(.*)/\1$", r"\1", _name_without_tower(x.op))
    summaries.histogram(f"activations/{layer}", x)
    summaries.sparsity(f"sparsity/{layer}", x)


def _convolution(images, name, channels, bias):
    """5 x 5 convolution, bias and ReLU: float32 [batch, n, n, m] to [batch, n, n, channels]."""
    with tf.variable_scope(name):
        shape = [5, 5, images.shape.as_list()[3], channels]
        kernel = _variable_with_weight_decay("weights", shape, stddev=5e-2, wd=None, read=True)
        biases = _variable_on_cpu("biases", [channels], tf.constant_initializer(bias))
        # In 16 bits, the error of fast_nn.conv2d would be too large.
        is_fast = FLAGS.fast_ops and not tensorflow_v1.computes_in_16_bits(FLAGS.use_fp16)
        conv2d = fast_nn.conv2d if is_fast else tf.nn.conv2d
        conv = conv2d(images, kernel, strides=[1, 1, 1, 1], padding="SAME")
        activation = tf.nn.relu(tf.nn.bias_add(conv, biases), name=name)
        _activation_summary(activation)
        return activation


def _max_pool(images, name):
    """3 x 3 max pooling, stride 2: float32 [b, n, n, m] to [b, ceil(n / 2), ceil(n / 2), m]."""
    return tf.nn.max_pool(images, [1, 3, 3, 1], [1, 2, 2, 1], padding="SAME", name=name)


def _normalize(images, name):
    """Local response normalization across channels: float32 [batch, n, n, m], shape unchanged."""
    # Radius and alpha as in cuda-convnet, which divides alpha by the size of the window.
    nn = fast_nn if FLAGS.fast_ops else tf.nn
    return nn.lrn(images, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75, name=name)


def _fully_connected(features, name, units, stddev, wd, relu=True):
    """Fully connected layer, ReLU optional: float32 [batch, ...] to [batch, units]."""
    bias = 0.1 if relu else 0.0  # if positive, more ReLUs are active at first
    size = features.shape[1:].num_elements()
    with tf.variable_scope(name):
        if features.shape.rank > 2:
            features = tf.reshape(features, [-1, size])
        weights = _variable_with_weight_decay("weights", [size, units], stddev, wd, read=True)
        biases = _variable_on_cpu("biases", [units], tf.constant_initializer(bias))
        output = tf.matmul(features, weights) + biases
        activation = (tf.nn.relu if relu else tf.identity)(output, name=name)
        _activation_summary(activation)
        return activation


def _locally_connected(images, name, channels, stddev, wd):
    """3 x 3 filters that differ by position, bias, ReLU: float32 [b, n, n, m] to [b, n, n, c]."""
    height, width, depth = images.shape.as_list()[1:]
    with tf.variable_scope(name):
        shape = [height, width, 3, 3, depth, channels]
        weights = _variable_with_weight_decay("weights", shape, stddev, wd, read=True)
        shape = [height, width, channels]
        biases = _variable_on_cpu("biases", shape, tf.constant_initializer(0.0))
        product = fast_nn.locally_connected(images, weights)
        activation = tf.nn.relu(product + biases, name=name)
        _activation_summary(activation)
        return activation


def inference(images, num_classes=None):
    """Builds the model up to the logits.

    Args:
      images: float32 [batch, 24, 24, 3] from `distorted_inputs` or `inputs`. The batch size may be
        unknown. The layers adapt to other image sizes.
      num_classes: int; the number of classes of the dataset if None.

    Returns:
      Logits, float32 [batch, num_classes]. Apply `tf.nn.softmax` to get probabilities.
    """
    if num_classes is None:
        num_classes = len(find_dataset().class_names)
    wd = FLAGS.weight_decay

    conv1 = _convolution(images, "conv1", channels=64, bias=0.0)  # [batch, 24, 24, 64]
    pool1 = _max_pool(conv1, "pool1")  # [batch, 12, 12, 64]
    norm1 = _normalize(pool1, "norm1")

    conv2 = _convolution(norm1, "conv2", channels=64, bias=0.1)  # [batch, 12, 12, 64]
    norm2 = _normalize(conv2, "norm2")
    pool2 = _max_pool(norm2, "pool2")  # [batch, 6, 6, 64]

    if FLAGS.top_layers == "local":
        # Source: layers-conv-local-11pct.cfg and layer-params-conv-local-11pct.cfg of cuda-convnet.
        local3 = _locally_connected(pool2, "local3", channels=32, stddev=0.04, wd=wd)
        local4 = _locally_connected(local3, "local4", channels=32, stddev=0.04, wd=wd)
        softmax_wd = wd
    else:
        local3 = _fully_connected(pool2, "local3", 384, stddev=0.04, wd=wd)  # [batch, 384]
        local4 = _fully_connected(local3, "local4", 192, stddev=0.04, wd=wd)  # [batch, 192]
        softmax_wd = None

    # No softmax here: the loss takes logits, which is faster and numerically more stable.
    stddev = 1.0 / local4.shape[1:].num_elements()
    return _fully_connected(local4, "softmax_linear", num_classes, stddev, softmax_wd, relu=False)


def loss(logits, labels, scope=None):
    """Adds the cross-entropy to the collection `losses` and returns the sum of the collection.

    Args:
      logits: float32 [batch, classes] from `inference`.
      labels: int [batch]; 0 to classes - 1.
      scope: string; sum only the losses in this name scope, for example those of a tower.

    Returns:
      float32 []; the mean cross-entropy of the batch, in nats, plus the weight decay.
    """
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.cast(labels, tf.int64), logits=logits, name="cross_entropy_per_example"
    )
    tf.add_to_collection("losses", tf.reduce_mean(cross_entropy, name="cross_entropy"))
    total_loss = tf.add_n(tf.get_collection("losses", scope), name="total_loss")
    graph_notes.check_finite(total_loss)
    return total_loss


def _add_loss_summaries(total_loss, tower_losses=None):
    """Shows the losses in TensorBoard; returns the operation that updates their moving averages.

    The loss of a single batch is noisy. TensorBoard shows the moving average under the name of the
    loss, and the value of the batch, averaged over the towers, with `_raw` appended.
    `tower_losses` has a list of losses for each tower, all in the same order.
    """
    if tower_losses is None:  # there are no towers
        tower_losses = [tf.get_collection("losses")]
    with tf.device("/cpu:0"), tf.name_scope("loss_averages"):
        means = {}
        for losses in [*zip(*tower_losses, strict=True), [total_loss]]:
            tag = _tag(losses[0].op)
            means[tag] = tf.reduce_mean(tf.stack(losses), name=tag)
        averages = tf.train.ExponentialMovingAverage(
            LOSS_AVERAGE_DECAY,
            zero_debias=True,  # without it, the curves start near 0
            name="avg",
        )
        with conditionals_without_functions():
            loss_averages_op = averages.apply(list(means.values()))
        with tf.control_dependencies([loss_averages_op]):
            for tag, mean in means.items():
                summaries.scalar(f"{tag}_raw", mean)
                summaries.scalar(tag, averages.average(mean))
    return loss_averages_op


def decayed_learning_rate(global_step, examples_per_step):
    """Returns the learning rate, float32 [], at a step, int64 [], and shows it in TensorBoard.

    By default, it drops to a tenth every 350 epochs. `examples_per_step` is the number of images
    that all towers or workers use in a step. If it has changed when a run is resumed, the schedule
    counts the images that the run has seen instead of its steps.
    """
    examples_per_epoch = find_dataset().num_examples_per_epoch_for_train
    num_batches_per_epoch = examples_per_epoch / examples_per_step
    decay_steps = max(1, int(num_batches_per_epoch * FLAGS.num_epochs_per_decay))
    if offset := graph_notes.images_offset():  # count images instead of steps
        global_step = tf.cast(global_step, tf.int64) * examples_per_step + offset
        decay_steps = max(examples_per_step, examples_per_epoch * FLAGS.num_epochs_per_decay)
    learning_rate = tf.train.exponential_decay(
        FLAGS.initial_learning_rate,
        global_step,
        decay_steps=decay_steps,
        decay_rate=FLAGS.learning_rate_decay_factor,
        staircase=True,
        name="learning_rate",
    )
    summaries.scalar("learning_rate", learning_rate)
    graph_notes.record_learning_rate(learning_rate)
    return learning_rate


def make_optimizer(learning_rate):
    """Returns a gradient descent optimizer for a rate, float32 []; float16 adds loss scaling."""
    optimizer = tf.train.GradientDescentOptimizer(learning_rate)
    if FLAGS.use_fp16 and tensorflow_v1.GPUS:  # bfloat16, which CPUs use, has the range of float32
        optimizer = tensorflow_v1.with_loss_scaling(optimizer)
    return optimizer


def train(total_loss, global_step, worker=ALONE):
    """Builds one training step: gradients, update and moving averages.

    Args:
      total_loss: float32 [] from `loss`.
      global_step: int64 [] variable; counts the updates.
      worker: `support.base.worker.Worker`; the one that this process runs in a cluster.

    Returns:
      The operation that trains on one batch.
    """
    learning_rate = decayed_learning_rate(global_step, FLAGS.batch_size * worker.count)
    loss_averages_op = _add_loss_summaries(total_loss)

    optimizer = make_optimizer(learning_rate)
    gradients = optimizer.compute_gradients(total_loss)
    update_op = update_variables(optimizer, gradients, global_step, worker)
    if not worker.is_chief:  # only the chief updates the shared loss averages
        return update_op
    return tf.group(update_op, loss_averages_op, name="train")


def update_variables(optimizer, gradients, global_step, worker=ALONE):
    """Returns the operation that applies gradients, counts the step and updates the averages.

    `gradients` is a list of (gradient, variable); without a gradient, a variable keeps its value.
    Operations in the collection `tf.GraphKeys.UPDATE_OPS` run as well, for example those of batch
    normalization. For `global_step` and `worker`, see `train`.
    """
    gradients = updates.drop_missing(gradients)
    updates.summarize_gradients(optimizer, gradients)
    applied_gradients = worker.average_gradients(gradients, global_step)

    # On the CPU. In a cluster, on a parameter server: the variables do not cross the network again.
    with tf.device(global_step.device), tf.name_scope("update"):
        # Loss scaling may skip the update, but the step still counts.
        apply_gradient_op = optimizer.apply_gradients(applied_gradients)
        with tf.control_dependencies([apply_gradient_op]):
            count_op = tf.assign_add(global_step, 1)

        # Gradients are noisy, so the variables keep moving around a minimum. The average of recent
        # values is usually closer to it, so evaluation uses the averages.
        # At step n, the decay is at most (1 + n) / (10 + n).
        variable_averages = tf.train.ExponentialMovingAverage(
            FLAGS.moving_average_decay, global_step
        )
        with tf.control_dependencies([count_op]), conditionals_without_functions():
            variables_averages_op = variable_averages.apply(tf.trainable_variables())

    update_op = worker.synchronize(variables_averages_op)
    with tf.control_dependencies([update_op]):  # show the updated variables
        for _, variable in gradients:
            summaries.histogram(_tag(variable.op), variable)

    # The workers share the batch statistics, so only the chief updates them.
    batch_updates = updates.collect_updates(TOWER_NAME) if worker.is_chief else []
    return tf.group(update_op, *batch_updates)
