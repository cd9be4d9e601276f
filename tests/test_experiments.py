"""Every LASCO experiment from the command to its files, at a size of seconds."""

from __future__ import annotations

import dataclasses
import re

import pytest
from experiment_reports import check_figure, run_experiment, table
from tiny_lasco import adapt_config, save_random
from tiny_runs import remembering
from typer.testing import CliRunner

from csimodels.commands import app
from csimodels.evaluation import lasco_experiments
from csimodels.evaluation.lasco_experiments import EXPERIMENTS, SAM_SIZES, Settings
from csimodels.evaluation.lasco_runs import pooled_nmse_db, run_task
from csimodels.evaluation.task_rows import mean
from csimodels.models.channel_transformer import TransformerConfig
from csimodels.models.lasco import ADAPTED_METHODS, LABELS, METHODS

ENVIRONMENTS, LENGTHS = (1101, 1102), (16, 32)
pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Stands for the checkpoint store: random models of every length and size."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(model: str, codeword_length: int, layers: int, width: int) -> str:
        name = f"{model}-{codeword_length}-{layers}-{width}"
        if name not in made:
            architecture = TransformerConfig.sam(layers, 16 if (layers, width) == (2, 64) else width)
            made[name] = str(save_random(folder / name, architecture, codeword_length, seed=len(made)))
        return made[name]

    return get


@pytest.fixture
def tiny(checkpoint, finished, monkeypatch):
    """Runs ``csimodels experiment NAME`` at tiny settings; the tasks that it asked for are in ``tiny.tasks``."""
    run, asked = remembering(run_task, finished)

    def settings(preset, store, out, *, workers, on_done):
        return Settings(
            preset,
            environments=ENVIRONMENTS,
            codeword_lengths=LENGTHS,
            train=16,
            validation=2,
            test=12,
            sample_counts=(16, 32),
            alphas=(0.2, 0.7, 1.5),
            adapt=adapt_config(),
            checkpoint=checkpoint,
            run=run,
        )

    settings.tasks = asked
    monkeypatch.setattr(lasco_experiments, "settings", settings)
    return settings


def test_list_names_every_experiment_with_its_figure():
    result = CliRunner().invoke(app, ["experiment", "--list"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for number in range(6, 11):
        assert re.search(rf"lasco-fig{number}\b.*LASCO Fig. {number}: ", result.output)
    assert all(name in result.output for name in EXPERIMENTS)
    assert {f"lasco-fig{number}" for number in range(6, 11)} < set(EXPERIMENTS)


def test_fig6_compares_all_methods_at_all_codeword_lengths(tiny, tmp_path):
    rows, report = run_experiment("lasco-fig6", tmp_path)
    main = [row for row in rows if row["initial"] == "pinv"]
    found = {(row["method"], row["codeword_length"], row["environment"]) for row in main}
    assert found == {(method, m, index) for method in METHODS for m in LENGTHS for index in ENVIRONMENTS}
    means = table(report)
    assert means["method"] == ["M = 16", "M = 32"]
    for method in METHODS:
        for column, m in enumerate(LENGTHS):
            chosen = [row for row in main if row["method"] == method and row["codeword_length"] == m]
            nmse = sum(row["nmse_db"] for row in chosen) / 2
            gcs = sum(row["gcs"] for row in chosen) / 2
            assert means[LABELS[method]][column] == f"{nmse:.2f} ({pooled_nmse_db(chosen):.2f}) / {gcs:.3f}"
    start = {row["method"] for row in rows if row["initial"] == "lmmse"}
    assert start == {"pretrained_lam", "finetuned_sam", "e_lasco"}
    assert all(f"{LABELS[method]}, LMMSE start" in means for method in start)
    per = table(report, 1)
    assert per["method"] == ["1101 (NLOS)", "1102 (LOS)"]
    (row,) = (r for r in main if (r["method"], r["environment"], r["codeword_length"]) == ("lasco", 1102, LENGTHS[1]))
    assert per["LASCO"][1] == f"{row['nmse_db']:.2f}"
    alphas = [row["alpha"] for row in main if row["method"] == "e_lasco" and row["codeword_length"] == LENGTHS[1]]
    assert per["alpha learned by E-LASCO"] == [f"{alpha:.2f}" for alpha in alphas]


def test_fig7_sweeps_alpha_on_average_and_per_environment(tiny, tmp_path):
    rows, report = run_experiment("lasco-fig7", tmp_path)
    assert [(row["environment"], row["alpha"]) for row in rows] == [
        (index, pytest.approx(alpha)) for index in ENVIRONMENTS for alpha in (0.2, 0.7, 1.5)
    ]
    assert {row["method"] for row in rows} == {"lasco"}
    cells = table(report)
    assert cells[""] == ["0.2", "0.7", "1.5", "best"]
    averages = [mean(rows, "nmse_db", set_alpha=alpha) for alpha in (0.2, 0.7, 1.5)]
    assert cells["mean"][:3] == [f"{value:.2f}" for value in averages]
    assert float(cells["mean"][3]) == (0.2, 0.7, 1.5)[averages.index(min(averages))]
    own = [row["nmse_db"] for row in rows if row["environment"] == 1102]
    assert cells["environment 1102"][:3] == [f"{value:.2f}" for value in own]


def test_fig8_varies_the_adaptation_samples(tiny, tmp_path):
    rows, report = run_experiment("lasco-fig8", tmp_path)
    assert {(task.train, task.validation, task.test) for task in tiny.tasks} == {(16, 2, 12), (32, 4, 12)}
    cells = table(report)
    assert cells["method"] == ["16", "32"]
    for method in METHODS:
        expected = [mean(rows, "nmse_db", method=method, train_samples=count) for count in (16, 32)]
        assert cells[LABELS[method]] == [f"{value:.2f}" for value in expected]


def test_fig9_leaves_the_reference_out_and_counts_epochs(tiny, tmp_path):
    rows, report = run_experiment("lasco-fig9", tmp_path)
    check_figure(tmp_path / "lasco-fig9a.png")
    ablation, epochs = table(report), table(report, 1)
    assert set(ablation) == {"method", "LASCO without reference", "LASCO", "E-LASCO"}
    expected = [mean(rows, "nmse_db", method="lasco_no_reference", codeword_length=m) for m in LENGTHS]
    assert ablation["LASCO without reference"] == [f"{value:.2f}" for value in expected]
    assert set(epochs) == {"method", *(LABELS[method] for method in ADAPTED_METHODS)}
    counts = sorted(row["best_epoch"] for row in rows if row["method"] == "baseline_a")
    assert len(counts) == 4
    assert epochs["Baseline A"] == [str(counts[index]) for index in (1, 2, 3)]


def test_fig6_and_fig9_share_their_runs(tiny, tmp_path):
    run_experiment("lasco-fig6", tmp_path)
    main = {task.key() for task in tiny.tasks if task.adapt.initial == "pinv"}
    tiny.tasks.clear()
    run_experiment("lasco-fig9", tmp_path)
    assert {task.key() for task in tiny.tasks} == main


def test_fig10_varies_the_size_of_the_small_models(tiny, tmp_path):
    rows, report = run_experiment("lasco-fig10", tmp_path)
    tags = [f"{layers} x {width}" for layers, width in SAM_SIZES]
    assert {row["tag"] for row in rows} == set(tags)
    assert len({task.reference for task in tiny.tasks}) == len(SAM_SIZES)
    assert len({task.base for task in tiny.tasks}) == 1
    cells = table(report)
    assert cells["method"] == tags
    expected = [mean(rows, "nmse_db", method="e_lasco", tag=tag) for tag in tags]
    assert cells["E-LASCO, M = 32"] == [f"{value:.2f}" for value in expected]


def test_richness_varies_the_ray_patches(tiny, tmp_path):
    rows, report = run_experiment("lasco-richness", tmp_path)
    cells = table(report)
    assert cells["method"] == ["K = 1", "K = 4", "K = 16"]
    for method in METHODS:
        expected = [mean(rows, "nmse_db", method=method, patches=k) for k in (1, 4, 16)]
        assert cells[LABELS[method]] == [f"{value:.2f}" for value in expected]
    assert len(set(cells["LMMSE (classical)"])) == 3


def test_presets_use_environments_that_pre_training_has_not_seen(tmp_path):
    plain = lasco_experiments.settings
    paper = plain("paper", lambda *arguments: "", tmp_path)
    assert list(paper.environments) == list(range(101, 111))
    assert paper.codeword_lengths == (100, 110, 120, 130, 140, 150)
    assert (paper.train, paper.sample_counts, paper.adapt.train.epochs) == (8000, (1000, 2000, 4000, 6000, 8000), 100)
    assert (paper.alphas[0], paper.alphas[-1], len(paper.alphas)) == (0.1, 2.0, 20)
    laptop = plain("laptop", lambda *arguments: "", tmp_path)
    assert min(laptop.environments) > 1040
    assert max(laptop.environments) < 5001
    assert len({index % 2 for index in laptop.environments}) == 2
    with pytest.raises(ValueError, match="preset: expected .*, got 'desktop'"):
        plain("desktop", lambda *arguments: "", tmp_path)


def test_an_experiment_runs_over_processes_and_goes_on_from_its_rows(checkpoint, tmp_path):
    done = []
    settings = dataclasses.replace(
        lasco_experiments.settings(
            "laptop", checkpoint, tmp_path, workers=1, on_done=lambda n, total, task: done.append((n, total))
        ),
        environments=ENVIRONMENTS,
        train=16,
        validation=2,
        test=12,
        alphas=(0.7, 1.0),
        adapt=adapt_config(),
    )
    first = EXPERIMENTS["lasco-fig7"][1](settings)
    assert done == [(1, 2), (2, 2)]
    assert EXPERIMENTS["lasco-fig7"][1](settings).rows == first.rows
    assert done == [(1, 2), (2, 2)]
    check_figure(first.draw(tmp_path))
