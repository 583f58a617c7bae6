"""Make the program of a plan: trace the networks, group equal ones, choose and check back ends."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from moe_kernels.errors import in_one_line
from moe_kernels.plan.ahead import compile_ahead
from moe_kernels.plan.choose import Option, default_dtype, options
from moe_kernels.plan.graph import CannotPlan, graph_of, naming_network
from moe_kernels.plan.layers import Head, Traced
from moe_kernels.plan.mixing import Mixing
from moe_kernels.plan.program import Member, Program
from moe_kernels.plan.reader import trace
from moe_kernels.plan.verify import check_member, check_trace, probe
from moe_kernels.select import fastest

log = logging.getLogger("moe_kernels")


class Request(NamedTuple):
    """The networks of a plan, and how they are to run; see `Plan`.

    ``refused`` are names of back ends that failed before; ``maps``: the networks are parts, which
    may read or return feature maps.
    """

    networks: Sequence[nn.Module]
    independent: bool
    dtype: torch.dtype | None
    refused: frozenset[str] = frozenset()
    maps: bool = False


def build(request: Request, mixing: Mixing, images: Tensor) -> Program:
    """The program for images [B, C, H, W] of this size, checked on a few of them.

    Raises:
        CannotPlan: a layer is not understood, or no back end computes what the networks compute.
    """
    if images.dim() != 4:
        raise CannotPlan(f"images of shape {list(images.shape)}")
    _, C, H, W = images.shape
    few = probe(images)
    graphs, traced = _traced(request, few)
    mixing.check(few, len(request.networks))
    heads = [x.layers[-1] for x in traced]
    classes = {x.num_classes for x in heads if isinstance(x, Head)}
    if len(classes) > 1:
        raise CannotPlan(f"the networks tell {sorted(classes)} classes apart")
    alike: dict[tuple[Any, ...], list[int]] = {}
    for e, one in enumerate(traced):
        alike.setdefault(_likeness(one, independent=request.independent), []).append(e)
    members = [
        member
        for indices in alike.values()
        for member in _fastest_members(request, indices, traced, images)
    ]
    return Program(members, mixing, graphs, traced, (C, H, W), independent=request.independent)


def _traced(request: Request, images: Tensor) -> tuple[list[fx.Graph], list[Traced]]:
    _, C, H, W = images.shape
    networks, maps = request.networks, request.maps
    graphs, traced = [], []
    for e, network in enumerate(networks):
        with naming_network(e, len(networks)):
            graphs.append(graph_of(network))
            traced.append(trace(network, graphs[-1], (C, H, W), maps=maps))
            check_trace(network, images, maps=maps)
    return graphs, traced


def _likeness(traced: Traced, *, independent: bool) -> tuple[Any, ...]:
    """Equal for networks that may run together."""
    # sources too: networks of equal layers may keep their parameters elsewhere
    places = tuple(
        (s.module, s.norm, s.projection, s.projection_norm, s.pooling is None, s.scale, s.identity)
        for s in traced.sources
    )
    # the same images are normalized once for all of them
    affine = () if independent else (*traced.scale.tolist(), *traced.shift.tolist())
    return traced.layers, places, affine


def _fastest_members(
    request: Request, indices: list[int], traced: Sequence[Traced], images: Tensor
) -> list[Member]:
    """Networks of equal layers on the fastest back end that computes what they compute."""
    layers = traced[indices[0]].layers
    size = (images.shape[2], images.shape[3])
    dtype = request.dtype or default_dtype(images.device, layers, size)
    right, fault = _right_members(request, dtype, indices, traced, images)
    if not right and dtype is torch.bfloat16 and request.dtype is None:  # too coarse, perhaps
        dtype = torch.float32
        right, _ = _right_members(request, dtype, indices, traced, images)
    if not right:
        raise fault
    if len(right) == 1:
        return next(iter(right.values()))
    columns: dict[str, Callable[..., Any]] = {
        name: functools.partial(_rehearse, members, _num_shown(request, images))
        for name, members in right.items()
    }
    digest = hashlib.sha256(repr(layers).encode()).hexdigest()[:16]
    facts = digest, len(indices), dtype, tuple(images.shape)
    return right[fastest("plan", columns, [images], images.device, *facts)]


def _num_shown(request: Request, images: Tensor) -> int:
    """How many images a network sees: each independent one has its own block of the batch."""
    return max(len(images) // (len(request.networks) if request.independent else 1), 1)


def _right_members(
    request: Request,
    dtype: torch.dtype,
    indices: list[int],
    traced: Sequence[Traced],
    images: Tensor,
) -> tuple[dict[str, list[Member]], CannotPlan]:
    """By back end, networks that compute what they should; and why the last other one does not."""
    right: dict[str, list[Member]] = {}
    fault = CannotPlan(f"nothing is left to run on, {', '.join(request.refused)} failed")
    layers = traced[indices[0]].layers
    offered = [
        option
        for option in options(layers, (images.shape[2], images.shape[3]), images.device, dtype)
        if option.name not in request.refused
    ]
    if any(option.name == "slab" for option in offered):
        counts = len(probe(images)), _num_shown(request, images)
        compile_ahead(
            request.networks,
            indices,
            traced,
            images,
            counts,
            dtype,
            independent=request.independent,
        )
    for option in offered:
        try:
            right[option.name] = _members(request, option, indices, traced, images)
        except CannotPlan as error:
            fault = error
            _log_once(f"the {option.name} back end is not used: {error}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, a driver or a library raises
            fault = CannotPlan(f"the {option.name} back end fails: {in_one_line(error)}")
            _log_once(f"{fault}; it is not used")
        if right and not _is_timed(images.device):
            break
    return right, fault


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _is_timed(device: torch.device) -> bool:
    """Elsewhere, and in torch's deterministic mode, the first back end that is right is taken."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def _members(
    request: Request,
    option: Option,
    indices: list[int],
    traced: Sequence[Traced],
    images: Tensor,
) -> list[Member]:
    """The networks on one back end, checked; together if it runs them together."""
    members = []
    for group in [indices] if option.together else [[e] for e in indices]:
        own = [traced[e] for e in group]
        member = Member(group, own, option.make(), images.device, independent=request.independent)
        member.load(request.networks)
        check_member(member, request.networks, images)
        members.append(member)
    return members


def _rehearse(members: list[Member], num_images: int, images: Tensor) -> None:
    """Run what a step runs, except the gate."""
    for member in members:
        values = member.forward(images[:num_images].unsqueeze(0))
        grad = member.head_input_grad(values, torch.ones_like(member.logits(values)))
        member.backward(values, grad)
