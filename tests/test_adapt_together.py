"""Adapting many environments in one bank: the runs of one after the other, at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_training import CODEC, MODEL, channels

from csimodels.models.channel_transformer import ChannelTransformer
from csimodels.models.lasco import ADAPTED_METHODS, Proxy
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training import adapt_together as module
from csimodels.training.adapt import AdaptConfig, Adapter, EnvironmentData
from csimodels.training.adapt_together import Adaptation, adapt_together, can_adapt_together
from csimodels.training.checkpoint import freeze
from csimodels.training.loop import TrainConfig, make_accelerator

TRAIN = TrainConfig(
    epochs=4, batch_size=16, learning_rate=3e-3, schedule="constant", patience=10, initial_candidate=True, save_every=3
)
SIZES = (96, 64, 80)  # training samples: 6, 4 and 5 steps an epoch
DESCRIPTION = {"environments": [2, 3, 4]}
pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def reference() -> ChannelTransformer:
    torch.manual_seed(0)
    return freeze(ChannelTransformer(MODEL))


@pytest.fixture(scope="module")
def data() -> list[EnvironmentData]:
    return [EnvironmentData.split(channels(140, index), size, 20, 24) for index, size in enumerate(SIZES, start=2)]


def make(reference, data, train: TrainConfig = TRAIN, **changes) -> list[Adapter]:
    config, codec = AdaptConfig(train, **changes), RandomProjectionCodec(CODEC)
    accelerator = make_accelerator(train, cpu=True)
    return [Adapter(lambda h: 0.5 * h, reference, codec, own, config, accelerator=accelerator) for own in data]


def together(adapters: list[Adapter], method: str = "e_lasco", **options):
    return adapt_together([Adaptation(adapter, method) for adapter in adapters], **options)


def weights(proxy: Proxy) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in proxy.state_dict().values()])


@pytest.mark.parametrize("form", ["collaborate", "shift"])
@pytest.mark.parametrize("method", ADAPTED_METHODS)
def test_every_method_ends_where_adapting_one_after_the_other_ends(reference, data, method, form):
    adapters = make(reference, data, form=form)
    for (result, proxy), adapter in zip(together(adapters, method), adapters, strict=True):
        expected, alone = adapter.adapt(method)
        assert (result.epochs, result.best_epoch) == (expected.epochs, expected.best_epoch)
        assert result.nmse_db == pytest.approx(expected.nmse_db, abs=2e-3)
        assert result.gcs == pytest.approx(expected.gcs, abs=1e-4)
        assert (result.alpha is None) == (expected.alpha is None)
        assert result.alpha == pytest.approx(expected.alpha, abs=1e-4)
        assert proxy.config == alone.config
        assert not proxy.training
        assert result.seconds > 0


def test_the_losses_of_every_epoch_are_those_of_the_runs_alone(reference, data):
    adapters = make(reference, data)
    trainer = module._BankTrainer([Adaptation(adapter, "e_lasco") for adapter in adapters], None, None, None)
    trainer.fit()
    for own, adapter in zip(trainer.progress, adapters, strict=True):
        alone = adapter._trainer(Proxy(adapter.proxy_config("e_lasco"), reference), None, None).fit()
        losses = [entry["loss"] for entry in alone.history]
        assert own.losses == pytest.approx(losses, abs=1e-4)
        assert len(losses) == 4


def test_methods_and_coefficients_share_a_bank(reference, data):
    (adapter,) = make(reference, data[:1])
    runs = [("lasco", 0.4), ("finetuned_sam", None), ("e_lasco", None), ("lasco", None), ("baseline_a", None)]
    results = adapt_together([Adaptation(adapter, method, alpha) for method, alpha in runs])
    for (method, alpha), (result, _) in zip(runs, results, strict=True):
        expected = adapter.score(method, alpha=alpha)
        assert result.nmse_db == pytest.approx(expected.nmse_db, abs=2e-3), method
        assert result.alpha == pytest.approx(expected.alpha, abs=1e-4)
    assert results[0][0].alpha == pytest.approx(0.4)
    assert results[3][0].alpha == pytest.approx(0.7)


def test_an_environment_stops_alone_and_keeps_its_best_weights(reference, data):
    train = dataclasses.replace(TRAIN, epochs=12, patience=2, learning_rate=3e-2)
    adapters = make(reference, data, train)
    results = together(adapters)
    expected = [adapter.adapt("e_lasco")[0] for adapter in adapters]
    assert [result.epochs for result, _ in results] == [alone.epochs for alone in expected]
    assert len({result.epochs for result, _ in results}) > 1  # or the test shows nothing
    for (result, _), alone in zip(results, expected, strict=True):
        assert result.best_epoch == alone.best_epoch
        assert result.nmse_db == pytest.approx(alone.nmse_db, abs=2e-2)


def test_nothing_improves_on_the_untrained_proxy(reference, data):
    frozen = dataclasses.replace(TRAIN, epochs=9, patience=3, learning_rate=1e-30)
    for result, proxy in together(make(reference, data, frozen), "finetuned_sam"):
        assert (result.epochs, result.best_epoch) == (3, 0)
        torch.testing.assert_close(weights(proxy.sam), weights(reference), rtol=0, atol=0)


def test_a_fixed_alpha_beside_a_learned_one_stays(reference, data):
    (adapter,) = make(reference, data[:1], alpha=0.6)
    (_, fixed), (_, learned) = adapt_together([Adaptation(adapter, "lasco"), Adaptation(adapter, "e_lasco")])
    assert fixed.alpha.item() == torch.tensor(0.6).item()
    assert abs(learned.alpha.item() - 1) > 1e-3


def killed_at(step: int):
    def on_step(now: int, total: int, loss: float) -> None:
        if now == step:
            raise KeyboardInterrupt

    return on_step


def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(reference, data, tmp_path):
    expected = together(make(reference, data), run_dir=tmp_path / "a", description=DESCRIPTION)
    with pytest.raises(KeyboardInterrupt):
        together(make(reference, data), run_dir=tmp_path / "b", description=DESCRIPTION, on_step=killed_at(11))
    steps = []
    resumed = together(
        make(reference, data), run_dir=tmp_path / "b", description=DESCRIPTION, on_step=lambda *at: steps.append(at[0])
    )
    assert steps == list(range(10, 25))  # on from the state of step 9
    for (result, proxy), (whole, unbroken) in zip(resumed, expected, strict=True):
        assert torch.equal(weights(proxy), weights(unbroken))
        assert (result.nmse_db, result.best_epoch, result.epochs) == (whole.nmse_db, whole.best_epoch, 4)
    again = together(make(reference, data), run_dir=tmp_path / "b", description=DESCRIPTION, on_step=killed_at(1))
    assert all(torch.equal(weights(a), weights(b)) for (_, a), (_, b) in zip(again, resumed, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"description": {"environments": [9]}}, {"method": "lasco"}, {"initial_alpha": 0.5}, {"slots": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_state_of_another_run_is_refused(reference, data, tmp_path, change):
    together(make(reference, data), run_dir=tmp_path, description=DESCRIPTION)
    arguments = {"method": "e_lasco", "description": DESCRIPTION}
    arguments |= {name: change[name] for name in change if name in arguments}
    adapters = make(reference, data, **{name: change[name] for name in change if name == "initial_alpha"})
    with pytest.raises(ValueError, match="state.safetensors: belongs to another run.*choose another output folder"):
        together(adapters[: change.get("slots", 3)], run_dir=tmp_path, **arguments)


def test_mistakes_are_named(reference, data, monkeypatch):
    adapters = make(reference, data)
    with pytest.raises(ValueError, match="adaptations: expected at least one, got none"):
        adapt_together([])
    with pytest.raises(ValueError, match="description: expected one with run_dir"):
        together(adapters, run_dir="here")
    with pytest.raises(ValueError, match="method: expected one of finetuned_sam.*got 'lmmse'"):
        together(adapters, "lmmse")
    with pytest.raises(ValueError, match="adaptations: expected one configuration"):
        together([adapters[0], *make(reference, data[1:], alpha=0.1)])
    other = freeze(ChannelTransformer(MODEL))
    with pytest.raises(ValueError, match="adaptations: expected adapters with the same reference SAM"):
        together([adapters[0], *make(other, data[1:])])
    with pytest.raises(ValueError, match="train: expected at least one batch of 97 samples, got 96"):
        together(make(reference, data, dataclasses.replace(TRAIN, batch_size=97)))
    with pytest.raises(ValueError, match="schedule: expected 'constant' for environments of different sample counts"):
        together(make(reference, data, dataclasses.replace(TRAIN, schedule="cosine")))
    with pytest.raises(FloatingPointError, match=r"of adaptation \d \(e_lasco\) became .*; lower the learning rate"):
        together(make(reference, data, dataclasses.replace(TRAIN, learning_rate=1e30)))


def test_a_cosine_schedule_with_equal_sizes_is_that_of_the_runs_alone(reference, data):
    cosine = dataclasses.replace(TRAIN, schedule="cosine")
    equal = [EnvironmentData.split(channels(140, index), 64, 20, 24) for index in (2, 3)]
    adapters = make(reference, equal, cosine)
    for (result, _), adapter in zip(together(adapters), adapters, strict=True):
        assert result.nmse_db == pytest.approx(adapter.adapt("e_lasco")[0].nmse_db, abs=2e-3)


def test_bf16_is_not_overruled(reference, data):
    assert not can_adapt_together(make(reference, data, dataclasses.replace(TRAIN, mixed_precision="bf16"))[0])
    compiled = "cpp" in module.csikernels.backends()["lasco_training_forward"]["cpu"]
    assert can_adapt_together(make(reference, data)[0]) == compiled
