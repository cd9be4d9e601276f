"""Channel generator on Sionna's implementation of 3GPP TR 38.901 (the extra ``sionna``).

Sionna draws the large-scale parameters, clusters and rays of the system-level models UMi, UMa and RMa, or those of a
CDL profile; from there on an environment is what it is in :mod:`csimodels.channels.disc`, so that the two generators
differ in nothing but their rays, and ``H`` comes from :func:`csimodels.channels.rays.synthesize` rather than from
Sionna's OFDM step. All antennas are vertically polarised and omnidirectional, and so never see the other polarisation.

Sionna is imported when the first environment is drawn. Drawing changes neither torch's nor Sionna's random state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

from csimodels.channels.clusters import sub_cluster_delays
from csimodels.channels.disc import CellConfig, DiscEnvironment, RaySet, unit_vectors

SYSTEM_SCENARIOS = {"umi": "UMiScenario", "uma": "UMaScenario", "rma": "RMaScenario"}
CDL_SCENARIOS = {f"cdl-{profile}": profile.upper() for profile in "abcde"}
MISSING = "Sionna is not installed; it comes with the extra: pip install 'csikernels[sionna]'"
_CDL_LOS = ("D", "E")
# Small problems, drawn once per environment: the CPU in double precision, wherever the samples are used.
_ON_CPU = {"precision": "double", "device": "cpu"}


def _import() -> tuple[Any, ModuleType]:
    """Sionna's configuration and its 38.901 models."""
    try:
        from sionna.phy import config
        from sionna.phy.channel import tr38901
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sionna":
            raise
        raise ModuleNotFoundError(MISSING, name="sionna") from None
    return config, tr38901


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[ModuleType]:
    """Sionna's 38.901 models with its generators seeded, and every random state put back afterwards."""
    # Setting Sionna's seed also seeds torch's global generators, and so does importing it.
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        config, tr38901 = _import()
        torch_states = {device: config.torch_rng(device).get_state() for device in config.available_devices}
        previous, numpy_state, python_state = config.seed, config.np_rng.bit_generator.state, config.py_rng.getstate()
        config.seed = seed
        try:
            yield tr38901
        finally:
            config.seed = previous
            config.np_rng.bit_generator.state = numpy_state
            config.py_rng.setstate(python_state)
            for device, state in torch_states.items():
                config.torch_rng(device).set_state(state)


def _numpy(value: torch.Tensor) -> np.ndarray:
    """Sionna's ``[batch, BS, UE, ...]`` for one BS, as ``[batch * UE, ...]``."""
    return value[:, 0].flatten(0, 1).cpu().numpy()


def _antenna(tr38901: ModuleType, carrier: float) -> Any:
    return tr38901.PanelArray(
        num_rows_per_panel=1,
        num_cols_per_panel=1,
        polarization="single",
        polarization_type="V",
        antenna_pattern="omni",
        carrier_frequency=carrier,
        **_ON_CPU,
    )


def system_level_links(
    tr38901: ModuleType,
    scenario: str,
    carrier: float,
    *,
    bs: np.ndarray,
    ues: np.ndarray,
    los: bool,
    spec_version: str = "16.1",
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Links of one BS drawn by Sionna within :func:`seeded` (38.901, section 7.5, steps 1 to 9 and the delays of 11).

    Args:
        tr38901: what :func:`seeded` yields.
        scenario: ``"umi"``, ``"uma"`` or ``"rma"``. carrier: Hz.
        bs: its position, metres ``[3]``.
        ues: their positions, metres ``[batch, UE, 3]``; those of one batch entry share large-scale parameters as their
            distances say (section 7.6.3), those of two do not.
        los: whether all are in line of sight.
        spec_version: of 38.901.

    Returns:
        scattered powers ``[batch * UE, cluster]``, 0 where there is no cluster; delays in seconds ``[batch * UE,
        cluster, ray]``; azimuths and zeniths of departure, then of arrival, radians of that shape; linear Rician
        factors ``[batch * UE]``, 0 out of sight.
    """
    batch, users = ues.shape[:2]
    antenna = _antenna(tr38901, carrier)
    options = {} if scenario == "rma" else {"o2i_model": "low"}  # of indoor UEs, and all here are outdoor
    model = getattr(tr38901, SYSTEM_SCENARIOS[scenario])(
        carrier_frequency=carrier,
        ut_array=antenna,
        bs_array=antenna,
        direction="downlink",
        enable_pathloss=False,
        enable_shadow_fading=False,
        spec_version=spec_version,
        **options,
        **_ON_CPU,
    )
    large_scale, sampler = tr38901.LSPGenerator(model), tr38901.RaysGenerator(model)
    model.set_topology(
        ut_loc=torch.from_numpy(ues),
        bs_loc=torch.from_numpy(bs).expand(batch, 1, 3),
        ut_orientations=torch.zeros(batch, users, 3, dtype=torch.float64),
        bs_orientations=torch.zeros(batch, 1, 3, dtype=torch.float64),
        ut_velocities=torch.zeros(batch, users, 3, dtype=torch.float64),
        in_state=torch.zeros(batch, users, dtype=torch.bool),
        los=los,
    )
    large_scale.topology_updated_callback()
    sampler.topology_updated_callback()
    parameters = large_scale()
    rays = sampler(parameters)
    cluster_delay, strongest = _numpy(model.get_param("cDS")) * 1e-9, _numpy(rays.strongest_cluster_indices)
    ray_delay = np.repeat(_numpy(rays.delays)[:, :, None], model.rays_per_cluster, axis=2)
    for link in range(batch * users):
        ray_delay[link, strongest[link]] += sub_cluster_delays(cluster_delay[link])
    rician = _numpy(parameters.k_factor) if los else np.zeros(batch * users)
    angles = [_numpy(value) for value in (rays.aod, rays.zod, rays.aoa, rays.zoa)]
    return _numpy(rays.powers), ray_delay, angles, rician


class SionnaEnvironment(DiscEnvironment):
    """One environment whose rays Sionna drew, fully determined by the scenario and ``(seed, index)``.

    It lies where the built-in generator's environment of the same cell, seed and index lies. With more than one patch
    every patch centre is a UE of its own: its large-scale parameters are correlated over the distance as in 38.901,
    section 7.6.3, and its rays are independent.

    Args:
        config: the cell. Scenarios take its heights as they are; 38.901 means 10 m for the BS in UMi, 25 m in UMa and
            35 m in RMa.
        index: the environment's number, from 1; LASCO draws even ones in line of sight, odd ones not.
        seed: the cell's seed, not negative.
        los: overrides the rule by index. CDL profiles have their own state (D and E line of sight, A to C not); for
            them None means the profile's, and the other state is an error.
        scenario: ``"umi"``, ``"uma"``, ``"rma"``, or ``"cdl-a"`` to ``"cdl-e"``. A profile's angles are turned so that
            the environment lies at azimuth 0, and in D and E at the profile's line-of-sight zenith (38.901, section
            7.7.5.1).
        delay_spread: rms delay spread in seconds that a CDL profile is scaled to.
        spec_version: tables of 38.901 to use; ``"16.1"`` are those of the built-in generator, ``"19.2"`` the latest.

    Raises:
        ValueError: an unknown scenario, a state that a CDL profile does not have, or what
            :class:`csimodels.channels.disc.DiscEnvironment` refuses.
        ModuleNotFoundError: Sionna is not installed; names the extra.
    """

    def __init__(
        self,
        config: CellConfig,
        index: int,
        seed: int,
        *,
        los: bool | None = None,
        scenario: str = "umi",
        delay_spread: float = 100e-9,
        spec_version: str = "16.1",
    ):
        if scenario not in SYSTEM_SCENARIOS and scenario not in CDL_SCENARIOS:
            known = ", ".join([*SYSTEM_SCENARIOS, *CDL_SCENARIOS])
            raise ValueError(f"scenario: expected one of {known}, got {scenario!r}")
        if scenario in CDL_SCENARIOS:
            profile_los = CDL_SCENARIOS[scenario] in _CDL_LOS
            if los not in (None, profile_los):
                raise ValueError(f"los: {scenario} is {'LOS' if profile_los else 'NLOS'}, got {los}")
            los = profile_los
            if not delay_spread > 0:
                raise ValueError(f"delay_spread: expected a positive number of seconds, got {delay_spread}")
        super().__init__(config, index, seed, los=los)
        self.scenario, self.delay_spread, self.spec_version = scenario, delay_spread, spec_version
        self.patch_centres = self._draw_disc(self._rng, config.patches)
        sionna_seed = np.random.SeedSequence([seed, index, 2]).generate_state(1, np.uint64)[0]
        with seeded(int(sionna_seed)) as tr38901:
            self.ray_sets = self._cdl(tr38901) if scenario in CDL_SCENARIOS else self._system_level(tr38901)

    def _system_level(self, tr38901: ModuleType) -> list[RaySet]:
        """Steps 1 to 9 of 38.901, section 7.5, by Sionna; 10 and 11 without antennas here."""
        links = system_level_links(
            tr38901,
            self.scenario,
            self.config.carrier,
            bs=self._bs,
            ues=(self.centre + self.patch_centres)[None],
            los=self.los,
            spec_version=self.spec_version,
        )
        return self._ray_sets(*links)

    def _cdl(self, tr38901: ModuleType) -> list[RaySet]:
        """38.901, section 7.7.1: Sionna's table, ray offsets and random coupling."""
        antenna = _antenna(tr38901, self.config.carrier)
        cdl = tr38901.CDL(
            CDL_SCENARIOS[self.scenario],
            self.delay_spread,
            self.config.carrier,
            ut_array=antenna,
            bs_array=antenna,
            spec_version=self.spec_version,
            **_ON_CPU,
        )
        # CDL offers no public way to its rays, only to channels at Sionna's own antennas.
        rays = cdl._create_rays(self.config.patches)
        rician = _numpy(cdl._get_k_factor(self.config.patches))
        azimuth, zenith = self._direct_angles()
        aod, zod, aoa, zoa = (_numpy(value) for value in (rays.aod, rays.zod, rays.aoa, rays.zoa))
        if self.los:
            zod, zoa = zod + zenith - cdl._los_zod.item(), zoa + math.pi - zenith - cdl._los_zoa.item()
        delay = np.repeat(_numpy(rays.delays)[:, :, None], aod.shape[2], axis=2)
        return self._ray_sets(_numpy(rays.powers), delay, [aod + azimuth, zod, aoa + azimuth, zoa], rician)

    def _ray_sets(
        self, power: np.ndarray, delay: np.ndarray, angles: list[np.ndarray], rician: np.ndarray
    ) -> list[RaySet]:
        """Phases (step 10) and the share of the direct ray.

        Args:
            power: scattered cluster powers that sum to 1 or less, ``[patch, cluster]``, 0 where there is no cluster.
            delay: seconds, ``[patch, cluster, ray]``.
            angles: azimuth and zenith of departure, azimuth and zenith of arrival, radians, ``[patch, cluster, ray]``.
            rician: linear Rician factor, ``[patch]``.
        """
        phase = self._rng.uniform(-math.pi, math.pi, delay.shape)
        gain = np.sqrt(power / delay.shape[2] / (1 + rician[:, None]))[:, :, None] * np.exp(1j * phase)
        departure, arrival = unit_vectors(angles[0], angles[1]), unit_vectors(angles[2], angles[3])
        return [
            RaySet(
                gain=torch.from_numpy(gain[patch, kept].reshape(-1)),
                delay=torch.from_numpy(delay[patch, kept].reshape(-1)),
                departure=torch.from_numpy(departure[patch, kept].reshape(-1, 3)),
                arrival=torch.from_numpy(arrival[patch, kept].reshape(-1, 3)),
                direct=math.sqrt(rician[patch] / (1 + rician[patch])),
            )
            for patch, kept in enumerate(power > 0)
        ]
