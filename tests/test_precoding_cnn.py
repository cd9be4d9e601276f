"""The precoding CNN: the power constraint, padding, scale, and that training raises the sum rate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csimodels.evaluation.metrics import sum_rate
from csimodels.evaluation.precoding import structured_precoder, wmmse_parameters
from csimodels.models.precoding_cnn import PrecodingCnn, PrecodingCnnConfig


def random_channel(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def network(**changes) -> PrecodingCnn:
    torch.manual_seed(0)
    return PrecodingCnn(PrecodingCnnConfig(**{"antennas": 9, "maps": 4, **changes})).eval()


def uneven_channel(batch: int, seed: int) -> torch.Tensor:
    """Four users whose gains differ by up to 20 dB, so that equal powers are far from the best."""
    gain_db = -20 * torch.rand(batch, 1, 4, generator=torch.Generator().manual_seed(seed + 1000))
    return random_channel(batch, 6, 4, seed=seed) * 10 ** (gain_db / 20)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("antennas", [9, 16])
def test_every_number_of_users_meets_the_power_constraint(antennas, training):
    cnn = network(antennas=antennas).train(training)
    for users, batch in ((4, 1), (5, 3), (6, 7), (7, 2), (8, 5)):
        power = torch.linspace(0.1, 10, batch)
        for values in cnn(random_channel(batch, antennas, users), power, 0.1):
            assert values.shape == (batch, users) and values.dtype == torch.float32
            assert (values >= 0).all()
            torch.testing.assert_close(values.sum(1), power, rtol=1e-5, atol=0)


@given(users=st.integers(4, 8), power_db=st.floats(-60, 60), noise_db=st.floats(-90, 90), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_the_power_constraint_holds_at_any_power(users, power_db, noise_db, seed):
    power = 10 ** (power_db / 10)
    for values in network()(random_channel(2, 9, users, seed=seed), power, 10 ** (noise_db / 10)):
        assert (values >= 0).all()
        torch.testing.assert_close(values.sum(1), torch.full((2,), power), rtol=1e-5, atol=0)


def test_only_the_ratio_of_power_to_noise_and_the_unit_of_power_matter():
    cnn, h = network(), random_channel(3, 9, 5)
    expected = torch.stack(cnn(h, 2.0, 0.1))
    torch.testing.assert_close(torch.stack(cnn(h, 20.0, 1.0)), 10 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(cnn(2 * h, 2.0, 0.4)), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(torch.stack(cnn(h, 2.0, 1e-3)), expected, rtol=1e-2)


def test_samples_are_independent_in_evaluation_and_powers_may_differ():
    cnn, h = network(), random_channel(3, 9, 5)
    power, noise = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.1, 1.0, 0.3])
    together = cnn(h, power, noise)
    for i in range(3):
        alone = cnn(h[i : i + 1], float(power[i]), float(noise[i]))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[i], part[0], rtol=1e-4, atol=1e-6)


def test_padded_users_leave_no_trace():
    cnn, five, six = network(), random_channel(2, 9, 5), random_channel(2, 9, 6)
    before = [torch.stack(cnn(h, 1.0, 0.1)) for h in (five, six)]
    with torch.no_grad():
        # Outputs of users 6 to 8, first of lambda, then of p.
        cnn.output.bias.unflatten(0, (2, 8))[:, 5:] = 50.0
    after = [torch.stack(cnn(h, 1.0, 0.1)) for h in (five, six)]
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1], rtol=0.1)


def test_padding_is_a_user_of_zero_channel():
    """A network for 5 users that has the columns and outputs of the first 5 of 8 gives the same.

    The image of 8 users goes on with zeros where that of 5 ends, as the padding of a convolution does; one convolution
    sees nothing of the difference.
    """
    large, small = network(convolutions=1), network(convolutions=1, max_users=5)
    small.convolutions.load_state_dict(large.convolutions.state_dict())
    with torch.no_grad():
        weight = large.output.weight.unflatten(0, (2, 8)).unflatten(2, (4, 2, 8 * 9))
        small.output.weight.copy_(weight[:, :5, ..., : 5 * 9].flatten(0, 1).flatten(1))
        small.output.bias.copy_(large.output.bias.unflatten(0, (2, 8))[:, :5].flatten())
        # What the padded columns would add is then only the convolution's reach past the fifth user: cut it off.
        weight[..., 5 * 9 :] = 0
    h = random_channel(3, 9, 5)
    for one, other in zip(large(h, 1.0, 0.1), small(h, 1.0, 0.1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_strided_and_conjugated_channels():
    cnn, h = network(), random_channel(3, 9, 5)
    strided = h.mT.contiguous().mT
    assert not strided.is_contiguous()
    for odd in (strided, h.conj().resolve_conj().conj()):
        for one, other in zip(cnn(odd, 1.0, 0.1), cnn(h, 1.0, 0.1), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [1e-9, 1e-2, 1e6])
def test_gradients_are_finite_at_any_noise(noise):
    cnn, h = network().train(), random_channel(4, 9, 5)
    lambdas, p = cnn(h, 1.0, noise)
    (-sum_rate(h, structured_precoder(h, lambdas, p, noise), noise).mean()).backward()
    for name, parameter in cnn.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_saturated_outputs_still_share_the_power():
    cnn, h = network(), random_channel(2, 9, 4)
    with torch.no_grad():
        cnn.output.bias.fill_(-1e4)  # every sigmoid is 0 in float32
    for values in cnn(h, 1.0, 0.1):
        torch.testing.assert_close(values.sum(1), torch.ones(2))


def test_autocast():
    cnn, h = network(), random_channel(2, 9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lambdas, p = cnn(h, 1.0, 0.1)
    assert lambdas.dtype == p.dtype == torch.float32
    torch.testing.assert_close(torch.stack([lambdas, p]), torch.stack(cnn(h, 1.0, 0.1)), rtol=0.05, atol=0.01)
    torch.testing.assert_close(lambdas.sum(1), torch.ones(2), rtol=1e-5, atol=0)


def test_training_raises_the_sum_rate():
    """Supervised on WMMSE, then on the negative sum rate, as in Zheng and Dai, section IV-C."""
    torch.manual_seed(0)
    cnn = PrecodingCnn(PrecodingCnnConfig(antennas=6, max_users=4))
    test, noise = uneven_channel(200, seed=0), 0.1

    def rate() -> float:
        with torch.no_grad():
            lambdas, p = cnn.eval()(test, 1.0, noise)
        cnn.train()
        return float(sum_rate(test, structured_precoder(test, lambdas, p, noise), noise).mean())

    optimizer = torch.optim.Adam(cnn.parameters(), lr=3e-3)
    rates = [rate()]
    for step in range(120):
        h = uneven_channel(64, seed=1 + step)
        lambdas, p = cnn(h, 1.0, noise)
        if step < 60:
            label_lambdas, label_p = wmmse_parameters(h, 1.0, noise)
            loss = ((lambdas - label_lambdas).square() + (p - label_p).square()).mean() / 2
        else:
            loss = -sum_rate(h, structured_precoder(h, lambdas, p, noise), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (59, 119):
            rates.append(rate())
    assert rates[0] + 0.1 < rates[1] < rates[2], rates


def test_presets():
    sizes = [
        sum(parameter.numel() for parameter in PrecodingCnn(preset).parameters())
        for preset in (PrecodingCnnConfig.paper(), PrecodingCnnConfig.laptop())
    ]
    assert sizes[0] > sizes[1]
    paper = PrecodingCnnConfig.paper()
    assert (paper.antennas, paper.min_users, paper.max_users) == (128, 4, 8)
    assert PrecodingCnnConfig.laptop(antennas=16).antennas == 16


def test_errors():
    cnn, h = network(), random_channel(2, 9, 5)
    for users in (3, 9):
        with pytest.raises(ValueError, match=f"users: expected 4 to 8, got {users}"):
            cnn(random_channel(2, 9, users), 1.0, 0.1)
    with pytest.raises(ValueError, match=r"h: expected shape \[batch, 9, user\], got \(2, 8, 5\)"):
        cnn(h[:, :8], 1.0, 0.1)
    with pytest.raises(TypeError, match="h: expected dtype complex64, complex128, got float32"):
        cnn(h.real, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"power: 1 value\(s\) that are not positive and finite"):
        cnn(h, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"noise_power: 1 value\(s\) that are not positive .*, first at index 1"):
        cnn(h, 1.0, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"power: expected a scalar or a shape that broadcasts to \(2,\)"):
        cnn(h, torch.ones(3), 0.1)
    h[1] = 0
    with pytest.raises(ValueError, match=r"h: 1 sample\(s\) of zero channel, first at index 1"):
        cnn(h, 1.0, 0.1)
    h[0, 3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"h: 1 non-finite value\(s\), first at index \(0, 3, 2\)"):
        cnn(h, 1.0, 0.1)
    for name in ("antennas", "convolutions", "maps"):
        with pytest.raises(ValueError, match=f"{name}: expected an int of at least 1, got 0"):
            PrecodingCnnConfig(**{name: 0})
    with pytest.raises(ValueError, match="max_users: expected at least min_users=4, got 3"):
        PrecodingCnnConfig(max_users=3)
