"""Users of a scene that Sionna RT ships, and the rays that reach them (the extra ``raytracing``).

A BS stands at one place; UEs stand on a square grid of points, each of which belongs to training, validation or test,
so that their positions are disjoint and at least a grid spacing apart. Points inside buildings, of the other state than
asked for, or that no path reaches are left out and counted. All antennas are vertically polarised and omnidirectional.

Sionna RT is imported when the first rays are traced; that picks Mitsuba's variant for the process, if nothing has yet.
On a CPU it compiles its kernels with the system's LLVM library, or the one that ``DRJIT_LIBLLVM_PATH`` names. One that
cannot compile a kernel ends the whole process (seen: 15 and 16, which lack an instruction on x86-64; 19 works), so it
is tried in a process of its own first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from csimodels.channels.disc import unit_vectors
from csimodels.channels.rays import SPEED_OF_LIGHT, Rays

SPLITS = ("train", "validation", "test")
_SHARES = (0.5, 0.25, 0.25)  # of the points, as the paper's 20,000, 10,000 and 10,000 samples
_LOOKED_AT, _TRACED = 8192, 512  # points at a time
_INDOORS, _OTHER_STATE, _UNREACHED, _REACHED = range(4)


@dataclasses.dataclass(frozen=True)
class TracedUsers:
    """UEs that rays reach.

    Attributes:
        positions: float64 ``[user, 3]``, metres.
        rays: gains at the carrier, the strongest first; a path that a user lacks has gain 0. Delays count from each
            user's first path. ``doppler`` is that of a UE that moves at 1 m/s in a horizontal direction of its own.
        left_out: points that were passed over before the last of these UEs: ``indoors``, in the ``other_state`` (in or
            out of line of sight), and ``unreached``.
    """

    positions: torch.Tensor
    rays: Rays
    left_out: dict[str, int]


@dataclasses.dataclass(frozen=True)
class RayTracedSite:
    """A BS in a scene, and where its UEs are. Decided: all of it but the carrier and the number of paths.

    Attributes:
        scene: name of one of Sionna RT's scenes: ``"munich"``, ``"simple_street_canyon"``, ``"florence"``, ...
        carrier: Hz.
        bs: position, metres.
        area: of the UEs: smallest x and y, largest x and y.
        ue_height: above the scene's zero, metres.
        spacing: of the grid of points, metres.
        los: whether UEs are in line of sight; None takes both.
        max_depth: reflections of a path, at most. diffraction: whether paths may also bend around one edge.
        max_paths: the strongest that are kept.
        samples: rays shot from the BS to find paths.
        seed: of the points' order, of the rays shot, and of the UEs' directions of movement.

    Raises:
        ValueError: a number out of range.
    """

    scene: str = "munich"
    carrier: float = 3.4e9
    bs: tuple[float, float, float] = (8.5, 21.0, 27.0)
    area: tuple[float, float, float, float] = (-150.0, -150.0, 150.0, 150.0)
    ue_height: float = 1.5
    spacing: float = 0.25
    los: bool | None = False
    max_depth: int = 5
    diffraction: bool = True
    max_paths: int = 10
    samples: int = 30_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("carrier", "spacing", "max_paths", "samples"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("max_depth", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if min(self._columns, self._rows) < 2:
            raise ValueError(f"area: expected room for 2 x 2 points {self.spacing} m apart, got {self.area}")

    @property
    def _columns(self) -> int:
        return int((self.area[2] - self.area[0]) / self.spacing)

    @property
    def _rows(self) -> int:
        return int((self.area[3] - self.area[1]) / self.spacing)

    def points(self, split: str, draw: int = 0) -> np.ndarray:
        """Grid points of one split in the order in which they are looked at, int64 ``[point]``; ``draw`` reorders them.

        Raises:
            ValueError: no such split, or a negative draw.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if draw < 0:
            raise ValueError(f"draw: expected at least 0, got {draw}")
        count, part = self._columns * self._rows, SPLITS.index(split)
        bounds = np.rint(np.cumsum((0, *_SHARES)) * count).astype(int)
        own = np.random.default_rng([self.seed, 0]).permutation(count)[bounds[part] : bounds[part + 1]]
        return np.random.default_rng([self.seed, 1, part, draw]).permutation(own)

    def positions(self, points: np.ndarray) -> np.ndarray:
        """Metres, float64 ``[point, 3]``."""
        row, column = np.divmod(points, self._columns)
        x, y = self.area[0] + (column + 0.5) * self.spacing, self.area[1] + (row + 0.5) * self.spacing
        return np.stack([x, y, np.full(len(points), self.ue_height)], axis=1)

    def headings(self, points: np.ndarray) -> np.ndarray:
        """Directions of movement, unit vectors ``[point, 3]``; each point has its own."""
        azimuth = np.random.default_rng([self.seed, 2]).uniform(-np.pi, np.pi, self._columns * self._rows)[points]
        return unit_vectors(azimuth, np.array(np.pi / 2))

    def users(self, split: str, count: int, *, draw: int = 0) -> TracedUsers:
        """The first ``count`` UEs of a split that rays reach.

        Positions are a function of the arguments alone; gains are so to the rounding of Sionna RT's float32.

        Raises:
            ValueError: no such split, a negative draw, or fewer such UEs than ``count`` in the whole area.
            ImportError: Sionna RT is not installed, or its LLVM does not work; names the extra.
        """
        points, tracer = self.points(split, draw), _tracer(self)
        outcome = np.full(len(points), _INDOORS)
        parts: list[Rays] = []
        missing = count
        for start in range(0, len(points), _LOOKED_AT):
            some = points[start : start + _LOOKED_AT]
            outdoors, sighted = tracer.look(self.positions(some))
            suitable = outdoors & (True if self.los is None else sighted == self.los)
            outcome[start : start + len(some)][outdoors & ~suitable] = _OTHER_STATE
            places = start + np.flatnonzero(suitable)
            for traced in np.split(places, range(_TRACED, len(places), _TRACED)):
                rays = tracer.trace(self.positions(points[traced]), self.headings(points[traced]))
                reached = (rays.gain != 0).any(-1).numpy()
                outcome[traced] = np.where(reached, _REACHED, _UNREACHED)
                kept = np.flatnonzero(reached)[:missing]
                parts.append(rays[torch.from_numpy(kept)])
                missing -= len(kept)
                if not missing:
                    return self._found(points, outcome, traced[kept[-1]] + 1, parts)
        raise ValueError(f"count: expected at most {count - missing} UEs ({split}) that rays reach, got {count}")

    def _found(self, points: np.ndarray, outcome: np.ndarray, seen: int, parts: list[Rays]) -> TracedUsers:
        counts = np.bincount(outcome[:seen], minlength=_REACHED)
        reached = points[:seen][outcome[:seen] == _REACHED]
        names = {"indoors": _INDOORS, "other_state": _OTHER_STATE, "unreached": _UNREACHED}
        fields = [field.name for field in dataclasses.fields(Rays)]
        return TracedUsers(
            torch.from_numpy(self.positions(reached)),
            Rays(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields}),
            {name: int(counts[value]) for name, value in names.items()},
        )


def rays_of_paths(
    a: np.ndarray,
    tau: np.ndarray,
    theta_t: np.ndarray,
    phi_t: np.ndarray,
    theta_r: np.ndarray,
    phi_r: np.ndarray,
    valid: np.ndarray,
    *,
    carrier: float,
    heading: np.ndarray,
    max_paths: int,
) -> Rays:
    """What Sionna RT found for one single-antenna transmitter, as rays.

    Args:
        a: complex baseband coefficients of ``Paths.cir``, ``[user, 1, 1, 1, path, 1]``: gains with the phase at the
            carrier, if the delays were not normalised.
        tau, theta_t, phi_t, theta_r, phi_r, valid: attributes of ``Paths`` with synthetic arrays, ``[user, 1, path]``:
            seconds; zenith and azimuth of departure and of arrival, radians, the latter from the user to where the path
            comes from; and whether there is such a path.
        carrier: Hz. heading: of every user, unit vectors ``[user, 3]``.
        max_paths: the strongest that are kept; where there are fewer, gains of 0 fill up.

    Returns:
        rays ``[user, max_paths]``, delays counted from each user's first path, ``doppler`` at a speed of 1 m/s.

    Raises:
        ValueError: an array of another shape.
    """
    users, paths = len(heading), tau.shape[-1]
    if a.shape != (users, 1, 1, 1, paths, 1):
        raise ValueError(f"a: expected [{users}, 1, 1, 1, {paths}, 1], got {a.shape}")
    named = {"tau": tau, "theta_t": theta_t, "phi_t": phi_t, "theta_r": theta_r, "phi_r": phi_r, "valid": valid}
    for name, value in named.items():
        if value.shape != (users, 1, paths):
            raise ValueError(f"{name}: expected [{users}, 1, {paths}], got {value.shape}")
    there = valid[:, 0].astype(bool)
    padding = ((0, 0), (0, max(0, max_paths - paths)))
    known = {
        name: np.pad(np.where(there, value[:, 0], 0.0).astype(np.float64), padding) for name, value in named.items()
    }
    gain = np.pad(np.where(there, a[:, 0, 0, 0, :, 0], 0.0).astype(np.complex128), padding)
    arrival = unit_vectors(known["phi_r"], known["theta_r"])
    return (
        Rays(
            torch.from_numpy(gain),
            torch.from_numpy(known["tau"]),
            torch.from_numpy(unit_vectors(known["phi_t"], known["theta_t"])),
            torch.from_numpy(carrier / SPEED_OF_LIGHT * (arrival * heading[:, None]).sum(-1)),
        )
        .strongest(max_paths)
        .aligned()
    )


class _Tracer:
    """Sionna RT with one scene and BS."""

    def __init__(self, site: RayTracedSite):
        import sionna.rt

        self._rt: Any = sionna.rt
        path = getattr(self._rt.scene, site.scene, None)
        if not isinstance(path, str):
            raise ValueError(
                f"scene: expected the name of one that Sionna RT ships, such as munich, got {site.scene!r}"
            )
        self._site, self._scene = site, self._rt.load_scene(path)
        self._scene.frequency = site.carrier
        antenna = self._rt.PlanarArray(num_rows=1, num_cols=1, pattern="iso", polarization="V")
        self._scene.tx_array = self._scene.rx_array = antenna
        self._scene.add(self._rt.Transmitter("bs", position=list(site.bs)))

    def look(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether the sky is open above each position ``[user, 3]``, and whether it sees the BS; bool ``[user]``."""
        import mitsuba

        scene = self._scene.mi_scene
        origin = mitsuba.Point3f(positions.T.astype(np.float32))
        up = mitsuba.Ray3f(origin, mitsuba.Vector3f(0, 0, 1))
        to_bs = mitsuba.Ray3f(origin, mitsuba.Point3f(*self._site.bs) - origin)
        to_bs.maxt = 1 - 1e-4
        return ~np.array(scene.ray_test(up)), ~np.array(scene.ray_test(to_bs))

    def trace(self, positions: np.ndarray, heading: np.ndarray) -> Rays:
        """Rays from the BS to every position; see :func:`rays_of_paths`."""
        names = [f"ue{index}" for index in range(len(positions))]
        for name, position in zip(names, positions.tolist(), strict=True):
            self._scene.add(self._rt.Receiver(name, position=position))
        try:
            paths = self._rt.PathSolver()(
                self._scene,
                max_depth=self._site.max_depth,
                samples_per_src=self._site.samples,
                refraction=False,
                diffraction=self._site.diffraction,
                seed=self._site.seed + 1,
            )
            a, tau = paths.cir(normalize_delays=False, out_type="numpy")
        finally:
            for name in names:
                self._scene.remove(name)
        found = (np.array(value) for value in (paths.theta_t, paths.phi_t, paths.theta_r, paths.phi_r, paths.valid))
        site = self._site
        return rays_of_paths(a, tau, *found, carrier=site.carrier, heading=heading, max_paths=site.max_paths)


@functools.lru_cache(maxsize=2)
def _tracer(site: RayTracedSite) -> _Tracer:
    reason = missing()
    if reason is not None:
        raise ImportError(reason, name="sionna.rt")
    return _Tracer(site)


def missing() -> str | None:
    """Why rays cannot be traced here, in one line; None if they can. The first call takes seconds."""
    if any(importlib.util.find_spec(name) is None for name in ("sionna", "mitsuba")):
        return "Sionna RT is not installed; it comes with the extra: pip install 'csikernels[raytracing]'"
    return _probed()


@functools.cache
def _probed() -> str | None:
    """What came of tracing a small scene in another process."""
    script = f"import sys; sys.path[:] = {sys.path!r}; from csimodels.channels.raytracing import _probe; _probe()"
    try:
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
        failed, said = run.returncode != 0, f"{run.stdout}\n{run.stderr}"
    except subprocess.TimeoutExpired:
        failed, said = True, "no answer within 300 s"
    if not failed:
        return None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = next((line for line in lines if "LLVM" in line), lines[-1] if lines else "no message")
    return (
        "Sionna RT, of the extra raytracing, cannot trace here; on a CPU it needs the shared library of an LLVM newer "
        f"than 16 (such as Debian's libllvm19), found by itself or by DRJIT_LIBLLVM_PATH (it said: {reason[:160]})"
    )


def _probe() -> None:
    tracer = _Tracer(RayTracedSite("simple_street_canyon", bs=(-33.0, 11.0, 32.0), samples=1000))
    position, heading = np.array([[20.0, 0.0, 1.5]]), np.array([[1.0, 0.0, 0.0]])
    tracer.look(position)
    tracer.trace(position, heading)
