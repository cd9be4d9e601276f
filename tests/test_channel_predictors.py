"""Predictors of the next slots: shapes, errors, what trains, what they can learn; the linear one by its formula."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.channels.multitask_data import prediction_channels
from csimodels.files import load_tensors, save_tensors
from csimodels.models.backbone import BackboneConfig
from csimodels.models.channel_predictors import (
    CELLS,
    RecurrentConfig,
    RecurrentPredictor,
    TransformerPredictor,
    TransformerPredictorConfig,
    sinusoids,
)
from csimodels.models.channel_transformer import parameter_count
from csimodels.models.linear_predictor import (
    DOMAINS,
    HoldConfig,
    HoldPredictor,
    LinearConfig,
    LinearPredictor,
)
from csimodels.models.llm4cp import Llm4cp, Llm4cpConfig

SIZES = {"history": 8, "future": 3, "subcarriers": 5}


def backbone(**changes):
    fields = {"family": "gpt2", "layers": 1, "width": 16, "heads": 2, "feedforward": 32, "attention": "causal"}
    return BackboneConfig(**(fields | {"settings": {"n_positions": 8}} | changes))


def small_llm4cp(**changes):
    fields = {"attention_blocks": 1, "attention_channels": 4, "dropout": 0.0, "tuned": "all"}
    return Llm4cpConfig(changes.pop("backbone", backbone()), **(SIZES | fields | changes))


def networks(seed=0):
    """Small ones of all kinds, by name."""
    torch.manual_seed(seed)
    made = {cell: RecurrentPredictor(RecurrentConfig(cell, **SIZES, layers=2, width=24)) for cell in CELLS}
    sizes = {"label": 4, "width": 24, "heads": 2, "feedforward": 32, "encoder_layers": 1, "decoder_layers": 1}
    made["transformer"] = TransformerPredictor(TransformerPredictorConfig(**SIZES, **sizes))
    made["llm4cp"] = Llm4cp(small_llm4cp())
    return made


NETWORKS = tuple(networks())


def exponentials(count, generator, *, slots=11, subcarriers=5, terms=1, dtype=torch.complex64):
    """Sums of ``terms`` complex exponentials in each subcarrier, with frequencies of a UE's own up to 0.12 per slot."""
    frequency = (torch.rand(count, terms, 1, 1, generator=generator, dtype=torch.float64) - 0.5) * 0.24
    parts = torch.randn(2, count, terms, 1, subcarriers, generator=generator, dtype=torch.float64)
    phase = 2 * math.pi * frequency * torch.arange(slots, dtype=torch.float64)[:, None]
    h = (torch.complex(*parts) * torch.polar(torch.ones_like(phase), phase)).sum(1)
    return h.to(dtype)


def nmse(predicted, future):
    return ((predicted - future).abs().square().sum() / future.abs().square().sum()).item()


def random_history(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("samples", [1, 3])
def test_shapes_and_samples_that_do_not_depend_on_each_other(name, samples):
    model = networks()[name].eval()
    history = random_history(samples, 8, 5)
    predicted = model(history)
    assert predicted.shape == (samples, 3, 5) and predicted.dtype == torch.complex64
    one_by_one = torch.cat([model(history[i : i + 1]) for i in range(samples)])
    torch.testing.assert_close(predicted, one_by_one, rtol=1e-5, atol=1e-6)
    assert torch.equal(predicted, networks()[name].eval()(history))


@pytest.mark.parametrize("name", NETWORKS)
def test_strided_and_conjugated_histories(name):
    model = networks()[name].eval()
    base = random_history(5, 8, 3)
    for history in (base.permute(2, 1, 0), base.permute(2, 1, 0).conj()):
        torch.testing.assert_close(model(history), model(history.resolve_conj().contiguous()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_amplitude_goes_through_and_nothing_comes_of_nothing(name):
    model = networks()[name].eval()
    history = random_history(2, 8, 5)
    torch.testing.assert_close(model(history * 1e3), model(history) * 1e3, rtol=1e-4, atol=1e-2)
    assert model(torch.zeros_like(history)).abs().max() < 1e-30


@pytest.mark.parametrize("name", NETWORKS)
def test_all_slots_and_all_trainable_weights_count(name):
    model = networks()[name]
    history = random_history(4, 8, 5).requires_grad_()
    model(history).abs().square().mean().backward()
    assert (history.grad.abs().amax((0, 2)) > 0).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", [*NETWORKS, "hold", "linear"])
def test_histories_that_do_not_fit_are_refused(name):
    others = {
        "hold": lambda: HoldPredictor(HoldConfig(**SIZES)),
        "linear": lambda: LinearPredictor(LinearConfig(**SIZES)),
    }
    model = others[name]() if name in others else networks()[name]
    for shape in ((2, 7, 5), (2, 8, 6), (8, 5), (2, 1, 8, 5)):
        with pytest.raises(ValueError) as raised:
            model(random_history(*shape))
        assert str(raised.value) == f"history: expected [B, 8, 5], got {shape}"
    with pytest.raises(TypeError, match="history: expected a tensor of complex64 or complex128, got torch.float32"):
        model(torch.ones(2, 8, 5))
    with pytest.raises(TypeError, match="history: expected a tensor .* got list"):
        model([[1j]])


@pytest.mark.parametrize("name", NETWORKS)
def test_each_learns_exponentials_that_hold_cannot_follow(name):
    generator = torch.Generator().manual_seed(3)
    model = networks(seed=1)[name].train()
    optimizer = torch.optim.Adam(model.parameters(), 8e-3)
    for _ in range(150):
        h = exponentials(64, generator)
        optimizer.zero_grad()
        (model(h[:, :8]) - h[:, 8:]).abs().square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        test = exponentials(500, generator)
        learnt = nmse(model(test[:, :8]), test[:, 8:])
    held = nmse(HoldPredictor(HoldConfig(**SIZES))(test[:, :8]), test[:, 8:])
    assert learnt < 0.6 * held, (learnt, held)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_predictors_feed_back_what_they_predict(cell):
    torch.manual_seed(0)
    longer = RecurrentPredictor(RecurrentConfig(cell, **SIZES, layers=2, width=24))
    shorter = RecurrentPredictor(RecurrentConfig(cell, **(SIZES | {"future": 1}), layers=2, width=24))
    shorter.load_state_dict(longer.state_dict())
    history = random_history(1, 8, 5)
    predicted = longer(history)
    torch.testing.assert_close(predicted[:, :1], shorter(history))
    # The second slot is what follows the history and the first one, all at the scale of the history.
    follows = torch.cat([history, predicted[:, :1]], dim=1)
    amplitude = history.abs().square().mean().sqrt()
    hidden, _ = longer.cells(longer.embed(torch.cat([follows.real, follows.imag], -1) / amplitude))
    second = longer.project(hidden[:, -1:]) * amplitude
    torch.testing.assert_close(torch.cat([predicted.real, predicted.imag], -1)[:, 1:2], second, rtol=1e-4, atol=1e-5)


def test_the_layers_and_sizes_are_the_paper_s():
    for cell, millions in (("rnn", 0.33), ("lstm", 1.22), ("gru", 0.93)):
        config = RecurrentConfig.paper(cell)
        assert (config.cell, config.layers, config.history, config.future, config.subcarriers) == (cell, 4, 16, 4, 48)
        assert parameter_count(RecurrentPredictor(config)) / 1e6 == pytest.approx(millions, abs=0.01)
    paper = Llm4cpConfig.paper()
    assert (paper.backbone.layers, paper.backbone.width, paper.tuned) == (6, 768, "norms")
    assert paper.backbone.source == "openai-community/gpt2"


def test_laptop_sizes_are_between_0_2_and_0_6_million():
    models = [RecurrentPredictor(RecurrentConfig.laptop(cell)) for cell in CELLS]
    models += [TransformerPredictor(TransformerPredictorConfig.laptop()), Llm4cp(Llm4cpConfig.laptop())]
    history = random_history(2, 16, 48)
    for model in models:
        assert 0.2e6 < parameter_count(model) < 0.6e6
        assert model(history).shape == (2, 4, 48)


def test_sinusoids_of_an_odd_width():
    table = sinusoids(3, 5)
    assert table.shape == (3, 5)
    torch.testing.assert_close(table[2, :2], torch.tensor([math.sin(2), math.cos(2)]))
    torch.testing.assert_close(table[2, 4].item(), math.sin(2 * 10000 ** (-4 / 5)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RecurrentConfig("mlp"), "cell: expected one of rnn, lstm, gru, got 'mlp'"),
        (lambda: RecurrentConfig(layers=0), "layers: expected a whole number of at least 1, got 0"),
        (lambda: RecurrentConfig(width=1.5), "width: expected a whole number of at least 1, got 1.5"),
        (lambda: TransformerPredictorConfig(label=17), "label: expected at most history=16, got 17"),
        (lambda: TransformerPredictorConfig(heads=7), "width: expected a multiple of heads=7, got 512"),
        (lambda: TransformerPredictorConfig(dropout=1.0), "dropout: expected 0 to below 1, got 1.0"),
        (lambda: small_llm4cp(patch=3), "patch: expected a divisor of history=8, got 3"),
        (lambda: small_llm4cp(reduction=3), "reduction: expected a divisor of attention_channels=4, got 3"),
        (lambda: small_llm4cp(tuned="lora"), "tuned: expected one of norms, all, got 'lora'"),
        (lambda: small_llm4cp(dropout=-0.1), "dropout: expected 0 to below 1, got -0.1"),
        (
            lambda: small_llm4cp(backbone=backbone(attention="bidirectional")),
            "backbone: expected the family gpt2 with causal attention, got gpt2 with bidirectional attention",
        ),
        (
            lambda: Llm4cp(small_llm4cp(backbone=backbone(settings={"n_positions": 7}))),
            "backbone: expected at least history=8 positions, got 7",
        ),
        (lambda: HoldConfig(future=0), "future: expected a whole number of at least 1, got 0"),
        (
            lambda: LinearConfig(domain="delays"),
            "domain: expected one of slots, slots and subcarriers, got 'delays'",
        ),
        (lambda: LinearConfig(ridge=0.0), "ridge: expected a number above 0 and below 1, got 0.0"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message


def test_norms_and_positions_alone_train_in_llm4cp_s_backbone():
    model = Llm4cp(small_llm4cp(tuned="norms"))
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    expected = {"wpe.weight", "ln_f.weight", "ln_f.bias"}
    expected |= {f"h.0.ln_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert trained == expected
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    assert others and all(parameter.requires_grad for parameter in others)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(random_history(3, 8, 5)).abs().square().mean().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved >= {f"backbone.{name}" for name in expected}
    assert not {name for name in moved if ".attn." in name or ".mlp." in name}
    whole = Llm4cp(small_llm4cp(tuned="all"))
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_llm4cp_takes_its_source_s_weights_and_rebuilds_from_its_configuration(tmp_path):
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 20, "vocab_size": 11, "n_inner": 32}
    torch.manual_seed(0)
    source = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    source.save_pretrained(tmp_path / "gpt2")
    described = BackboneConfig("gpt2", source=str(tmp_path / "gpt2"), layers=2, attention="causal")
    model = Llm4cp(small_llm4cp(backbone=described, tuned="norms")).eval()
    assert torch.equal(model.backbone.wpe.weight, source.wpe.weight)
    assert torch.equal(model.backbone.h[1].mlp.c_fc.weight, source.h[1].mlp.c_fc.weight)
    assert len(model.backbone.h) == 2
    entries = json.loads(json.dumps(dataclasses.asdict(model.config)))
    rebuilt = Llm4cp(Llm4cpConfig.from_dict(entries), pretrained=False).eval()
    rebuilt.load_state_dict(model.state_dict())
    history = random_history(2, 8, 5)
    assert torch.equal(rebuilt(history), model(history))


def test_llm4cp_sees_positions_and_both_domains():
    model = Llm4cp(small_llm4cp()).eval()
    history = random_history(1, 8, 5)
    before = model(history)
    for parameter in (model.backbone.wpe.weight, model.delay.mix.weight, model.frequency.mix.weight):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape))
        assert (model(history) - before).abs().max() > 1e-5
        with torch.no_grad():
            parameter.copy_(kept)
    torch.testing.assert_close(model(history), before)


# Without a network


def test_hold_repeats_the_last_slot():
    history = random_history(2, 8, 5, dtype=torch.complex128)
    predicted = HoldPredictor(HoldConfig(**SIZES))(history)
    assert predicted.dtype == torch.complex128 and predicted.shape == (2, 3, 5)
    assert all(torch.equal(predicted[:, slot], history[:, -1]) for slot in range(3))


def coloured(count, *, seed=0):
    """Channels with correlated slots and subcarriers, of more terms than slots: their covariance has full rank."""
    generator = torch.Generator().manual_seed(seed)
    h = exponentials(count, generator, terms=9, dtype=torch.complex128)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.complex128) * torch.tensor([1, 0.6, 0.3, 0.1, 0.03])
    return h @ mixing


def fitted(domain, h, **options):
    return LinearPredictor(LinearConfig(**SIZES, domain=domain)).fit(h[:, :8], h[:, 8:], **options)


@pytest.mark.parametrize("noise", [0.05, 1.3])
def test_the_linear_predictor_is_the_wiener_filter(noise):
    h = coloured(200)
    snapshots = h.permute(0, 2, 1).reshape(-1, 11)  # sample and subcarrier, slot
    covariance = snapshots.mT @ snapshots.conj() / len(snapshots)
    filter_ = torch.linalg.solve(
        covariance[:8, :8] + noise * torch.eye(8, dtype=torch.float64), covariance[8:, :8], left=False
    )
    history = random_history(3, 8, 5, dtype=torch.complex128)
    torch.testing.assert_close(fitted("slots", h)(history, noise), filter_ @ history, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("noise", [0.05, 1.3])
def test_with_subcarriers_it_is_the_wiener_filter_of_the_product_covariance(noise):
    h = coloured(200)
    slots = torch.einsum("btm,bsm->ts", h, h.conj()) / h.shape[0] / 5
    columns = torch.einsum("btm,btn->mn", h[:, :8], h[:, :8].conj()) / h.shape[0] / 8
    columns = columns / columns.diagonal().real.mean()
    covariance = torch.kron(slots[:8, :8].contiguous(), columns) + noise * torch.eye(40, dtype=torch.float64)
    filter_ = torch.linalg.solve(covariance, torch.kron(slots[8:, :8].contiguous(), columns), left=False)
    history = random_history(3, 8, 5, dtype=torch.complex128)
    expected = (filter_ @ history.reshape(3, 40, 1)).reshape(3, 3, 5)
    torch.testing.assert_close(fitted(DOMAINS[1], h)(history, noise), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("domain", DOMAINS)
def test_without_noise_it_continues_a_few_exponentials_exactly(domain):
    generator = torch.Generator().manual_seed(5)
    frequency = torch.tensor([0.11, -0.07, 0.31, 0.2], dtype=torch.float64)
    amplitude = torch.randn(60, 5, 4, generator=generator, dtype=torch.complex128)
    waves = torch.polar(torch.ones(4, 11, dtype=torch.float64), 2 * math.pi * frequency[:, None] * torch.arange(11))
    h = (amplitude @ waves).mT  # each sample and subcarrier another mixture of the same four
    model = fitted(domain, h[:30])
    assert nmse(model(h[30:, :8]), h[30:, 8:]) < 1e-12
    single = h[30:].to(torch.complex64)
    assert model(single[:, :8]).dtype == torch.complex64 and nmse(model(single[:, :8]), single[:, 8:]) < 1e-9


@pytest.mark.parametrize("domain", DOMAINS)
def test_noise_known_to_each_sample_averaged_or_learnt_from_noisy_histories(domain):
    h = coloured(600)
    generator = torch.Generator().manual_seed(2)
    power = torch.rand(600, generator=generator, dtype=torch.float64) * 4
    noise = torch.randn(600, 8, 5, generator=generator, dtype=torch.complex128) * power.sqrt()[:, None, None]
    noisy = h[:, :8] + noise
    clean = fitted(domain, h)
    each = clean(noisy, power)
    for i in (0, 7):
        torch.testing.assert_close(each[i : i + 1], clean(noisy[i : i + 1], power[i].item()))
    averaged = LinearPredictor(LinearConfig(**SIZES, domain=domain)).fit(noisy, h[:, 8:], noise_power=power)
    assert averaged.noise_power.item() == pytest.approx(power.mean().item())
    torch.testing.assert_close(averaged(noisy), averaged(noisy, power.mean()))
    errors = [nmse(p, h[:, 8:]) for p in (each, averaged(noisy), noisy[:, -1:].expand(-1, 3, -1))]
    assert errors[0] < errors[1] < errors[2]
    # Of noisy histories, the mean power of the noise is in the covariance over slots anyway.
    as_they_are = [LinearPredictor(LinearConfig(**SIZES, domain=DOMAINS[0])) for _ in range(2)]
    as_they_are[0].fit(noisy, h[:, 8:])
    as_they_are[1].fit(noisy, h[:, 8:], noise_power=power)
    assert nmse(as_they_are[0](noisy), as_they_are[1](noisy)) < 1e-2


@settings(deadline=None, max_examples=20)
@given(
    st.complex_numbers(max_magnitude=10, allow_nan=False, allow_infinity=False),
    st.floats(0, 10),
    st.sampled_from(DOMAINS),
    st.integers(0, 5),
)
def test_it_is_linear(factor, noise, domain, seed):
    model = fitted(domain, coloured(30))
    a, b = random_history(2, 2, 8, 5, seed=seed, dtype=torch.complex128)
    torch.testing.assert_close(
        model(a + factor * b, noise), model(a, noise) + factor * model(b, noise), rtol=1e-6, atol=1e-6
    )


def test_on_channels_of_moving_ues_it_beats_hold_and_subcarriers_help():
    train, _ = prediction_channels("uma_nlos", "train", 150)
    test, _ = prediction_channels("uma_nlos", "test", 40)
    train, test = train.flatten(0, 1), test.flatten(0, 1)
    noise = 0.1 * torch.randn(test[:, :16].shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    history, future = test[:, :16] + noise, test[:, 16:]
    held = nmse(HoldPredictor(HoldConfig())(history), future)
    errors = [
        nmse(LinearPredictor(LinearConfig(domain=domain)).fit(train[:, :16], train[:, 16:])(history, 0.01), future)
        for domain in DOMAINS
    ]
    assert errors[1] < 0.85 * errors[0] < 0.5 * held


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_fitted_state_is_saved_and_loaded(domain, tmp_path):
    model = fitted(domain, coloured(20), noise_power=0.01)
    save_tensors(tmp_path / "a.safetensors", model.state_dict(), {})
    loaded = LinearPredictor(model.config)
    loaded.load_state_dict(load_tensors(tmp_path / "a.safetensors")[0])
    history = random_history(2, 8, 5)
    assert torch.equal(loaded(history), model(history))
    assert torch.equal(fitted(domain, coloured(20), noise_power=0.01)(history), model(history))


def test_channels_without_power_in_some_modes_and_an_empty_batch():
    h = coloured(40)
    h[:, :, 3:] = 0
    model = fitted(DOMAINS[1], h)
    predicted = model(h[:, :8], 0.1)
    assert torch.isfinite(predicted.abs()).all() and predicted[:, :, 3:].abs().max() < 1e-9
    assert model(h[:0, :8]).shape == (0, 3, 5)


def test_what_cannot_be_fitted_or_predicted_is_refused():
    model, h = LinearPredictor(LinearConfig(**SIZES)), coloured(6)
    with pytest.raises(RuntimeError, match=r"LinearPredictor: expected to be fitted first, by fit"):
        model(h[:, :8])
    cases = [
        ((h[:, :7], h[:, 8:]), {}, r"histories: expected \[B, 8, 5\], got \(6, 7, 5\)"),
        ((h[:, :8], h[:, 9:]), {}, r"futures: expected \[B, 3, 5\], got \(6, 2, 5\)"),
        ((h[:, :8], h[:5, 8:]), {}, "histories, futures: expected the same number of samples, at least 1, got 6 and 5"),
        (
            (h[:0, :8], h[:0, 8:]),
            {},
            "histories, futures: expected the same number of samples, at least 1, got 0 and 0",
        ),
        ((0 * h[:, :8], h[:, 8:]), {}, "expected finite numbers and some power, got a mean power of 0.0"),
        ((h[:, :8], h[:, 8:] / 0), {}, "histories, futures: expected finite numbers"),
        ((h[:, :8], h[:, 8:]), {"noise_power": -1.0}, "noise_power: expected finite numbers of at least 0, got -1.0"),
        ((h[:, :8], h[:, 8:]), {"noise_power": torch.ones(5)}, r"noise_power: expected a number or \[6\], got \(5,\)"),
        ((h[:, :8], h[:, 8:]), {"noise_power": 1e6}, "noise_power: expected less than the mean power of histories, "),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            model.fit(*arguments, **options)
    with pytest.raises(TypeError, match="futures: expected a tensor of complex64 or complex128, got torch.float64"):
        model.fit(h[:, :8], h[:, 8:].real)
    model.fit(h[:, :8], h[:, 8:])
    with pytest.raises(ValueError, match=r"noise_power: expected a number or \[6\], got \(2,\)"):
        model(h[:, :8], torch.ones(2))
