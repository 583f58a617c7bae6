"""Train a network by compiled kernels: its forward in train mode, with gradients of parameters.

For networks that plans know whose layers are convolutions without groups, BatchNorm, ReLU, sums,
concatenations, pooling and one linear layer at the end, on CPUs with AVX-512 or AVX2.

    plan = TrainingPlan(network)
    if plan.fits(images):
        logits = plan(images)       # moves the running statistics, as network(images) would
        loss(logits).backward()     # .grad of the parameters, and of the images if they want one

A network is compared with its copy in plain autograd before the first batch: logits, gradients of
all parameters and of the images, and running statistics.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_kernels.plan.back_ends.base import Weights
from moe_kernels.plan.back_ends.simd_calls import INSTRUCTIONS, instructions_for
from moe_kernels.plan.back_ends.simd_training import TrainingBackEnd
from moe_kernels.plan.back_ends.simd_weights import PackedWeights
from moe_kernels.plan.choose import named_back_end, obstacle, padded_cost
from moe_kernels.plan.contents import Contents, Group, held
from moe_kernels.plan.graph import CannotPlan, graph_of
from moe_kernels.plan.layers import (
    RELU,
    Conv,
    Head,
    Join,
    Layer,
    Pointwise,
    Source,
    Traced,
)
from moe_kernels.plan.modules import all_modules, structure
from moe_kernels.plan.program import Member
from moe_kernels.plan.reader import trace
from moe_kernels.plan.verify import change_weights, normal, plain_autograd, probe

log = logging.getLogger("moe_kernels")

_NUM_IMAGES = 8
# Allowed errors relative to the norm: logits, gradients of all parameters, of images, statistics.
# In deep networks roundings move ReLUs over zero, and gradients jump.
_ALLOWED = {torch.float32: (1e-3, 0.1, 0.1, 1e-4), torch.bfloat16: (0.1, 0.9, 0.9, 0.02)}
_ALLOWED_EACH = 0.5  # of each parameter's gradient, in float32


class TrainingPlan:
    """A network whose train-mode forward and backward run by compiled kernels.

    Parameters are read at each call. Who differentiates gradients again gets another pass by the
    network itself, in float32.

    Args:
        network: maps images [B, C, H, W] to logits [B, K], with float32 parameters.
        dtype: of activations and of the factors of products: float32 or bfloat16. Weights, their
            gradients and statistics are float32.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.network, self._dtype = network, dtype
        self._programs: dict[tuple[Any, ...], _Program | CannotPlan] = {}
        self._structure = structure(network)

    def fits(self, images: Tensor) -> bool:
        """Whether it computes what the network would, checked at the first images of their size."""
        return self.fault(images) is None

    def fault(self, images: Tensor) -> CannotPlan | None:
        """Why it does not fit these images, or None."""
        if images.dim() != 4 or not images.is_cpu or images.dtype is not torch.float32:
            return CannotPlan("these are no float32 images [B, C, H, W] on a CPU")
        if any(_is_otherwise(module) for module in all_modules(self.network)):
            return CannotPlan("a BatchNorm is in eval mode, or a part draws random numbers")
        if (now := structure(self.network)) != self._structure:
            self._programs.clear()
            self._structure = now
        key = self._key(images)
        if key not in self._programs:
            try:
                self._programs[key] = _checked(self.network, images.detach(), self._dtype)
            except CannotPlan as error:
                self._programs[key] = error
        found = self._programs[key]
        return found if isinstance(found, CannotPlan) else None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K], float32, of images that fit.

        Raises:
            ValueError: a BatchNorm would see a single value.
        """
        program = self._programs[self._key(images)]
        assert isinstance(program, _Program)
        return program(images)

    def _key(self, images: Tensor) -> tuple[Any, ...]:
        return tuple(images.shape[1:]), tuple(
            module.training for module in all_modules(self.network)
        )


class _Run(NamedTuple):
    """One pass through a network."""

    member: Member
    back_end: TrainingBackEnd


class _Program:
    """The layers of a network for images of one size, and its packed weights."""

    def __init__(
        self, network: nn.Module, traced: Traced, dtype: torch.dtype, instructions: str
    ) -> None:
        self.network, self._traced, self._dtype = network, traced, dtype
        self._places = {
            layer.name: source
            for layer, source in zip(traced.layers, traced.sources, strict=True)
            if not isinstance(layer, Join)
        }
        self._modules = dict(network.named_modules(remove_duplicate=False))
        self._weights = PackedWeights(dtype, instructions)
        self._contents = Contents()

    def __call__(self, images: Tensor) -> Tensor:
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        return cast(Tensor, _Training.apply(images, self, names, *parameters))

    def start(self) -> _Run:
        """What runs one pass with the weights of this moment."""
        self._load()
        back_end = TrainingBackEnd(self._modules, self._places, self._weights, self._dtype)
        device = torch.device("cpu")
        member = Member([0], [self._traced], back_end, device, independent=False)
        return _Run(member, back_end)

    def _load(self) -> None:
        pairs = [
            (layer, source)
            for layer, source in zip(self._traced.layers, self._traced.sources, strict=True)
            if isinstance(layer, Conv | Head)
        ]
        changed = self._contents.changed([self._read_by(source) for _, source in pairs])
        layers = [pairs[i][0] for i in changed]
        self._weights.load(layers, [self._raw(*pairs[i]) for i in changed])

    def _read_by(self, source: Source) -> Group | None:
        tensors = []
        for path in (source.module, source.projection):
            if path is not None:
                own = held(self._modules[path], ("weight", "bias"))
                if own is None:
                    return None
                tensors += own
        return Group(tensors)

    def _raw(self, layer: Layer, source: Source) -> Weights:
        """A layer's parameters as they are; the bias is what is added before any BatchNorm."""
        module: Any = self._modules[source.module]
        weight = module.weight.detach()
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
        if isinstance(layer, Head):
            return Weights(weight[None], bias[None])
        assert isinstance(layer, Conv)
        weight = weight.reshape(layer.out_channels, layer.in_channels, *layer.kernel)
        if source.projection is None:
            return Weights(weight[None], bias[None])
        side: Any = self._modules[source.projection]
        if source.norm is None and source.projection_norm is None and side.bias is not None:
            bias = bias + side.bias.detach()
        return Weights(weight[None], bias[None], side.weight.detach().flatten(1)[None])


class _Training(torch.autograd.Function):
    """Logits [B, K] of images, of a network with these parameters."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, program: _Program, names: tuple[str, ...], *parameters: Tensor
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            run = program.start()
            values = run.member.forward(images[None])
            logits = run.member.logits(values)[0]
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(images, *parameters)  # who changes them meanwhile is told
            ctx.made = program, names, run, values
        return logits.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        images, *parameters = ctx.saved_tensors
        program, names, run, values = ctx.made
        if torch.is_grad_enabled():  # to be differentiated again
            return _differentiable(ctx, program.network, names, images, parameters, grad)
        wants = ctx.needs_input_grad
        # the graph has a place for each tensor, and so none for the second and third input
        wanted = [x and _is_due(ctx, i) for i, x in enumerate((wants[0], *wants[3:]))]
        run.back_end.begin(
            {name for name, is_wanted in zip(names, wanted[1:], strict=True) if is_wanted},
            wants_images=wanted[0],
        )
        with torch.autocast("cpu", enabled=False):
            head = run.member.head_input_grad(values, grad.float().contiguous()[None])
            of_images = run.member.backward(dict(values), head)[0]
        of_parameters = [run.back_end.gradients.get(name) for name in names]
        return of_images if wanted[0] else None, None, None, *of_parameters


def _is_due(ctx: Any, index: int) -> bool:
    """Whether this way back asks for the gradient of a tensor, as far as torch tells."""
    node = ctx.next_functions[index][0]
    try:
        return node is not None and bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it does not tell of leaves in torch.autograd.grad
        return True


def _differentiable(
    ctx: Any,
    network: nn.Module,
    names: tuple[str, ...],
    images: Tensor,
    parameters: list[Tensor],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs with a graph of their own: of another pass, by the network itself."""
    buffers = {name: x.clone() for name, x in network.named_buffers()}
    tensors = dict(zip(names, parameters, strict=True))
    logits = functional_call(network, {**tensors, **buffers}, (images,))
    wants = ctx.needs_input_grad
    of_tensors = wants[0], *wants[3:]
    inputs = [
        x for x, is_wanted in zip((images, *parameters), of_tensors, strict=True) if is_wanted
    ]
    made = iter(torch.autograd.grad(logits, inputs, grad, create_graph=True, allow_unused=True))
    found = [next(made) if is_wanted else None for is_wanted in wants]
    return tuple(found)


def _is_otherwise(module: nn.Module) -> bool:
    """Whether it computes, in the mode that it is in, something else than a training plan."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return not module.training
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def _checked(network: nn.Module, images: Tensor, dtype: torch.dtype) -> _Program:
    """The program for images of this size, compared with the network.

    Raises:
        CannotPlan: it is not understood, it would not be faster, or it computes something else.
    """
    named = named_back_end()
    if named not in (None, *INSTRUCTIONS):
        raise CannotPlan("another back end was asked for")
    instructions = named or instructions_for(dtype)
    for wanted in (torch.float32, dtype):
        reason = obstacle(instructions, images.device, wanted)
        if reason is not None:
            raise CannotPlan(reason)
    if any(x.dtype is not torch.float32 or not x.is_cpu for x in network.parameters()):
        raise CannotPlan("its parameters are not float32 on a CPU")
    _, C, H, W = images.shape
    traced = trace(network, graph_of(network), (C, H, W))
    for layer, source in zip(traced.layers, traced.sources, strict=True):
        _check_layer(network, layer, source)
    if padded_cost(traced.layers, (H, W)) > 1:
        raise CannotPlan("it is too narrow to gain")
    enough = images.repeat(-(-_NUM_IMAGES // max(len(images), 1)), 1, 1, 1)
    few = probe(enough, _NUM_IMAGES)
    copies = [_copy(network) for _ in range(2)]
    for one in copies:
        change_weights(one)
    _compare(copies, traced, few, torch.float32, instructions)
    if dtype is not torch.float32:
        _compare([_copy(network) for _ in range(2)], traced, few, dtype, instructions)
    return _Program(network, traced, dtype, instructions)


def _copy(network: nn.Module) -> nn.Module:
    """With tensors of its own, also where those of the network were computed from others."""
    memo: dict[int, Any] = {id(x): nn.Parameter(x.detach().clone()) for x in network.parameters()}
    memo |= {id(x): x.detach().clone() for x in network.buffers()}
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:  # whatever its parts raise
        raise CannotPlan(f"it cannot be copied to be checked: {error}") from error


def _check_layer(network: nn.Module, layer: Layer, source: Source) -> None:
    """Raise CannotPlan for a layer that is not trained by compiled kernels."""
    if source.identity or source.pooling is not None or source.scale is not None:
        raise CannotPlan(f"{layer.name} is no plain layer")
    for path in (source.norm, source.projection_norm):
        norm = None if path is None else network.get_submodule(path)
        if norm is None:
            continue
        if type(norm) is not nn.BatchNorm2d:
            raise CannotPlan(f"{path} is no BatchNorm2d")
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        if not all(x is None or (x.dtype is torch.float32 and x.is_contiguous()) for x in tensors):
            raise CannotPlan(f"{path} has other tensors than dense float32")
    if isinstance(layer, Conv) and layer.groups != 1:
        raise CannotPlan(f"{layer.name} has groups")
    if isinstance(layer, Pointwise):
        known = layer.activation in (None, RELU) if layer.affine else True
        if not known or layer.epsilon is not None:
            raise CannotPlan(f"{layer.name} normalizes or activates in another way")
    if isinstance(layer, Conv | Head):
        if isinstance(layer, Conv) and layer.kernel != (1, 1):
            if not isinstance(network.get_submodule(source.module), nn.Conv2d):
                raise CannotPlan(f"{layer.name} is no convolution")
        for path in (source.module, source.projection):
            if path is not None:
                module = network.get_submodule(path)
                if held(module, ("weight", "bias")) is None:
                    raise CannotPlan(f"{path} computes its weight")


def _compare(
    copies: list[nn.Module],
    traced: Traced,
    images: Tensor,
    dtype: torch.dtype,
    instructions: str,
) -> None:
    """Compare a pass through the first copy by compiled kernels with the second's own."""
    for one in copies:
        one.requires_grad_(True)
    ours = _pass(copies[0], _Program(copies[0], traced, dtype, instructions), images)
    theirs = _pass(copies[1], copies[1], images)
    # each parameter counts alike; those of a bias in front of a BatchNorm are rounding errors
    least = 1e-4 * max(float(x.norm()) for x in theirs.of_parameters)
    scales = [1 / (float(x.norm()) + least + 1e-30) for x in theirs.of_parameters]
    if dtype is torch.float32:
        for mine, its, scale in zip(ours.of_parameters, theirs.of_parameters, scales, strict=True):
            if not float((mine - its).norm()) * scale <= _ALLOWED_EACH:
                raise CannotPlan("in train mode the gradient of a parameter is another one")
    for what, allowed in zip(_Pass._fields, _ALLOWED[dtype], strict=True):
        own = scales if what == "of_parameters" else []
        mine, its = (_joined(getattr(x, what), own) for x in (ours, theirs))
        size = float(its.norm())
        difference = float((mine - its).norm())
        log.debug("training in %s: %s differ by %.2g", dtype, what, difference / (size or 1))
        if not difference <= allowed * size + 1e-6:
            raise CannotPlan(
                f"in train mode {what} differ from the module's by {difference:.3g}, "
                f"their norm is {size:.3g}"
            )


class _Pass(NamedTuple):
    """What a pass computes: logits, gradients along some gradient of them, and statistics."""

    logits: list[Tensor]
    of_parameters: list[Tensor]
    of_images: list[Tensor]
    statistics: list[Tensor]


def _joined(tensors: list[Tensor], scales: list[float]) -> Tensor:
    """All numbers; those of parameters scaled."""
    if scales:
        tensors = [x * scale for x, scale in zip(tensors, scales, strict=True)]
    return torch.cat([x.flatten() for x in tensors]) if tensors else torch.zeros(1)


def _pass(network: nn.Module, forward: Any, images: Tensor) -> _Pass:
    with plain_autograd(images.device):
        leaf = images.clone().requires_grad_()
        inputs = [leaf, *network.parameters()]
        logits = forward(leaf)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.requires_grad:
            raise CannotPlan("it does not return logits that can be differentiated")
        grads = torch.autograd.grad(logits, inputs, normal(logits, 1), allow_unused=True)
    made = [torch.zeros_like(x) if y is None else y for x, y in zip(inputs, grads, strict=True)]
    buffers = [x.detach().float() for x in network.buffers()]
    return _Pass([logits.detach().float()], made[1:], made[:1], buffers)
