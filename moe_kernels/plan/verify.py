"""Compare what a plan computes with what its modules compute, before the plan may run.

`check_trace` tests in float32 whether a network was understood, on a copy with other weights: a new
network hides what it will do after training behind BatchNorms that change nothing yet and branches
that start at zero. `check_member` tests a back end on the networks themselves, as closely as its
dtype allows. Both compare gradients as well, which hooks and no_grad may change unseen.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moe_kernels import oracle
from moe_kernels.plan.back_ends.aten import AtenBackEnd
from moe_kernels.plan.graph import CannotPlan, graph_of, naming_network
from moe_kernels.plan.modules import RandomState, evaluated
from moe_kernels.plan.program import Member
from moe_kernels.plan.reader import trace

log = logging.getLogger("moe_kernels")

# Allowed errors of logits and of gradients, relative to their norm. Where rounding moves a ReLU
# over zero a gradient jumps; in bfloat16 those of narrow networks are off by a third.
_TRACED = 1e-3, 1e-2
_COMPUTED = {torch.float32: (1e-3, 0.1), torch.bfloat16: (0.1, 0.9)}
_NUM_IMAGES = 2


class NotFinite(CannotPlan):
    """A model that returns NaN or infinity, which other weights may cure."""


def probe(images: Tensor, count: int = _NUM_IMAGES) -> Tensor:
    """A few images like these, float32, with noise: equal pixels would leave max pooling a choice,
    which different roundings take differently."""
    few = images[:count].detach().float()
    if len(few) == 0:
        few = images.new_zeros(count, *images.shape[1:], dtype=torch.float32)
    largest = float(few.abs().amax()) or 1.0
    return few + 0.1 * largest * normal(few, 0)


def differentiated(
    network: nn.Module, images: Tensor, grad_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the images, as the module and autograd compute them."""
    with plain_autograd(images.device), evaluated(network):
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


def check_trace(network: nn.Module, images: Tensor, *, maps: bool = False) -> None:
    """Compare what a trace understands of a network with what it computes.

    In float32, which is fast; a network of so many layers that roundings alone move ReLUs over zero
    is judged in float64.

    Args:
        images: as `probe` makes them.
        maps: as of `trace`.
    Raises:
        CannotPlan: they differ, or the network cannot be copied.
    """
    try:
        copied = copy.deepcopy(network)
    except Exception as error:  # whatever its parts raise
        raise CannotPlan(f"it cannot be copied to be checked: {error}") from error
    change_weights(copied)
    try:
        _compare_trace(copied, images, torch.float32, maps)
    except NotFinite:
        raise
    except CannotPlan:
        try:
            _compare_trace(copied.double(), images.double(), torch.float64, maps)
        except CannotPlan:
            raise
        except Exception:  # not every network computes in float64
            log.debug("it cannot be judged in float64", exc_info=True)
        else:
            return
        raise


def _compare_trace(
    network: nn.Module, images: Tensor, dtype: torch.dtype, maps: bool = False
) -> None:
    _, C, H, W = images.shape
    traced = trace(network, graph_of(network), (C, H, W), maps=maps)
    back_end = AtenBackEnd(images.device, dtype)
    member = Member([0], [traced], back_end, images.device, independent=False)
    member.load([network])
    logits, grads, grad_logits = _computed(member, images)
    truth = differentiated(network, images, grad_logits[0])
    compare((logits[0], grads[0]), truth, _TRACED)


def check_member(member: Member, networks: Sequence[nn.Module], images: Tensor) -> None:
    """Compare what a back end computes of its networks with the modules, on a few images.

    Args:
        networks: all networks of the plan.
    Raises:
        CannotPlan: they differ by more than the dtype excuses; NotFinite if a module's logits are
            not finite.
    """
    few = probe(images)
    logits, grads, grad_logits = _computed(member, few)
    truth = []
    for e, its_grad in zip(member.indices, grad_logits, strict=True):
        with naming_network(e, len(networks)):
            truth.append(differentiated(networks[e], few, its_grad))
    its_logits, its_grads = (torch.stack(x) for x in zip(*truth, strict=True))
    if len(grads) != len(its_grads):  # networks that see the same images
        its_grads = its_grads.sum(dim=0, keepdim=True)
    compare((logits, grads), (its_logits, its_grads), _COMPUTED[member.back_end.dtype])


def _computed(member: Member, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [G, B, K], the gradient of the images [1 or G, ...] along some gradient of the logits,
    and the latter."""
    with oracle.without_tf32():
        values = member.forward(images.unsqueeze(0))
        logits = member.logits(values).contiguous()
        grad_logits = normal(logits, 1)
        grads = member.backward(values, member.head_input_grad(values, grad_logits))
    return logits, grads, grad_logits


def compare(
    ours: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
    allowed: tuple[float, float],
) -> None:
    """Compare logits and gradients, each within an error relative to the norm.

    Raises:
        CannotPlan: they differ by more; NotFinite if the truth is not finite.
    """
    for what, mine, its, error in zip(("logits", "gradients"), ours, truth, allowed, strict=True):
        size, difference = float(its.norm()), float((mine - its).norm())
        if not difference <= error * size + 1e-6:
            reason = f"the plan's {what} differ from the module's by {difference:.3g}, "
            kind = CannotPlan if its.isfinite().all() else NotFinite
            raise kind(f"{reason}their norm is {size:.3g}")


@contextlib.contextmanager
def plain_autograd(device: torch.device) -> Iterator[None]:
    """Autograd in full precision, whatever the caller's modes are, and leaving no trace."""
    random_state = RandomState()
    with contextlib.ExitStack() as stack:
        stack.callback(random_state.restore)
        stack.enter_context(oracle.any_algorithm())  # not all backward passes are deterministic
        stack.enter_context(oracle.without_tf32())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@torch.no_grad()
def change_weights(network: nn.Module) -> None:
    """By a tenth of their size, those that are zero as well; and BatchNorm's statistics."""
    for i, parameter in enumerate(network.parameters()):
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.norm()) / parameter.numel() ** 0.5 or 1.0
            parameter.add_(0.1 * size * normal(parameter, i))
    for i, module in enumerate(network.modules()):
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            mean, variance = module.running_mean, module.running_var
            assert variance is not None
            mean.add_(0.1 * variance.sqrt() * normal(mean, i))
            variance.mul_(torch.exp(0.3 * normal(variance, i + 1)))


def normal(like: Tensor, seed: int) -> Tensor:
    """Normally distributed, as far as a check can tell: a large one repeats itself."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(
        min(like.numel(), 9973), generator=generator, dtype=torch.float32, device="cpu"
    ).to(like)
    repeats = -(-like.numel() // len(noise))
    return noise.repeat(repeats)[: like.numel()].view(like.shape)
