"""Algorithms 1 and 2: what is paired, what is kept, that a killed training goes on, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_codebook import FC, LLAMA, codebook, data, four_discs, site, training
from tiny_runs import KillAt, KilledError

from csimodels.channels.rays import AntennaArray
from csimodels.evaluation.metrics import codeword_cosine
from csimodels.files import load_tensors, save_tensors
from csimodels.models.codebook_deployment import CodebookDeployment
from csimodels.models.codebook_file import FeedbackCodebook, load_codebook
from csimodels.models.codebooks import PortLayout, rvq_codebook
from csimodels.models.codeword_baselines import build_network
from csimodels.models.codeword_network import refine_codebook
from csimodels.training import codebook_training
from csimodels.training.codebook_training import (
    CodebookData,
    cosine_loss,
    enhance_codebook,
    enhance_environments,
    pair,
    stack_books,
)
from csimodels.training.codeword_file import load_network, save_network

pytestmark = pytest.mark.usefixtures("small_models")


def enhance(task, folder, accelerator, *, book=None, channels=None, **options):
    return enhance_codebook(task, book or codebook(), channels or data(), folder, accelerator=accelerator, **options)


def cosine(h, ue, bs=None):
    """Mean cosine when the UE searches ``ue`` and the BS reads ``bs``, all in float64."""
    scores = (h.to(torch.complex128) @ ue.to(torch.complex128).mH).abs()
    scores /= torch.linalg.vector_norm(ue.to(torch.complex128), dim=1)
    return codeword_cosine(h, (ue if bs is None else bs)[scores.argmax(1)]).item()


def test_the_stand_in_is_a_dual_polarised_array():
    h = site(5, AntennaArray.upa(8, 8))
    assert h.shape == (5, 128)
    assert torch.allclose(torch.linalg.vector_norm(h, dim=1), torch.ones(5))


# Pairs and loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 5, 10])
def test_pairs_are_those_of_float64(bits):
    h, words = site(200), rvq_codebook(bits, 16, seed=0)
    index, similarity = pair(h, words)
    scores = (h.to(torch.complex128) @ words.to(torch.complex128).mH).abs()
    assert torch.equal(index, scores.argmax(1))
    assert torch.allclose(similarity.double(), scores.amax(1), atol=1e-6)


def test_a_channel_without_direction_is_not_paired():
    h = site(4)
    h[2] = 0
    with pytest.raises(ValueError, match="h: expected finite, non-zero channels, 1 of 4 are not, first 2"):
        pair(h, codebook().words)


def test_the_loss_is_the_negative_metric_and_blind_to_phase_and_scale():
    g, h = codebook(4).words, site(16)
    assert cosine_loss(g, h).item() == pytest.approx(-codeword_cosine(h, g).item(), abs=1e-6)
    turned = g * torch.polar(torch.arange(1.0, 17.0), torch.arange(16.0))[:, None]
    assert cosine_loss(turned, 3 * h).item() == pytest.approx(cosine_loss(g, h).item(), abs=1e-6)


def test_the_gradient_of_the_loss():
    g = rvq_codebook(2, 4, seed=1).to(torch.complex128).requires_grad_()
    h = rvq_codebook(2, 4, seed=2).to(torch.complex128)
    assert torch.autograd.gradcheck(lambda g: cosine_loss(g, h), (g,))


# Algorithm 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [FC, LLAMA], ids=["fc", "lvm4cf"])
def test_single_side_learns_and_leaves_the_conventional_codebook(tmp_path, accelerator, network):
    book = codebook()
    words, before = book.words, book.words.clone()
    result = enhance(training(network=network), tmp_path, accelerator, book=book)
    enhanced = result.book.words
    assert torch.equal(words, before)
    assert torch.allclose(torch.linalg.vector_norm(enhanced, dim=1), torch.ones(16), atol=1e-6)
    h = data().validation
    assert result.validation == pytest.approx(cosine(h, words, enhanced), abs=1e-5)
    assert result.history[0]["validation"] == pytest.approx(cosine(h, words), abs=1e-5)
    assert result.validation > result.history[0]["validation"] + 0.05
    assert [entry["interval"] for entry in result.history] == [0, 1]
    assert result.history[1]["epochs"] == 4
    network, _ = load_network(tmp_path / "model.safetensors")
    assert torch.equal(refine_codebook(network, words), enhanced)
    # What the file says is what the two ends deploy: the UE searches the conventional codebook.
    stored = load_codebook(tmp_path / "codebook.safetensors")
    deployment = CodebookDeployment.single_side(book, stored)
    index, _ = deployment.report_index(h)
    assert codeword_cosine(h, deployment.reconstruct(index)).item() == pytest.approx(result.validation, abs=1e-5)


def test_each_codeword_is_refined_once_and_the_gradient_is_that_of_all_pairs(tmp_path, accelerator):
    torch.manual_seed(0)
    network, h, words = build_network(FC), data().train, codebook(2).words
    index, _ = pair(h, words)
    sizes = []
    network.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    cosine_loss(network(words[index]), h).backward()
    plain = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    pairs = codebook_training._Pairs(h, words, torch.device("cpu"))
    cosine_loss(pairs.refined(network, pairs.index), h).backward()
    assert sizes[0] == len(h) and sizes[1] <= 4
    for one, two in zip(plain, network.parameters(), strict=True):
        assert torch.allclose(one, two.grad, atol=1e-6)


# Algorithm 2 ----------------------------------------------------------------------------------------------------------


def test_dual_side_pairs_anew_with_every_codebook_that_it_keeps(tmp_path, accelerator):
    task = training(deployment="dual_side", epochs=10, update_interval=5)
    channels = four_discs()
    result = enhance(task, tmp_path, accelerator, book=codebook(3), channels=channels)
    first, second, third = result.history
    assert [entry["interval"] for entry in result.history] == [0, 1, 2]
    assert first["validation"] + 0.1 < second["validation"] < third["validation"] == result.validation
    assert second["kept"] and third["kept"]
    assert result.validation == pytest.approx(cosine(channels.validation, result.book.words), abs=1e-5)
    # The codewords that the second interval was trained with are the first one's.
    assert second["train_cosine"] == pytest.approx(cosine(channels.train, codebook(3).words), abs=1e-5)
    assert third["train_cosine"] > second["train_cosine"] + 0.1
    # Validation channels that keep their codeword do no better than those that may choose a new one.
    assert all(entry["paired_validation"] <= entry["validation"] for entry in (second, third))
    assert not (tmp_path / "model.safetensors").exists()
    assert (result.book.deployment, result.book.kind, result.book.bits) == ("DS", "fc", 3)


def test_a_codebook_that_is_no_better_is_not_kept(tmp_path, accelerator):
    # Without steps worth the name every candidate comes from random weights.
    task = training(deployment="dual_side", epochs=3, update_interval=1, learning_rate=0.0, schedule="constant")
    good = FeedbackCodebook(enhance(training(), tmp_path / "good", accelerator).book.words, "good", codebook().ports)
    result = enhance(task, tmp_path / "bad", accelerator, book=good)
    assert torch.equal(result.book.words, good.words)
    assert [entry["kept"] for entry in result.history] == [True, False, False, False]
    assert all(entry["validation"] < result.validation for entry in result.history[1:])
    assert result.validation == result.history[0]["validation"]
    assert len({entry["train_cosine"] for entry in result.history[1:]}) == 1  # the pairs stayed
    assert len({entry["validation"] for entry in result.history[1:]}) == 3  # the models did not


def test_a_codebook_as_good_as_the_old_one_is_not_kept(tmp_path, accelerator):
    network = build_network(dataclasses.replace(FC, residual=True))
    for parameter in network.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    save_network(tmp_path / "same.safetensors", network)
    task = training(
        network=network.config,
        deployment="dual_side",
        epochs=1,
        update_interval=1,
        learning_rate=0.0,
        schedule="constant",
        initial=str(tmp_path / "same.safetensors"),
    )
    result = enhance(task, tmp_path / "run", accelerator)
    assert result.history[1]["validation"] == pytest.approx(result.validation, abs=1e-6)
    assert result.history[1]["kept"] == (result.history[1]["validation"] > result.history[0]["validation"])


def test_every_interval_starts_from_weights_of_its_own():
    task = training(deployment="dual_side", epochs=4, update_interval=2)
    one, two = task.build(1), task.build(2)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), task.build(1).parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert (task.stage(1).epochs, task.stage(1).seed + 1) == (2, task.stage(2).seed)
    assert training().stage(1).epochs == 4


# Killed, finished, other ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployment", ["single_side", "dual_side"])
@pytest.mark.parametrize("kill_at", [5, 10, 14])
def test_a_killed_training_ends_with_the_codebook_of_an_unbroken_one(tmp_path, accelerator, deployment, kill_at):
    task = training(deployment=deployment, update_interval=2)  # 16 steps
    whole = enhance(task, tmp_path / "whole", accelerator)
    step = KillAt(kill_at)
    with pytest.raises(KilledError):
        enhance(task, tmp_path / "broken", accelerator, on_step=step)
    again = enhance(task, tmp_path / "broken", accelerator, on_step=step)
    assert step.steps < 16 + kill_at  # the finished part was not repeated
    assert torch.equal(again.book.words, whole.book.words)
    assert (again.validation, without_times(again)) == (whole.validation, without_times(whole))


def without_times(result):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]


@pytest.mark.parametrize("before", [True, False], ids=["before the progress is written", "after it"])
def test_a_training_killed_between_two_intervals_goes_on(tmp_path, accelerator, monkeypatch, before):
    task = training(deployment="dual_side", update_interval=2)
    whole = enhance(task, tmp_path / "whole", accelerator)
    save = codebook_training.save_codebook

    def killed(*arguments):
        if not before:
            save(*arguments)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(codebook_training, "save_codebook", killed)
        with pytest.raises(KilledError):
            enhance(task, tmp_path / "broken", accelerator)
    steps = []
    again = enhance(task, tmp_path / "broken", accelerator, on_step=lambda *step: steps.append(step))
    assert len(steps) == 8  # of the second interval alone
    assert torch.equal(again.book.words, whole.book.words)
    assert without_times(again) == without_times(whole)
    assert not list(tmp_path.glob("broken/interval2/state.safetensors"))


def test_a_finished_training_is_read_and_another_one_refused(tmp_path, accelerator):
    task = training(deployment="dual_side", update_interval=2)
    result = enhance(task, tmp_path, accelerator)
    steps = []
    again = enhance(task, tmp_path, accelerator, on_step=lambda *step: steps.append(step))
    assert steps == []
    assert torch.equal(again.book.words, result.book.words)
    assert (again.validation, again.history) == (result.validation, result.history)
    assert not (tmp_path / "progress.safetensors").exists()
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["history"] == result.history
    for other in ({"book": codebook(seed=9)}, {"channels": dataclasses.replace(data(), description={"other": 1})}):
        with pytest.raises(ValueError, match="belongs to another training"):
            enhance(task, tmp_path, accelerator, **other)
    with pytest.raises(ValueError, match="belongs to another training"):
        enhance(dataclasses.replace(task, seed=1), tmp_path, accelerator)


# Pre-trained starts and many environments -----------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_checkpoint_and_returns_to_it(tmp_path, accelerator):
    pooled = CodebookData(torch.cat([site(64, index=2), site(64, index=4)]), site(32, index=2, seed=1), {"sites": 2})
    enhance(training(), tmp_path / "pooled", accelerator, channels=pooled)
    path = str(tmp_path / "pooled" / "model.safetensors")
    start, _ = load_network(path)
    task = training(deployment="dual_side", update_interval=2, initial=path)
    for interval in (1, 2):
        built = task.build(interval).state_dict()
        assert all(torch.equal(built[name], tensor) for name, tensor in start.state_dict().items())
    still = training(epochs=1, initial=path, learning_rate=0.0, schedule="constant", initial_candidate=True)
    result = enhance(still, tmp_path / "still", accelerator)
    assert torch.equal(result.book.words, refine_codebook(start, codebook().words))
    other = training(network=dataclasses.replace(FC, hidden=(5,)), initial=path)
    with pytest.raises(ValueError, match=r"model.safetensors: expected a network of .*'hidden': \(5,\)"):
        enhance(other, tmp_path / "other", accelerator)


def test_multi_scenario_codebooks_are_those_of_each_environment(tmp_path, accelerator):
    task = training(deployment="dual_side", epochs=2, update_interval=1)
    kinds = {"uma": data(index=2), "rma": data(index=5)}
    books = enhance_environments(task, codebook(), kinds, tmp_path / "all", accelerator=accelerator)
    assert (books.words.shape, books.environments) == ((2, 16, 16), ("uma", "rma"))
    for row, channels in zip(books.words, kinds.values(), strict=True):
        alone = enhance(task, tmp_path / str(channels.description["index"]), accelerator, channels=channels)
        assert torch.equal(row, alone.book.words)
    assert not torch.equal(*books.words)
    with pytest.raises(ValueError, match="books: expected at least one"):
        stack_books({})
    with pytest.raises(ValueError, match=r"books: expected rvq for .*\(16, 16\), as the first is, got rvq .*\(8, 16\)"):
        stack_books({"one": codebook(), "two": codebook(3)})
    with pytest.raises(ValueError, match="training: expected the deployment 'dual_side'"):
        enhance_environments(training(), codebook(), kinds, tmp_path, accelerator=accelerator)
    with pytest.raises(ValueError, match="environments: expected at least one"):
        enhance_environments(task, codebook(), {}, tmp_path, accelerator=accelerator)


# Refused --------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(tmp_path, accelerator):
    with pytest.raises(ValueError, match="deployment: expected one of single_side, dual_side, got 'both'"):
        training(deployment="both")
    with pytest.raises(ValueError, match="update_interval: expected a divisor of the 4 epochs, got 3"):
        training(deployment="dual_side", update_interval=3)
    with pytest.raises(ValueError, match="update_interval: expected at least 1, got 0"):
        training(update_interval=0)
    single = FeedbackCodebook(codebook().words, "x", PortLayout(2, 2, 4), deployment="SS", ue_digest="0" * 64)
    for book in (single, stack_books({"one": codebook()})):
        with pytest.raises(ValueError, match=r"conventional: expected a codebook \[K, D\] of both ends"):
            enhance(training(), tmp_path, accelerator, book=book)
    for ports in (PortLayout(2, 2, 2), PortLayout(1, 4, 4)):
        book = FeedbackCodebook(rvq_codebook(4, len(ports), seed=0), "rvq", ports)
        with pytest.raises(ValueError, match="conventional: expected a codebook for 16 ports of 2 polarisation"):
            enhance(training(), tmp_path, accelerator, book=book)
    for name in ("train", "validation"):
        for bad in (site(0), site(3)[:, :8], site(3).real):
            with pytest.raises(ValueError, match=rf"{name}: expected complex64 \[n, 16\], not empty"):
                enhance(training(), tmp_path, accelerator, channels=dataclasses.replace(data(), **{name: bad}))
    bad = data()
    bad.train[3, 1] = math.nan
    with pytest.raises(ValueError, match="h: expected finite, non-zero channels, 1 of 64 are not, first 3"):
        enhance(training(), tmp_path, accelerator, channels=bad)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, {"format": "other"})
    with pytest.raises(ValueError, match="not a codeword network"):
        load_network(path)
    network = build_network(LLAMA).eval()
    save_network(path, network, extra={"note": 1})
    state = torch.get_rng_state()
    loaded, metadata = load_network(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.config, metadata["note"]) == (network.config, 1)
    assert torch.equal(loaded(codebook().words), network(codebook().words))
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "config": {**metadata["config"], "colour": "blue"}})
    with pytest.raises(ValueError, match="does not know its configuration .*colour"):
        load_network(path)
    save_tensors(path, dict(list(tensors.items())[1:]), metadata)
    with pytest.raises(ValueError, match="its weights do not fit its own configuration"):
        load_network(path)
