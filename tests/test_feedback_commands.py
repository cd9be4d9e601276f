"""Training, encoding and decoding on files, as a user has them: round trips, and what bad input gets."""

from __future__ import annotations

import dataclasses
import re

import pytest
import scipy.io
import torch
from command_line import refuse, succeed
from tiny_feedback import CONFIG, data, stage, training, write_site
from tiny_training import CELL, channels

from csimodels.channels.angle_delay import angle_delay, to_frequency
from csimodels.channels.environment import CellConfig, Environment
from csimodels.channels.hdf5 import ChannelReader
from csimodels.channels.rays import SubcarrierGrid
from csimodels.evaluation.metrics import nmse_db, sgcs
from csimodels.feedback import load_llmcsinet
from csimodels.models.llmcsinet import LlmCsiNet
from csimodels.models.payload import PayloadFormat
from csimodels.report_file import read_reports, write_reports
from csimodels.training.feedback_file import save_feedback
from csimodels.training.llmcsinet import train_feedback

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny_training import TRAIN

    from csimodels.training.loop import make_accelerator

    folder = tmp_path_factory.mktemp("model")
    task = training(stage("preliminary", epochs=8), stage(epochs=8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # `small_models` is of each test, and comes after this
    try:
        train_feedback(task, data(), folder, accelerator=make_accelerator(TRAIN, cpu=True))
    finally:
        torch.set_num_threads(threads)
    return folder / "model.safetensors"


@pytest.fixture
def site(tmp_path):
    # In a unit far from that of training, and with more subcarriers than the model has delays.
    cell = dataclasses.replace(CELL, grid=SubcarrierGrid(16, 140e6))
    return write_site(tmp_path / "site.h5", Environment(cell, 2, seed=1).sample(5, seed=3) * 1e-6)


def read(path):
    with ChannelReader(path) as reader:
        return reader.read()


def test_a_file_comes_back_as_the_model_reconstructs_it(model, site, tmp_path):
    reports, restored = tmp_path / "site.csif", tmp_path / "restored.h5"
    size = PayloadFormat.of(CONFIG).report_bytes(32)
    out = succeed("encode", site, reports, "--model", model)
    assert f"wrote 5 reports of {size} bytes (M = 32, values as float32) to {reports}" in out
    out = succeed("decode", reports, restored, "--model", model, "--truth", site)
    network, h = load_llmcsinet(model), read(site)
    with torch.inference_mode():
        expected = to_frequency(network(angle_delay(h, delays=8)[0]), 16)
    found = read(restored)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-11)
    score, similarity = nmse_db(h, found).item(), sgcs(h, found).item()
    assert f"wrote 5 samples to {restored}" in out
    assert f"NMSE {score:.2f} dB, SGCS {similarity:.3f}" in out
    with ChannelReader(restored) as reader:
        assert (reader.environment == 7).all() and reader.los.all()


def test_without_the_truth_only_the_channels_are_written(model, site, tmp_path):
    succeed("encode", site, tmp_path / "r", "--model", model)
    out = succeed("decode", tmp_path / "r", tmp_path / "restored.h5", "--model", model)
    assert "NMSE" not in out
    assert read(tmp_path / "restored.h5").shape == (5, 8, 16)


def test_codes_and_fewer_elements_make_shorter_reports(model, site, tmp_path):
    sizes, scores = {}, {}
    for name, options in {"full": (), "codes": ("--values", "codes"), "few": ("--elements", 4)}.items():
        out = succeed("encode", site, tmp_path / name, "--model", model, *options)
        sizes[name] = int(re.search(r"reports of (\d+) bytes", out)[1])
        out = succeed("decode", tmp_path / name, tmp_path / "restored.h5", "--model", model, "--truth", site)
        scores[name] = float(re.search(r"NMSE (-?[\d.]+) dB", out)[1])
    form = PayloadFormat.of(CONFIG, load_llmcsinet(model).quantizer)
    assert sizes == {
        "full": PayloadFormat.of(CONFIG).report_bytes(32),
        "codes": form.report_bytes(32),
        "few": PayloadFormat.of(CONFIG).report_bytes(4),
    }
    assert sizes["few"] < sizes["codes"] < sizes["full"]
    assert abs(scores["codes"] - scores["full"]) < 0.5
    assert scores["few"] > scores["full"]


def test_a_sample_of_no_energy_comes_back_as_zeros(model, site, tmp_path):
    h = read(site)
    h[2] = 0
    write_site(site, h)
    succeed("encode", site, tmp_path / "r", "--model", model)
    out = succeed("decode", tmp_path / "r", tmp_path / "restored.h5", "--model", model, "--truth", site)
    restored = read(tmp_path / "restored.h5")
    assert not restored[2].any()
    assert restored[3].abs().min() > 0
    assert "left out of these: 1 samples of no energy" in out
    keep = torch.tensor([0, 1, 3, 4])
    assert f"NMSE {nmse_db(h[keep], restored[keep]).item():.2f} dB" in out


def test_a_cost2100_file_comes_back_as_one(tmp_path):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, delays=32, antennas=32, codeword_values=64)
    save_feedback(tmp_path / "m.safetensors", LlmCsiNet(config), "llmcsinet")
    values = 0.5 + 0.02 * torch.randn(3, 2, 32, 32)
    scipy.io.savemat(tmp_path / "DATA.mat", {"HT": values.flatten(1).numpy()})
    succeed("encode", tmp_path / "DATA.mat", tmp_path / "r", "--model", tmp_path / "m.safetensors")
    arguments = (tmp_path / "r", tmp_path / "restored.mat", "--model", tmp_path / "m.safetensors")
    out = succeed("decode", *arguments, "--truth", tmp_path / "DATA.mat")
    restored = torch.from_numpy(scipy.io.loadmat(tmp_path / "restored.mat")["HT"]).view(3, 2, 32, 32)
    with torch.inference_mode():
        # The file has angles before delays, the model delays before angles.
        expected = load_llmcsinet(tmp_path / "m.safetensors")((values - 0.5).mT.contiguous()).mT + 0.5
    torch.testing.assert_close(restored, expected.clamp(0, 1), rtol=0, atol=1e-5)
    score = nmse_db(values - 0.5, restored - 0.5).item()
    assert float(re.search(r"NMSE (-?[\d.]+) dB", out)[1]) == pytest.approx(score, abs=0.02)


def test_train_makes_a_model_that_encodes(tmp_path):
    write_site(tmp_path / "site.h5", Environment(CellConfig(), 1301, 0).sample(40))
    small = ("--epochs", 1, "--batch-size", 16, "--compression", 64, "--threads", 1)
    out = succeed("train", "--data", tmp_path / "site.h5", "--out", tmp_path / "run", *small)
    assert re.search(rf"validation NMSE -?[\d.]+ dB; wrote {tmp_path}/run/model.safetensors", out)
    again = succeed("train", "--data", tmp_path / "site.h5", "--out", tmp_path / "run", *small)
    assert again == out
    out = succeed("encode", tmp_path / "site.h5", tmp_path / "r", "--model", tmp_path / "run" / "model.safetensors")
    assert "(M = 28, values as float32)" in out
    message = refuse("train", "--data", tmp_path / "site.h5", "--out", tmp_path / "run", *small, "--seed", 1)
    assert "belongs to another training" in message


# Bad input ------------------------------------------------------------------------------------------------------------


def test_channels_that_do_not_fit_or_are_not_finite_are_refused(model, site, tmp_path):
    h = read(site)
    h[3, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="first at index 3"):
        write_site(tmp_path / "nan.h5", h)
    write_site(tmp_path / "narrow.h5", channels(2)[:, :, :4].contiguous())
    message = refuse("encode", tmp_path / "narrow.h5", tmp_path / "r", "--model", model)
    assert message.endswith("expected 8 antennas and at least 8 subcarriers (or 8 delays), as the model, got 8 and 4")
    assert "m: expected 1 to 128" in refuse("encode", site, tmp_path / "r", "--model", model, "--elements", 129)
    assert "m: expected 1 to 128" in refuse("encode", site, tmp_path / "r", "--model", model, "--elements", 0)
    message = refuse("encode", site, tmp_path / "r", "--model", model, "--values", "int8")
    assert message == "values: expected float32 or codes, got 'int8'"
    assert not (tmp_path / "r").exists()
    assert "no such file" in refuse("encode", tmp_path / "no.h5", tmp_path / "r", "--model", model)
    assert "no such file" in refuse("encode", site, tmp_path / "r", "--model", tmp_path / "no.safetensors")


def test_reports_of_another_model_are_refused(model, site, tmp_path):
    other = tmp_path / "other.safetensors"
    save_feedback(other, LlmCsiNet(dataclasses.replace(CONFIG, radius=2)), "llmcsinet")
    succeed("encode", site, tmp_path / "r", "--model", model)
    message = refuse("decode", tmp_path / "r", tmp_path / "restored.h5", "--model", other)
    assert "of another configuration" in message
    assert not (tmp_path / "restored.h5").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"", "the file is empty"),
        (lambda b: b"not reports", "not a file of feedback reports"),
        (lambda b: b[:20], "truncated"),
        (lambda b: b[:-3], "truncated or damaged: expected 5 reports of"),
        (lambda b: b[:40] + b"#" + b[41:], "damaged: the description's checksum"),
        (lambda b: b[:-30] + bytes([b[-30] ^ 1]) + b[-29:], "reports from 0 on: report 4: corrupted"),
    ],
    ids=["empty", "foreign", "cut description", "cut reports", "changed description", "changed report"],
)
def test_damaged_report_files_are_refused_and_nothing_is_lost(model, site, tmp_path, damage, message):
    path, restored = tmp_path / "r", tmp_path / "restored.h5"
    succeed("encode", site, path, "--model", model)
    path.write_bytes(damage(path.read_bytes()))
    restored.write_bytes(b"what was there")
    assert message in refuse("decode", path, restored, "--model", model)
    assert restored.read_bytes() == b"what was there"


def test_a_truth_of_another_size_is_refused(model, site, tmp_path):
    succeed("encode", site, tmp_path / "r", "--model", model)
    write_site(tmp_path / "other.h5", channels(5))
    message = refuse("decode", tmp_path / "r", tmp_path / "x.h5", "--model", model, "--truth", tmp_path / "other.h5")
    assert "expected the 5 samples of" in message


def test_reports_must_be_as_many_and_as_long_as_said(site, model, tmp_path):
    succeed("encode", site, tmp_path / "r", "--model", model)
    found = read_reports(tmp_path / "r")
    with pytest.raises(ValueError, match="reports: expected 6, at least one, got 5"):
        write_reports(tmp_path / "s", found.reports, 6, found.values, found.layout)
    with pytest.raises(ValueError, match="bytes each, got 3 for report 1"):
        write_reports(tmp_path / "s", [found.reports[0], b"abc"], 2, found.values, found.layout)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "alexnet"), "model: expected one of llmcsinet, "),
        (("--variant", "XL"), "variant: expected one of S, M, L, got 'XL'"),
        (("--compression", 7), "compression: expected one of 8, 16, 32, 64, got 7"),
        (("--preset", "desktop"), "preset: expected one of laptop, paper, got 'desktop'"),
        (("--backbone", "gpt2"), "backbone: expected family:source or random, got 'gpt2'"),
        (("--model", "crnet", "--all-ratios"), "all-ratios, backbone: expected neither for crnet"),
        (("--backbone", "gpt2:/no/such/folder", "--data", "{site}"), "sources that work offline"),
    ],
)
def test_train_says_what_it_cannot_do(options, message, tmp_path):
    site = write_site(tmp_path / "site.h5", Environment(CellConfig(), 1301, 0).sample(20))
    filled = [str(option).replace("{site}", str(site)) for option in options]
    error = refuse("train", "--out", tmp_path / "run", *filled)
    assert message in error
    assert not (tmp_path / "run" / "model.safetensors").exists()
