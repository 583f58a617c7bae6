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
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_kernels import oracle
from moe_kernels.ops.softmax_combine import softmax_combine, softmax_combine_cross_entropy
from moe_kernels.plan.back_ends.base import Value
from moe_kernels.plan.choose import Option, options
from moe_kernels.plan.graph import CannotPlan, graph_of, has_constants
from moe_kernels.plan.layers import Conv, Head, flop
from moe_kernels.plan.member import Member
from moe_kernels.plan.modules import RandomState, evaluated, structure
from moe_kernels.plan.step import Loss, Steps
from moe_kernels.plan.trace import Traced, image_affine, trace
from moe_kernels.plan.verify import (
    NotFinite,
    check_trace,
    compare,
    differentiated,
    direction,
    probe,
)
from moe_kernels.select import fastest

log = logging.getLogger("moe_kernels")


@dataclass
class _Program:
    """A plan for images of one size."""

    members: list[Member]
    affines: list[tuple[Tensor, Tensor]]  # scale and shift [C] of each network, on the CPU
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
        dtype: of activations and weights inside; by default as `choose.default_dtype` says.
    Raises:
        CannotPlan: at the first batch, if a network is not understood, or if the plan does not
            compute what the networks compute.
    """

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
        self._graphs: list[fx.Graph] = []  # from the first batch on
        self._structures = [structure(network) for network in networks]
        self._gate_structure = None if gate is None else structure(gate)
        self._programs: dict[tuple[int, ...], _Program] = {}
        self._failures: dict[tuple[int, ...], CannotPlan] = {}
        this = weakref.proxy(self)  # no circle: what nobody needs gives its memory back at once
        self._steps = Steps(lambda *batch: this.gradient(*batch)[0])
        self._gate_addresses = _addresses(gate)
        self.deterministic = True  # networks are; the gate shows at the first batch

    # What an attack calls ---------------------------------------------------------------------

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K], float32."""
        with _own_modes(images.device):
            images = images.float()
            program = self._program(images)
            parts = [
                self._logits(self._gate_logits(part), self._expert_logits(program, part))
                for part in self._parts(program, images)
            ]
            return self._joined(parts)

    def gradient(
        self, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the loss, summed over the batch, with respect to the images.

        Args:
            images: [B, C, H, W]; computed with as float32.
            labels: [B] integers, or for a loss of one's own a row of anything for each image.
            loss: ``loss(logits, labels)`` to [B]; cross-entropy by default, which is fused.
        Returns:
            Gradient [B, C, H, W] and logits [B, K], both float32.
        """
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        with _own_modes(images.device):
            images = images.float()
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
        with _own_modes(images.device):
            self._program(images)

    def refresh(self) -> None:
        """Take over the networks' weights and statistics of this moment, into the same buffers.

        Raises:
            CannotPlan: the networks have become something else, see `fits`.
        """
        for e, graph in enumerate(self._graphs):
            if has_constants(graph):
                self._graphs[e] = graph_of(self._networks[e])
        for shape, program in list(self._programs.items()):
            if not _equal(self._affines(shape), program.affines):  # groups may differ, too
                del self._programs[shape]
                self._steps.forget()
                continue
            with _own_modes(program.scale.device):
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
            and self._gate_structure == (None if gate is None else structure(gate))
            and self._structures == [structure(network) for network in networks]
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
        program = self._programs.get(shape)
        if program is None:
            if shape in self._failures:  # an attack asks each time
                raise CannotPlan(str(self._failures[shape]))
            try:
                program = self._programs[shape] = self._make_program(images.detach())
            except NotFinite:
                raise
            except CannotPlan as error:
                self._failures[shape] = error
                raise
        return program

    def _make_program(self, images: Tensor) -> _Program:
        if images.dim() != 4:
            raise CannotPlan(f"images of shape {list(images.shape)}")
        traced = self._trace(images)
        heads = [x.layers[-1] for x in traced]
        classes = {x.num_classes for x in heads if isinstance(x, Head)}
        if len(classes) != 1:
            raise CannotPlan(f"the networks tell {sorted(classes)} classes apart")
        device = images.device
        members: list[Member] = []
        alike: dict[tuple[Any, ...], list[int]] = {}
        for e, one in enumerate(traced):
            alike.setdefault(self._likeness(one), []).append(e)
        scale = torch.stack([x.scale for x in traced]).to(device)[:, :, None, None]
        shift = torch.stack([x.shift for x in traced]).to(device)[:, :, None, None]
        affines = [(x.scale, x.shift) for x in traced]
        for indices in alike.values():
            program = _Program([], affines, scale, shift, None)
            members += self._best_members(program, indices, traced[indices[0]], images)
        places = torch.tensor([e for member in members for e in member.indices], device=device)
        order = None if len(members) == 1 else places.argsort()
        if order is not None and bool((order == torch.arange(len(order), device=device)).all()):
            order = None
        return _Program(members, affines, scale, shift, order)

    def _trace(self, images: Tensor) -> list[Traced]:
        _, C, H, W = images.shape
        few = probe(images)
        graphs, traced = [], []
        for e, network in enumerate(self._networks):
            with self._named(e):
                graphs.append(graph_of(network))
                traced.append(trace(network, graphs[-1], (C, H, W)))
                check_trace(network, few)
        self._graphs = graphs
        self._check_gate(few)
        return traced

    def _check_gate(self, images: Tensor) -> None:
        random_state = RandomState()
        gate_logits: Any = self._gate_logits(images)
        if random_state.restore():
            self.deterministic = False
        expected = [len(images), len(self._networks)]
        if self._gate is not None and list(getattr(gate_logits, "shape", [])) != expected:
            raise CannotPlan(f"the gate does not return gate_logits of shape {expected}")

    @contextlib.contextmanager
    def _named(self, e: int) -> Iterator[None]:
        """Say which of several networks a reason is about."""
        try:
            yield
        except CannotPlan as error:
            if len(self._networks) == 1:
                raise
            raise type(error)(f"network {e}: {error}") from error

    def _likeness(self, traced: Traced) -> tuple[Any, ...]:
        """Networks with equal ones may run together."""
        # sources too: networks of equal layers may keep their parameters elsewhere
        places = tuple(
            (s.module, s.norm, s.projection, s.projection_norm, s.pooling is None, s.identity)
            for s in traced.sources
        )
        # the same images are normalized once for all of them
        affine = () if self._independent else (*traced.scale.tolist(), *traced.shift.tolist())
        return traced.layers, places, affine

    def _affines(self, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Scale and shift [C] of each network for images [C, H, W], as they are now."""
        C, H, W = shape
        pairs = zip(self._networks, self._graphs, strict=True)
        return [image_affine(network, graph, (C, H, W)) for network, graph in pairs]

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
        """Compare with the modules, on a few images."""
        few = probe(images)
        together = [few] * len(self._networks) if self._independent else few
        with oracle.without_tf32():
            values = self._forward(member, program, together)
            logits = member.logits(values).contiguous()
            grad_logits = direction(logits)
            grad = member.head_input_grad(values, grad_logits)
            grads = self._image_grad(program, member, member.backward(values, grad))
        truth = []
        for e, its_grad in zip(member.indices, grad_logits, strict=True):
            with self._named(e):
                truth.append(differentiated(self._networks[e], few, its_grad))
        its_logits, its_grads = (torch.stack(x) for x in zip(*truth, strict=True))
        if not self._independent:
            its_grads = its_grads.sum(dim=0, keepdim=True)
        compare((logits, grads), (its_logits, its_grads), member.back_end.dtype)

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
            if leaf is not None and gate_logits is not None:
                (total,) = _gradients(gate_logits, [leaf], grad_gate)
        grads = []
        for member, its_values, grad in zip(members, values, grad_heads, strict=True):
            own = self._image_grad(program, member, member.backward(its_values, grad))
            if self._independent:
                grads.append(own)
            else:
                total = own[0] if total is None else total.add_(own[0])
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

    def _image_grad(self, program: _Program, member: Member, grad: Tensor) -> Tensor:
        """[1 or G, B, C, H, W], from that of the normalized images."""
        scale = program.scale[member.place].unsqueeze(1)
        return grad * (scale if self._independent else scale[:1])

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
        with evaluated(self._gate):
            gate_logits: Tensor = self._gate(images)
        return gate_logits

    @contextlib.contextmanager
    def _gate_tape(self, images: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        if self._gate is None:
            yield None, None
            return
        with torch.enable_grad():
            leaf = (images.clone() if images.is_inference() else images.detach()).requires_grad_()
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
            grads = _gradients(total, leaves)
        return (grads[1] if len(grads) == 2 else None), grads[0], logits.detach()


def _gradients(
    output: Tensor, leaves: Sequence[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Zeros for leaves that the output does not depend on."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(x) for x in leaves)
    return torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)


def _is_timed(device: torch.device) -> bool:
    """Elsewhere, and in torch's deterministic mode, the first back end that is right is taken."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """Whatever the caller's are: a plan has a dtype of its own, and its buffers outlive a call."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in pairs)


def _addresses(gate: nn.Module | None) -> list[int]:
    return [] if gate is None else [x.data_ptr() for x in (*gate.parameters(), *gate.buffers())]
