"""The benchmarks run and print their tables. The only speed tested has a wide margin."""

import re

import pytest
from conftest import run_script

ROW = r"\| [^|]+ \| \d+\.\d\d \| \d+\.\d\d to \d+\.\d\d \|"
SMALL_QUEUE = "--min_fraction_of_examples_in_queue=0.004"  # 200 images


@pytest.mark.slow
def test_the_comparison_with_the_baseline_prints_all_rows():
    process = run_script(
        "benchmarks/compare.py", "--turns=1", "--process_turns=1", "--steps=1", SMALL_QUEUE
    )
    first, _, _, _, *lines = process.stdout.splitlines()
    assert "TensorFlow 2.21" in first
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 8
    for row in rows:
        assert re.fullmatch(rf"{ROW} [^|]+ \| [^|]+ \|", row)
    assert lines[-1].startswith("Throughput in images per second: baseline ")
    assert "Traceback" not in process.stderr  # a warning that 16 bits are slow is allowed


@pytest.mark.slow
def test_keras_trains_the_same_network_in_turns_with_the_others():
    process = run_script(
        "benchmarks/keras_training.py",
        "--turns=1",
        "--steps=1",
        SMALL_QUEUE,
        "--policy=mixed_bfloat16",
    )
    first, _, _, _, own, keras = process.stdout.splitlines()
    assert "Keras 3" in first
    assert re.fullmatch(ROW, own)
    assert re.fullmatch(ROW, keras)
    assert "mixed_bfloat16" in keras


@pytest.mark.slow
def test_losses_are_compared_over_several_seeds(synthetic_data_dir):
    process = run_script(
        "benchmarks/compare_losses.py",
        "--synthetic_data",
        f"--data_dir={synthetic_data_dir}",
        "--seeds=2",
        "--steps=1",
        "--batch_size=32",
    )
    _, _, *rows = process.stdout.splitlines()[-4:]
    for name, row in zip(["baseline", "fast"], rows, strict=True):
        mean, deviation, each = re.fullmatch(rf"\| {name} \| (.*) \| (.*) \| (.*) \|", row).groups()
        losses = [float(loss) for loss in each.split(", ")]
        assert len(losses) == 2
        # Before the first update: ln(10) plus 2.37 of weight decay.
        assert losses == pytest.approx([4.67] * 2, abs=0.2)
        assert float(mean) == pytest.approx(sum(losses) / 2, abs=2e-3)
        assert float(deviation) == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5, abs=2e-3)


@pytest.mark.slow
def test_a_step_with_local_top_layers_takes_at_most_50_percent_longer():
    process = run_script("benchmarks/compare_top_layers.py", "--turns=7", "--steps=3")
    assert "--top_layers=full: 1,068,298 parameters" in process.stdout
    assert "--top_layers=local: 1,116,490 parameters" in process.stdout
    *_, row = process.stdout.splitlines()
    assert re.fullmatch(rf"{ROW} 1.5 \|", row)
    assert 0.5 < float(row.split("|")[2]) <= 1.5


@pytest.mark.slow
def test_clusters_are_compared_with_towers_for_the_given_numbers_of_workers():
    process = run_script(
        "benchmarks/cluster.py", "--workers=2", "--cluster_turns=1", "--cluster_steps=40"
    )
    first, _, _, _, row = process.stdout.splitlines()
    assert first.endswith("median of 1 turns")
    workers, towers_speed, speed, ratio, megabytes, needed = re.fullmatch(
        r"\| (\d) \| (\d+) \| (\d+) \| (\S+) \(\S+ to \S+\) \| (\S+) \| (\S+) \|", row
    ).groups()
    assert workers == "2"
    assert float(ratio) == pytest.approx(int(speed) / int(towers_speed), abs=0.02)
    # Two workers send gradients and fetch variables, 4 bytes for each of 1,068,298 parameters.
    assert float(needed) == pytest.approx(2 * 2 * 4 * 1.068298, abs=0.01)
    assert float(megabytes) == pytest.approx(float(needed), rel=0.1)
