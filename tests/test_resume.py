"""A training process that is killed, or whose disk is full, goes on where it was and ends with the same bits."""

import os
import signal

import pytest
import torch
from tiny_training import log_without_times, losses, names, run, saved_state, start, weights


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder and output of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    status, output = run(run_dir)
    assert status == 0, output
    assert list(losses(output)) == list(range(1, 46))
    return run_dir, losses(output)


def kill_at(run_dir, step: int) -> None:
    """Start a run, kill it with SIGKILL when it has done ``step`` steps."""
    process = start(run_dir, "--hold", step)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "holding\n":
            break
    else:
        raise AssertionError("".join(lines))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    process.stdin.close()


def assert_same_end(run_dir, unbroken) -> None:
    expected = weights(unbroken)
    actual = weights(run_dir)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert log_without_times(run_dir) == log_without_times(unbroken)


def test_kill_in_mid_epoch_and_resume(tmp_path, unbroken):
    unbroken_dir, unbroken_losses = unbroken
    kill_at(tmp_path, 3)  # before the first state: the next start is from nothing
    assert not (tmp_path / "state.safetensors").exists()

    kill_at(tmp_path, 22)
    # The second epoch's seventh step was under way; the last state is two steps older, itself in mid-epoch.
    state = saved_state(tmp_path)
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (20, 1, 5)
    assert not (tmp_path / "model.safetensors").exists()

    status, output = run(tmp_path)
    assert status == 0, output
    assert losses(output) == {step: loss for step, loss in unbroken_losses.items() if step > 20}
    assert_same_end(tmp_path, unbroken_dir)


def test_full_disk_stops_the_run_and_loses_nothing(tmp_path, unbroken):
    unbroken_dir, _ = unbroken
    status, output = run(tmp_path, "--full-disk", 22)
    assert status == 1
    assert "OSError" in output and "state.safetensors: cannot be written" in output
    assert list(losses(output))[-1] == 24  # where the next state was due
    assert saved_state(tmp_path)["step"] == 20
    assert names(tmp_path) == ["state.safetensors"]
    status, output = run(tmp_path)
    assert status == 0, output
    assert next(iter(losses(output))) == 21
    assert_same_end(tmp_path, unbroken_dir)
