"""What a plan computes against what its modules compute, before it may run.

Whether a trace understood a network is asked in float32 and of a copy with other weights: a new
network hides what it will do after training behind BatchNorms that change nothing yet and branches
that start at zero. Whether a back end computes it is asked of the networks themselves, as closely
as the dtype allows. Both are asked for gradients, too, which hooks and no_grad may change unseen.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moe_kernels import oracle
from moe_kernels.plan.back_ends.aten import AtenBackEnd
from moe_kernels.plan.graph import CannotPlan, graph_of
from moe_kernels.plan.member import Member
from moe_kernels.plan.modules import RandomState, evaluated
from moe_kernels.plan.trace import trace

# Allowed errors of logits and of gradients, relative to their norm. Where rounding moves a ReLU
# over zero a gradient jumps; in bfloat16 those of narrow networks are off by a third.
_TRACED = 1e-3, 1e-2
_COMPUTED = {torch.float32: (1e-3, 0.1), torch.bfloat16: (0.1, 0.9)}
_NUM_IMAGES = 2


class NotFinite(CannotPlan):
    """A model that returns NaN or infinity, which other weights may cure."""


def probe(images: Tensor) -> Tensor:
    """A few images like these, float32, with noise: equal pixels would leave max pooling a choice,
    which different roundings take differently."""
    few = images[:_NUM_IMAGES].detach().float()
    if len(few) == 0:
        few = images.new_zeros(_NUM_IMAGES, *images.shape[1:], dtype=torch.float32)
    largest = float(few.abs().amax()) or 1.0
    return few + 0.1 * largest * _normal(few, 0)


def direction(logits: Tensor) -> Tensor:
    """Some gradient of the logits."""
    return _normal(logits, 1)


def differentiated(
    network: nn.Module, images: Tensor, grad_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the images, as the module and autograd compute them."""
    with _plain_autograd(images.device), evaluated(network):
        leaf = images.clone().requires_grad_()
        logits = network(leaf)
        if not isinstance(logits, Tensor) or logits.shape != grad_logits.shape:
            raise CannotPlan(f"it does not return logits of shape {list(grad_logits.shape)}")
        grad: Tensor | None = None
        if logits.requires_grad:
            (grad,) = torch.autograd.grad(
                logits, leaf, grad_logits.to(logits.dtype), allow_unused=True
            )
    return logits.detach(), torch.zeros_like(images) if grad is None else grad


def check_trace(network: nn.Module, images: Tensor) -> None:
    """Compare what a trace understands of a network with what it computes.

    Args:
        images: as `probe` makes them.
    Raises:
        CannotPlan: they differ, or the network cannot be copied.
    """
    try:
        copied = copy.deepcopy(network)
    except Exception as error:  # whatever its parts raise
        raise CannotPlan(f"it cannot be copied to be checked: {error}") from error
    _change_weights(copied)
    _, C, H, W = images.shape
    traced = trace(copied, graph_of(copied), (C, H, W))
    scale, shift = (x.to(images.device)[:, None, None] for x in (traced.scale, traced.shift))
    member = Member([0], traced, AtenBackEnd(images.device, torch.float32), images.device)
    with oracle.without_tf32():
        member.load([copied])
        values = member.forward((images * scale + shift).unsqueeze(0))
        logits = member.logits(values)
        grad_logits = direction(logits)
        grad = member.backward(values, member.head_input_grad(values, grad_logits)) * scale
    compare((logits[0], grad[0]), differentiated(copied, images, grad_logits[0]), _TRACED)


def compare(
    ours: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
    allowed: tuple[float, float] | torch.dtype,
) -> None:
    """Logits and gradients, each within an error; that of a back end depends on its dtype.

    Raises:
        CannotPlan: they differ by more; NotFinite if the truth is not finite.
    """
    errors = _COMPUTED[allowed] if isinstance(allowed, torch.dtype) else allowed
    for what, mine, its, error in zip(("logits", "gradients"), ours, truth, errors, strict=True):
        size, difference = float(its.norm()), float((mine - its).norm())
        if not difference <= error * size + 1e-6:
            reason = f"the plan's {what} differ from the module's by {difference:.3g}, "
            kind = CannotPlan if its.isfinite().all() else NotFinite
            raise kind(f"{reason}their norm is {size:.3g}")


@contextlib.contextmanager
def _plain_autograd(device: torch.device) -> Iterator[None]:
    """Autograd in full precision, whatever the caller's modes are, and leaving no trace."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    random_state = RandomState()
    with contextlib.ExitStack() as stack:
        stack.callback(random_state.restore)
        # backward passes that have no deterministic kernel would raise
        stack.callback(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        torch.use_deterministic_algorithms(False)
        stack.enter_context(oracle.without_tf32())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@torch.no_grad()
def _change_weights(network: nn.Module) -> None:
    """By a tenth of their size, those that are zero as well; and BatchNorm's statistics."""
    for i, parameter in enumerate(network.parameters()):
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.norm()) / parameter.numel() ** 0.5 or 1.0
            parameter.add_(0.1 * size * _normal(parameter, i))
    for i, module in enumerate(network.modules()):
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            mean, variance = module.running_mean, module.running_var
            assert variance is not None
            mean.add_(0.1 * variance.sqrt() * _normal(mean, i))
            variance.mul_(torch.exp(0.3 * _normal(variance, i + 1)))


def _normal(like: Tensor, seed: int) -> Tensor:
    """Normally distributed, as far as a check can tell: a large one repeats itself."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(
        min(like.numel(), 9973), generator=generator, dtype=torch.float32, device="cpu"
    ).to(like)
    repeats = -(-like.numel() // len(noise))
    return noise.repeat(repeats)[: like.numel()].view(like.shape)
