"""Put the rehearsed device behind torch.cuda: its names, its facts, its generator."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

from rehearsal import graphs, streams
from rehearsal.tensors import CudaError

_NAME = "NVIDIA H200 (rehearsed)"
_FACTS = SimpleNamespace(
    name=_NAME,
    major=9,
    minor=0,
    total_memory=139 * 2**30,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 * 2**20,
    warp_size=32,
)


class BackEnd:
    """What torch asks of the module of a back end."""

    def is_initialized(self) -> bool:
        """Always."""
        return True

    def is_available(self) -> bool:
        """Always."""
        return True

    def current_device(self) -> int:
        """The only one."""
        return 0

    def device_count(self) -> int:
        """One."""
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast lowers to."""
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Seed the device's generator."""
        _manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """The state of the device's generator."""
        return _get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Set the state of the device's generator."""
        _set_state(state)


def _outside_of_captures(what: str) -> None:
    if graphs.capturing() is not None:
        raise CudaError(f"Cannot call {what} during CUDA graph capture.")


def _manual_seed(seed: int) -> None:
    _outside_of_captures("CUDAGeneratorImpl::set_current_seed")
    streams.generator.manual_seed(seed)


def _get_state(device: Any = None) -> torch.Tensor:
    _outside_of_captures("CUDAGeneratorImpl::get_state")
    return streams.generator.get_state()


def _set_state(state: torch.Tensor, device: Any = None) -> None:
    _outside_of_captures("CUDAGeneratorImpl::set_state")
    streams.generator.set_state(state)


def _set_states(states: Any) -> None:
    for state in states:
        _set_state(state)


def _answer(value: Any) -> Any:
    return lambda *_, **__: value


@contextlib.contextmanager
def _device(device: Any) -> Any:
    yield


def start() -> None:
    """Replace what torch.cuda asks the driver for."""
    # torch.compile's tables hold each function once: no two names share an object.
    nothing = "_lazy_init init set_device empty_cache reset_peak_memory_stats ipc_collect"
    zero = (
        "current_device memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    )
    true = "is_available is_initialized is_bf16_supported is_tf32_supported"
    answers = {nothing: None, zero: 0, true: True}
    replaced = {
        **{name: _answer(x) for names, x in answers.items() for name in names.split()},
        "device_count": _answer(1),
        "get_device_capability": _answer((_FACTS.major, _FACTS.minor)),
        "get_device_name": _answer(_NAME),
        "get_device_properties": _answer(_FACTS),
        "mem_get_info": _answer((_FACTS.total_memory, _FACTS.total_memory)),
        "device": _device,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.stream,
        "set_stream": streams.set_stream,
        "current_stream": streams.current_stream,
        "default_stream": _answer(streams.DEFAULT),
        "synchronize": streams.synchronize,
        "CUDAGraph": graphs.CUDAGraph,
        "graph": graphs.graph,
        "graph_pool_handle": graphs.graph_pool_handle,
        "is_current_stream_capturing": lambda: graphs.capturing() is not None,
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed,
        "get_rng_state": _get_state,
        "set_rng_state": _set_state,
        "get_rng_state_all": lambda: [_get_state()],
        "set_rng_state_all": _set_states,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    streams.generator.manual_seed(0)
    # There is no NCCL; gloo sums the tensors inside.
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend=None, **options: init("gloo", **options)
