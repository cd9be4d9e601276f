"""Every LLMCsiNet experiment from the command to its files, at a size of seconds."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from command_line import succeed
from experiment_reports import run_experiment, table
from tiny_runs import remembering

from csimodels.evaluation import llmcsinet_runs, llmcsinet_settings
from csimodels.evaluation.llmcsinet_runs import fit_quantizer, reconstruct, run_task, score, zf_rate
from csimodels.evaluation.llmcsinet_settings import Settings
from csimodels.evaluation.outcome import Context
from csimodels.evaluation.task_rows import mean, run_tasks, select
from csimodels.models.baselines import BASELINES
from csimodels.training.feedback_file import load_feedback
from csimodels.training.llmcsinet_presets import FROZEN, feedback_preset

pytestmark = pytest.mark.usefixtures("small_models")
SIZES = dataclasses.replace(
    feedback_preset("laptop"),
    samples=(16, 8, 8),
    epochs=1,
    batch_size=8,
    transfer=(8,),
    transfer_epochs=1,
    compressions=(8, 64),
    variants=("S",),
)
CLASSICAL = ["Largest elements", "Principal components"]
NETWORKS = ["CRNet", "IdasNet", "LLMCsiNet-S"]
METHODS = CLASSICAL + NETWORKS


@pytest.fixture
def tiny(shared_folder, finished, monkeypatch):
    """Runs experiments at tiny settings; the tasks that they asked for are in ``tiny.tasks``."""
    run, asked = remembering(run_task, finished)

    def settings(context):
        return Settings(
            SIZES,
            baselines=("crnet", "idasnet"),
            few=("crnet", "idasnet"),
            classical=("largest", "pca"),
            folder=shared_folder / "checkpoints",
            run=run,
            snrs_db=(0, 20),
            rate_snrs_db=(0, 20),
            costs=SIZES,
            repeats=2,
        )

    settings.tasks = asked
    monkeypatch.setattr(llmcsinet_settings, "settings", settings)
    return settings


def test_list_names_every_figure_and_table():
    out = succeed("experiment", "--list")
    for number in range(5, 13):
        assert re.search(rf"llmcsinet-fig{number}\b.*LLMCsiNet Fig. {number}: ", out)
    for number, numeral in ((2, "II"), (3, "III"), (4, "IV"), (5, "V"), (6, "VI")):
        assert re.search(rf"llmcsinet-table{number}\b.*LLMCsiNet Table {numeral}: ", out)
    assert "lasco-fig6" in out


def test_fig5_compares_all_methods_on_all_channels_at_all_ratios(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig5", shared_folder)
    cells = table(report)
    assert cells["method"] == [f"{channels}, 1/{ratio}" for channels in SIZES.channels for ratio in (8, 64)]
    assert list(cells)[1:] == [*METHODS, "LLMCsiNet-S, largest of image"]
    for label in list(cells)[1:]:
        expected = [
            mean(rows, "nmse_db", label=label, channels=channels, compression=ratio)
            for channels in SIZES.channels
            for ratio in (8, 64)
        ]
        assert cells[label] == [f"{value:.3f}" for value in expected]
    (ranked,) = {task.training.config.selection for task in tiny.tasks if task.label == "LLMCsiNet-S, largest of image"}
    assert ranked == "image"
    sizes = table(report, 1)
    assert sizes["CRNet"][:2] == ["1024", "128"]  # float32 values of 2048/8 and 2048/64
    assert sizes["IdasNet"][:2] == sizes["LLMCsiNet-S"][:2]
    assert re.search(r"delay rows keep: outdoor_nlos 9\d\.\d%, indoor_los 9\d\.\d%", report)


def test_table3_shows_the_sgcs_of_the_same_networks(tiny, shared_folder):
    run_experiment("llmcsinet-fig5", shared_folder)
    asked = [task.key() for task in tiny.tasks]
    tiny.tasks.clear()
    rows, report = run_experiment("llmcsinet-table3", shared_folder, figure=False)
    assert [task.key() for task in tiny.tasks] == asked
    row = select(rows, label="IdasNet", channels="indoor_los", compression=64)[0]
    assert table(report)["IdasNet"][3] == f"{row['sgcs']:.3f}"


def test_fig6_measures_both_ends(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig6", shared_folder)
    assert [row["label"] for row in rows] == NETWORKS
    assert all(0 < row["ue_low_ms"] <= row["ue_ms"] <= row["ue_high_ms"] for row in rows)
    assert table(report)["CRNet"][1].startswith(f"{rows[0]['bs_ms']:.2f} (")


def test_fig7_scores_noisy_csi_against_the_channel(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig7", shared_folder)
    for label in METHODS:
        expected = [mean(rows, "nmse_db", label=label, condition="noisy", snr_db=snr) for snr in (0, 20)]
        clean = mean(rows, "nmse_db", label=label, condition="clean")
        assert table(report)[label] == [f"{value:.2f}" for value in (*expected, clean)]
        assert expected[0] != expected[1]


def test_fig8_one_network_serves_all_ratios(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig8", shared_folder)
    mixed = [task for task in tiny.tasks if task.label.endswith("-MC")]
    assert [task.training.lengths for task in mixed] == [(221, 28)]
    chosen = select(rows, label="LLMCsiNet-S-MC")
    assert [row["compression"] for row in chosen] == [8, 64]
    assert [row["report_bytes"] for row in chosen] == [
        row["report_bytes"] for ratio in (8, 64) for row in select(rows, label="IdasNet", compression=ratio)
    ]
    assert set(table(report)) == {"method", "LLMCsiNet-S-MC", *METHODS}


def test_fig9_trains_on_both_and_tests_on_each(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig9", shared_folder)
    assert {task.channels.mixed for task in tiny.tasks} == {True}
    assert {task.channels.speed_kmh for task in tiny.tasks} == {30}
    cells = table(report)
    assert set(cells) == {"method and test", *(f"{label}, {t}" for label in METHODS for t in ("still", "30 km/h"))}
    row = select(rows, label="CRNet", condition="other", compression=64)[0]
    assert cells["CRNet, still"][1] == f"{row['nmse_db']:.2f}"
    assert row["test_speed_kmh"] == 0


def test_fig10_leaves_out_one_module_at_a_time(tiny, shared_folder):
    _, report = run_experiment("llmcsinet-fig10", shared_folder)
    configs = {task.label: task.training.config for task in tiny.tasks}
    assert configs["without f_EN (random mask)"].mask == "random"
    assert not configs["without f_PD"].preliminary
    assert not configs["without f_TP"].prediction
    parts = {task.label: [stage.part for stage in task.training.stages] for task in tiny.tasks}
    assert parts["without f_PD"] == ["whole"]
    assert parts["without f_TP"] == ["preliminary"]
    assert configs["without f_EN (mask by magnitude)"].mask == "magnitude"
    assert len(table(report)) == 6
    pretrained = [config.backbone for label, config in configs.items() if label.endswith("pre-trained")]
    random = [config.backbone for label, config in configs.items() if label.endswith("random")]
    assert [dataclasses.replace(backbone, source=None) for backbone in pretrained] == random


def test_fig11_goes_on_from_the_other_set_s_network(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig11", shared_folder)
    transfers = [task for task in tiny.tasks if task.start]
    assert {task.label for task in transfers} == set(NETWORKS)
    assert {(task.start, task.channels.name, task.channels.train) for task in transfers} == {
        ("outdoor_nlos", "indoor_los", 8),
        ("indoor_los", "outdoor_nlos", 8),
    }
    for task in transfers:
        _, metadata = load_feedback(task.training.initial)
        assert metadata["fingerprint"]["data"]["name"] == task.start
        assert task.training.stages[0].train.initial_candidate
    row = select(rows, label="IdasNet", start="indoor_los")[0]
    assert table(report, 2)["IdasNet"] == [f"{row['nmse_db']:.2f}"]


def test_fig12_is_bounded_by_perfect_csi(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-fig12", shared_folder)
    cells = {label: [float(value) for value in values] for label, values in list(table(report).items())[1:]}
    assert set(cells) == {"perfect CSI", *METHODS}
    assert cells["perfect CSI"][0] < cells["perfect CSI"][1]
    assert all(
        value <= best for label in METHODS for value, best in zip(cells[label], cells["perfect CSI"], strict=True)
    )
    assert all(row["rate"] is not None for row in select(rows, condition="rate"))


def test_table2_counts_bits_as_the_paper_and_bytes_as_they_are(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-table2", shared_folder, figure=False)
    assert [row["llmcsinet_bits"] for row in rows] == [16418, 8278, 4208, 2136]
    assert [row["crnet_bits"] for row in rows] == [16384, 8192, 4096, 2048]
    # 28 bytes of header, 221 values of 4 bytes, 221 * 11 bits, 4 bytes of checksum.
    assert rows[0]["report_bytes"] == 28 + 884 + 304 + 4
    assert rows[0]["report_bytes_codes"] == 28 + 166 + 304 + 4
    assert table(report)["8"][:4] == ["256", "16384", "221", "16418"]


def test_tables_4_and_5_count_both_ends(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-table4", shared_folder, figure=False)
    network = BASELINES["crnet"](1 / 64)
    expected = f"{network.ue_parameters():,} / {network.bs_parameters():,}"
    assert table(report)["CRNet"][1] == expected
    rows, report = run_experiment("llmcsinet-table5", shared_folder, figure=False)
    convolutions = 2 * 32 * 32 * 9 * (2 * 64 + 64 * 2)
    assert select(rows, label="LLMCsiNet-S")[0]["ue"] == convolutions
    assert table(report)["LLMCsiNet-S"][0].startswith(f"{convolutions:,} / ")


def test_table6_quantises_what_was_trained_without(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-table6", shared_folder, figure=False)
    for label in METHODS:
        clean, codes = (mean(rows, "nmse_db", label=label, condition=name) for name in ("clean", "codes"))
        if label in CLASSICAL:
            assert clean < codes < 0  # elements as they are leave an error small enough for the codes' to show
        else:
            assert 0 < abs(codes - clean) < 1
    assert table(report, 2)["CRNet"] == ["1024 / 196", "128 / 28"]


def test_real_bytes_come_from_the_rows_of_table_6_and_more_of_the_classical_methods(tiny, shared_folder):
    rows, report = run_experiment("llmcsinet-bytes", shared_folder)
    assert {row["compression"] for row in select(rows, label="CRNet")} == {8, 64}
    assert {row["compression"] for row in select(rows, label="Largest elements")} == {8, 16, 32, 64}
    for number, (channels, condition) in enumerate(itertools.product(SIZES.channels, ("clean", "codes"))):
        cells = table(report, number)
        for label in METHODS:
            chosen = select(rows, label=label, channels=channels, condition=condition)
            expected = sorted((row["report_bytes"], row["nmse_db"]) for row in chosen)
            assert cells[label] == [", ".join(f"{size}: {nmse:.2f}" for size, nmse in expected)]


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_a_task_s_key_holds_what_determines_it_and_its_folder_does_not(tiny, shared_folder):
    s = tiny(None)
    task = s.variant("S", "outdoor_nlos", 8)
    assert dataclasses.replace(task, folder="elsewhere").key() == task.key()
    changes = [
        {"training": task.training.seeded(1)},
        {"channels": dataclasses.replace(task.channels, train=17)},
        {"snrs_db": (3.0,)},
        {"codes": True},
        {"label": "other"},
    ]
    keys = {dataclasses.replace(task, **change).key() for change in changes}
    assert len(keys | {task.key()}) == len(changes) + 1
    # Conditions do not ask for another training.
    assert dataclasses.replace(task, codes=True, label="other").checkpoint() == task.checkpoint()


def test_tasks_run_in_processes_and_are_kept(tiny, shared_folder):
    s = tiny(None)
    task = s.baseline("idasnet", "outdoor_nlos", 8)
    first = run_tasks(llmcsinet_runs.run_task, [task], shared_folder / "rows", workers=1)
    assert run_tasks(llmcsinet_runs.run_task, [task], shared_folder / "rows", workers=1) == first
    assert first[0]["label"] == "IdasNet"


def test_reconstruction_and_quantiser_work_for_values_alone_and_with_positions():
    torch.manual_seed(0)
    h = torch.randn(6, 2, 32, 32)
    for name in ("crnet", "idasnet"):
        network = BASELINES[name](1 / 8).eval()
        with torch.inference_mode():
            expected = network(h)
        torch.testing.assert_close(reconstruct(network, h), expected)
        coarse, fine = (reconstruct(network, h, quantizer=fit_quantizer(network, h, bits)) for bits in (1, 8))
        assert score(expected, fine)["nmse_db"] < score(expected, coarse)["nmse_db"] < 0


def test_zero_forcing_on_the_truth_sees_no_interference():
    h = torch.randn(8, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    low, high = zf_rate(h, h, 0), zf_rate(h, h, 30)
    assert high - low == pytest.approx(30 / 10 * 3.3219, abs=1.0)  # 3.32 bit per 10 dB, once noise is small
    assert zf_rate(h, torch.randn_like(h), 30) < 2


def test_presets_follow_the_paper(tmp_path):
    paper = feedback_preset("paper")
    assert (paper.samples, paper.epochs, paper.patience) == ((20_000, 10_000, 10_000), 300, 20)
    task = paper.llmcsinet("L", 8, "indoor_los")
    assert [stage.part for stage in task.stages] == ["preliminary", "whole"]
    assert [stage.frozen for stage in task.stages] == [False, FROZEN["indoor_los"]]
    assert task.stages[0].train.learning_rate == 2e-3
    assert task.stages[0].train.weight_decay == 0
    assert (task.config.backbone.layers, task.config.backbone.width) == (6, 1280)
    assert task.config.codeword_values == 221
    assert paper.baseline("crnet", 8).stages[0].train.epochs == 600
    settings = llmcsinet_settings.settings(Context("laptop", tmp_path))
    assert settings.baselines == ("crnet", "idasnet", "transindecnet", "gcrnet")
    with pytest.raises(ValueError, match="preset: expected one of laptop, paper, got 'desktop'"):
        llmcsinet_settings.settings(Context("desktop", tmp_path))
