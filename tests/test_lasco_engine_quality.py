"""What low precision costs the shipped large model on channels that it has not seen."""

from __future__ import annotations

import pytest
import torch

from csikernels import LascoEngine, SamBank
from csimodels.assets import shipped_checkpoint
from csimodels.channels.environment import CellConfig, Environment
from csimodels.evaluation.demo import ENVIRONMENTS
from csimodels.evaluation.metrics import nmse_db
from csimodels.models.projection import RandomProjectionCodec
from csimodels.training.adapt import EnvironmentData
from csimodels.training.checkpoint import load_checkpoint

SAMPLES = 128


@pytest.fixture(scope="module")
def scene():
    """The shipped base, its codec, its inputs in network units and the true channels."""
    base, config, _ = load_checkpoint(shipped_checkpoint("base"))
    codec = RandomProjectionCodec(config)
    environment = Environment(CellConfig(), ENVIRONMENTS[1], 0).sample(SAMPLES)
    truth = EnvironmentData.split(environment, 1, 1, SAMPLES - 2).test
    return base, codec, codec.initial(codec.encode(truth)), truth


@pytest.mark.op("transformer_forward")
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_nmse_of_the_shipped_model_hardly_changes(backend, scene, precision):
    base, codec, h_in, truth = scene
    engine = LascoEngine(base, SamBank.from_modules(base, [base], 1.0), precision)
    with torch.inference_mode():
        exact = nmse_db(truth, codec.to_channel(base(h_in))).item()
        actual = nmse_db(truth, codec.to_channel(engine._base_output(h_in))).item()
    assert exact < -10  # it reconstructs
    assert abs(actual - exact) < 0.05, (actual, exact)
