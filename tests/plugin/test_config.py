"""The fields of the plugin: defaults, environment, what is refused, and the sizes that follow from the world."""

import logging
import os

import pytest
from accelerate import Accelerator

from accel_tp_ddp import TensorParallelDDPPlugin

from ..helpers.ranks import run_on_ranks


@pytest.fixture
def environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PARALLELISM_CONFIG_", "ACCEL_TP_DDP_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_plugin_defaults_are_plain_ddp(environment):
    plugin = TensorParallelDDPPlugin()
    assert (plugin.tp_size, plugin.tp_plan, plugin.replica_check_steps) == (1, "auto", 100)
    assert (plugin.loss_parallel, plugin.sequence_parallel, plugin.zero1) == ("auto", False, False)
    assert (plugin.watch, plugin.peak_tflops) == (0, None)


def test_plugin_reads_what_the_launcher_sets(environment):
    environment.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    environment.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "3")
    environment.setenv("ACCEL_TP_DDP_PLAN", "plan.yaml")
    environment.setenv("ACCEL_TP_DDP_REPLICA_CHECK_STEPS", "7")
    environment.setenv("ACCEL_TP_DDP_ZERO1", "true")
    environment.setenv("ACCEL_TP_DDP_SEQUENCE_PARALLEL", "true")
    environment.setenv("ACCEL_TP_DDP_WATCH", "10")
    environment.setenv("ACCEL_TP_DDP_PEAK_TFLOPS", "989.4")
    plugin = TensorParallelDDPPlugin()
    assert plugin.sequence_parallel and not TensorParallelDDPPlugin(sequence_parallel=False).sequence_parallel
    assert plugin.zero1 and not TensorParallelDDPPlugin(zero1=False).zero1
    assert (plugin.tp_size, plugin.dp_replicate_size, plugin.tp_plan) == (2, 3, "plan.yaml")
    assert (plugin.replica_check_steps, plugin.watch, plugin.peak_tflops) == (7, 10, 989.4)


def test_arguments_beat_the_environment(environment):
    environment.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    environment.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "3")
    environment.setenv("ACCEL_TP_DDP_PLAN", "plan.yaml")
    environment.setenv("ACCEL_TP_DDP_REPLICA_CHECK_STEPS", "7")
    plugin = TensorParallelDDPPlugin(tp_size=4, dp_replicate_size=1, tp_plan={"a": "colwise"}, replica_check_steps=0)
    assert (plugin.tp_size, plugin.dp_replicate_size, plugin.tp_plan) == (4, 1, {"a": "colwise"})
    assert plugin.replica_check_steps == 0


def test_plugin_prints_its_sizes(environment, capsys):
    print(TensorParallelDDPPlugin(tp_size=2))
    print(TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=3, tp_plan={"up": "colwise"}))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=world size / tp_size, tp_plan='auto')"
    assert second == "TensorParallelDDPPlugin(tp_size=2, dp_replicate_size=3, tp_plan={'up': 'colwise'})"
    assert repr(TensorParallelDDPPlugin(tp_size=2)) == first == str(TensorParallelDDPPlugin(tp_size=2))


@pytest.mark.parametrize(
    "name, value",
    [("tp_size", 0), ("tp_size", "two"), ("tp_size", True), ("dp_replicate_size", 0), ("replica_check_steps", -1)]
    + [
        ("loss_parallel", "perhaps"),
        ("cp_size", 2),
        ("dp_shard_size", 2),
        ("loss_parallel", 1),
        ("zero1", "perhaps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(environment, name, value):
    with pytest.raises(ValueError, match=name):
        TensorParallelDDPPlugin(**{name: value})


def test_an_environment_value_out_of_range_names_its_variable(environment):
    environment.setenv("PARALLELISM_CONFIG_TP_SIZE", "many")
    with pytest.raises(ValueError, match="PARALLELISM_CONFIG_TP_SIZE"):
        TensorParallelDDPPlugin()


def sizes_in_accelerator(variables, options):
    os.environ.update(variables)
    config = TensorParallelDDPPlugin(**options)
    Accelerator(parallelism_config=config)
    return config.tp_size, config.dp_replicate_size, repr(config)


@pytest.mark.parametrize(
    "variables, options, sizes",
    [
        ({}, {"tp_size": 2}, (2, 2)),
        ({}, {"tp_size": 4}, (4, 1)),
        ({}, {"tp_size": 2, "dp_replicate_size": 2}, (2, 2)),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, (2, 2)),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {}, (2, 2)),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}, {"tp_size": 4}, (4, 1)),
        ({}, {}, (1, 4)),
    ],
    ids=str,
)
def test_replicas_follow_from_the_world_size(variables, options, sizes):
    for tp, dp, text in run_on_ranks(sizes_in_accelerator, 4, variables, options):
        assert (tp, dp) == sizes
        assert f"tp_size={tp}" in text and (f"dp_replicate_size={dp}" in text or "world size" in text)


@pytest.mark.parametrize("options", [{"tp_size": 3}, {"tp_size": 2, "dp_replicate_size": 3}], ids=str)
def test_sizes_that_do_not_fit_the_world_are_refused(options):
    for raised in run_on_ranks(sizes_in_accelerator, 4, {}, options, expect_raise=True):
        assert raised.type_name == "ValueError" and "tp_size" in raised.message and "4" in raised.message


def _warned(local):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("accel_tp_ddp.plugin.config")
    logger.addHandler(handler)
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    try:
        Accelerator(parallelism_config=TensorParallelDDPPlugin(tp_size=2))
    finally:
        logger.removeHandler(handler)
    return [record.getMessage() for record in records]


def test_a_replica_on_several_hosts_is_told_once():
    first, second = run_on_ranks(_warned, 2, 1)
    assert len(first) == 1 and "replicas lie on several hosts" in first[0] and second == []
    assert run_on_ranks(_warned, 2, 2) == [[], []]
