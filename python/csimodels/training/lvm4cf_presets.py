"""The two sizes at which LVM4CF and its rivals are trained: ``paper`` (section V) and ``laptop``."""

from __future__ import annotations

import dataclasses
import functools

from csimodels.models.backbone import BackboneConfig
from csimodels.models.codebooks import PortLayout
from csimodels.models.codeword_baselines import FcConfig, TransformerCodewordConfig
from csimodels.models.codeword_network import CodewordConfig
from csimodels.models.lvm4cf import Lvm4CfConfig
from csimodels.training.codebook_training import CodebookTraining
from csimodels.training.lasco_presets import check_preset
from csimodels.training.loop import TrainConfig

PORTS = PortLayout(2, 8, 8)  # Table I
LABELS = {"fc": "FC", "transformer": "Transformer", "llm": "LLM", "lvm4cf": "LVM4CF"}


@dataclasses.dataclass(frozen=True)
class CodebookPreset:
    """Sizes of one preset.

    Attributes:
        samples: SSLCF's, of one site, for training, validation and test.
        pooled_samples: MSLCF's, of all sites of an environment type together.
        single_side_epochs, dual_side_epochs, update_interval: of Algorithms 1 and 2.
        batch_size, learning_rate: of every interval; the schedule is decided, the paper says "scheduler" only.
        bits: B of the figures. few_bits: those of the figures with two; pooled_few_bits: for codebooks of many sites.
        networks: label in :data:`LABELS` -> configuration.
        site: SSLCF's set of channels. environments: MSLCF's, one per environment type.
        ports: of the array. mixed_precision: of :class:`TrainConfig`.
    """

    name: str
    samples: tuple[int, int, int]
    pooled_samples: tuple[int, int, int]
    single_side_epochs: int
    dual_side_epochs: int
    update_interval: int
    batch_size: int
    learning_rate: float
    bits: tuple[int, ...]
    few_bits: tuple[int, int]
    pooled_few_bits: tuple[int, ...]
    networks: dict[str, CodewordConfig] = dataclasses.field(hash=False)
    site: str
    environments: tuple[str, ...]
    ports: PortLayout = PORTS
    mixed_precision: str = "no"

    def training(self, network: str, deployment: str, *, initial: str | None = None, seed: int = 0) -> CodebookTraining:
        """Algorithm 1 (``"single_side"``) or 2 (``"dual_side"``) for a network by its label's name.

        Raises:
            ValueError: there is no such network or deployment.
        """
        if network not in self.networks:
            raise ValueError(f"network: expected one of {', '.join(self.networks)}, got {network!r}")
        epochs = self.single_side_epochs if deployment == "single_side" else self.dual_side_epochs
        train = TrainConfig(
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            final_learning_rate=self.learning_rate / 100,
            weight_decay=0.0,
            seed=seed,
            save_every=200,
            mixed_precision=self.mixed_precision,
            initial_candidate=initial is not None,
        )
        return CodebookTraining(self.networks[network], train, deployment, self.update_interval, initial, seed)


@functools.cache
def codebook_preset(name: str) -> CodebookPreset:
    """``"laptop"`` or ``"paper"``.

    At ``laptop`` no backbone is pre-trained and all networks have about the same size (0.43 to 0.53 M parameters), so
    that its results compare architectures, not what pre-training brings.

    Its choices were measured on built-in channels of 100 discs (mean cosine on validation channels):

    - ``residual`` stays off, as in the paper: with 256 codewords, 20,000 channels and 4 intervals of 10 epochs, FC rose
      from 0.213 to 0.702 without and to 0.689 with it (k-lines: 0.712). The first interval has to leave the random
      codewords behind, and a network relearns the identity soon enough in the others.
    - The learning rate lies between two that served with batches of 512 and 1,024 codewords (6 epochs, SS): LVM4CF
      reached 0.512 with 1e-3, 0.564 with 3e-3 and 0.380 with 6e-3, the Transformer 0.539 and 0.567, FC 0.558, 0.557 and
      0.454.
    - With these settings and 256 codewords LVM4CF rose from 0.213 to 0.695 in 33 seconds on one core of an AMD EPYC
      (k-lines: 0.705).

    Raises:
        ValueError: there is no such preset.
    """
    check_preset(name)
    if name == "paper":
        return CodebookPreset(
            name,
            samples=(70_000, 20_000, 10_000),
            pooled_samples=(140_000, 40_000, 20_000),
            single_side_epochs=200,
            dual_side_epochs=400,
            update_interval=40,
            batch_size=512,
            learning_rate=1e-3,
            bits=(6, 8, 10, 12, 14, 16, 18, 20),
            few_bits=(12, 20),
            pooled_few_bits=(12, 20),
            networks={
                "fc": FcConfig(),
                "transformer": TransformerCodewordConfig(),
                "llm": Lvm4CfConfig.llm_paper(),
                "lvm4cf": Lvm4CfConfig.paper(),
            },
            site="uma_28ghz_site",
            environments=("uma_28ghz", "rma_28ghz", "uma_3.5ghz", "rma_3.5ghz"),
            mixed_precision="auto",
        )
    return CodebookPreset(
        name,
        samples=(12_000, 2_000, 2_000),
        pooled_samples=(12_000, 2_000, 2_000),
        single_side_epochs=12,
        dual_side_epochs=24,
        update_interval=6,
        batch_size=256,
        learning_rate=2e-3,
        bits=(4, 6, 8, 10, 12),
        few_bits=(12, 20),
        pooled_few_bits=(12,),
        networks={
            "fc": FcConfig(),
            "transformer": TransformerCodewordConfig(width=128, heads=4, feedforward=512),
            "llm": Lvm4CfConfig(backbone=BackboneConfig.laptop(2)),
            "lvm4cf": Lvm4CfConfig.laptop(),
        },
        site="uma_28ghz_site",
        environments=("uma_28ghz", "rma_28ghz", "uma_3.5ghz", "rma_3.5ghz"),
    )
