#!/bin/sh
# Trains the model on the synthetic dataset for a minute or two, and evaluates it:
#
#     sh examples/first_run.sh
#
# The checkpoints and the files for TensorBoard go to /tmp/synthetic. If you run the script again,
# training resumes from the last checkpoint, which has all 400 steps already.
set -e
cd "$(dirname "$0")/.."

python cifar10_train.py --synthetic_data --max_steps=400 --train_dir=/tmp/synthetic/train
python cifar10_eval.py --synthetic_data --num_examples=2000 --run_once \
    --checkpoint_dir=/tmp/synthetic/train --eval_dir=/tmp/synthetic/eval
