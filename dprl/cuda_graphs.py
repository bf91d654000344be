"""Functions of tensors, recorded once and replayed: on a GPU small kernels take longer to launch than to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UPS = 3
"""Calls of each shape before one is recorded, in which libraries choose kernels and torch.compile compiles."""

Tensors = dict[str, Tensor]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Tensors


class Replayed:
    """Calls `function`, from the fourth time on through a CUDA graph, one for each shape of its inputs.

    What the function reads beside its inputs, and what it changes, such as weights, their gradients and an optimiser's
    moments, may change in place between calls, and must not move. It must not copy between devices, nor depend on
    values. Every call runs it once. Without a GPU it is called as it is.
    """

    def __init__(self, function: Callable[..., Tensors], generator: torch.Generator | None = None) -> None:
        """Take the function, and the generator from which it draws."""
        self._function, self._generator = function, generator
        self._recordings: dict[Hashable, _Recording] = {}
        self._calls: Counter[Hashable] = Counter()
        self._memory: Any = None

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return what the function returns."""
        if not all(tensor.is_cuda for tensor in inputs):
            return self._function(*inputs)
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM_UPS:
            return self._warm_up(inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = self._record(inputs)
        recording = self._recordings[shapes]
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.graph.replay()
        return {name: output.clone() for name, output in recording.outputs.items()}

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Tensors:
        """Call the function on a stream of its own, as what is recorded has to be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        own = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = self._function(*own)
        self._memory = graph.pool()  # recordings are replayed in turn, so they share what lies between
        return _Recording(graph, own, outputs)
