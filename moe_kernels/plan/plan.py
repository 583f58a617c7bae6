"""Compute networks and a gate, and the gradient of their images, without an autograd tape.

    logits = softmax(gate(images)) . network_e(images),  or each network's own logits

BatchNorm is folded (eval mode), and gradients go to the images alone.

Axes: E networks, B images, C H W, K classes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from moe_kernels import oracle
from moe_kernels.errors import in_one_line
from moe_kernels.graphs import Graphs
from moe_kernels.plan.build import Request, build
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.mixing import Loss, Mixing
from moe_kernels.plan.modules import kept_tensors, structure
from moe_kernels.plan.program import Program
from moe_kernels.plan.verify import NotFinite

log = logging.getLogger("moe_kernels")


class Plan:
    """E networks, mixed by a gate or independent of each other, ready to be attacked.

    A snapshot: it computes with the weights of the last `refresh`. The gate is not folded and
    always current. Networks see images in [0, 1] or whatever they were trained on; a per-channel
    normalization inside of them is part of the plan.

    Args:
        networks: modules from images [B, C, H, W] to logits [B, K].
        gate: module from the same images to gate_logits [B, E]; None for a single network or
            independent ones.
        independent: image block e of E equal blocks belongs to network e: [E * B, C, H, W] to
            [E * B, K].
        dtype: of activations and weights inside; by default as `choose.default_dtype` says.
        maps: the network may read or return feature maps; its plan is called by `differentiable`.
    Raises:
        ValueError: several networks without a gate that are not independent.
        CannotPlan: at the first batch, if a network is not understood, or if the plan does not
            compute what the networks compute.

    Attributes:
        graphs: where attacks keep their captured steps; emptied when memory that `gradient` reads
            moves.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        gate: nn.Module | None = None,
        *,
        independent: bool = False,
        dtype: torch.dtype | None = None,
        maps: bool = False,
    ) -> None:
        if gate is None and not independent and len(networks) != 1:
            raise ValueError(f"{len(networks)} networks: expected a gate, or independent=True")
        self._request = Request(list(networks), independent, dtype, maps=maps)
        self._mixing = Mixing(gate)
        self._structures = [structure(network) for network in networks]
        self._gate_structure = None if gate is None else structure(gate)
        self._gate_addresses = _addresses(gate)
        self._programs: dict[tuple[int, ...], Program] = {}
        self._failures: dict[tuple[int, ...], CannotPlan] = {}
        self.graphs = Graphs()

    # What an attack calls ---------------------------------------------------------------------

    @property
    def deterministic(self) -> bool:
        """Whether two calls give the same: networks do, and the gate is seen at the first batch."""
        return self._mixing.deterministic

    @property
    def called(self) -> list[nn.Module]:
        """The modules whose own code runs in a call: the gate. Networks are read, not run."""
        return [] if self._mixing.gate is None else [self._mixing.gate]

    @property
    def back_end(self) -> str:
        """The back ends in use, and their dtypes."""
        return ", ".join(sorted(self.back_ends)) or "not run yet"

    @property
    def back_ends(self) -> set[str]:
        """As `back_end`, each for itself."""
        return {str(m.back_end) for p in self._programs.values() for m in p.members}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K], float32."""
        for attempt in self._attempts(images):
            with attempt as program:
                return _joined([program.logits(part) for part in program.split(images.float())])
        raise AssertionError("attempts end with a result or an error")

    def gradient(self, images: Tensor, labels: Tensor, loss: Loss = "ce") -> tuple[Tensor, Tensor]:
        """Gradient of the loss, summed over the batch, with respect to the images.

        Args:
            images: [B, C, H, W]; computed with as float32.
            labels: [B] integers, or for a loss of one's own a row of anything for each image.
            loss: ``loss(logits, labels)`` to [B]; or "ce", the cross-entropy, which is fused.
        Returns:
            Gradient [B, C, H, W] and logits [B, K], both float32.
        Raises:
            ValueError: the images do not go with the labels, or with independent networks.
            CannotPlan: as `prepare`.
        """
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        for attempt in self._attempts(images):
            with attempt as program:
                parts = zip(program.split(images.float()), program.split(labels), strict=True)
                found = [program.gradient(*part, loss) for part in parts]
                grads, logits = zip(*found, strict=True)
                return _joined(grads), _joined(logits)
        raise AssertionError("attempts end with a result or an error")

    def differentiable(self, images: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What a single network returns, and the function from its gradient to that of the images.

        Raises:
            CannotPlan: as `prepare`.
        """
        for attempt in self._attempts(images):
            with attempt as program:
                runs = [program.differentiable(part) for part in program.split(images.float())]
                logits, ways_back = zip(*runs, strict=True)
                return _joined(logits), functools.partial(_way_back, program, ways_back)
        raise AssertionError("attempts end with a result or an error")

    def gflop_per_image(self, image_shape: Sequence[int]) -> float | None:
        """Of a forward pass and the gradient of the image [C, H, W], as torch counts them.

        Without the gate. An image of independent networks is seen by one of them. None before the
        first batch of this size.
        """
        program = self._programs.get(tuple(image_shape))
        return None if program is None else program.gflop_per_image()

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
        for shape, program in list(self._programs.items()):
            with _own_modes(program.device):
                if program.refresh(self._request.networks):
                    continue
            del self._programs[shape]  # other networks may run together now
            self.graphs.forget()
        addresses = _addresses(self._mixing.gate)
        if addresses != self._gate_addresses:  # graphs know the old ones
            self.graphs.forget()
            self._gate_addresses = addresses

    def fits(
        self, networks: Sequence[nn.Module], gate: nn.Module | None, dtype: torch.dtype | None
    ) -> bool:
        """Whether a refresh would make this the plan of these networks: the same modules inside."""
        return (
            dtype is self._request.dtype
            and self._gate_structure == (None if gate is None else structure(gate))
            and self._structures == [structure(network) for network in networks]
        )

    def __str__(self) -> str:
        """The back ends, and how many convolutions of how many networks run on each."""
        first = f"plan of {len(self._request.networks)} networks"
        if self._request.independent:
            first += ", each for itself"
        return "; ".join([first, *map(str, self._programs.values())])

    def __repr__(self) -> str:
        return f"Plan({len(self._request.networks)} networks, {self.back_end})"

    def _attempts(self, images: Tensor) -> Iterator[contextlib.AbstractContextManager[Program]]:
        """The program for these images, and if its back end fails, that of another."""
        while True:
            yield self._attempt(images)

    @contextlib.contextmanager
    def _attempt(self, images: Tensor) -> Iterator[Program]:
        with _own_modes(images.device):
            program = self._program(images.float())
            try:
                yield program
            except RuntimeError as error:  # a library without a kernel for these sizes, say
                capturing = images.is_cuda and torch.cuda.is_current_stream_capturing()
                if isinstance(error, torch.OutOfMemoryError) or capturing:
                    raise
                self._refuse(program, error)

    def _refuse(self, program: Program, error: Exception) -> None:
        """Use the back ends of this program no more."""
        failed = {member.back_end.name for member in program.members}
        log.warning(
            "the %s back end is not used any more: %s", ", ".join(failed), in_one_line(error)
        )
        self._request = self._request._replace(refused=self._request.refused | failed)
        self._programs.clear()
        self.graphs.forget()

    def _program(self, images: Tensor) -> Program:
        """The program for images of this size, made at the first."""
        shape = tuple(images.shape[1:])
        if shape not in self._programs:
            if shape in self._failures:  # an attack asks each time
                raise CannotPlan(str(self._failures[shape]))
            try:
                self._programs[shape] = build(self._request, self._mixing, images.detach())
            except NotFinite:
                raise
            except CannotPlan as error:
                self._failures[shape] = error
                raise
        return self._programs[shape]


def _way_back(
    program: Program, ways_back: Sequence[Callable[[Tensor], Tensor]], grad: Tensor
) -> Tensor:
    """Gradient of the images [B, C, H, W] from that of the logits [B, K]."""
    with _own_modes(grad.device):
        pairs = zip(ways_back, program.split(grad.float()), strict=True)
        return _joined([back(part) for back, part in pairs])


@contextlib.contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """Whatever the caller's are: a plan has a dtype of its own, and its buffers outlive a call.

    Float32 is float32, never TF32: it is what the plan was verified in.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        oracle.without_tf32(deterministic=False),
    ):
        yield


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Undo `Program.split`: parts [1 or E, b, ...] to [N, ...]."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    return joined.flatten(0, 1)


def _addresses(gate: nn.Module | None) -> list[int]:
    return [] if gate is None else [x.data_ptr() for x in kept_tensors(gate)]
