"""Every multi-task experiment from the command to its files, at a size of seconds."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from command_line import refuse
from experiment_reports import run_experiment, table_of
from tiny_multitask import PRESET, SAMPLES, add_sets
from tiny_runs import remembering

from csimodels.channels.transmission import add_noise, draw_uplink
from csimodels.evaluation import multitask_settings
from csimodels.evaluation.detection import lmmse
from csimodels.evaluation.experiments import EXPERIMENTS
from csimodels.evaluation.metrics import sum_rate
from csimodels.evaluation.multitask_runs import Conditions, MultiTaskRun, pooled_db, run_task
from csimodels.evaluation.multitask_scores import detection_scores
from csimodels.evaluation.multitask_settings import MULTI, SINGLE, Settings
from csimodels.evaluation.outcome import Context
from csimodels.evaluation.precoding import wmmse
from csimodels.evaluation.task_rows import run_tasks, select
from csimodels.models import multitask_baselines
from csimodels.models.channel_predictors import RecurrentConfig
from csimodels.models.detnet import DetNetConfig
from csimodels.models.precoding_cnn import PrecodingCnnConfig
from csimodels.training.multitask_data import NOISE_POWER, served

pytestmark = pytest.mark.usefixtures("small_models")
CONDITIONS = Conditions(
    speeds_kmh=(10, 100),
    snrs_db=(0, 20),
    other_set="other",
    detection_snrs_db=(0, 20),
    powers_dbw=(-10, 0),
    users=(2, 3),
    channel_snrs_db=(10,),
    few_users=2,
)
NETWORKS = {
    "gru": RecurrentConfig("gru", 4, 2, 5, layers=1, width=8),
    "cnn": PrecodingCnnConfig(8, 2, 3, maps=2),
    "detnet": DetNetConfig(8, 2, 3, layers=2, hidden=8, memory=4, weights="shared"),
}
PREDICT = ["last slot", "linear MMSE predictor", "GRU", SINGLE, MULTI]
PRECODE = ["ZF", "MMSE", "WMMSE", "CNN", SINGLE, MULTI]
DETECT = ["LMMSE", "DetNet", SINGLE, MULTI]


@pytest.fixture
def tiny(shared_folder, finished, monkeypatch):
    """Runs experiments at tiny settings; the runs that they asked for are in ``tiny.asked``."""
    add_sets(monkeypatch)
    run, asked = remembering(run_task, finished)
    monkeypatch.setattr(multitask_settings, "TASK_OF", {name: multitask_baselines.TASK_OF[name] for name in NETWORKS})
    monkeypatch.setattr("csimodels.training.multitask_presets.baseline_config", lambda name, preset: NETWORKS[name])

    def tiny_settings(context):
        return Settings(PRESET, PRESET, CONDITIONS, shared_folder / "checkpoints", run, repeats=1)

    tiny_settings.asked = asked
    monkeypatch.setattr(multitask_settings, "settings", tiny_settings)
    return tiny_settings


def channels(shared_folder):
    return SAMPLES.multiuser("test", shared_folder / "checkpoints" / "channels")


@pytest.mark.parametrize("name, header", [("fig5", ["10 km/h", "100 km/h"]), ("fig6", ["0 dB", "20 dB"])])
def test_prediction(tiny, tmp_path, shared_folder, name, header):
    _, report = run_experiment(f"multitask-{name}", tmp_path)
    found, table = table_of(report)
    assert found[1:] == header and list(table) == PREDICT
    # The last slot's error by itself.
    match = {"snr_db": 20} if name == "fig5" else {"snr_db": 0}
    h = [SAMPLES.prediction("test", shared_folder / "checkpoints" / "channels", speed_kmh=v) for v in (10, 100)]
    error = power = 0.0
    for one in h[:1] if name == "fig5" else h:
        heard = add_noise(one[:, :4], match["snr_db"], torch.Generator().manual_seed(7))
        error += (heard[:, 3:] - one[:, 4:]).abs().square().sum().item()
        power += one[:, 4:].abs().square().sum().item()
    assert float(table["last slot"][0]) == pytest.approx(10 * torch.tensor(error / power).log10().item(), abs=0.006)
    assert "Trainable parameters: GRU 0.00 M" in report
    assert float(table["last slot"][1 if name == "fig5" else 0]) > float(table["last slot"][0 if name == "fig5" else 1])


def test_fig13_is_scored_elsewhere(tiny, tmp_path):
    rows, report = run_experiment("multitask-fig13", tmp_path)
    _, table = table_of(report)
    chosen = select(rows, label="GRU", condition="predict", set="other", snr_db=20)
    assert list(table) == PREDICT and table["GRU"][1] == f"{pooled_db(chosen):.2f}"
    here = select(rows, label="GRU", condition="predict", set="tiny", snr_db=20)
    assert pooled_db(here) != pooled_db(chosen)


@pytest.mark.parametrize(
    "name, header", [("fig7", ["-10 dBW", "0 dBW"]), ("fig8", ["2 users", "3 users"]), ("fig12", ["10 dB"])]
)
def test_precoding(tiny, tmp_path, shared_folder, name, header):
    rows, report = run_experiment(f"multitask-{name}", tmp_path)
    found, table = table_of(report)
    assert found[1:] == header and list(table) == PRECODE
    if name == "fig12":
        clear = select(rows, label="WMMSE", condition="precode", users=2, power_dbw=0, channel_snr_db=None)[0]["rate"]
        assert float(table["WMMSE"][0]) < clear
        return
    h = served(channels(shared_folder), 3 if name == "fig8" else 2)
    power = 1.0  # 0 dBW
    expected = sum_rate(h, wmmse(h, power, NOISE_POWER), NOISE_POWER).mean().item()
    assert float(table["WMMSE"][1]) == pytest.approx(expected, abs=0.006)
    best = max(float(cells[1]) for cells in table.values())
    assert best <= float(table["WMMSE"][1]) + 0.05


@pytest.mark.parametrize("name, value", [("fig9", "nmse"), ("fig10", "ser")])
def test_detection(tiny, tmp_path, shared_folder, name, value):
    rows, report = run_experiment(f"multitask-{name}", tmp_path)
    header, table = table_of(report)
    assert header[1:] == ["0 dB", "20 dB"] and list(table) == DETECT
    for label in DETECT:
        row = select(rows, label=label, condition="detect", snr_db=20)[0]
        assert table[label][1] == f"{row[value]:.5f}"
    assert float(table["LMMSE"][1]) < float(table["LMMSE"][0])
    # LMMSE by itself: the shrunken estimate has the smaller error, the other makes the decisions.
    h, expected = channels(shared_folder), 0.0
    draws = torch.Generator().manual_seed(7)
    for number, k in enumerate((2, 3)):
        own = served(h[number::2], k)
        y, symbols, noise_power = draw_uplink(own, 2, 16, 0, draws)
        found = lmmse(own.unsqueeze(1), y, noise_power[:, None], unbiased=value == "ser")
        expected += detection_scores(found, symbols, 16)[value] / 2
    assert float(table["LMMSE"][0]) == pytest.approx(expected, abs=1e-5)


def test_fig11_compares_prompts(tiny, tmp_path):
    rows, report = run_experiment("multitask-fig11", tmp_path)
    header, table = table_of(report, "Validation loss")
    names = [MULTI, "multi-task, identifiers alone", SINGLE, "single-task, no prompt"]
    assert header[1:] == ["1", "2"] and list(table) == names
    prompts = {run.label: (run.training.config.prompt, run.tasks) for run in tiny.asked}
    assert prompts["multi-task, identifiers alone"][0] == "identifier"
    assert prompts["single-task, no prompt"] == ("none", ("detect",))
    last = select(rows, label=SINGLE, condition="epoch", epoch=2)[0]
    assert table[SINGLE][1] == f"{last['losses']['detect']:.4f}"
    _, scores = table_of(report, "Scores of the best weights")
    assert scores[SINGLE][0] == "-" and scores[MULTI][0] != "-"  # a network for one task has no score in the others


def test_table1_compares_starts(tiny, tmp_path):
    _, report = run_experiment("multitask-table1", tmp_path, figure=False)
    header, table = table_of(report)
    assert header[1:] == ["NMSE of prediction (dB)", "NMSE of detection", "sum rate (bit/s/Hz)"]
    names = ["full precision", "NF4, LoftQ's start", "NF4, plain start (QLoRA)"]
    assert list(table) == [*names, *(f"another: {name}" for name in names)]
    trainings = {run.label: run.training for run in tiny.asked if run.label in table}
    assert [chosen.adaptation.kind for chosen in trainings.values()] == ["lora", "loftq", "qlora"] * 2
    assert [chosen.config.backbone.layers for chosen in trainings.values()] == [1, 1, 1, 2, 2, 2]


def test_table2_counts_parameters(tiny, tmp_path):
    _, report = run_experiment("multitask-table2", tmp_path, figure=False)
    _, table = table_of(report)
    assert list(table) == ["one layer", "no backbone"]
    assert re.fullmatch(r"0\.0\d / 0\.0\d M", table["one layer"][3])


def test_a_quantised_backbone_counts_as_the_one_in_full_precision(tiny):
    from csimodels.evaluation.multitask_runs import parameters
    from csimodels.training.multitask_file import Adaptation

    counts = [parameters(PRESET.multitask(adaptation=Adaptation(kind, 2)).build()) for kind in ("lora", "qlora")]
    assert counts[0] == counts[1] and counts[0]["trainable"] < counts[0]["total"]


def test_table3_learns_from_a_tenth(tiny, tmp_path):
    rows, report = run_experiment("multitask-table3", tmp_path, figure=False)
    header, table = table_of(report)
    assert header[1:] == ["80 samples", "8 samples"] and list(table) == PREDICT
    assert {row["train_samples"] for row in rows} == {80, 8}


def test_costs(tiny, tmp_path):
    rows, report = run_experiment("multitask-costs", tmp_path, figure=False)
    by_label = {row["label"]: row for row in rows}
    full, lora, nf4 = (
        by_label[name] for name in ("float32, all weights trained", "float32 + LoRA", "NF4 + LoRA, float32")
    )
    assert lora["trainable_m"] == nf4["trainable_m"] < full["trainable_m"]
    # Both keep the same activations; weights are none of them.
    assert nf4["activations_mb"] == pytest.approx(lora["activations_mb"], rel=0.1)
    assert nf4["weights_mb"] < lora["weights_mb"] and lora["optimizer_mb"] < full["optimizer_mb"]
    assert all(row[name] > 0 for row in rows for name in ("step_ms", "inference_ms", "activations_mb"))
    assert len(table_of(report)[1]) == 5


def test_a_finished_experiment_trains_nothing_again(tiny, shared_folder, finished, monkeypatch):
    first = EXPERIMENTS["multitask-fig9"].run(Context("laptop", shared_folder))
    finished.clear()  # the rows are lost, the networks are not
    monkeypatch.setattr("csimodels.training.multitask.Trainer", None)
    again = EXPERIMENTS["multitask-fig9"].run(Context("laptop", shared_folder))
    assert again.rows == first.rows


def test_real_settings_run_in_processes(tmp_path, monkeypatch):
    add_sets(monkeypatch)
    chosen = multitask_settings.settings(Context("laptop", tmp_path, workers=1))
    assert chosen.conditions.users == (4, 5, 6, 7, 8) and chosen.costs.name == "paper"
    with pytest.raises(ValueError, match="channels: expected none for the multi-task experiments"):
        multitask_settings.settings(Context("laptop", tmp_path, channels=("x",)))
    small = dataclasses.replace(chosen.sizes.samples, train=8, validation=4, test=10)
    run = MultiTaskRun(
        "LMMSE", small, chosen.sizes.drawing, chosen.conditions, str(tmp_path / "checkpoints"), method="lmmse"
    )
    assert run_tasks(run_task, [run], tmp_path, workers=1) == run_task(run)


def test_runs_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="method: expected one of hold, linear, zf, .*, got 'x'"):
        MultiTaskRun("x", SAMPLES, PRESET.drawing, CONDITIONS, str(tmp_path), method="x")
    with pytest.raises(ValueError, match="training, method: expected one of them"):
        MultiTaskRun("x", SAMPLES, PRESET.drawing, CONDITIONS, str(tmp_path))
    assert "channels: expected none" in refuse("experiment", "multitask-fig5", "--channels", "x", "--out", tmp_path)
