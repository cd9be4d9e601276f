"""Every LVM4CF experiment from the command to its files, at a size of seconds; and the presets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from experiment_reports import run_experiment, table_of
from tiny_codebook import FC, LLAMA, site
from tiny_runs import remembering

from csimodels.evaluation import lvm4cf_runs, lvm4cf_settings
from csimodels.evaluation.codebook_rate import codebook_sum_rate
from csimodels.evaluation.experiments import EXPERIMENTS
from csimodels.evaluation.lvm4cf_runs import ChannelSet, CodebookTask, run_task
from csimodels.evaluation.lvm4cf_settings import Settings
from csimodels.evaluation.outcome import Context
from csimodels.evaluation.task_rows import mean, run_tasks, select
from csimodels.models.codebook_file import load_codebook
from csimodels.models.codebooks import PortLayout, rvq_codebook, type1_codebook
from csimodels.models.codeword_baselines import count_parameters
from csimodels.training.lvm4cf_presets import LABELS, codebook_preset

pytestmark = pytest.mark.usefixtures("small_models")
SIZES = dataclasses.replace(
    codebook_preset("laptop"),
    samples=(48, 16, 16),
    pooled_samples=(64, 16, 16),
    single_side_epochs=2,
    dual_side_epochs=2,
    update_interval=1,
    batch_size=16,
    learning_rate=1e-2,
    bits=(3, 5),
    few_bits=(3, 5),
    pooled_few_bits=(5,),
    networks={"fc": FC, "lvm4cf": LLAMA},
    site="site",
    environments=("uma", "rma"),
    ports=PortLayout(2, 2, 4),
)
CONVENTIONAL = ["RVQ (conventional)", "DFT"]
DUAL = [*CONVENTIONAL, "covariance-shaped RVQ, DS", "k-lines, DS", "FC, DS", "LVM4CF, DS"]
SINGLE = [*CONVENTIONAL, "cell eigenvectors, SS", "FC, SS", "LVM4CF, SS"]


def channels(name, split, count):
    """``site`` is one disc, the others are pooled from three."""
    seed = ("train", "validation", "test").index(split)
    if name == "site":
        return site(count, index=3, seed=seed)
    pooled = torch.cat([site(count, index=index, seed=seed) for index in {"uma": (3, 5, 7), "rma": (9, 11, 13)}[name]])
    return pooled[torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0))[:count]]


@pytest.fixture
def tiny(shared_folder, finished, monkeypatch):
    """Runs experiments at tiny settings; the tasks that they asked for are in ``tiny.tasks``."""
    run, asked = remembering(run_task, finished)

    def tiny_settings(context):
        return Settings(SIZES, SIZES, shared_folder / "checkpoints", run, snrs_db=(0, 20), repeats=2)

    tiny_settings.tasks = asked
    monkeypatch.setattr(lvm4cf_settings, "settings", tiny_settings)
    monkeypatch.setattr(lvm4cf_runs, "draw_channels", channels)
    return tiny_settings


def test_fig5(tiny, tmp_path):
    rows, report = run_experiment("lvm4cf-fig5", tmp_path)
    for environment in ("uma", "rma"):
        header, table = table_of(report, f"Cosine similarity, {environment}")
        assert header == ["method", "B = 3", "B = 5"]
        assert list(table) == DUAL
        assert table[CONVENTIONAL[1]][0] == "-"  # 32 beams at least
        for label, method in (("RVQ (conventional)", "rvq"), ("k-lines, DS", "k_lines")):
            expected = mean(rows, "cosine", method=method, bits=5, channels=environment)
            assert table[label][1] == f"{expected:.3f}"
        assert float(table["k-lines, DS"][1]) > float(table["RVQ (conventional)"][1])
    assert {row["test"] for row in rows} == {"uma", "rma"}


def test_fig6(tiny, tmp_path):
    rows, report = run_experiment("lvm4cf-fig6", tmp_path)
    assert list(table_of(report, "Cosine similarity at one site (site), SF-SS")[1]) == SINGLE
    assert list(table_of(report, "Cosine similarity at one site (site), SF-DS")[1]) == DUAL
    _, costs = table_of(report, "Seconds of training")
    assert costs["FC, SS"][1] == "0" and costs["FC, DS"][1] == str(32 * 16 * 8)
    fc = select(rows, label="FC", deployment="single_side", bits=5)[0]
    task = next(t for t in tiny.tasks if (t.label, t.deployment, t.bits) == ("FC", "single_side", 5))
    h, book = site(16, index=3, seed=2), load_codebook(task.run_dir() / "codebook.safetensors")
    index = (h @ rvq_codebook(5, 16, seed=0).mH).abs().argmax(1)  # the UE keeps the conventional codebook
    assert fc["cosine"] == pytest.approx((h.conj() * book.words[index]).sum(1).abs().mean().item(), abs=1e-5)
    assert fc["parameters"] == count_parameters(FC)
    assert (fc["report_bits"], fc["codebook_bytes"]) == (5, 0)


def test_fig7(tiny, tmp_path, shared_folder):
    rows, report = run_experiment("lvm4cf-fig7", tmp_path)
    assert list(table_of(report, "codebooks made for site")[1]) == DUAL
    assert list(table_of(report, "codebooks made for uma")[1]) == DUAL
    assert {row["test"] for row in rows} == {"site"}
    site_book, type_book = (mean(rows, "cosine", method="k_lines", bits=5, channels=name) for name in ("site", "uma"))
    assert site_book > type_book
    # The codebooks of the environment type are those of Fig. 5.
    made = {task.run_dir() for task in tiny.tasks if task.channels.name == "uma" and task.deployment == "dual_side"}
    assert made == {path for path in (shared_folder / "checkpoints" / "lvm4cf").iterdir() if "-uma-" in path.name}


def test_fig8(tiny, tmp_path):
    rows, report = run_experiment("lvm4cf-fig8", tmp_path, figure=False)
    header, table = table_of(report, "B = 3")
    assert header == ["method", "parameters", "of the paper's sizes", "UE, µs", "BS, µs", "sum rate (bit/s/Hz)"]
    assert list(table) == [name for name in DUAL if name != CONVENTIONAL[1]]
    assert table["LVM4CF, DS"][:2] == [str(count_parameters(LLAMA))] * 2
    assert all(float(value) > 0 for cells in table.values() for value in cells[2:])
    assert {row["snr_db"] for row in select(rows, condition="rate")} == {20}


def test_fig9(tiny, tmp_path):
    rows, report = run_experiment("lvm4cf-fig9", tmp_path)
    assert list(table_of(report, "Sum rate (bit/s/Hz) at one site, 4 users, zero forcing, SF-SS, B = 5")[1]) == SINGLE
    assert list(table_of(report, "zero forcing, MF-DS, B = 5")[1]) == DUAL
    assert "MF-DS, B = 3" not in report
    _, table = table_of(report, "zero forcing, SF-DS, B = 5")
    assert list(table) == DUAL
    assert {row["test"] for row in rows} == {"site"}
    rvq = select(rows, method="rvq", bits=5, condition="rate", snr_db=20)[0]
    h, words = site(16, index=3, seed=2), rvq_codebook(5, 16, seed=0)
    estimate = words[(h @ words.mH).abs().argmax(1)]
    assert rvq["rate"] == pytest.approx(codebook_sum_rate(h, estimate, 20.0).item(), rel=1e-9)
    assert float(table["RVQ (conventional)"][1]) == pytest.approx(rvq["rate"], abs=0.01)


def test_type1_stands_beside_the_others_at_its_number_of_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(lvm4cf_runs, "draw_channels", channels)
    s = Settings(SIZES, SIZES, tmp_path, lambda tasks: [], ())
    labels = {bits: [task.label for task in s.methods("dual_side", bits, s.site())] for bits in (8, 9, 10)}
    assert [bits for bits, found in labels.items() if "Type I" in found] == [9]  # 16 x 8 beams, 4 co-phases
    (row,) = run_task(s.classical("type1", 9, s.site()))
    h, words = site(16, index=3, seed=2), type1_codebook(4, 2)
    best = ((h @ words.mH).abs() / torch.linalg.vector_norm(h, dim=1, keepdim=True)).amax(1)
    assert row["cosine"] == pytest.approx(best.mean().item(), abs=1e-5)
    assert (row["deployment"], row["report_bits"], row["codebook_bytes"]) == ("conventional", 9, 0)


def test_a_finished_experiment_trains_nothing_again(tiny, shared_folder, finished, monkeypatch):
    s = tiny(Context("laptop", shared_folder))
    first = EXPERIMENTS["lvm4cf-fig6"].run(Context("laptop", shared_folder))
    monkeypatch.setattr(lvm4cf_runs, "draw_channels", None)
    finished.clear()  # the rows are lost, the codebooks are not
    again = EXPERIMENTS["lvm4cf-fig6"].run(Context("laptop", shared_folder))
    assert again.rows == first.rows
    assert s.sizes is SIZES


def test_real_settings_run_tasks_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(lvm4cf_runs, "draw_channels", channels)
    chosen = lvm4cf_settings.settings(Context("laptop", tmp_path, workers=1))
    chosen = dataclasses.replace(chosen, sizes=SIZES)
    tasks = [chosen.classical("rvq", 3, chosen.site()), chosen.network("fc", "dual_side", 3, chosen.site())]
    rows = chosen.run(tasks)
    assert [row["label"] for row in rows] == ["RVQ (conventional)", "FC"]
    assert rows == run_tasks(run_task, tasks, tmp_path)
    assert rows[1]["cosine"] == run_task(tasks[1])[0]["cosine"]


def test_tasks_that_make_no_sense_are_refused(tmp_path):
    few = ChannelSet("site", 8, 8, 8)
    with pytest.raises(ValueError, match="method: expected network or one of rvq, dft, type1, shaped, .*, got 'x'"):
        CodebookTask("x", "x", 3, SIZES.ports, few, few, str(tmp_path))
    with pytest.raises(ValueError, match="training: expected one for a network alone, got None for 'network'"):
        CodebookTask("x", "network", 3, SIZES.ports, few, few, str(tmp_path))


def test_tasks_differ_by_all_that_matters(tmp_path):
    s = Settings(SIZES, SIZES, tmp_path, lambda tasks: [], ())
    task = s.network("fc", "dual_side", 3, s.site())
    others = [
        s.network("fc", "single_side", 3, s.site()),
        s.network("lvm4cf", "dual_side", 3, s.site()),
        s.network("fc", "dual_side", 5, s.site()),
        s.network("fc", "dual_side", 3, s.environment("uma")),
        s.classical("rvq", 3, s.site()),
    ]
    assert len({t.run_dir() for t in (task, *others)}) == len({t.key() for t in (task, *others)}) == 6
    elsewhere = s.network("fc", "dual_side", 3, s.site(), test=s.environment("uma"), snrs_db=(3.0,))
    assert elsewhere.run_dir() == task.run_dir() and elsewhere.key() != task.key()


def test_the_presets():
    paper, laptop = codebook_preset("paper"), codebook_preset("laptop")
    assert paper.samples == (70_000, 20_000, 10_000) and paper.pooled_samples == (140_000, 40_000, 20_000)
    single, dual = (paper.training("lvm4cf", deployment) for deployment in ("single_side", "dual_side"))
    assert (single.train.epochs, single.intervals) == (200, 1)
    assert (dual.train.epochs, dual.update_interval, dual.intervals) == (400, 40, 10)
    assert (dual.train.batch_size, dual.train.learning_rate, dual.train.weight_decay) == (512, 1e-3, 0)
    assert single.network.backbone.source == "Emma02/LVM_ckpts"
    assert min(paper.bits) == 6 and max(paper.bits) == 20
    assert paper.few_bits == laptop.few_bits == (12, 20)  # Fig. 9
    assert paper.environments == laptop.environments  # Table I: UMa and RMa, 28 and 3.5 GHz
    sizes = [count_parameters(config) for config in laptop.networks.values()]
    assert max(sizes) < 1.3 * min(sizes)
    assert list(laptop.networks) == list(paper.networks) == list(LABELS)
    tuned = laptop.training("fc", "single_side", initial="some.safetensors")
    assert tuned.train.initial_candidate and not laptop.training("fc", "single_side").train.initial_candidate
    with pytest.raises(ValueError, match="network: expected one of fc, transformer, llm, lvm4cf, got 'cnn'"):
        laptop.training("cnn", "dual_side")
    with pytest.raises(ValueError, match="preset: expected one of"):
        codebook_preset("desktop")
