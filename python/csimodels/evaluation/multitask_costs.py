"""What fine-tuning the multi-task network costs (section V-E): bytes and time with full and with low-rank fine-tuning.

The prediction task at the sizes of the ``paper`` preset, random weights (costs do not depend on them). Bytes are those
of the tensors, not of the process: all weights, what AdamW keeps beside the trainable ones (gradient and two moments),
and what a training step keeps for its backward pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from csimodels.evaluation.task_rows import Row
from csimodels.evaluation.timing import device, seconds
from csimodels.training.multitask_file import Adaptation

if TYPE_CHECKING:
    from csimodels.evaluation.multitask_settings import Settings

_MEGA = 1e6


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a backbone is stored and fine-tuned; ``bfloat16`` computes by autocast and halves frozen weights."""

    label: str
    adaptation: Adaptation | None
    bfloat16: bool = False


def variants(rank: int) -> list[Variant]:
    """Those compared, the heaviest first. Starts do not change costs, so the quick one of eq. 29 is taken."""
    return [
        Variant("float32, all weights trained", None),
        Variant("float32 + LoRA", Adaptation("lora", rank)),
        Variant("bfloat16 + LoRA", Adaptation("lora", rank), bfloat16=True),
        Variant("NF4 + LoRA, float32", Adaptation("qlora", rank)),
        Variant("NF4 + LoRA, bfloat16", Adaptation("qlora", rank), bfloat16=True),
    ]


def cost_rows(s: Settings) -> list[Row]:
    """One row per variant of :func:`variants`, with a batch of ``s.sizes.cost_batch``."""
    return [_measure(s, variant) for variant in variants(s.costs.rank)]


def _measure(s: Settings, variant: Variant) -> Row:
    training = s.costs.multitask(adaptation=variant.adaptation, backbone=s.costs.random_backbone())
    network = training.build()
    if variant.bfloat16:
        for parameter in network.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    shape = (s.sizes.cost_batch, s.costs.config.history, s.costs.config.subcarriers)
    history = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable)

    def step() -> None:
        with _precision(variant):
            loss = torch.view_as_real(network("predict", history)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def infer() -> None:
        with _precision(variant):
            network("predict", history)

    with _saved_bytes(network) as saved:
        step()
    step_ms = _median_ms(step, s.repeats)
    network.eval()
    return {
        "label": variant.label,
        "device": device(),
        "batch": s.sizes.cost_batch,
        "weights_mb": sum(map(_bytes, [*network.parameters(), *network.buffers()])) / _MEGA,
        "trainable_m": sum(parameter.numel() for parameter in trainable) / 1e6,
        "optimizer_mb": 3 * sum(map(_bytes, trainable)) / _MEGA,
        "activations_mb": saved[0] / _MEGA,
        "step_ms": step_ms,
        "inference_ms": _median_ms(infer, s.repeats),
    }


def _precision(variant: Variant) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if variant.bfloat16 else contextlib.nullcontext()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def _saved_bytes(network: nn.Module) -> Iterator[list[int]]:
    """Bytes that autograd keeps for the backward pass, each storage counted once; the network's own are no part."""
    total = [0]
    # Tensors are held, lest another one comes to lie where a freed one was and is taken for it.
    seen = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*network.parameters(), *network.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _median_ms(call: Callable[[], Any], repeats: int) -> float:
    return 1e3 * seconds(call, repeats, warm_up=1).median().item()
