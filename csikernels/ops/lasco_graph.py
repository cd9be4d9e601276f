"""A step of fixed shapes as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_MOST_GRAPHS = 16  # each keeps its own activations


class StepGraphs:
    """Captures ``step(h_in, slot)`` once per batch size and replays it.

    The first call of a batch size runs as it is: kernels are compiled and tuned and libraries set up, which a capture
    cannot do. The second call captures. A step must not wait for the GPU, and may read only its arguments and memory
    that stays in place; ``state`` names what it reads, and another state is another graph.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]):
        self._step = step
        self._graphs: OrderedDict[Hashable, _Capture | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, h_in: Tensor, slot: Tensor, state: Hashable) -> Tensor:
        """h_in [B, T, F] on a GPU, slot [B] anywhere -> [B, T, F]."""
        with torch.cuda.device(h_in.device), self._lock:
            # Replays of one graph share its memory, so streams, which do not wait for each other, have their own.
            key = (h_in.device, torch.cuda.current_stream().cuda_stream, h_in.shape[0], state)
            if key not in self._graphs:
                self._graphs[key] = None
                while len(self._graphs) > _MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                return self._step(h_in, slot)
            self._graphs.move_to_end(key)
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = _Capture(self._step, h_in, slot)
            return graph.replay(h_in, slot)

    def __reduce__(self) -> tuple:
        return StepGraphs, (self._step,)  # a copy starts without graphs

    def clear(self) -> None:
        """Forget all graphs."""
        with self._lock:
            self._graphs.clear()


class _Capture:
    """One graph with the memory of its arguments and result."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], h_in: Tensor, slot: Tensor):
        self._h_in = h_in.clone(memory_format=torch.contiguous_format)
        self._slot = slot.to(h_in.device, copy=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = step(self._h_in, self._slot)

    def replay(self, h_in: Tensor, slot: Tensor) -> Tensor:
        self._h_in.copy_(h_in)
        self._slot.copy_(slot, non_blocking=True)
        self._graph.replay()
        return self._output.clone()
