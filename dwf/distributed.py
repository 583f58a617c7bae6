"""Let several processes train as one: ranks, sums, and BatchNorm over the global batch.

A run on W processes computes what one process computes with the same global batch: each rank takes
its share of the rows, gradients are averaged by DistributedDataParallel, and BatchNorm's training
statistics are those of all rows. Attacks see the inner module and communicate nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dwf.checks import ConfigError, DwfError


def init(device: str = "auto") -> torch.device:
    """Join the process group if torchrun started us; return this process's device.

    "auto" is this rank's GPU if there is one, else the CPU. GPU tensors are summed by nccl, CPU
    tensors by gloo.

    Raises:
        ConfigError: for a device that torch does not know or this machine does not have, or if the
            processes of the group do not meet.
    """
    local_rank = _local_rank()
    if device == "auto":
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {device!r} is unknown, expected auto, cpu, cuda or cuda:0"
        ) from error
    on_gpu = chosen.type == "cuda"
    if on_gpu and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device!r}, but torch sees {torch.cuda.device_count()} GPUs")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise ConfigError(
                f"RANK is {os.environ['RANK']!r}, but the processes did not meet, {reason}; start "
                "them by torchrun, or unset RANK"
            ) from error
        _learn_who_is_there()
    return chosen


def _local_rank() -> int:
    text = os.environ.get("LOCAL_RANK", "0")
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"LOCAL_RANK is {text!r}, expected a number") from error


def shutdown() -> None:
    """Leave the process group, if there is one."""
    _there.clear()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # of processes that are gone
            dist.destroy_process_group()


class ProcessLostError(DwfError, RuntimeError):
    """Another process of a torchrun is gone; the message says which and what to do."""


# Process number and id of every process on this machine.
_there: dict[int, int] = {}


def _learn_who_is_there() -> None:
    """Fill ``_there``, by which a lost process is named."""
    host = zlib.crc32(socket.gethostname().encode())
    own = torch.zeros(world_size(), 2, dtype=torch.int64)
    own[rank()] = torch.tensor([os.getpid(), host])
    if dist.get_backend() == "nccl":
        own = own.cuda()
    _there.clear()
    _there.update({i: pid for i, (pid, where) in enumerate(total(own).tolist()) if where == host})


@contextlib.contextmanager
def naming_lost() -> Iterator[None]:
    """Turn torch's error about a connection that broke into one that names the lost process.

    Raises:
        ProcessLostError: another process is gone.
    """
    try:
        yield
    except DwfError:
        raise
    except RuntimeError as error:
        lost = _lost() if world_size() > 1 else []
        broken = any(word in str(error).lower() for word in ("gloo", "nccl", "connection"))
        if not lost and not (world_size() > 1 and broken):
            raise
        which = " and ".join(f"rank {i} (pid {pid})" for i, pid in lost) or "another process"
        raise ProcessLostError(
            f"{which} is gone, so rank {rank()} cannot go on; its last lines say why, or the "
            "system killed it (memory: see dmesg); the same command continues from the last "
            "checkpoint"
        ) from error


def _lost() -> list[tuple[int, int]]:
    """Processes of this machine that do not run any more, after giving them a second to go."""
    for _ in range(10):
        lost = [(i, pid) for i, pid in _there.items() if not _runs(pid)]
        if lost:
            return lost
        time.sleep(0.1)
    return []


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"  # dead, but its parent has not looked yet


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process has come here."""
    any_process(False)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process: the same answer on each of them."""
    return bool(total(torch.tensor(int(flag))))


def total(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def largest(values: Tensor) -> Tensor:
    """The largest of all processes' values, element by element, in place."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def wrapped(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel, or as it is on a single process."""
    if world_size() == 1:
        return module
    # the option's name before torch 2.15; drop once that is required
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync: False}  # BatchNorm statistics are global already
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        **options,
    )


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradient is summed likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad.clone())


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics cover the rows of all processes.

    torch's SyncBatchNorm refuses CPU tensors. Frozen parameters mean that an attack is running: it
    uses local statistics and starts no communication. In eval mode it is torch's BatchNorm2d, so
    plans of the model are those of one process: ``evaluates_as`` tells them.
    """

    evaluates_as = nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.weight.requires_grad and world_size() > 1):
            return super().forward(x)
        rows = x.float()
        axes = (0, 2, 3)
        count = float(total(torch.tensor(float(rows.numel() // rows.shape[1]), device=x.device)))
        mean = _sum(rows.sum(axes)) / count
        centered = rows - mean.view(1, -1, 1, 1)
        variance = _sum(centered.square().sum(axes)) / count  # two passes: no cancellation
        if self.track_running_stats:
            self._update(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scale = (self.weight * (variance + self.eps).rsqrt()).view(1, -1, 1, 1)
        return (centered * scale + self.bias.view(1, -1, 1, 1)).to(x.dtype)

    def _update(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(unbiased_variance, rate)


def _sum(values: Tensor) -> Tensor:
    return _Sum.apply(values)  # type: ignore[no-any-return]


def use_global_batch_norm(model: nn.Module) -> None:
    """Turn every BatchNorm2d of a model into a GlobalBatchNorm2d, in place, keeping its state.

    One without weights keeps local statistics, because it cannot tell training from an attack.
    Does nothing on a single process, where both compute the same.
    """
    if world_size() == 1:
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            module.__class__ = GlobalBatchNorm2d
