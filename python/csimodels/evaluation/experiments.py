"""All experiments by name, whatever system they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from csimodels.evaluation import (
    lasco_experiments,
    llmcsinet_experiments,
    llmcsinet_settings,
    lvm4cf_experiments,
    lvm4cf_settings,
    multitask_experiments,
    multitask_settings,
)
from csimodels.evaluation.outcome import Context, Outcome
from csimodels.training.checkpoint_store import CheckpointStore


@dataclasses.dataclass(frozen=True)
class Experiment:
    """``description``, one line that names the paper's figure, and ``run``."""

    description: str
    run: Callable[[Context], Outcome]


def _lasco(function: Callable[[lasco_experiments.Settings], Outcome]) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        if context.channels:
            raise ValueError("channels: expected none for LASCO's experiments, whose environments are the preset's")
        store = CheckpointStore(
            context.out / "checkpoints", context.preset, on_start=context.on_start, on_step=context.on_step
        )
        settings = lasco_experiments.settings(
            context.preset, store, context.out, workers=context.workers, on_done=context.on_done
        )
        return function(settings)

    return run


def _llmcsinet(function: Callable[[llmcsinet_settings.Settings], Outcome]) -> Callable[[Context], Outcome]:
    return lambda context: function(llmcsinet_settings.settings(context))


def _lvm4cf(function: Callable[[lvm4cf_settings.Settings], Outcome]) -> Callable[[Context], Outcome]:
    return lambda context: function(lvm4cf_settings.settings(context))


def _multitask(function: Callable[[multitask_settings.Settings], Outcome]) -> Callable[[Context], Outcome]:
    return lambda context: function(multitask_settings.settings(context))


EXPERIMENTS: dict[str, Experiment] = {
    **{name: Experiment(text, _lasco(function)) for name, (text, function) in lasco_experiments.EXPERIMENTS.items()},
    **{
        name: Experiment(text, _llmcsinet(function))
        for name, (text, function) in llmcsinet_experiments.EXPERIMENTS.items()
    },
    **{name: Experiment(text, _lvm4cf(function)) for name, (text, function) in lvm4cf_experiments.EXPERIMENTS.items()},
    **{
        name: Experiment(text, _multitask(function))
        for name, (text, function) in multitask_experiments.EXPERIMENTS.items()
    },
}
