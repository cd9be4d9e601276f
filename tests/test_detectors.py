"""Learned detectors: OAMP against a NumPy iteration in the antenna domain, the properties that define each network."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.evaluation.detection import lmmse, ml, qam_constellation, qam_demodulate, qam_modulate
from csimodels.evaluation.metrics import ser
from csimodels.models.detnet import DetNet, DetNetConfig, layer_loss
from csimodels.models.dnn_detector import DnnDetector, DnnDetectorConfig
from csimodels.models.multiuser import DetectorConfig
from csimodels.models.oamp_net import OampNet, OampNetConfig

NETWORKS = {
    "dnn": lambda **changes: DnnDetector(DnnDetectorConfig(**{"hidden": (24, 16), **changes})),
    "detnet-joint": lambda **changes: DetNet(DetNetConfig(**{"layers": 3, "hidden": 24, "memory": 6, **changes})),
    "detnet-shared": lambda **changes: DetNet(
        DetNetConfig(**{"layers": 3, "hidden": 24, "memory": 6, "weights": "shared", **changes})
    ),
    "oamp-net": lambda **changes: OampNet(OampNetConfig(**{"layers": 4, **changes})),
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def random_complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def transmission(batch, slots, antennas, users, order, snr_db, seed=0):
    """h, y, symbol indices and the noise power, which is users / snr."""
    noise = users / 10 ** (snr_db / 10)
    h = random_complex(batch, antennas, users, seed=3 * seed)
    symbols = torch.randint(order, (batch, slots, users), generator=torch.Generator().manual_seed(3 * seed + 1))
    n = math.sqrt(noise) * random_complex(batch, slots, antennas, seed=3 * seed + 2)
    return h, qam_modulate(symbols, order) @ h.mT + n, symbols, noise


def drawn(build, **changes):
    """A network whose parameters are all away from their initial values."""
    torch.manual_seed(0)
    network = build(**changes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


# What all share -------------------------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("antennas", [9, 16])
def test_every_number_of_users_slots_and_samples(build, antennas):
    network = drawn(build, antennas=antennas)
    for users, batch, slots in ((4, 1, 8), (5, 3, 1), (6, 7, 3), (7, 2, 8), (8, 5, 2)):
        h, y, _, noise = transmission(batch, slots, antennas, users, 16, 10)
        estimate = network(h, y, torch.full((batch,), noise))
        assert estimate.shape == (batch, slots, users) and estimate.dtype == torch.complex64
        assert torch.isfinite(torch.view_as_real(estimate)).all()


@every_network
def test_samples_and_slots_are_independent(build):
    network = drawn(build, antennas=9)
    h, y, _, _ = transmission(3, 4, 9, 5, 16, 10)
    noise = torch.tensor([0.1, 1.0, 3.0])
    together = network(h, y, noise)
    for i, slot in np.ndindex(3, 4):
        alone = network(h[i : i + 1], y[i : i + 1, slot : slot + 1], noise[i].item())
        torch.testing.assert_close(together[i, slot], alone[0, 0], rtol=1e-4, atol=1e-5)


@every_network
def test_strided_and_conjugated_inputs(build):
    network = drawn(build, antennas=9)
    h, y, _, noise = transmission(3, 4, 9, 5, 16, 10)
    expected = network(h, y, noise)
    strided = h.mT.contiguous().mT.conj().resolve_conj().conj()  # lazily conjugated twice, users first in memory
    every_other = y.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous() and not every_other.is_contiguous()
    torch.testing.assert_close(network(strided, every_other, noise), expected, rtol=1e-4, atol=1e-5)


@every_network
def test_gradients_are_finite_at_any_noise(build):
    for snr_db in (-60, 10, 90):
        network = build(antennas=9)
        h, y, symbols, noise = transmission(4, 3, 9, 5, 16, snr_db)
        (network(h, y, noise) - qam_modulate(symbols, 16)).abs().square().mean().backward()
        for name, parameter in network.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
    network.zero_grad()
    h, y, symbols, _ = transmission(4, 3, 9, 5, 16, 100)
    (network(h, y, 1e-9) - qam_modulate(symbols, 16)).abs().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@every_network
def test_every_parameter_is_used(build):
    network = drawn(build, antennas=9)
    h, y, symbols, noise = transmission(8, 3, 9, 8, 16, 5)
    (network(h, y, noise) - qam_modulate(symbols, 16)).abs().square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@every_network
def test_autocast(build):
    network = drawn(build, antennas=9)
    h, y, _, noise = transmission(3, 2, 9, 5, 16, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate = network(h, y, noise)
    assert estimate.dtype == torch.complex64
    torch.testing.assert_close(estimate, network(h, y, noise), rtol=0.1, atol=0.1)


@every_network
def test_double_precision(build):
    network = drawn(build, antennas=9).double()
    h, y, _, noise = transmission(3, 2, 9, 5, 16, 10)
    estimate = network(h.to(torch.complex128), y.to(torch.complex128), noise)
    assert estimate.dtype == torch.complex128
    torch.testing.assert_close(estimate.to(torch.complex64), network.float()(h, y, noise), rtol=1e-3, atol=1e-4)


@every_network
def test_bad_input(build):
    network = build(antennas=9)
    h, y, _, _ = transmission(2, 3, 9, 5, 16, 10)
    for users in (3, 9):
        with pytest.raises(ValueError, match=f"users: expected 4 to 8, got {users}"):
            network(random_complex(2, 9, users), y, 0.1)
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, 9, user\], got \(2, 8, 5\)"):
        network(h[:, :8], y, 0.1)
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, antenna, user\], got \(9, 5\)"):
        network(h[0], y, 0.1)
    with pytest.raises(TypeError, match="h: expected dtype complex64, complex128, got float32"):
        network(h.real, y, 0.1)
    with pytest.raises(TypeError, match="y: expected dtype complex64, got complex128"):
        network(h, y.to(torch.complex128), 0.1)
    for bad in (y[:1], y[..., :8]):
        with pytest.raises(ValueError, match=r"y: expected shape \[2, slot, 9\], got "):
            network(h, bad, 0.1)
    with pytest.raises(ValueError, match=r"noise_power: 1 value\(s\) that are not positive .*, first at index 1"):
        network(h, y, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"noise_power: expected a scalar or a shape that broadcasts to \(2,\)"):
        network(h, y, torch.ones(3))
    silent = h.clone()
    silent[1] = 0
    with pytest.raises(ValueError, match=r"h: 1 sample\(s\) of zero channel, first at index 1"):
        network(silent, y, 0.1)
    y[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"y: 1 non-finite value\(s\), first at index \(1, 2, 3\)"):
        network(h, y, 0.1)


@pytest.mark.parametrize("config", [DetectorConfig, DnnDetectorConfig, DetNetConfig, OampNetConfig])
def test_bad_configuration(config):
    for order in (2, 8, 32, 16.0):
        with pytest.raises(ValueError, match="order: expected one of 4, 16, 64, 256, got"):
            config(order=order)
    with pytest.raises(ValueError, match="antennas: expected an int of at least 1, got 0"):
        config(antennas=0)
    with pytest.raises(ValueError, match="max_users: expected at least min_users=4, got 3"):
        config(max_users=3)


def test_bad_layers():
    with pytest.raises(ValueError, match=r"hidden: expected at least one layer of at least 1 neuron, got \(\)"):
        DnnDetectorConfig(hidden=())
    for name in ("layers", "hidden", "memory"):
        with pytest.raises(ValueError, match=f"{name}: expected an int of at least 1, got 0"):
            DetNetConfig(**{name: 0})
    with pytest.raises(ValueError, match="weights: expected 'joint' or 'shared', got 'own'"):
        DetNetConfig(weights="own")
    with pytest.raises(ValueError, match=r"residual: expected 0 to below 1, got 1\.0"):
        DetNetConfig(residual=1.0)
    with pytest.raises(ValueError, match="layers: expected an int of at least 1, got 0"):
        OampNetConfig(layers=0)


def test_presets():
    for network, config in ((DnnDetector, DnnDetectorConfig), (DetNet, DetNetConfig), (OampNet, OampNetConfig)):
        sizes = [sum(p.numel() for p in network(preset).parameters()) for preset in (config.paper(), config.laptop())]
        assert config.paper().antennas == 128 and config.paper().order == 16
        assert sizes[0] >= sizes[1]
        assert config.laptop(order=4).order == 4
    assert OampNetConfig.paper().layers == 10


@pytest.mark.parametrize("name", ["detnet-shared", "oamp-net"])
@given(users=st.integers(4, 8), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=10)
def test_the_order_of_the_users_does_not_matter(name, users, seed):
    network = drawn(NETWORKS[name], antennas=9)
    h, y, _, noise = transmission(2, 3, 9, users, 16, 5, seed)
    order = torch.randperm(users, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(network(h[..., order], y, noise), network(h, y, noise)[..., order], rtol=1e-3, atol=1e-4)


def test_padded_users_leave_no_trace():
    """The weights that only users 6 to 8 reach may be anything when there are 5."""
    five, six = (transmission(3, 2, 9, users, 16, 10) for users in (5, 6))
    dnn, detnet = drawn(NETWORKS["dnn"], antennas=9), drawn(NETWORKS["detnet-joint"], antennas=9)
    before = [[network(h, y, noise) for h, y, _, noise in (five, six)] for network in (dnn, detnet)]
    with torch.no_grad():
        dnn.from_channel.weight.unflatten(1, (9, 8, 2))[:, :, 5:] = 1e6
        dnn.layers[-1].weight.unflatten(0, (8, 2))[5:] = 1e6
        for lift, score in zip(detnet.lift, detnet.score, strict=True):
            lift.weight[:, 10:16] = 1e6
            score.weight.unflatten(0, (8, 8))[5:] = 1e6
    for network, expected in zip((dnn, detnet), before, strict=True):
        after = [network(h, y, noise) for h, y, _, noise in (five, six)]
        assert torch.equal(after[0], expected[0])
        assert not torch.allclose(after[1], expected[1], atol=0.1)


@pytest.mark.parametrize("name", ["detnet-joint", "detnet-shared", "oamp-net"])
def test_the_unit_of_the_channel_does_not_matter(name):
    network = drawn(NETWORKS[name], antennas=9)
    h, y, _, noise = transmission(2, 3, 9, 5, 16, 5)
    expected = network(h, y, noise)
    torch.testing.assert_close(network(1e-3 * h, 1e-3 * y, 1e-6 * noise), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["dnn", "detnet-joint", "detnet-shared"])
def test_who_does_not_know_the_noise(name):
    network = drawn(NETWORKS[name], antennas=9)
    h, y, _, _ = transmission(2, 3, 9, 5, 16, 5)
    assert torch.equal(network(h, y, 1e-3), network(h, y, 1e3))


# DNN ------------------------------------------------------------------------------------------------------------------


def test_dnn_is_one_chain_of_dense_layers_on_channel_and_signal():
    network = drawn(NETWORKS["dnn"], antennas=9)
    h, y, _, _ = transmission(2, 3, 9, 5, 16, 5)
    padded = np.zeros((2, 9, 8), dtype=np.complex128)
    padded[..., :5] = h.numpy()
    weights = [parameter.detach().double().numpy() for parameter in network.parameters()]
    channel_weight, bias, received_weight, *others = weights
    first = np.concatenate([channel_weight, received_weight], axis=1)
    for i, slot in np.ndindex(2, 3):
        received = y[i, slot].numpy() / math.sqrt(5)
        inputs = np.concatenate([padded[i].reshape(-1), received]).astype(np.complex128).view(np.float64)
        z = first @ inputs + bias
        for weight, offset in zip(others[::2], others[1::2], strict=True):
            z = weight @ np.maximum(z, 0) + offset
        expected = z.view(np.complex128)[:5]
        np.testing.assert_allclose(network(h, y, 1.0)[i, slot].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


# DetNet ---------------------------------------------------------------------------------------------------------------


def textbook_detnet(network: DetNet, h: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """One sample and slot, joint weights, with the real-valued 2N x 2K channel."""
    users, config = h.shape[1], network.config
    real = np.block([[h.real, -h.imag], [h.imag, h.real]])
    unit = np.trace(real.T @ real) / (2 * users)
    gram, matched = real.T @ real / unit, real.T @ np.concatenate([y.real, y.imag]) / unit
    levels = np.sort(np.unique(qam_constellation(config.order, dtype=torch.complex128).real.numpy()))
    state = {name: value.detach().double().numpy() for name, value in network.state_dict().items()}
    x, v = np.zeros(2 * users), np.zeros(config.memory)
    score, estimates = np.zeros(2 * config.max_users * len(levels)), []
    for layer in range(config.layers):
        step, own = state["steps"][layer]
        q = x + step * matched - own * gram @ x
        pairs = np.zeros((config.max_users, 2))
        pairs[:users] = np.stack([q[:users], q[users:]], 1)

        def dense(name: str, inputs: np.ndarray, layer: int = layer) -> np.ndarray:
            return state[f"{name}.{layer}.weight"] @ inputs + state[f"{name}.{layer}.bias"]

        z = np.maximum(dense("lift", np.concatenate([pairs.reshape(-1), v])), 0)
        score = config.residual * score + (1 - config.residual) * dense("score", z)
        if layer + 1 < config.layers:
            v = config.residual * v + (1 - config.residual) * dense("remember", z)
        odds = np.exp(score.reshape(config.max_users, 2, len(levels))[:users])
        soft = (odds * levels).sum(-1) / odds.sum(-1)
        x = np.concatenate([soft[:, 0], soft[:, 1]])
        estimates.append(soft[:, 0] + 1j * soft[:, 1])
    return estimates


def test_detnet_is_the_real_valued_iteration():
    network = drawn(NETWORKS["detnet-joint"], antennas=9)
    h, y, _, _ = transmission(2, 2, 9, 5, 16, 5)
    estimates = network(h, y, 1.0, all_layers=True)
    assert estimates.shape == (3, 2, 2, 5)
    assert torch.equal(estimates[-1], network(h, y, 1.0))
    for i, slot in np.ndindex(2, 2):
        expected = textbook_detnet(network, h[i].numpy().astype(complex), y[i, slot].numpy().astype(complex))
        np.testing.assert_allclose(estimates[:, i, slot].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_detnet_stays_in_the_hull_of_the_constellation(order):
    network = drawn(NETWORKS["detnet-shared"], antennas=9, order=order)
    h, y, _, _ = transmission(3, 2, 9, 5, order, 5)
    largest = qam_constellation(order).real.max() * (1 + 1e-5)
    assert torch.view_as_real(network(h, 100 * y, 1.0)).abs().max() <= largest


def test_layer_loss_by_hand():
    symbols = torch.tensor([1 + 1j, 0j])
    errors = torch.tensor([[3 + 4j, 0j], [1 + 1j, 0j], [2j, 0j]])  # mean squares 25/4, 2/4, 4/4
    expected = (math.log(2) * 0.5 + math.log(3) * 1.0) / math.log(6)
    assert layer_loss(symbols + errors, symbols).item() == pytest.approx(expected)
    assert layer_loss((symbols + errors)[:1], symbols).item() == pytest.approx(25 / 4)
    with pytest.raises(ValueError, match=r"estimates: expected shape \[layer, \(2,\)\], got \(3, 1\)"):
        layer_loss(errors[:, :1], symbols)
    with pytest.raises(TypeError, match="symbols: expected dtype complex64, complex128, got float32"):
        layer_loss(errors, symbols.real)


@pytest.mark.parametrize("weights", ["shared", "joint"])
def test_detnet_learns(weights):
    torch.manual_seed(0)
    config = DetNetConfig(8, 1, 4, 4, layers=4, hidden=32, memory=8, weights=weights, residual=0.5)
    network = DetNet(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for step in range(120):
        h, y, symbols, noise = transmission(64, 4, 8, 4, 4, 8, seed=step)
        loss = layer_loss(network(h, y, noise, all_layers=True), qam_modulate(symbols, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


# OAMP-Net -------------------------------------------------------------------------------------------------------------


def textbook_oamp(h: np.ndarray, y: np.ndarray, noise: float, order: int, scalars: np.ndarray) -> np.ndarray:
    """One sample and slot with the real-valued 2N x 2K channel and a 2N x 2N inverse per layer, as printed."""
    receive, transmit = h.shape
    real = np.block([[h.real, -h.imag], [h.imag, h.real]])
    received = np.concatenate([y.real, y.imag])
    levels = np.unique(qam_constellation(order, dtype=torch.complex128).real.numpy())
    x = np.zeros(2 * transmit)
    for gamma, theta, phi, xi in scalars:
        residual = received - real @ x
        v2 = max((residual @ residual - receive * noise) / np.trace(real.T @ real), 5e-13 / 2)
        w = v2 * real.T @ np.linalg.inv(v2 * real @ real.T + noise / 2 * np.eye(2 * receive))
        w *= 2 * transmit / np.trace(w @ real)
        r = x + gamma * w @ residual
        c = np.eye(2 * transmit) - theta * w @ real
        tau2 = np.trace(c @ c.T) * v2 / (2 * transmit) + theta**2 * noise * np.trace(w @ w.T) / (4 * transmit)
        exponent = -((r[:, None] - levels) ** 2) / (2 * tau2)
        odds = np.exp(exponent - exponent.max(1, keepdims=True))
        x = phi * ((odds * levels).sum(1) / odds.sum(1) - xi * r)
    return x[:transmit] + 1j * x[transmit:]


@pytest.mark.parametrize("order", [4, 16, 64])
@pytest.mark.parametrize("users", [1, 3, 6])
def test_untrained_oamp_net_is_oamp(users, order):
    network = OampNet(OampNetConfig(5, 1, 6, order, layers=5))
    plain = np.tile([1.0, 1.0, 1.0, 0.0], (5, 1))
    for snr_db in (-5, 10, 25):
        h, y, _, noise = transmission(3, 2, 5, users, order, snr_db)
        estimate = network(h, y, noise)
        for i, slot in np.ndindex(3, 2):
            expected = textbook_oamp(h[i].numpy().astype(complex), y[i, slot].numpy(), noise, order, plain)
            np.testing.assert_allclose(estimate[i, slot].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_oamp_net_with_scalars_of_its_own():
    network = drawn(NETWORKS["oamp-net"], antennas=9)
    scalars = torch.stack([network.gamma, network.theta, network.phi, network.xi], 1).detach().double().numpy()
    h, y, _, noise = transmission(3, 2, 9, 5, 16, 12)
    estimate = network(h, y, noise)
    for i, slot in np.ndindex(3, 2):
        expected = textbook_oamp(h[i].numpy().astype(complex), y[i, slot].numpy(), noise, 16, scalars)
        np.testing.assert_allclose(estimate[i, slot].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("users", "order", "snr_db"), [(4, 4, 6), (3, 16, 12)])
def test_oamp_lies_between_linear_and_maximum_likelihood_detection(users, order, snr_db):
    h, y, symbols, noise = transmission(600, 4, 8, users, order, snr_db)
    network = OampNet(OampNetConfig(8, 1, 4, order))
    with torch.no_grad():
        learned = ser(symbols, qam_demodulate(network(h, y, noise), order))
    linear = ser(symbols, qam_demodulate(lmmse(h.unsqueeze(1), y, noise, unbiased=True), order))
    exact = ser(symbols, ml(h.unsqueeze(1), y, order))
    assert 0.003 < exact <= learned < 0.9 * linear
    assert learned < 2.5 * exact


def test_oamp_net_recovers_what_has_no_noise():
    h, y, symbols, _ = transmission(50, 2, 32, 8, 16, 200)
    with torch.no_grad():
        estimate = OampNet(OampNetConfig(32))(h, y, 1e-9)
    torch.testing.assert_close(estimate, qam_modulate(symbols, 16), rtol=0, atol=1e-4)


def test_oamp_net_without_a_signal_to_hear_stays_near_the_prior_mean():
    h, y, _, noise = transmission(20, 2, 9, 4, 16, -50)
    with torch.no_grad():
        assert OampNet(OampNetConfig(9))(h, y, noise).abs().max() < 0.2


def test_oamp_net_takes_more_users_than_antennas_and_linearly_dependent_ones():
    network = OampNet(OampNetConfig(3))
    h, y, symbols, noise = transmission(4, 2, 3, 6, 4, 20)
    h[:, :, 5] = h[:, :, 0]
    loss = (network(h, y, noise) - qam_modulate(symbols, 4)).abs().square().mean()
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_oamp_net_training_lowers_the_error():
    torch.manual_seed(0)
    network = OampNet(OampNetConfig(6, 1, 6, 4, layers=4))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    h, y, symbols, noise = transmission(200, 4, 6, 6, 4, 10)
    losses = []
    for _ in range(30):
        loss = (network(h, y, noise) - qam_modulate(symbols, 4)).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(after < 1.05 * before for before, after in itertools.pairwise(losses))
