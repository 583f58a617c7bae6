"""The plan: networks and a gate as one function of the images, with its gradient, and no tape.

    logits = softmax(gate(images)) . network_e(images),  or each network's own logits

A plan knows which layer comes when and where gradients meet; a back end (backends.py) computes the
layers. BatchNorm is folded (eval mode), gradients go to the images alone.

Axes: E networks, B images, C H W, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import testing
from ..op import fastest
from ..softmax_combine import softmax_combine, softmax_combine_cross_entropy
from .backends import Value
from .choose import Option, options
from .layers import Conv, Head, flop
from .member import Member
from .steps import Loss, Steps
from .trace import CannotPlan, Traced, graph_of, trace

log = logging.getLogger("moe_kernels")

# The plan's logits against the module's own, relative to their norm: what rounding may do, and what
# a trace that missed something (a random number, a branch) does not stay under.
_MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_CHECKED_IMAGES = 4


@dataclass
class _Program:
    """A plan for images of one size."""

    members: list[Member]
    scale: Tensor  # [E, C, 1, 1]
    shift: Tensor
    order: Tensor | None  # from the members' order to the networks', if it is another


class Plan:
    """E networks, mixed by a gate or each for itself, ready to be attacked.

    A snapshot: it computes with the weights of the last `refresh`, not of the moment (the gate,
    which is not folded, is always current). Networks see images in [0, 1] or whatever they were
    trained on; a per-channel normalization inside of them is part of the plan.

    Args:
        networks: modules from images [B, C, H, W] to logits [B, K].
        gate: module from the same images to gate_logits [B, E]; None for a single network or
            independent ones.
        independent: image block e of E equal blocks belongs to network e: [E * B, C, H, W] to
            [E * B, K].
        dtype: of activations and weights inside; by default bfloat16 where the processor has it.
    Raises:
        CannotPlan: at once if torch.fx cannot follow a network; at the first batch if a layer is
            not understood, or if the plan does not compute what the networks compute.
    """

    deterministic = True  # there is nothing random in it to average over

    def __init__(
        self,
        networks: Sequence[nn.Module],
        gate: nn.Module | None = None,
        *,
        independent: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if gate is None and not independent and len(networks) != 1:
            raise ValueError(f"{len(networks)} networks: expected a gate, or independent=True")
        self._networks = list(networks)
        self._gate = gate
        self._independent = independent
        self._dtype = dtype
        self._graphs = [graph_of(network) for network in networks]
        self._modules = [_modules(network) for network in networks]
        self._programs: dict[tuple[int, ...], _Program] = {}
        self._steps = Steps(lambda *batch: self.gradient(*batch)[0])
        self._gate_addresses = _addresses(gate)

    # What an attack calls ---------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K], float32."""
        program = self._program(images)
        parts = [
            self._logits(self._gate_logits(part), self._expert_logits(program, part))
            for part in self._parts(program, images)
        ]
        return self._joined(parts)

    @torch.no_grad()
    def gradient(
        self, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the loss, summed over the batch, with respect to the images.

        Args:
            images: [B, C, H, W] float32.
            labels: [B] int64, or for a loss of one's own a row of anything for each image.
            loss: ``loss(logits, labels)`` to [B]; cross-entropy by default, which is fused.
        Returns:
            Gradient [B, C, H, W] and logits [B, K], both float32.
        """
        program = self._program(images)
        grads, logits = [], []
        parts = self._parts(program, images)
        for part, its_labels in zip(parts, self._parts(program, labels), strict=True):
            grad, out = self._part_gradient(program, part, its_labels, loss)
            grads.append(grad)
            logits.append(out)
        return self._joined(grads), self._joined(logits)

    def linf_step(
        self,
        adversarial: Tensor,
        images: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        step_size: Tensor,
        low: float,
        high: float,
        loss: Loss | None = None,
    ) -> None:
        """One step of PGD, in place on ``adversarial``; see `moe_kernels.linf_step_`.

        On a GPU it is one CUDA graph from the second call with the same sizes on; radius, step
        length and labels may change from call to call.
        """
        self._steps(adversarial, images, labels, epsilon, step_size, low, high, loss)

    @property
    def graph(self) -> str:
        """Whether steps are captured in a CUDA graph, or why not."""
        return self._steps.graph

    # The plan itself --------------------------------------------------------------------------

    def prepare(self, images: Tensor) -> None:
        """Make ready for images of this size, which the first call would do as well.

        Raises:
            CannotPlan: a layer is not understood, or the plan does not compute what they do.
        """
        self._program(images)

    def refresh(self) -> None:
        """Take over the networks' weights and statistics of this moment, into the same buffers."""
        for program in self._programs.values():
            for member in program.members:
                member.load(self._networks)
        if _addresses(self._gate) != self._gate_addresses:  # graphs know the old ones
            self._steps.forget()
            self._gate_addresses = _addresses(self._gate)

    def fits(
        self, networks: Sequence[nn.Module], gate: nn.Module | None, dtype: torch.dtype | None
    ) -> bool:
        """Whether a refresh would make this the plan of these networks: the same modules inside."""
        return (
            dtype is self._dtype
            and (gate is None) == (self._gate is None)
            and (gate is None or self._gate is None or _modules(gate) == _modules(self._gate))
            and len(networks) == len(self._networks)
            and all(_modules(x) == known for x, known in zip(networks, self._modules, strict=True))
        )

    def gflop_per_image(self, image_shape: Sequence[int]) -> float | None:
        """Of a forward pass and the gradient of the image [C, H, W], as torch counts them.

        Without the gate. An image of independent networks is seen by one of them.
        """
        program = self._programs.get(tuple(image_shape))
        if program is None:
            return None
        _, H, W = image_shape
        total = sum(len(x.indices) * sum(flop(x.layers, (H, W))) for x in program.members)
        return 2e-9 * total / (len(self._networks) if self._independent else 1)

    def __str__(self) -> str:
        """The back ends, and how many convolutions of how many networks run on each."""
        lines = [f"plan of {len(self._networks)} networks"]
        if self._independent:
            lines[0] += ", each for itself"
        for (C, H, W), program in self._programs.items():
            counts: dict[str, int] = {}
            for member in program.members:
                convs = sum(isinstance(x, Conv) for x in member.layers)
                what = f"{convs} fused convolutions each, {member.back_end}"
                counts[what] = counts.get(what, 0) + len(member.indices)
            for what, count in counts.items():
                lines.append(f"images {C}x{H}x{W}: {count} of {what}")
        return "; ".join(lines)

    @property
    def back_end(self) -> str:
        """The back ends in use, and their dtypes."""
        names = {str(m.back_end) for p in self._programs.values() for m in p.members}
        return ", ".join(sorted(names)) or "not run yet"

    # Making a program -------------------------------------------------------------------------

    def _program(self, images: Tensor) -> _Program:
        shape = tuple(images.shape[1:])
        if shape not in self._programs:
            if images.dim() != 4:
                raise CannotPlan(f"images of shape {list(images.shape)}")
            with torch.no_grad():
                self._programs[shape] = self._make_program(images.detach())
        return self._programs[shape]

    def _make_program(self, images: Tensor) -> _Program:
        C, H, W = images.shape[1:]
        traced = [
            trace(network, graph, (C, H, W))
            for network, graph in zip(self._networks, self._graphs, strict=True)
        ]
        heads = [x.layers[-1] for x in traced]
        classes = {x.num_classes for x in heads if isinstance(x, Head)}
        if len(classes) != 1:
            raise CannotPlan(f"the networks tell {sorted(classes)} classes apart")
        device = images.device
        members: list[Member] = []
        alike: dict[tuple[Any, ...], list[int]] = {}
        for e, one in enumerate(traced):
            # sources too: networks of equal layers may keep their parameters elsewhere
            names = tuple((s.module, s.norm, s.projection, s.projection_norm) for s in one.sources)
            alike.setdefault((one.layers, names), []).append(e)
        scale = torch.stack([x.scale for x in traced]).to(device)[:, :, None, None]
        shift = torch.stack([x.shift for x in traced]).to(device)[:, :, None, None]
        for indices in alike.values():
            program = _Program([], scale, shift, None)
            members += self._best_members(program, indices, traced[indices[0]], images)
        places = torch.tensor([e for member in members for e in member.indices], device=device)
        order = None if len(members) == 1 else places.argsort()
        if order is not None and bool((order == torch.arange(len(order), device=device)).all()):
            order = None
        return _Program(members, scale, shift, order)

    def _best_members(
        self, program: _Program, indices: list[int], traced: Traced, images: Tensor
    ) -> list[Member]:
        """Networks of equal layers on the fastest back end that computes what they compute."""
        right: dict[str, list[Member]] = {}
        fault: Exception | None = None
        size = (images.shape[2], images.shape[3])
        for option in options(traced.layers, size, images.device, self._dtype):
            try:
                right[option.name] = self._make_members(program, option, indices, traced, images)
            except CannotPlan as error:
                fault = error
                log.warning("the %s back end is not used: %s", option.name, error)
            if right and not _is_timed(images.device):
                break
        if not right:
            assert fault is not None
            raise fault
        name = next(iter(right))
        if len(right) > 1:
            columns = {
                name: functools.partial(self._rehearse, program, members)
                for name, members in right.items()
            }
            layers = hashlib.sha256(repr(traced.layers).encode()).hexdigest()[:16]
            facts = layers, len(indices), self._dtype, tuple(images.shape)
            name = fastest("plan", columns, [images], images.device, *facts)
        return right[name]

    def _make_members(
        self,
        program: _Program,
        option: Option,
        indices: list[int],
        traced: Traced,
        images: Tensor,
    ) -> list[Member]:
        members = []
        for group in [indices] if option.together else [[e] for e in indices]:
            member = Member(group, traced, option.make(), images.device)
            member.load(self._networks)
            self._check(program, member, images)
            members.append(member)
        return members

    def _rehearse(self, program: _Program, members: list[Member], images: Tensor) -> None:
        """What a step does, but for the gate."""
        blocks = images.chunk(len(self._networks)) if self._independent else images
        for member in members:
            values = self._forward(member, program, blocks)
            grad = member.head_input_grad(values, torch.ones_like(member.logits(values)))
            member.backward(values, grad)

    def _check(self, program: _Program, member: Member, images: Tensor) -> None:
        """Compare with the modules, on a few images: what a trace cannot see must not matter."""
        few = images[:_CHECKED_IMAGES].detach()
        plain = torch.autocast(few.device.type, enabled=False)
        with torch.no_grad(), testing.without_tf32(), plain:
            together = [few] * len(self._networks) if self._independent else few
            ours = member.logits(self._forward(member, program, together))
            for e, logits in zip(member.indices, ours, strict=True):
                with _evaluated(self._networks[e]):
                    truth = self._networks[e](few)
                _compare(logits, truth, member.back_end.dtype, e)

    # Running it -------------------------------------------------------------------------------

    def _parts(self, program: _Program, tensor: Tensor) -> list[Any]:
        """The batch in parts that suit the caches; E blocks each for independent networks."""
        sizes = [m.back_end.preferred_batch for m in program.members]
        known = [size for size in sizes if size is not None]
        if self._independent:
            E = len(self._networks)
            if len(tensor) % E:
                raise ValueError(f"{len(tensor)} images do not divide among {E} networks")
            blocks = list(tensor.chunk(E)) if len(tensor) else [tensor] * E
            size = min(known, default=max(len(blocks[0]), 1))
            return list(zip(*(torch.split(block, size) for block in blocks), strict=True))
        return list(torch.split(tensor, min(known, default=max(len(tensor), 1))))

    def _joined(self, parts: list[Any]) -> Tensor:
        """Undo `_parts`; independent parts are stacked [E, b, ...]."""
        return torch.cat(parts, dim=1).flatten(0, 1) if self._independent else torch.cat(parts)

    def _part_gradient(
        self, program: _Program, images: Any, labels: Any, loss: Loss | None
    ) -> tuple[Tensor, Tensor]:
        """Gradient and logits of one part of the batch."""
        members = program.members
        values = [self._forward(member, program, images) for member in members]
        with self._gate_tape(images) as (leaf, gate_logits):
            logits, grad_gate, grad_heads = self._heads(program, values, gate_logits, labels, loss)
            total: Tensor | None = None
            # a gate may be a constant
            if leaf is not None and gate_logits is not None and gate_logits.requires_grad:
                (total,) = torch.autograd.grad(gate_logits, leaf, grad_gate)
        grads = []
        for member, its_values, grad in zip(members, values, grad_heads, strict=True):
            own = member.backward(its_values, grad)
            scale = program.scale[member.place]  # of normalization
            if self._independent:
                grads.append(own * scale.unsqueeze(1))
            else:
                total = own[0] * scale[0] if total is None else total.add_(own[0] * scale[0])
        if self._independent:
            return self._gathered(program, grads), logits
        assert total is not None
        return total, logits

    def _heads(
        self,
        program: _Program,
        values: list[dict[int, Value]],
        gate_logits: Tensor | None,
        labels: Any,
        loss: Loss | None,
    ) -> tuple[Tensor, Tensor | None, list[Value]]:
        """Logits, the gradient of gate_logits, and of what the head of each member reads."""
        members = program.members
        if loss is None and gate_logits is not None and len(members) == 1:
            gate = gate_logits.detach().float()
            fused = members[0].cross_entropy(values[0], gate, labels)
            if fused is not None:
                logits, grad_gate, grad = fused
                return logits, grad_gate.to(gate_logits.dtype), [grad]
        pairs = list(zip(members, values, strict=True))
        expert_logits = self._gathered(program, [member.logits(own) for member, own in pairs])
        gate_grad, grad_experts, logits = self._combined(gate_logits, expert_logits, labels, loss)
        heads = [m.head_input_grad(own, grad_experts[m.place].contiguous()) for m, own in pairs]
        return logits, gate_grad, heads

    def _forward(self, member: Member, program: _Program, images: Any) -> dict[int, Value]:
        if self._independent:
            own = torch.stack([images[e] for e in member.indices])
            own = own * program.scale[member.place].unsqueeze(1)
            own += program.shift[member.place].unsqueeze(1)
        else:
            e = member.indices[0]
            own = (images * program.scale[e]).add_(program.shift[e]).unsqueeze(0)
        return member.forward(own)

    def _expert_logits(self, program: _Program, images: Any) -> Tensor:
        return self._gathered(
            program, [m.logits(self._forward(m, program, images)) for m in program.members]
        )

    def _gathered(self, program: _Program, of_members: list[Tensor]) -> Tensor:
        """[E, ...] in the networks' order."""
        joined = torch.cat(of_members)
        return joined if program.order is None else joined[program.order]

    def _gate_logits(self, images: Tensor) -> Tensor | None:
        if self._gate is None:
            return None
        with _evaluated(self._gate), torch.autocast(images.device.type, enabled=False):
            gate_logits: Tensor = self._gate(images)
        return gate_logits

    @contextlib.contextmanager
    def _gate_tape(self, images: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        if self._gate is None:
            yield None, None
            return
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            gate_logits = self._gate_logits(leaf)
        yield leaf, gate_logits

    def _logits(self, gate_logits: Tensor | None, expert_logits: Tensor) -> Tensor:
        if gate_logits is not None:
            return softmax_combine(gate_logits.float(), expert_logits)
        return expert_logits if self._independent else expert_logits[0]

    def _combined(
        self, gate_logits: Tensor | None, expert_logits: Tensor, labels: Any, loss: Loss | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """(gradient of gate_logits, of expert_logits [E, B, K], logits)."""
        if self._independent:
            labels = torch.stack(list(labels))
        if loss is None and gate_logits is not None:
            gate = gate_logits.detach().float()
            _, grad_gate, grad_experts = softmax_combine_cross_entropy(gate, expert_logits, labels)
            return grad_gate.to(gate_logits.dtype), grad_experts, self._logits(gate, expert_logits)
        if loss is None:
            E, B, K = expert_logits.shape
            # the cross-entropy of one network is that of a mixture of one
            flat = expert_logits.reshape(1, E * B, K)
            zeros = flat.new_zeros(E * B, 1)
            _, _, grad = softmax_combine_cross_entropy(zeros, flat, labels.reshape(-1))
            return None, grad.view(E, B, K), self._logits(None, expert_logits)
        with torch.enable_grad():
            experts = expert_logits.detach().requires_grad_()
            gate_leaf = None if gate_logits is None else gate_logits.detach().requires_grad_()
            logits = self._logits(gate_leaf, experts)
            rows = labels.flatten(0, 1) if self._independent else labels
            total = loss(logits.flatten(0, -2), rows).sum()
            leaves = [experts] if gate_leaf is None else [experts, gate_leaf]
            grads = torch.autograd.grad(total, leaves)
        return (grads[1] if len(grads) == 2 else None), grads[0], logits.detach()


def _is_timed(device: torch.device) -> bool:
    """Elsewhere, and in torch's deterministic mode, the first back end that is right is taken."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


def _compare(ours: Tensor, truth: Any, dtype: torch.dtype, e: int) -> None:
    if not isinstance(truth, Tensor) or truth.shape != ours.shape:
        raise CannotPlan(f"network {e} does not return logits of shape {list(ours.shape)}")
    error = float((ours - truth).norm())
    size = float(truth.norm())
    if not error <= _MAX_ERROR[dtype] * size + 1e-6:
        raise CannotPlan(
            f"the plan's logits of network {e} differ from the module's by {error:.3g}, their "
            f"norm is {size:.3g}"
        )


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    modes = [(x, x.training) for x in module.modules() if x.training]
    for x, _ in modes:
        x.training = False
    try:
        yield
    finally:
        for x, mode in modes:
            x.training = mode


def _modules(network: nn.Module) -> list[tuple[str, int, str]]:
    """The modules inside, by identity: another list means another graph.

    Not the outermost one, which may be a wrapper made for this call.
    """
    return [(name, id(x), x.extra_repr()) for name, x in network.named_modules() if name]


def _addresses(gate: nn.Module | None) -> list[int]:
    return [] if gate is None else [x.data_ptr() for x in (*gate.parameters(), *gate.buffers())]
