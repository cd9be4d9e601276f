"""Two processes on the CPU (gloo over loopback) train as one does: same loss curve, same weights, one decision."""

import json
import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_training import MODEL, log_without_times, losses, run, saved_state, train, weights

from csimodels.files import load_tensors

SIZES = (16, 17)  # shares of 8 and 8, and of 9 and 8 samples


def two(*arguments) -> tuple[int, str]:
    """Run the tiny training in two processes under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2")
    address = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return run(*arguments, prefix=(*launcher, *address))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Batch size -> folder and output of a one-process run."""
    folder = tmp_path_factory.mktemp("one")
    status, output = run(folder, "--batch-size", *SIZES)
    assert status == 0, output
    return {size: (folder / str(size), part) for size, part in zip(SIZES, parts(output), strict=True)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """As :func:`one_process`, and under 0 the folder of what the processes say about themselves."""
    folder = tmp_path_factory.mktemp("two")
    status, output = two(folder, "--compare-processes", "--batch-size", *SIZES)
    assert status == 0, output
    return {size: (folder / str(size), part) for size, part in zip(SIZES, parts(output), strict=True)} | {0: folder}


def parts(output: str) -> list[str]:
    """The output, cut at each run's first line."""
    return output.split("batch ")[1:]


def assert_same_curve(actual: dict[int, float], expected: dict[int, float]) -> None:
    assert list(actual) == list(expected)
    assert list(actual.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        kept = slice(None)
        if name.endswith("in_proj_bias"):
            # The keys' bias shifts all of a query's scores alike, which softmax ignores: its gradient is rounding
            # error, and AdamW makes steps of full size from it.
            kept = [*range(MODEL.width), *range(2 * MODEL.width, 3 * MODEL.width)]
        torch.testing.assert_close(
            actual[name][kept], tensor[kept], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("size", SIZES)
def test_same_loss_curve_and_weights(one_process, two_processes, size):
    one_dir, one_output = one_process[size]
    two_dir, two_output = two_processes[size]
    assert one_output.startswith(f"{size} processes 1\n")
    assert two_output.startswith(f"{size} processes 2\n")
    assert_same_curve(losses(two_output), losses(one_output))
    assert_same_weights(weights(two_dir), weights(one_dir))
    one_log, two_log = log_without_times(one_dir), log_without_times(two_dir)
    assert two_log["validation_nmse_db"] == pytest.approx(one_log["validation_nmse_db"], abs=1e-4)
    assert (two_log["steps"], two_log["best_epoch"]) == (one_log["steps"], one_log["best_epoch"])


def test_the_main_process_decides_for_all(two_processes):
    reports = [json.loads((two_processes[0] / f"disagree{rank}.json").read_text()) for rank in (0, 1)]
    assert reports == [{"epochs": 5, "best": 0.25, "processes": 2}] * 2
    first, second = (load_tensors(two_processes[0] / f"disagree{rank}.safetensors")[0] for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_smaller_than_the_processes_is_refused(two_processes):
    for rank in (0, 1):
        message = (two_processes[0] / f"refused{rank}.txt").read_text()
        assert message == "batch_size: expected at least one sample for each of 2 processes, got 1"


def test_one_process_s_state_continues_in_two(one_process, tmp_path):
    one_dir, one_output = one_process[16]

    def stop(step: int, total: int, loss: float) -> None:
        if step == 22:
            raise KeyboardInterrupt

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step=stop)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert saved_state(tmp_path)["step"] == 20
    status, output = two(tmp_path, "--compare-processes")
    assert status == 0, output
    expected = {step: loss for step, loss in losses(one_output).items() if step > 20}
    assert_same_curve(losses(output), expected)
    assert_same_weights(weights(tmp_path), weights(one_dir))
