"""Run a plan on images of one size: all layers forward, the mixture, and back to the images.

Axes: E networks, G of them that run together, B images, C H W, K classes. A batch of images is
[1, B, C, H, W] if all networks see the same, or [E, B, C, H, W] if each has images of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from moe_kernels.plan.back_ends.base import BackEnd, Value
from moe_kernels.plan.backward import Backward, first_readers
from moe_kernels.plan.contents import Contents
from moe_kernels.plan.fold import fold, read_by
from moe_kernels.plan.graph import graph_of, has_constants
from moe_kernels.plan.layers import (
    Conv,
    Entry,
    Exit,
    Head,
    Join,
    Pointwise,
    Pool,
    Traced,
    flop,
    rectified,
)
from moe_kernels.plan.mixing import Loss, Mixing
from moe_kernels.plan.reader import affine_versions, image_affine


class Member:
    """Networks of equal layers that run together on one back end.

    Args:
        indices: their numbers in the plan.
        traced: the layers of each; equal but for the normalization of independent networks.
        independent: whether each network has images of its own.
    """

    def __init__(
        self,
        indices: Sequence[int],
        traced: Sequence[Traced],
        back_end: BackEnd,
        device: torch.device,
        *,
        independent: bool,
    ) -> None:
        self.indices = list(indices)
        self.back_end = back_end
        self.device = device
        self.layers = traced[0].layers
        last = self.layers[-1]
        assert isinstance(last, Head | Exit)
        self.last = last
        self.reads_maps = isinstance(self.layers[0], Entry)
        # the networks' numbers as an index that a graph can capture
        low, high = indices[0], indices[-1]
        consecutive = self.indices == list(range(low, high + 1))
        self.place = slice(low, high + 1) if consecutive else torch.tensor(indices, device=device)
        self._rectified = rectified(self.layers)
        self._first_reader = first_readers(self.layers)
        self._sources = traced[0].sources
        self._contents = Contents()
        # shared images are normalized once
        kinds = traced if independent else traced[:1]
        self._scale = torch.stack([x.scale for x in kinds]).to(device)[:, None, :, None, None]
        self._shift = torch.stack([x.shift for x in kinds]).to(device)[:, None, :, None, None]

    def load(self, networks: Sequence[nn.Module]) -> None:
        """Take the parameters of these networks out of all E networks of the plan.

        Layers whose parameters have not changed since the last time stay as they are.
        """
        own = [networks[e] for e in self.indices]
        pairs = list(zip(self.layers, self._sources, strict=True))
        changed = self._contents.changed([read_by(own, *pair) for pair in pairs])
        if not changed:
            return
        layers, sources = zip(*(pairs[i] for i in changed), strict=True)
        try:
            wide = torch.promote_types(self.back_end.dtype, torch.float32)
            self.back_end.load(layers, fold(own, layers, sources, wide))
        except BaseException:
            self._contents.forget()
            raise

    def forward(self, images: Tensor) -> dict[int, Value]:
        """All values from images [1 or G, B, C, H, W]."""
        back_end = self.back_end
        values: dict[int, Value] = {}
        if not self.reads_maps:
            values[0] = back_end.enter((images * self._scale).add_(self._shift))
        for layer in self.layers[:-1]:
            if isinstance(layer, Entry):
                values[layer.output] = back_end.from_map(images)
                continue
            if isinstance(layer, Join):
                values[layer.output] = back_end.join(layer, [values[x] for x in layer.sources])
                continue
            source = values[layer.source]
            if isinstance(layer, Conv):
                residual = None if layer.residual is None else values[layer.residual]
                projected = None if layer.projection is None else values[layer.projection.source]
                values[layer.output] = back_end.conv(layer, source, residual, projected)
            elif isinstance(layer, Pool):
                values[layer.output] = back_end.pool(layer, source)
            elif isinstance(layer, Pointwise):
                values[layer.output] = back_end.pointwise(layer, source)
        return values

    def logits(self, values: dict[int, Value]) -> Tensor:
        """Logits [G, B, K]; or the map [G, B, C, H, W] of a network that returns one."""
        last, source = self.last, values[self.last.source]
        if isinstance(last, Exit):
            return self.back_end.to_map(source, last.channels)
        return self.back_end.head(last, source)

    def head_input_grad(self, values: dict[int, Value], grad_logits: Tensor) -> Value:
        """Gradient of what the last layer reads from that of `logits`."""
        last, source = self.last, values[self.last.source]
        masked = last.source in self._rectified
        if isinstance(last, Exit):
            grad = self.back_end.from_map(grad_logits)
            return self.back_end.mask(grad, source) if masked else grad
        return self.back_end.head_input_grad(last, grad_logits, source, masked=masked)

    def cross_entropy(
        self, values: dict[int, Value], gate_logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Value] | None:
        """Logits [B, K], and gradients of gate_logits and of what the head reads; see `BackEnd`."""
        last = self.last
        if isinstance(last, Exit):
            return None
        masked = last.source in self._rectified
        return self.back_end.cross_entropy(
            last, values[last.source], gate_logits, labels, masked=masked
        )

    def backward(self, values: dict[int, Value], grad: Value) -> Tensor:
        """Gradient [1 or G, B, C, H, W] of the images from that of what the last layer reads.

        Uses up ``values``, each as soon as nothing needs it any more.
        """
        way = Backward(self.layers, self.back_end, self._first_reader, self._rectified, values)
        found = way.run(grad)
        return found if self.reads_maps else found * self._scale


class Program:
    """A plan for images [C, H, W] of one size.

    Args:
        members: together all networks of the plan, each once.
        graphs: the traced graph of each network.
        traced: the layers of each network.
    """

    def __init__(
        self,
        members: list[Member],
        mixing: Mixing,
        graphs: list[fx.Graph],
        traced: Sequence[Traced],
        image_shape: tuple[int, int, int],
        *,
        independent: bool,
    ) -> None:
        self.members = members
        self.image_shape = image_shape
        self._mixing = mixing
        self._graphs = graphs
        self._affines = [(x.scale, x.shift) for x in traced]
        self._versions: list[list[tuple[int, int]]] = []
        self._independent = independent
        self._num_networks = len(traced)
        self.device = members[0].device
        self._order = self._network_order()

    def _network_order(self) -> Tensor | None:
        """Where each network is among the members' results; None if they are in order."""
        places = [e for member in self.members for e in member.indices]
        if places == sorted(places):
            return None
        return torch.tensor(places, device=self.device).argsort()

    def refresh(self, networks: Sequence[nn.Module]) -> bool:
        """Take over the networks' parameters, into the same memory.

        Returns:
            False, and nothing is taken over, if a normalization of the images has changed.
        """
        for e, graph in enumerate(self._graphs):
            if has_constants(graph):
                self._graphs[e] = graph_of(networks[e])
        same = self._same_affines(networks)
        if same:
            for member in self.members:
                member.load(networks)
        return same

    def _same_affines(self, networks: Sequence[nn.Module]) -> bool:
        """Whether all networks still normalize the images as when they were traced."""
        if self.members[0].reads_maps:
            return True
        pairs = list(zip(networks, self._graphs, strict=True))
        versions = [affine_versions(*pair) for pair in pairs]
        if versions == self._versions:
            return True
        self._versions = versions
        affines = [image_affine(network, graph, self.image_shape) for network, graph in pairs]
        return all(
            torch.equal(a, b)
            for known, new in zip(self._affines, affines, strict=True)
            for a, b in zip(known, new, strict=True)
        )

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """[N, ...] as [1 or E, B, ...] in parts along B that suit the caches.

        Raises:
            ValueError: the rows do not divide among independent networks.
        """
        blocks = self._num_networks if self._independent else 1
        if len(tensor) % blocks:
            raise ValueError(f"{len(tensor)} images do not divide among {blocks} networks")
        batch = tensor.reshape(blocks, len(tensor) // blocks, *tensor.shape[1:])
        sizes = [member.back_end.preferred_batch for member in self.members]
        _, H, W = self.image_shape
        smaller = max(1, 32 * 32 // max(H * W, 1))
        known = [size * smaller for size in sizes if size is not None]
        return torch.split(batch, min(known, default=max(batch.shape[1], 1)), dim=1)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [1 or E, B, K] float32."""
        gate_logits = self._mixing.gate_logits(images[0])
        of_members = [m.logits(m.forward(self._seen_by(m, images))) for m in self.members]
        return self._mixing.logits(gate_logits, self._gathered(of_members))

    def gradient(self, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Gradient of the summed loss, shaped like ``images``, and logits [1 or E, B, K].

        Args:
            labels: [1 or E, B, ...], what the loss compares logits with.
        """
        values = [m.forward(self._seen_by(m, images)) for m in self.members]
        gate = self._mixing.run_gate(images[0])
        gate_logits = None if gate is None else gate.gate_logits
        logits, grad_gate, grad_heads = self._head_gradients(values, gate_logits, labels, loss)
        ways = zip(self.members, values, grad_heads, strict=True)
        if self._independent:
            return self._gathered([m.backward(own, grad) for m, own, grad in ways]), logits
        total = None if gate is None else gate.image_gradient(grad_gate).unsqueeze(0)
        for member, own, grad in ways:
            through = member.backward(own, grad)
            total = through if total is None else total.add_(through)
        assert total is not None
        return total, logits

    def differentiable(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What a single network returns, [1, B, ...], and the way from its gradient to images."""
        (member,) = self.members
        values = member.forward(images)

        def way_back(grad_logits: Tensor) -> Tensor:
            grad = member.head_input_grad(values, grad_logits.contiguous())
            return member.backward(dict(values), grad)

        return member.logits(values), way_back

    def _head_gradients(
        self,
        values: list[dict[int, Value]],
        gate_logits: Tensor | None,
        labels: Tensor,
        loss: Loss,
    ) -> tuple[Tensor, Tensor | None, list[Value]]:
        """Logits, the gradient of gate_logits, and of what the head of each member reads."""
        if loss == "ce" and gate_logits is not None and len(self.members) == 1:
            gate = gate_logits.detach().float()
            fused = self.members[0].cross_entropy(values[0], gate, labels[0])
            if fused is not None:
                logits, grad_gate, grad = fused
                return logits.unsqueeze(0), grad_gate.to(gate_logits.dtype), [grad]
        pairs = list(zip(self.members, values, strict=True))
        expert_logits = self._gathered([m.logits(own) for m, own in pairs])
        logits, gate_grad, grads = self._mixing.gradients(gate_logits, expert_logits, labels, loss)
        heads = [m.head_input_grad(own, grads[m.place].contiguous()) for m, own in pairs]
        return logits, gate_grad, heads

    def _seen_by(self, member: Member, images: Tensor) -> Tensor:
        return images[member.place] if self._independent else images

    def _gathered(self, of_members: list[Tensor]) -> Tensor:
        """[E, ...] in the networks' order."""
        joined = torch.cat(of_members)
        return joined if self._order is None else joined[self._order]

    def gflop_per_image(self) -> float:
        """Of a forward pass and the gradient of one image, without the gate."""
        _, H, W = self.image_shape
        total = sum(len(m.indices) * sum(flop(m.layers, (H, W))) for m in self.members)
        return 2e-9 * total / (self._num_networks if self._independent else 1)

    def __str__(self) -> str:
        """How many convolutions of how many networks run on each back end."""
        C, H, W = self.image_shape
        counts: dict[str, int] = {}
        for member in self.members:
            convs = sum(isinstance(x, Conv) for x in member.layers)
            what = f"{convs} fused convolutions each, {member.back_end}"
            counts[what] = counts.get(what, 0) + len(member.indices)
        return "; ".join(f"images {C}x{H}x{W}: {count} of {what}" for what, count in counts.items())
