"""The single trainer in this process; test_end_to_end.py runs it as its user does."""

import re

import pytest
from conftest import write_data_set

import cifar10
import cifar10_data
import cifar10_multi_gpu_train
import cifar10_session
import cifar10_train
from cifar10_runtime import session_config, tf

FLAGS = cifar10_train.FLAGS


def test_train_trains_as_the_flags_say_and_then_has_nothing_to_do(tmp_path, capsys):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.batch_size = 4
    FLAGS.max_steps = 5
    FLAGS.log_frequency = 2
    FLAGS.min_fraction_of_examples_in_queue = 0.001
    cifar10_train.train()
    output = capsys.readouterr()
    assert re.findall(r"step (\d+), loss = \d+\.\d\d ", output.out) == ["0", "2", "4"]
    assert tf.train.latest_checkpoint(FLAGS.train_dir).endswith("model.ckpt-5")
    cifar10_train.train()
    output = capsys.readouterr()
    assert output.out == ""
    assert "nothing to do" in output.err


@pytest.mark.parametrize(
    ("trainer", "batch", "examples_per_step"),
    [(cifar10_train, 4, 4), (cifar10_multi_gpu_train, 4, 12)],
    ids=["single", "multi"],
)
def test_the_flags_reach_the_training_loop(
    tmp_path, monkeypatch, trainer, batch, examples_per_step
):
    write_data_set(tmp_path / cifar10_data.EXTRACTED_FOLDER)
    FLAGS.data_dir = str(tmp_path)
    FLAGS.train_dir = str(tmp_path / "train")
    FLAGS.batch_size = batch
    FLAGS.num_gpus = 3
    FLAGS.max_steps = 17
    FLAGS.log_frequency = 3
    FLAGS.save_checkpoint_secs = 5
    FLAGS.save_checkpoint_steps = 6
    FLAGS.max_checkpoints_to_keep = 7
    FLAGS.log_device_placement = True
    FLAGS.use_fp16 = True
    calls = []
    monkeypatch.setattr(
        cifar10_session,
        "run_training",
        lambda train_op, loss, examples, **named: calls.append((examples, named)),
    )
    trainer.train()
    ((examples, named),) = calls
    assert examples == examples_per_step
    named.pop("check_input")()
    assert named.pop("config") == session_config(use_fp16=True, log_device_placement=True)
    assert named == {
        "train_dir": str(tmp_path / "train"),
        "max_steps": 17,
        "log_frequency": 3,
        "save_checkpoint_secs": 5,
        "save_checkpoint_steps": 6,
        "max_checkpoints_to_keep": 7,
    }


@pytest.mark.parametrize("use_fp16", [False, True])
def test_use_fp16_computes_in_16_bits_with_variables_in_32(use_fp16):
    with tf.Graph().as_default(), tf.Session(config=session_config(use_fp16)) as session:
        images = tf.random.stateless_normal([4, 24, 24, 3], seed=[1, 2])
        total_loss = cifar10.loss(cifar10.inference(images), tf.range(4))
        train_op = cifar10.train(total_loss, tf.train.get_or_create_global_step())
        session.run(tf.global_variables_initializer())
        metadata = tf.RunMetadata()
        options = tf.RunOptions(output_partition_graphs=True)
        session.run(train_op, options=options, run_metadata=metadata)
        convolutions = [
            tf.as_dtype(node.attr["T"].type)
            for graph in metadata.partition_graphs
            for node in graph.node
            if "Conv2D" in node.op
        ]
        assert len(convolutions) >= 5  # two forwards, two for the filters, one for the images
        narrow = {tf.bfloat16, tf.float16}
        assert all((dtype in narrow) == use_fp16 for dtype in convolutions)
        assert {variable.dtype for variable in tf.trainable_variables()} == {tf.float32}
