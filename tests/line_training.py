"""A model of one weight and the hooks that script and interrupt its training."""

import torch
from accelerate import Accelerator

from csimodels.training.loop import TrainConfig, Trainer


class Line(torch.nn.Module):
    """``y = w x`` with one weight, so that a test can say what every step does to it."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([start]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def line_trainer(
    accelerator: Accelerator, config: TrainConfig, *, model=None, data=None, validate=None, **options
) -> Trainer:
    """Fit a :class:`Line` to ``y = 2 x``; options as of :class:`Trainer`."""
    x = torch.linspace(-1, 1, 24)

    def loss(network, batch):
        x, y = batch
        return (network(x) - y).square().mean()

    return Trainer(
        model or Line(),
        config,
        data or (lambda epoch: (x, 2 * x)),
        options.pop("loss", loss),
        validate or (lambda network: (network.weight.item() - 2) ** 2),
        accelerator=accelerator,
        **options,
    )


def line_config(**changes) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "batch_size": 8, "learning_rate": 0.1, "schedule": "constant", **changes})


def scripted(values: list[float], seen: list[float]):
    """A validation that returns the given values in turn and notes the weight that it saw."""
    remaining = iter(values)

    def validate(network):
        assert not network.training
        assert torch.is_inference_mode_enabled()
        seen.append(network.weight.item())
        return next(remaining)

    return validate


class Interrupted(Exception):  # noqa: N818
    pass


def interrupt_at(stop: int):
    def on_step(step: int, total: int, loss: float) -> None:
        if step == stop:
            raise Interrupted

    return on_step
