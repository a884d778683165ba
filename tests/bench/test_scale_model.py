"""The model of training on many GPUs: its sums, by hand, and where it says that limits lie."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import scale_model
from scale_model import Machine, Model, limits, plan

# 1 GB of weights in 10 blocks, a step of 0.9 s on one GPU
MODEL = Model(parameters=250_000_000, blocks=10, seconds=0.6, memory=20e9, images=2)
MACHINE = Machine(
    per_machine=8, nvlink=100.0, network=10.0, latency=0.0, disk=1.0, cores=4, slower=1.5
)


def test_one_gpu_sends_nothing():
    for parallel in ("ddp", "fsdp"):
        row = plan(MODEL, MACHINE, 1, parallel, 10.0)
        assert (row["sent MB a GPU"], row["not hidden ms"], row["efficiency %"]) == (0, 0, 100)
        assert row["step ms"] == pytest.approx(900)
        assert row["images/s"] == pytest.approx(2 / 0.9)
        assert row["loader cores a GPU"] == pytest.approx(0.2 / 0.9)
        assert row["memory GB"] == pytest.approx(20)
        assert row["checkpoint GB"] == pytest.approx(3)
        assert row["written in s"] == pytest.approx(3)


def test_an_all_reduce_hides_behind_backward_but_for_its_last_bucket():
    row = plan(MODEL, MACHINE, 8, "ddp", 10.0)
    assert row["sent MB a GPU"] == pytest.approx(2 * 7 / 8 * 1000)
    assert row["communication ms"] == pytest.approx(17.5)
    assert row["not hidden ms"] == pytest.approx(17.5 / 40)
    # between machines, 8 cards of 10 GB/s are slower than 100 GB/s
    row = plan(MODEL, MACHINE, 16, "ddp", 10.0)
    assert row["communication ms"] == pytest.approx(1e3 * 2 * 15 / 16 / 80)
    assert row["written in s"] == pytest.approx(1.5)
    # 2 s of it, of which 0.6 are backward's
    row = plan(MODEL, replace(MACHINE, nvlink=0.875), 8, "ddp", 10.0)
    assert row["communication ms"] == pytest.approx(2000)
    assert row["not hidden ms"] == pytest.approx(1400)
    assert row["efficiency %"] == pytest.approx(100 * 0.9 / 2.3)
    (said,) = limits(row, MACHINE)
    assert "communication is not hidden" in said


def test_latency_counts_by_hops():
    slow = replace(MACHINE, latency=1000.0)
    fast, late = (plan(MODEL, m, 8, "ddp", 10.0)["communication ms"] for m in (MACHINE, slow))
    assert late - fast == pytest.approx(2 * 40 * 3)


def test_parts_are_gathered_twice_and_scattered_once():
    row = plan(MODEL, MACHINE, 8, "fsdp", 10.0)
    assert row["sent MB a GPU"] == pytest.approx(3 * 7 / 8 * 1000)
    assert row["not hidden ms"] == pytest.approx(2 * 0.875)
    assert row["memory GB"] == pytest.approx(20 - 7 / 8 * 4)


def test_a_loader_that_is_too_slow_is_named():
    row = plan(MODEL, MACHINE, 1, "ddp", 0.5)
    (said,) = limits(row, MACHINE)
    assert said == "reading needs 4.4 cores a GPU of 4"


def test_the_table_has_all_columns_and_the_rate_is_a_measured_row():
    rows = [plan(MODEL, MACHINE, gpus, "ddp", 10.0) for gpus in (1, 512)]
    head, rule, *lines = scale_model.table(rows).split("\n")
    assert head.startswith("| GPUs | images a step | step ms |")
    assert {line.count("|") for line in (head, rule, *lines)} == {len(rows[0]) + 1}
    assert lines[1].startswith("| 512 | 1024 | ")
    rate, where = scale_model.images_a_second()
    assert 1 < rate < 10000
    assert where.count(",") == 1
