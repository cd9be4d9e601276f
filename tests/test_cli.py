"""The command line as a newcomer meets it: a site from file to scores, and one line for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_line import refuse, succeed
from tiny_lasco import SAMPLES, save_random

from csimodels.channels.hdf5 import ChannelReader
from csimodels.models.lasco import LABELS
from csimodels.training import adapt as adapt_module
from csimodels.training import adapt_together as adapt_together_module
from csimodels.training import lasco_presets
from csimodels.training.checkpoint import load_checkpoint
from csimodels.training.loop import TrainConfig
from csimodels.training.proxy_file import load_proxy

COUNTS = [f"--{name}={count}" for name, count in zip(("train", "validation", "test"), SAMPLES, strict=True)]

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(autouse=True)
def quick_adaptation(monkeypatch):
    """Two epochs of two batches at every preset."""
    train = TrainConfig(epochs=2, batch_size=16, schedule="constant", patience=5, initial_candidate=True)
    for preset in ("laptop", "paper"):
        make = classmethod(lambda cls, **changes: cls(train, **changes))
        monkeypatch.setattr(adapt_module.AdaptConfig, preset, make)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A generated file of one environment."""
    path = tmp_path_factory.mktemp("site") / "site.h5"
    out = succeed("generate", path, "--environments", 1301, "--samples", sum(SAMPLES) + 4)
    assert out == f"wrote {sum(SAMPLES) + 4} samples of 1 environment to {path}\n"
    return path


# From a generated file to scores --------------------------------------------------------------------------------------


def test_generate_writes_what_it_was_asked_for(tmp_path):
    out = succeed("generate", tmp_path / "a.h5", "--environments", "3,7-8", "--samples", 5, "--seed", 2, "--patches", 4)
    assert out == f"wrote 15 samples of 3 environments to {tmp_path}/a.h5\n"
    with ChannelReader(tmp_path / "a.h5") as reader:
        assert reader.environment.tolist() == [3] * 5 + [7] * 5 + [8] * 5
        assert reader.los.tolist() == [False] * 10 + [True] * 5
        assert (reader.seed, reader.parameters["cell"]["patches"]) == (2, 4)
        assert reader.read().shape == (15, 32, 32)


def scores(out: str) -> dict[str, list[str]]:
    """Method label -> NMSE, GCS, epochs and alpha, from the printed table."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_evaluate_then_adapt_then_evaluate_again(site, shipped, tmp_path):
    before = scores(succeed("evaluate", "--data", site))
    assert set(before) == {LABELS["pretrained_lam"], LABELS["pretrained_sam"]}
    out = succeed("adapt", "--data", site, "--out", tmp_path / "run", *COUNTS)
    assert out.endswith(f"wrote {tmp_path}/run/proxy.safetensors and {tmp_path}/run/result.json\n")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["preset"], result["initial"]) == ("laptop", "pinv")
    assert set(result["methods"]) == {"pretrained_lam", "pretrained_sam", "e_lasco"}
    adapted = result["methods"]["e_lasco"]
    assert scores(out)["E-LASCO"] == [
        f"{adapted['nmse_db']:.2f}",
        f"{adapted['gcs']:.3f}",
        "2",
        f"{adapted['alpha']:.2f}",
    ]
    out = succeed("evaluate", "--data", site, "--proxy", tmp_path / "run" / "proxy.safetensors")
    assert out.startswith("left out: the first 40 samples, which the proxy was adapted on\n")
    assert set(scores(out)) == {*before, "E-LASCO"}
    assert scores(out)[LABELS["pretrained_lam"]] != before[LABELS["pretrained_lam"]]


def test_all_samples_of_another_file_are_evaluated(site, shipped, tmp_path):
    succeed("adapt", "--data", site, "--out", tmp_path, *COUNTS)
    succeed("generate", tmp_path / "other.h5", "--environments", 1303, "--samples", 6)
    out = succeed("evaluate", "--data", tmp_path / "other.h5", "--proxy", tmp_path / "proxy.safetensors")
    assert "left out" not in out
    assert "E-LASCO" in scores(out)


@pytest.mark.parametrize("method", ["finetuned_sam", "baseline_a", "lasco_no_reference", "lasco"])
def test_adapt_to_a_builtin_environment_with_each_method(method, shipped, tmp_path):
    out = succeed("adapt", "--environment", 1302, "--out", tmp_path, "--method", method, "--initial", "lmmse", *COUNTS)
    assert LABELS[method] in scores(out)
    _, codec, _ = load_checkpoint(shipped["base"])
    proxy, lmmse, _ = load_proxy(tmp_path / "proxy.safetensors", codec=codec)
    assert proxy.config.method == method
    assert lmmse is not None
    out = succeed("evaluate", "--environment", 1302, "--samples", 8, "--proxy", tmp_path / "proxy.safetensors")
    assert LABELS[method] in scores(out)


def test_alpha_is_lascos_coefficient_and_e_lascos_start(shipped, tmp_path):
    arguments = ("--environment", 1302, "--alpha", 0.4, *COUNTS)
    out = succeed("adapt", *arguments, "--method", "lasco", "--out", tmp_path / "a")
    assert scores(out)["LASCO"][3] == "0.40"
    out = succeed("adapt", *arguments, "--method", "e_lasco", "--out", tmp_path / "b")
    assert 0.3 < float(scores(out)["E-LASCO"][3]) < 0.5


def test_adapt_repeated_gives_the_same_without_training(site, shipped, tmp_path, monkeypatch):
    arguments = ("adapt", "--data", site, "--out", tmp_path, *COUNTS)
    first = succeed(*arguments)

    def trained(*arguments):
        raise AssertionError

    monkeypatch.setattr(adapt_module, "squared_error", trained)
    monkeypatch.setattr(adapt_together_module._BankTrainer, "_train_step", trained)
    assert succeed(*arguments) == first


def test_adapt_to_several_environments_writes_a_folder_for_each(shipped, tmp_path):
    succeed("generate", tmp_path / "two.h5", "--environments", "5,6", "--samples", sum(SAMPLES))
    out = succeed("adapt", "--data", tmp_path / "two.h5", "--environments", "6,5", "--out", tmp_path / "run", *COUNTS)
    assert re.findall(r"^environment (\d+)$", out, re.MULTILINE) == ["6", "5"]
    results = [json.loads((tmp_path / "run" / name / "result.json").read_text())["methods"] for name in ("5", "6")]
    assert results[0]["pretrained_lam"]["nmse_db"] != results[1]["pretrained_lam"]["nmse_db"]
    assert all(result["e_lasco"]["epochs"] == 2 for result in results)
    proxy = tmp_path / "run" / "6" / "proxy.safetensors"
    assert set(scores(succeed("evaluate", "--environment", 6, "--samples", 8, "--proxy", proxy))) >= {"E-LASCO"}
    out = succeed("evaluate", "--data", tmp_path / "two.h5", "--proxy", proxy)
    assert out.startswith("left out: the first 40 samples of environment 6, which the proxy was adapted on\n")
    succeed("adapt", "--environments", "7,8", "--out", tmp_path / "builtin", *COUNTS)
    assert (tmp_path / "builtin" / "8" / "proxy.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--environments", "5,9"], "two.h5: expected environments 5,9, it has no 9"),
        (["--environments", "5,5"], "environments: expected each once, got '5,5'"),
        (["--environments", "5", "--environment", 5], "environment, environments: expected one of them, got both"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_adapt_refuses_environments_that_are_not_there(options, message, shipped, tmp_path):
    succeed("generate", tmp_path / "two.h5", "--environments", "5,6", "--samples", 5)
    assert message in refuse("adapt", "--data", tmp_path / "two.h5", "--out", tmp_path / "run", *options, *COUNTS)
    assert not (tmp_path / "run").exists()


def test_adapt_takes_no_other_site_s_state_for_this_one_s(site, shipped, tmp_path):
    succeed("adapt", "--data", site, "--out", tmp_path, *COUNTS)
    before = (tmp_path / "proxy.safetensors").read_bytes()
    message = refuse("adapt", "--environment", 1302, "--out", tmp_path, *COUNTS)
    assert "state.safetensors: belongs to another run" in message
    assert "choose another output folder or remove the file" in message
    assert (tmp_path / "proxy.safetensors").read_bytes() == before


def test_pretrain_on_a_file_and_from_a_checkpoint(site, shipped, tmp_path, monkeypatch):
    small = lasco_presets.TransformerConfig(layers=1, width=16, heads=2, feedforward=32)
    monkeypatch.setattr(lasco_presets.TransformerConfig, "sam", lambda layers, width: small)
    arguments = ("--model", "reference", "--data", site, "--epochs", 1, "--batch-size", 16, "--codeword-length", 64)
    out = succeed("pretrain", *arguments, "--out", tmp_path / "a")
    assert re.match(rf"validation NMSE .* dB \(epoch 1 of 1, \d+ s\); wrote {tmp_path}/a/model.safetensors\n", out)
    model, codec, _ = load_checkpoint(tmp_path / "a" / "model.safetensors")
    assert (model.config, codec.codeword_length) == (small, 64)
    log = json.loads((tmp_path / "a" / "log.json").read_text())
    assert log["data"]["file"] == str(site)
    succeed("pretrain", *arguments, "--initial", tmp_path / "a" / "model.safetensors", "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "log.json").read_text())["validation_nmse_db"] < log["validation_nmse_db"]


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate' (see csimodels --help)"),
        (["adapt", "--environment", 3], "Missing option '--out' (see csimodels adapt --help)"),
        (["generate"], "Missing argument"),
        (["evaluate", "--samples", "many"], "Invalid value for '--samples'"),
        (["evaluate", "--samples", 0], "Invalid value for '--samples'"),
        (["evaluate", "--enviroment", 3], "No such option"),
        (["experiment"], "name: expected an experiment; csimodels experiment --list names them"),
        (["experiment", "lasco-fig5"], "name: expected one of lasco-fig6, lasco-fig7, "),
        (["experiment", "lasco-fig6", "--preset", "cluster"], "preset: expected "),
        (["evaluate"], "data, environment: expected exactly one of --data FILE and --environment INDEX"),
        (["evaluate", "--data", "x.h5", "--environment", 3], "data, environment: expected exactly one of --data FILE"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_usage_errors_take_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--method", "lasso"],
            "method: expected one of finetuned_sam, baseline_a, lasco_no_reference, lasco, ",
        ),
        (["--method", "lmmse"], "method: expected one of finetuned_sam"),
        (["--preset", "cluster"], "preset: expected one of laptop, paper, got 'cluster'"),
        (["--initial", "zero"], "initial: expected 'pinv' or 'lmmse', got 'zero'"),
        (["--alpha", "nan"], "alpha: expected a finite number, got nan"),
        (
            ["--method", "finetuned_sam", "--alpha", 1],
            "alpha: expected none for finetuned_sam, which has no ",
        ),
        (["--data", "x.h5"], "data, environment: expected exactly one of --data FILE and --environment INDEX"),
        (["--train", 15], "train: expected at least one batch of 16 samples, got 15"),
        (["--train", 1], "Invalid value for '--train'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_adapt_names_the_option_that_is_wrong(options, message, shipped, tmp_path):
    assert message in refuse("adapt", "--environment", 1302, "--out", tmp_path / "run", *COUNTS, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codeword-length", 0], "codeword_length: expected 1 to 2048 (2 * 32 * 32), got 0"),
        (["--codeword-length", 2049], "codeword_length: expected 1 to 2048 (2 * 32 * 32), got 2049"),
        (["--model", "large"], "model: expected one of base, reference, got 'large'"),
        (["--preset", "cluster"], "preset: expected one of laptop, paper, got 'cluster'"),
        (["--learning-rate", "-1"], "learning_rate: expected a finite number from 0, got -1.0"),
        (["--initial", "no.safetensors"], "no.safetensors: no such file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_pretrain_names_the_option_that_is_wrong(options, message, site, tmp_path):
    arguments = ["--model", "reference", "--data", site, "--out", tmp_path / "run", *options]
    assert message in refuse("pretrain", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "0", "5-3", "1-", "-4", "a", "1,,2", "1.5", "²"])
def test_generate_names_indices_that_it_cannot_read(text, tmp_path):
    expected = f"environments: expected numbers from 1 and ascending ranges such as 1-100,105, got {text!r}"
    assert refuse("generate", tmp_path / "a.h5", f"--environments={text}") == expected


def test_generate_refuses_repeated_indices_and_unknown_generators(tmp_path):
    assert "each once" in refuse("generate", tmp_path / "a.h5", "--environments", "1-3,2")
    assert "got 'quadriga'" in refuse("generate", tmp_path / "a.h5", "--generator", "quadriga")
    assert list(tmp_path.iterdir()) == []


def test_missing_truncated_and_foreign_data_files(site, shipped, tmp_path):
    assert refuse("evaluate", "--data", tmp_path / "no.h5") == f"{tmp_path}/no.h5: no such file"
    path = tmp_path / "bad.h5"
    path.write_bytes(b"")
    assert refuse("evaluate", "--data", path) == f"{path}: the file is empty"
    path.write_bytes(site.read_bytes()[:5000])
    assert f"{path}: truncated or damaged" in refuse("evaluate", "--data", path)
    path.write_text("antenna,subcarrier\n")
    assert f"{path}: not an HDF5 file" in refuse("adapt", "--data", path, "--out", tmp_path / "run", *COUNTS)
    with h5py.File(path, "w") as file:
        file["h"] = np.zeros(3)
    assert f"{path}: an HDF5 file, but not a channel file of csimodels" in refuse("evaluate", "--data", path)


def test_nan_in_a_data_set_is_counted_and_its_first_index_given(site, shipped, tmp_path):
    path = tmp_path / "nan.h5"
    path.write_bytes(site.read_bytes())
    with h5py.File(path, "r+") as file:
        for index in (41, 17):
            sample = file["h"][index]
            sample[3, 5] = np.nan
            file["h"][index] = sample
    expected = f"{path}: 2 of {sum(SAMPLES) + 4} samples are not finite, the first is sample 17"
    assert refuse("evaluate", "--data", path) == expected
    assert refuse("adapt", "--data", path, "--out", tmp_path / "run", *COUNTS) == expected
    assert refuse("pretrain", "--model", "base", "--data", path, "--out", tmp_path / "run") == expected
    assert not (tmp_path / "run").exists()


def test_too_few_samples_and_several_environments_in_a_file(site, shipped, tmp_path):
    message = refuse("adapt", "--data", site, "--out", tmp_path / "run")
    assert message == "train, validation, test: expected sizes from 1 that sum to at most 60, got 1000, 125 and 1000"
    message = refuse("adapt", "--data", site, "--out", tmp_path / "run", "--preset", "paper")
    assert message.endswith("got 8000, 1000 and 1000")
    succeed("generate", tmp_path / "two.h5", "--environments", "5,6", "--samples", 40)
    message = refuse("adapt", "--data", tmp_path / "two.h5", "--out", tmp_path / "run", *COUNTS)
    assert f"{tmp_path}/two.h5: expected one environment to adapt to, got 2" in message
    assert "csimodels generate FILE --environments 5" in message


def test_missing_truncated_and_foreign_checkpoints(site, shipped, tmp_path):
    arguments = ("evaluate", "--data", site, "--base")
    assert refuse(*arguments, tmp_path / "no") == f"{tmp_path}/no: no such file"
    path = tmp_path / "bad.safetensors"
    path.write_bytes(shipped["base"].read_bytes()[:2000])
    assert f"{path}: not a readable safetensors file of csimodels" in refuse(*arguments, path)
    assert f"{site}: not a readable safetensors file of csimodels" in refuse(*arguments, site)
    short = save_random(tmp_path / "short.safetensors", codeword_length=64)
    message = refuse(*arguments, short)
    assert "codeword_length=64" in message
    assert "codeword_length=256" in message  # names both


def test_channels_of_another_size_than_the_models(site, shipped, tmp_path):
    small = [
        save_random(tmp_path / f"{name}.safetensors", codeword_length=16, antennas=8, subcarriers=8)
        for name in ("base", "reference")
    ]
    message = refuse("evaluate", "--data", site, "--base", small[0], "--reference", small[1])
    assert message == "h: expected shape [batch, 8, 8], got (60, 32, 32)"


def test_a_proxy_is_refused_beside_other_models_and_foreign_files_are_no_proxies(site, shipped, tmp_path):
    succeed("adapt", "--data", site, "--out", tmp_path, *COUNTS)
    proxy = tmp_path / "proxy.safetensors"
    other = save_random(tmp_path / "other.safetensors")
    message = refuse("evaluate", "--data", site, "--proxy", proxy, "--base", other)
    assert message == f"{proxy}: adapted beside other models; give its --base and --reference"
    assert "not an adapted proxy" in refuse("evaluate", "--data", site, "--proxy", shipped["base"])
    assert "no such file" in refuse("evaluate", "--data", site, "--proxy", tmp_path / "no")
    message = refuse("evaluate", "--data", site, "--base", proxy)
    assert "not a csimodels checkpoint" in message


def test_a_missing_shipped_checkpoint_says_how_to_get_it(monkeypatch, tmp_path, site):
    monkeypatch.setattr("csimodels.assets.shipped_folder", lambda: tmp_path)
    message = refuse("evaluate", "--data", site)
    assert message == (
        f"{tmp_path}/base.safetensors: the shipped checkpoint is missing; `make demo-checkpoints` trains it again"
    )


def test_output_that_is_no_folder(shipped, site, tmp_path):
    (tmp_path / "file").write_text("here")
    for command in (["adapt", "--data", site, *COUNTS], ["demo"], ["experiment", "lasco-fig6"]):
        assert "Invalid value for '--out'" in refuse(*command, "--out", tmp_path / "file")
    message = refuse("adapt", "--data", site, *COUNTS, "--out", tmp_path / "file" / "below")
    assert "Not a directory" in message
    assert (tmp_path / "file").read_text() == "here"


def test_failures_that_are_nobodys_input_exit_with_1(shipped, site, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device", str(tmp_path / "proxy.safetensors"))

    monkeypatch.setattr("csimodels.training.proxy_file.save_tensors", full)
    message = refuse("adapt", "--data", site, "--out", tmp_path, *COUNTS, code=1)
    assert message == f"{tmp_path}/proxy.safetensors: No space left on device"
    assert not (tmp_path / "proxy.safetensors").exists()


def test_a_diverging_training_exits_with_1(site, tmp_path):
    arguments = ("--model", "reference", "--data", site, "--epochs", 2, "--batch-size", 16, "--learning-rate", "1e30")
    message = refuse("pretrain", *arguments, "--out", tmp_path, code=1)
    assert "lower the learning rate" in message


def test_error_texts_are_shown_as_they_are(tmp_path):
    path = tmp_path / "[bold]odd[/bold] name.h5"
    assert refuse("evaluate", "--data", path) == f"{path}: no such file"
