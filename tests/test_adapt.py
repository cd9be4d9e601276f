"""Adaptation to one environment: what it calls, what it trains, when it stops, how it resumes, what it writes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny_training import CELL, CODEC, MODEL, channels

from csimodels.channels.rays import normalize_power
from csimodels.evaluation.lmmse import LinearMmse
from csimodels.evaluation.metrics import gcs, nmse_db
from csimodels.files import load_tensors, save_tensors
from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.models.lasco import ADAPTED_METHODS, Proxy, ProxyConfig
from csimodels.models.projection import CodecConfig, RandomProjectionCodec
from csimodels.training import adapt as adapt_module
from csimodels.training.adapt import AdaptConfig, Adapter, EnvironmentData, linear_estimate
from csimodels.training.checkpoint import freeze, save_checkpoint
from csimodels.training.loop import TrainConfig, make_accelerator
from csimodels.training.proxy_file import load_proxy, save_proxy
from csimodels.training.score import score_models

TRAIN = TrainConfig(
    epochs=4, batch_size=16, learning_rate=3e-3, schedule="constant", patience=10, initial_candidate=True, save_every=3
)
DESCRIPTION = {"environment": 2}
pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def codec() -> RandomProjectionCodec:
    return RandomProjectionCodec(CODEC)


@pytest.fixture(scope="module")
def reference() -> ChannelTransformer:
    torch.manual_seed(0)
    return freeze(ChannelTransformer(MODEL))


@pytest.fixture(scope="module")
def data() -> EnvironmentData:
    return EnvironmentData.split(channels(140), 96, 20, 24)


def damped(h_in: torch.Tensor) -> torch.Tensor:
    """A black box: no module, no parameters."""
    return 0.5 * h_in


def make(reference, codec, data, base=damped, train: TrainConfig = TRAIN, **changes) -> Adapter:
    config = AdaptConfig(train, **changes)
    return Adapter(base, reference, codec, data, config, accelerator=make_accelerator(train, cpu=True))


def weights(proxy) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in proxy.state_dict().values()])


class Counting:
    """Counts the samples and remembers whether anything asked for gradients."""

    def __init__(self):
        self.samples, self.calls, self.gradients = 0, 0, False

    def __call__(self, h_in: torch.Tensor) -> torch.Tensor:
        self.samples += len(h_in)
        self.calls += 1
        self.gradients |= h_in.requires_grad or torch.is_grad_enabled()
        return damped(h_in)


def test_the_base_sees_every_sample_once_however_much_is_adapted(reference, codec, data):
    base = Counting()
    adapter = make(reference, codec, data, base)
    assert base.samples == 96 + 20 + 24
    for method in ("lasco", "e_lasco", "baseline_a", "pretrained_lam"):
        adapter.score(method)
    assert base.samples == 96 + 20 + 24
    assert base.calls == 3
    assert not base.gradients


def test_a_black_box_is_scored_by_its_outputs_alone(reference, codec, data):
    result = make(reference, codec, data).score("pretrained_lam")
    estimate = codec.to_channel(0.5 * codec.initial(codec.encode(data.test)))
    assert result.nmse_db == pytest.approx(nmse_db(data.test, estimate).item(), abs=1e-5)
    assert result.gcs == pytest.approx(gcs(data.test, estimate).item(), abs=1e-6)
    assert (result.epochs, result.alpha, result.seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (lambda h: h[:, :-1], ValueError, r"base: expected outputs of shape \(96, 8, 16\), got \(96, 7, 16\)"),
        (lambda h: h.numpy(), TypeError, "base: expected outputs of type torch.Tensor, got ndarray"),
        (lambda h: h / 0, ValueError, "base: expected finite outputs, got 12288 that are NaN or infinite"),
    ],
)
def test_outputs_that_do_not_fit_are_refused_before_any_training(reference, codec, data, base, error, message):
    with pytest.raises(error, match=message):
        make(reference, codec, data, base)


def validation_nmse(adapter: Adapter, proxy) -> float:
    """In dB, from the public parts alone."""
    h = adapter.data.validation
    h_in = adapter.codec.initial(adapter.codec.encode(h))
    with torch.no_grad():
        estimate = proxy(h_in, damped(h_in), adapter.reference(h_in))
    return nmse_db(h, adapter.codec.to_channel(estimate)).item()


@pytest.mark.parametrize("method", ADAPTED_METHODS)
def test_adaptation_improves_the_validation_nmse(reference, codec, data, method):
    adapter = make(reference, codec, data)
    untrained = Proxy(ProxyConfig(method, 0.7), reference)
    result, proxy = adapter.adapt(method)
    assert validation_nmse(adapter, proxy) < validation_nmse(adapter, untrained) - 0.3
    assert 1 <= result.best_epoch <= result.epochs == 4
    assert result.seconds > 0
    assert not proxy.training


def test_frozen_models_stay_as_they_are(reference, codec, data):
    base = freeze(ChannelTransformer(MODEL))
    before = weights(base).clone(), weights(reference).clone()
    make(reference, codec, data, base).adapt("e_lasco")
    assert torch.equal(weights(base), before[0])
    assert torch.equal(weights(reference), before[1])


def test_e_lasco_learns_alpha_and_lasco_keeps_it(reference, codec, data):
    adapter = make(reference, codec, data, alpha=0.6, initial_alpha=0.9)
    elastic, proxy = adapter.adapt("e_lasco")
    assert elastic.alpha == proxy.alpha.item()
    assert abs(elastic.alpha - 0.9) > 0.01
    fixed, proxy = adapter.adapt("lasco")
    assert fixed.alpha == proxy.alpha.item() == pytest.approx(0.6)
    swept, _ = adapter.adapt("lasco", alpha=1.4)
    assert swept.alpha == pytest.approx(1.4)
    assert swept.nmse_db != fixed.nmse_db
    assert adapter.score("lasco", alpha=1.4).nmse_db == swept.nmse_db
    assert adapter.adapt("finetuned_sam")[0].alpha is None


def test_alpha_has_its_own_learning_rate(reference, codec, data):
    still = make(reference, codec, data, alpha_learning_rate=0.0).adapt("e_lasco")[1]
    assert still.alpha.item() == 1.0  # neither a step nor weight decay
    one = dataclasses.replace(TRAIN, epochs=1, batch_size=96)
    moved = make(reference, codec, data, train=one, alpha_learning_rate=0.02).adapt("e_lasco")[1]
    assert abs(moved.alpha.item() - 1.0) == pytest.approx(0.02, rel=1e-3)  # AdamW's first step is the rate itself


def test_lmmse_start_hands_the_networks_the_linear_estimate(reference, codec, data):
    identity = make(reference, codec, data, lambda h: h, initial="lmmse")
    assert identity.score("pretrained_lam").nmse_db == pytest.approx(identity.score("lmmse").nmse_db, abs=1e-5)
    lmmse = LinearMmse.fit(codec.target(data.train).flatten(1), codec.projection)
    estimate = linear_estimate(lmmse, codec, data.test)
    expected = nmse_db(data.test, codec.to_channel(estimate)).item()
    assert identity.score("lmmse").nmse_db == pytest.approx(expected, abs=1e-5)
    assert make(reference, codec, data).score("lmmse").nmse_db == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        small = codec.to_channel(reference(estimate))
    assert identity.score("pretrained_sam").nmse_db == pytest.approx(nmse_db(data.test, small).item(), abs=1e-4)


def test_two_runs_of_the_same_are_the_same(reference, codec, data):
    for method in ("baseline_a", "e_lasco"):
        (first, proxy), (second, again) = (make(reference, codec, data).adapt(method) for _ in range(2))
        assert torch.equal(weights(proxy), weights(again))
        assert (first.nmse_db, first.gcs, first.alpha) == (second.nmse_db, second.gcs, second.alpha)


def test_stops_when_the_validation_nmse_no_longer_improves(reference, codec, data):
    frozen = dataclasses.replace(TRAIN, epochs=9, patience=3, learning_rate=1e-30)
    result, proxy = make(reference, codec, data, train=frozen).adapt("finetuned_sam")
    assert (result.epochs, result.best_epoch) == (3, 0)  # the untrained proxy is a candidate
    assert torch.equal(weights(proxy.sam), weights(reference))


def test_a_killed_adaptation_ends_as_an_unbroken_one(reference, codec, data, tmp_path, monkeypatch):
    expected, proxy = make(reference, codec, data).adapt("e_lasco", run_dir=tmp_path / "a", description=DESCRIPTION)
    plain, error = adapt_module.squared_error, iter(range(100))

    def killed(*arguments):
        if next(error) == 10:  # the second epoch, past the state of step 9
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(adapt_module, "squared_error", killed)
    with pytest.raises(KeyboardInterrupt):
        make(reference, codec, data).adapt("e_lasco", run_dir=tmp_path / "b", description=DESCRIPTION)
    steps = []
    monkeypatch.setattr(adapt_module, "squared_error", lambda *arguments: steps.append(1) or plain(*arguments))
    result, resumed = make(reference, codec, data).adapt("e_lasco", run_dir=tmp_path / "b", description=DESCRIPTION)
    assert len(steps) == 4 * 6 - 9
    assert torch.equal(weights(resumed), weights(proxy))
    assert (result.nmse_db, result.best_epoch, result.epochs) == (expected.nmse_db, expected.best_epoch, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"description": {"environment": 3}},
        {"method": "lasco"},
        {"initial_alpha": 0.5},
        {"train": dataclasses.replace(TRAIN, epochs=9)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_state_of_another_adaptation_is_refused(reference, codec, data, tmp_path, change):
    make(reference, codec, data).adapt("e_lasco", run_dir=tmp_path, description=DESCRIPTION)
    arguments = {"method": "e_lasco", "description": DESCRIPTION}
    arguments |= {name: change.pop(name) for name in list(change) if name in arguments}
    with pytest.raises(ValueError, match="state.safetensors: belongs to another run.*choose another output folder"):
        make(reference, codec, data, **change).adapt(run_dir=tmp_path, **arguments)


def test_a_folder_needs_a_description_of_the_data(reference, codec, data, tmp_path):
    with pytest.raises(ValueError, match="description: expected one with run_dir, got None"):
        make(reference, codec, data).adapt("lasco", run_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adaptation_may_follow_a_training_in_another_precision(reference, codec, data):
    plain = make(reference, codec, data).adapt("lasco")[1]
    half = dataclasses.replace(TRAIN, mixed_precision="bf16")
    rounded = make(reference, codec, data, train=half).adapt("lasco")[1]
    assert not torch.equal(weights(rounded), weights(plain))
    torch.testing.assert_close(weights(rounded), weights(plain), rtol=0, atol=0.05)
    assert torch.equal(weights(make(reference, codec, data).adapt("lasco")[1]), weights(plain))


def test_bad_methods_options_and_sizes_are_named(reference, codec, data):
    adapter = make(reference, codec, data)
    with pytest.raises(ValueError, match="method: expected one of pretrained_lam.*lmmse, got 'laso'"):
        adapter.score("laso")
    with pytest.raises(ValueError, match="method: expected one of finetuned_sam.*got 'lmmse'"):
        adapter.adapt("lmmse")
    with pytest.raises(ValueError, match="initial: expected 'pinv' or 'lmmse', got 'zero'"):
        AdaptConfig(TRAIN, initial="zero")
    with pytest.raises(ValueError, match="alpha: expected a finite number, got nan"):
        AdaptConfig(TRAIN, alpha=float("nan"))
    with pytest.raises(ValueError, match="train: expected a positive learning rate, got 0"):
        AdaptConfig(dataclasses.replace(TRAIN, learning_rate=0.0))
    large = dataclasses.replace(TRAIN, batch_size=97)
    with pytest.raises(ValueError, match="train: expected at least one batch of 97 samples, got 96"):
        make(reference, codec, data, train=large).adapt("lasco")


def test_splits_are_disjoint_in_order_and_normalised():
    h = channels(10) * torch.arange(1, 11)[:, None, None]
    split = EnvironmentData.split(h, 5, 2, 3)
    pooled = torch.cat([split.train, split.validation, split.test])
    torch.testing.assert_close(pooled.abs().square().sum(dim=(1, 2)), torch.full((10,), 64.0))
    torch.testing.assert_close(pooled, normalize_power(channels(10)))
    assert [len(part) for part in (split.train, split.validation, split.test)] == [5, 2, 3]


@pytest.mark.parametrize("sizes", [(9, 1, 1), (0, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_splits_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=f"expected sizes from 1 that sum to at most 10, got {sizes[0]}, {sizes[1]}"):
        EnvironmentData.split(channels(10), *sizes)


def test_a_nan_in_the_data_is_refused_with_its_index():
    h = channels(10)
    h[7, 3, 2] = complex("nan")
    with pytest.raises(ValueError, match="index 7"):
        EnvironmentData.split(h, 8, 1, 1)


def test_outputs_are_channels_side_by_side(reference, codec, data):
    adapter = make(reference, codec, data)
    _, proxy = adapter.adapt("lasco")
    outputs = adapter.outputs(proxy, 3)
    torch.testing.assert_close(outputs["truth"], data.test[:3])
    pseudo_inverse = codec.encode(data.test[:3]) @ codec.pseudo_inverse.T
    expected = pseudo_inverse.unflatten(1, codec.token_shape) * codec.token_scale
    torch.testing.assert_close(outputs["input"], codec.to_channel(expected))
    h_in = codec.initial(codec.encode(data.test[:3]))
    torch.testing.assert_close(outputs["base"], codec.to_channel(damped(h_in)))
    with torch.no_grad():
        estimate = proxy(h_in, damped(h_in), reference(h_in))
    torch.testing.assert_close(outputs["estimate"], codec.to_channel(estimate))


def test_presets_are_the_papers_and_the_laptops():
    paper, laptop = AdaptConfig.paper().train, AdaptConfig.laptop(initial="lmmse")
    assert (paper.epochs, paper.batch_size, paper.learning_rate, paper.patience) == (100, 256, 1e-3, 20)
    assert paper.schedule == laptop.train.schedule == "constant"
    assert (laptop.train.epochs, laptop.train.batch_size, laptop.train.patience) == (40, 64, 10)
    assert laptop.initial == "lmmse"


# Proxy files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["pinv", "lmmse"])
@pytest.mark.parametrize("method", ADAPTED_METHODS)
def test_a_proxy_comes_back_from_its_file_and_scores_the_same(reference, codec, data, tmp_path, method, initial):
    adapter = make(reference, codec, data, initial=initial, train=dataclasses.replace(TRAIN, epochs=1))
    result, proxy = adapter.adapt(method)
    path = tmp_path / "proxy.safetensors"
    save_proxy(path, proxy, CODEC, lmmse=adapter.lmmse if initial == "lmmse" else None, extra={"note": [1]})
    loaded, lmmse, extra = load_proxy(path, codec=CODEC)
    assert loaded.config == proxy.config
    assert torch.equal(weights(loaded), weights(proxy))
    assert (lmmse is not None) == (initial == "lmmse")
    assert extra == {"note": [1]}
    assert not loaded.training
    scores = score_models(damped, reference, codec, data.test, path, batch=5)
    assert set(scores) == {"pretrained_lam", "pretrained_sam", method}
    assert scores[method]["nmse_db"] == pytest.approx(result.nmse_db, abs=1e-4)
    assert scores[method]["gcs"] == pytest.approx(result.gcs, abs=1e-5)
    assert scores[method].get("alpha") == result.alpha


def test_the_frozen_models_are_scored_from_the_pseudo_inverse_even_beside_an_lmmse_proxy(
    reference, codec, data, tmp_path
):
    adapter = make(reference, codec, data, initial="lmmse", train=dataclasses.replace(TRAIN, epochs=1))
    save_proxy(tmp_path / "p", adapter.adapt("lasco")[1], CODEC, lmmse=adapter.lmmse)
    beside, alone = (score_models(damped, reference, codec, data.test, path) for path in (tmp_path / "p", None))
    assert beside["pretrained_lam"] == alone["pretrained_lam"]
    assert beside["pretrained_sam"] == alone["pretrained_sam"]


@pytest.fixture
def proxy_path(reference, codec, data, tmp_path):
    adapter = make(reference, codec, data, initial="lmmse", train=dataclasses.replace(TRAIN, epochs=1))
    save_proxy(tmp_path / "proxy.safetensors", adapter.adapt("lasco")[1], CODEC, lmmse=adapter.lmmse)
    return tmp_path / "proxy.safetensors"


def test_missing_truncated_and_foreign_proxy_files_are_refused(proxy_path, reference, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file"):
        load_proxy(tmp_path / "nothing.safetensors", codec=CODEC)
    whole = proxy_path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PK\x03\x04 something else"):
        proxy_path.write_bytes(content)
        with pytest.raises(ValueError, match="proxy.safetensors: not a readable safetensors file"):
            load_proxy(proxy_path, codec=CODEC)
    save_checkpoint(tmp_path / "sam.safetensors", reference, CODEC)
    with pytest.raises(ValueError, match="sam.safetensors: not an adapted proxy .*'csimodels.proxy'"):
        load_proxy(tmp_path / "sam.safetensors", codec=CODEC)


def test_a_proxy_for_another_codec_is_refused_naming_both(proxy_path):
    with pytest.raises(ValueError, match="adapted for CodecConfig.*codeword_length=32.*is for .*codeword_length=16"):
        load_proxy(proxy_path, codec=CodecConfig(antennas=8, subcarriers=8, codeword_length=16))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, metadata: metadata.pop("proxy"), "does not know its configuration"),
        (lambda tensors, metadata: metadata["proxy"].update(method="other"), "does not know its configuration"),
        (lambda tensors, metadata: metadata["config"].update(dilation=2), "does not know its configuration"),
        (lambda tensors, metadata: metadata.pop("rank"), "does not know its configuration"),
        (lambda tensors, metadata: tensors.pop("proxy.alpha"), "do not fit its own configuration"),
        (lambda tensors, metadata: tensors.pop("lmmse.gain"), "do not fit its own configuration"),
        (lambda tensors, metadata: metadata["config"].update(width=32), "do not fit its own configuration"),
    ],
)
def test_a_proxy_file_that_is_not_consistent_is_refused(proxy_path, edit, message):
    tensors, metadata = load_tensors(proxy_path)
    edit(tensors, metadata)
    save_tensors(proxy_path, tensors, metadata)
    with pytest.raises(ValueError, match=f"proxy.safetensors: .*{message}"):
        load_proxy(proxy_path, codec=CODEC)


def test_proxy_metadata_is_plain_json(proxy_path):
    _, metadata = load_tensors(proxy_path)
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["codec"]["antennas"] == len(CELL.array)
