"""Adaptation tasks over processes: rows are kept as they come, finished tasks never run again."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_lasco import SAMPLES, adapt_config, save_random

from csimodels.evaluation import lasco_runs
from csimodels.evaluation.lasco_runs import AdaptTask, run_task, run_tasks
from csimodels.evaluation.task_rows import mean
from csimodels.models.channel_transformer import TransformerConfig
from csimodels.training import checkpoint_store
from csimodels.training.checkpoint_store import CheckpointStore
from csimodels.training.lasco_presets import SECOND_STAGE, PretrainData, pretrain_task

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def task(lasco_checkpoints) -> AdaptTask:
    return AdaptTask(
        str(lasco_checkpoints["base"]),
        str(lasco_checkpoints["reference"]),
        1201,
        adapt_config(),
        (("pretrained_lam", None), ("lasco", 0.5), ("e_lasco", None)),
        *SAMPLES,
    )


@pytest.fixture
def in_process(monkeypatch):
    """Tasks run in threads of this process, which start at once and see what a test has replaced."""

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, mp_context, initializer):
            super().__init__(workers)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)


def without_times(rows):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_a_row_says_what_was_run_and_what_came_out(task):
    rows = run_task(task)
    assert [(row["method"], row["set_alpha"]) for row in rows] == list(task.runs)
    lam, lasco, elastic = rows
    common = {"initial": "pinv", "environment": 1201, "los": False, "patches": 1, "codeword_length": 256, "tag": ""}
    assert all(row.items() >= {**common, "train_samples": 32}.items() for row in rows)
    assert lam["epochs"] is lam["alpha"] is None
    assert lasco["alpha"] == 0.5
    assert lasco["epochs"] == elastic["epochs"] == 1
    assert all(row["nmse_db"] < 5 and 0 < row["gcs"] <= 1 for row in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_two_processes_give_the_rows_of_one(task, tmp_path):
    tasks = [dataclasses.replace(task, environment=index) for index in (1202, 1201, 1203)]
    done = []
    one = run_tasks(tasks, tmp_path / "1", workers=1)
    two = run_tasks(tasks, tmp_path / "2", workers=2, on_done=lambda n, total, t: done.append((n, total)))
    assert without_times(one) == without_times(two)
    assert [row["environment"] for row in two[::3]] == [1202, 1201, 1203]  # the tasks' order, whoever ends first
    assert done == [(1, 3), (2, 3), (3, 3)]
    lines = [json.loads(line) for line in (tmp_path / "2" / "rows.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {task.key() for task in tasks}


def test_finished_tasks_are_not_run_again(task, tmp_path, in_process, monkeypatch):
    first = run_tasks([task], tmp_path, workers=1)
    ran, plain = [], lasco_runs.run_task
    monkeypatch.setattr(lasco_runs, "run_task", lambda t: ran.append(t.environment) or plain(t))
    other, done = dataclasses.replace(task, environment=1202), []
    rows = run_tasks([other, task], tmp_path, on_done=lambda n, total, t: done.append((n, total, t.environment)))
    assert ran == [1202]
    assert done == [(2, 2, 1202)]
    assert rows[3:] == first  # times included
    assert run_tasks([other, task], tmp_path) == rows
    assert ran == [1202]


def test_what_finished_before_an_error_is_kept_and_the_rest_is_not_started(task, tmp_path, in_process, monkeypatch):
    started, plain = [], lasco_runs.run_task
    monkeypatch.setattr(lasco_runs, "run_task", lambda t: started.append(t.environment) or plain(t))
    tasks = [dataclasses.replace(task, environment=index) for index in (1201, -7, *range(1202, 1230))]
    with pytest.raises(ValueError, match="index: expected at least 1, got -7"):
        run_tasks(tasks, tmp_path, workers=1)
    assert len(started) < 10
    assert started[:2] == [1201, -7]
    started.clear()
    run_tasks(tasks[:1], tmp_path, workers=1)
    assert started == []


def test_a_worker_s_error_reaches_the_caller(task, tmp_path):
    with pytest.raises(ValueError, match="index: expected at least 1, got -7"):
        run_tasks([dataclasses.replace(task, environment=-7)], tmp_path, workers=1)


def test_rows_of_an_experiment_beside_this_one_stay(task, tmp_path, in_process, monkeypatch):
    plain = lasco_runs.run_task

    def beside(t):
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"key": "of another", "rows": [{"method": "lmmse"}]}) + "\n")
        return plain(t)

    monkeypatch.setattr(lasco_runs, "run_task", beside)
    run_tasks([task], tmp_path, workers=1)
    keys = [json.loads(line)["key"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert keys == ["of another", task.key()]


@pytest.mark.parametrize(
    "damage", [b'{"key": "a", "ro', b"[1, 2]", b'{"key": "a"}', b"\xff\xfe\x00", b"null"], ids=repr
)
def test_a_damaged_row_file_is_named_with_its_line(task, tmp_path, damage):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"key": "k", "rows": []}).encode()
    path.write_bytes(good + b"\n" + damage + b"\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not a row record .*remove it to start anew"):
        run_tasks([task], tmp_path, workers=1)
    assert path.read_bytes() == good + b"\n" + damage + b"\n"


def test_the_key_is_the_checkpoints_content_not_their_place(task, tmp_path):
    copy = shutil.copy(task.base, tmp_path / "copy.safetensors")
    assert dataclasses.replace(task, base=copy).key() == task.key()
    other = save_random(tmp_path / "other.safetensors")
    assert dataclasses.replace(task, reference=str(other)).key() != task.key()
    before = task.key()
    changed = dataclasses.replace(task, base=copy)
    save_random(copy, seed=4)
    assert changed.key() != before


@pytest.mark.parametrize(
    "change",
    [
        {"environment": 1202},
        {"adapt": adapt_config(epochs=2)},
        {"adapt": adapt_config(initial="lmmse")},
        {"runs": (("lasco", 0.6),)},
        {"train": 33},
        {"validation": 9},
        {"test": 17},
        {"cell_seed": 1},
        {"patches": 4},
        {"tag": "2 x 64"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_all_that_determines_the_outcome(task, change):
    assert dataclasses.replace(task, **change).key() != task.key()


def test_mean_of_matching_rows_and_none():
    rows = [{"m": "a", "v": 1.0}, {"m": "a", "v": 4.0}, {"m": "b", "v": 9.0}]
    assert mean(rows, "v", m="a") == 2.5
    with pytest.raises(ValueError, match="rows: expected at least one with {'m': 'c'}, got none"):
        mean(rows, "v", m="c")


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, Any, bool]]:
    """Pre-training is noted (folder, task, whether on the other environments) and writes a small model."""
    calls = []

    def data(preset: str, *, continued: bool) -> PretrainData:
        return PretrainData(None, None, {"continued": continued})

    def pretrain(task, data, validation, run_dir, *, data_description, **others):
        calls.append((run_dir, task, data_description["continued"]))
        save_random(run_dir / "model.safetensors", codeword_length=task.codec.codeword_length)

    monkeypatch.setattr(checkpoint_store, "pretrain", pretrain)
    monkeypatch.setattr(checkpoint_store, "pretrain_data", data)
    return calls


def test_the_laptop_preset_uses_the_shipped_pair_and_trains_nothing_for_it(trained, shipped, tmp_path):
    store = CheckpointStore(tmp_path, "laptop")
    assert store("base", 256) == str(shipped["base"])
    assert store("reference", 256, 2, 64) == str(shipped["reference"])
    assert trained == []


def test_other_codeword_lengths_start_from_the_shipped_model_and_are_trained_once(trained, shipped, tmp_path):
    started = []
    store = CheckpointStore(tmp_path, "laptop", on_start=started.append)
    path = store("base", 128)
    assert CheckpointStore(tmp_path, "laptop")("base", 128) == path
    ((folder, task, continued),) = trained
    assert path == str(folder / "model.safetensors")
    assert task.initial_checkpoint == str(shipped["base"])
    assert task.codec.codeword_length == 128
    assert task.train.epochs < pretrain_task("base", "laptop", 128).train.epochs
    assert continued
    assert started == [f"pre-training {folder.name} (laptop preset)"]


def test_models_made_from_another_shipped_one_are_not_used(trained, shipped, monkeypatch, tmp_path):
    store = CheckpointStore(tmp_path, "laptop")
    before = store("base", 128)
    other = save_random(tmp_path / "newer.safetensors", seed=9)
    monkeypatch.setattr(checkpoint_store, "shipped_checkpoint", lambda model: other)
    assert store("base", 128) != before
    assert len(trained) == 2


def test_other_sizes_train_in_two_stages_as_the_shipped_models_did(trained, shipped, tmp_path):
    path = CheckpointStore(tmp_path, "laptop")("reference", 256, 4, 64)
    (first, one, fresh), (second, two, continued) = trained
    assert (fresh, continued) == (False, True)
    assert one.initial_checkpoint is None
    assert two.initial_checkpoint == str(first / "model.safetensors")
    assert one.architecture == two.architecture == TransformerConfig.sam(4, 64)
    assert (two.train.epochs, two.train.learning_rate) == (SECOND_STAGE["epochs"], SECOND_STAGE["learning_rate"])
    assert path == str(second / "model.safetensors")


def test_the_paper_preset_trains_from_scratch_at_the_papers_size(trained, shipped, tmp_path):
    CheckpointStore(tmp_path, "paper")("base", 150)
    ((_, task, continued),) = trained
    assert (task.initial_checkpoint, continued, task.train.epochs) == (None, False, 500)
    assert task.architecture == TransformerConfig.lam_paper()


def test_a_killed_second_stage_does_not_repeat_the_first(trained, shipped, tmp_path):
    store = CheckpointStore(tmp_path, "laptop")
    path = Path(store("reference", 256, 4, 64))
    path.unlink()
    store("reference", 256, 4, 64)
    assert [folder.name for folder, *_ in trained[2:]] == [path.parent.name]
