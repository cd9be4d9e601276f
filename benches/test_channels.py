"""Timings of channel generation, 32 antennas x 32 subcarriers, against what one would write instead.

Peers, on the same rays and positions: one complex product over all rays, and a loop over rays. Peers that draw anew: an
environment for every sample, and, where it is installed, Sionna's UMi with its own OFDM step, one UE per sample. The
former must give the generator's channels, the latter the right shape. ``samples_per_second`` is in the JSON.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compare import compare

from csimodels.channels.disc import CellConfig
from csimodels.channels.environment import Environment
from csimodels.channels.rays import Rays, synthesize
from csimodels.channels.sionna import SionnaEnvironment

CELL = CellConfig()
COUNTS = [256, 10_000]  # a small batch, and one environment of LASCO
STATES = pytest.mark.parametrize("los", [True, False], ids=["los", "nlos"])
SIONNA = importlib.util.find_spec("sionna") is not None


def responses(rays: Rays) -> tuple[torch.Tensor, torch.Tensor]:
    """Steering ``[..., path, antenna]`` and delay response ``[..., path, subcarrier]``, complex64."""
    steering = torch.exp(2j * math.pi * (rays.direction @ CELL.array.positions.T))
    delay = torch.exp(-2j * math.pi * rays.delay[..., None] * CELL.grid.frequencies)
    return steering.to(torch.complex64), delay.to(torch.complex64)


class Peer:
    """The rays of an environment at the positions of its draw 0, as a user would handle them."""

    def __init__(self, environment: Environment, count: int):
        (self.rays,) = environment.ray_sets
        rng = np.random.default_rng([environment.seed, environment.index, 1, 0])
        self.positions = environment._draw_disc(rng, count)
        self.environment = environment

    def gains(self) -> torch.Tensor:
        phase = 2 * math.pi / CELL.wavelength * (torch.from_numpy(self.positions) @ self.rays.arrival.T)
        return (self.rays.gain * torch.exp(1j * phase)).to(torch.complex64)

    def direct(self) -> torch.Tensor | float:
        """The line-of-sight part, by the package for every peer: the peers differ in the scattered rays."""
        if not self.environment.los:
            return 0.0
        amplitude = np.full(len(self.positions), self.rays.direct)
        return synthesize(self.environment._direct(self.positions, amplitude), CELL.array, CELL.grid)

    def product(self) -> torch.Tensor:
        steering, delay = responses(Rays(self.rays.gain, self.rays.delay, self.rays.departure))
        geometry = (steering[:, :, None] * delay[:, None, :]).flatten(1)
        return (self.gains() @ geometry).reshape(-1, 32, 32) + self.direct()

    def loop(self) -> torch.Tensor:
        steering, delay = responses(Rays(self.rays.gain, self.rays.delay, self.rays.departure))
        gains, h = self.gains(), torch.zeros(len(self.positions), 32, 32, dtype=torch.complex64)
        for path in range(gains.shape[1]):
            h += gains[:, path, None, None] * torch.outer(steering[path], delay[path])
        return h + self.direct()


def a_new_environment_per_sample(los: bool, count: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([Environment(CELL, index, 0, los=los).sample(1) for index in range(1, count + 1)])


def umi_of_sionna(los: bool, count: int) -> Callable[[], torch.Tensor]:
    from sionna.phy.channel import cir_to_ofdm_channel
    from sionna.phy.channel.tr38901 import PanelArray, UMi

    def panel(columns: int) -> PanelArray:
        return PanelArray(1, columns, "single", "V", "omni", CELL.carrier, device="cpu")

    channel = UMi(
        CELL.carrier,
        "low",
        panel(1),
        panel(32),
        "downlink",
        enable_pathloss=False,
        enable_shadow_fading=False,
        device="cpu",
    )
    azimuth = torch.rand(count, 1, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    still = torch.zeros(count, 1, 3)
    channel.set_topology(
        ut_loc=torch.stack([100 * azimuth.cos(), 100 * azimuth.sin(), torch.full_like(azimuth, 1.5)], dim=-1),
        bs_loc=torch.tensor([0.0, 0.0, 10.0]).expand(count, 1, 3),
        ut_orientations=still,
        bs_orientations=still,
        ut_velocities=still,
        in_state=torch.zeros(count, 1, dtype=torch.bool),
        los=los,
    )
    frequencies = CELL.grid.frequencies.float()
    return lambda: cir_to_ofdm_channel(frequencies, *channel(1, 1.0))[:, 0, 0, 0, :, 0]


@pytest.mark.parametrize("los", [True, False], ids=["los", "nlos"])
@pytest.mark.parametrize("count", COUNTS)
def test_generation(benchmark, count, los):
    environment = Environment(CELL, 1, 0, los=los)
    peer = Peer(environment, count)
    ours = {"csimodels": lambda: environment.sample(count)}
    peers: dict[str, Callable] = {"torch complex64, product over rays": peer.product}
    if count == COUNTS[0]:
        peers["torch complex64, loop over rays"] = peer.loop
        peers["csimodels, a new environment per sample"] = a_new_environment_per_sample(los, count)
    if SIONNA:
        rays_of_sionna = SionnaEnvironment(CELL, 1, 0, los=los)
        ours["csimodels, rays of Sionna"] = lambda: rays_of_sionna.sample(count)
    if SIONNA and count == COUNTS[0]:
        peers["Sionna UMi"] = umi_of_sionna(los, count)
    expected = environment.sample(count)

    def check(name: str, h: torch.Tensor) -> None:
        assert h.shape == (count, 32, 32)
        if name.startswith("torch complex64"):
            torch.testing.assert_close(h, expected, rtol=0, atol=2e-5)

    case = f"channels, {count} x 32 x 32, {'LOS' if los else 'NLOS'}"
    compare(benchmark, case, ours, peers, check=check, rounds=7)
    seconds = benchmark.extra_info["seconds"]
    benchmark.extra_info["samples_per_second"] = {name: count / seconds[name]["median"] for name in ours}
