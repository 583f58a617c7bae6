"""Time one step of PGD adversarial training of any network, side by side in one run.

    adversarial = PGD(network in eval mode, images)
    loss = cross_entropy(network in train mode, adversarial); backward; SGD

`eager` is what a script does: float32, autograd, an attack as toolboxes write it. `stock` is the
best that PyTorch does without this package: channels_last, on a GPU bfloat16, torch.compile and a
CUDA graph around the attack's step, as far as they run. `dwf` attacks the accelerated network by
`dwf.pgd` and trains as `dwf.train` does. A column is timed only if its attack stays in the ball and
gains as much loss as eager's. Images are random and weights untrained: the time of a step does not
depend on them.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels
from dwf.attacks import attack_target, pgd
from dwf.bench.attack import Attack, StockAttack, eager_attack
from dwf.bench.stock import COMPILE, first_that_runs, without_tf32
from dwf.checks import ConfigError
from dwf.models import planned
from dwf.models.known_faults import check_convolutions
from moe_kernels import TrainMode
from moe_kernels.errors import in_one_line
from moe_kernels.timing import Timing, compare

# Of eager's gain of loss; bfloat16 and untrained networks cost some.
MIN_GAIN = 0.9
# Calls of a column before the first round: building, the gate, warming up. A machine may be shared.
CALLS_BEFORE = 9
MIN_ROUNDS, MAX_ROUNDS = 3, 50
MIN_BATCH = 4


@dataclass(frozen=True)
class Case:
    """What is timed: the network [B, C, H, W] to [B, K], and the attack of a step."""

    network: nn.Module
    image_shape: tuple[int, ...]
    batch_size: int
    epsilon: float
    step_size: float
    num_steps: int


@dataclass(frozen=True)
class Comparison:
    """Times of the columns by name, eager's first; what ran; and what did not, and why."""

    device: str
    batch_size: int
    num_steps: int
    times: dict[str, Timing]
    ran: dict[str, str]
    skipped: dict[str, str]

    def gain(self, over: str) -> float | None:
        """How many times as fast dwf's step is as another column's; None without one of them."""
        if "dwf" not in self.times or over not in self.times:
            return None
        return self.times[over].ratio / self.times["dwf"].ratio

    def lines(self) -> list[str]:
        """The comparison as text, its last line the ratio."""
        what = f"one training step with PGD-{self.num_steps} on {self.batch_size} images"
        lines = [f"{what}, {self.device}"]
        for name, took in self.times.items():
            lines.append(
                f"  {name:<6}{took.median_ms:>10.1f} ms{1 / took.ratio:>8.2f} x eager   "
                f"{self.ran[name]}"
            )
        lines += [f"  {name:<6} not timed: {why}" for name, why in self.skipped.items()]
        told = [
            f"{gain:.2f} times as fast as {words}"
            for over, words in (("eager", "eager PyTorch"), ("stock", "the best stock PyTorch"))
            if (gain := self.gain(over)) is not None
        ]
        lines.append(f"dwf's step is {', '.join(told)}" if told else "dwf's step was not timed")
        return lines


def compare_step(
    case: Case,
    device: torch.device,
    *,
    seconds: float = 120.0,
    compiles: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Time the step of `case` on a device, in about so many seconds.

    Args:
        seconds: where the batch is too large for them, it is halved until it is not.
        compiles: try torch.compile on a CPU as well; it takes a minute.
        say: gets a line about what is being done.
    Raises:
        ConfigError: the network does not run on such images, or cannot be trained on this CPU.
    """
    began = time.monotonic()
    network = copy.deepcopy(case.network).to(device)
    check_convolutions(network, device)
    batch_size = case.batch_size
    say("trying the network")
    per_image = _seconds_per_image(network, case, device)
    # Three columns, none much slower than eager.
    calls = 3 * (CALLS_BEFORE + MIN_ROUNDS)
    while batch_size > MIN_BATCH and calls * batch_size * per_image > seconds:
        batch_size = max(batch_size // 2, MIN_BATCH)
    images, labels = _inputs(network, case, batch_size, device)
    expected = eager_attack(_plain(network), case.epsilon, case.step_size)
    adversarial = without_tf32(expected)(images, labels, case.num_steps)
    reference = _gain(network, images, labels, adversarial)
    columns: dict[str, Step] = {}
    ran: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, build in _builders(network, case, images, compiles=compiles).items():
        say(f"building {name}")
        try:
            step, ran[name] = build()
            _check(step, network, images, labels, case, reference)
            step(images, labels)
        except Exception as error:
            # Compilers, captures and networks fail in as many ways as there are reasons.
            skipped[name] = in_one_line(error)
            if name == "eager":
                raise ConfigError(f"the network cannot be trained: {skipped[name]}") from error
        else:
            columns[name] = step
    say(f"timing {', '.join(columns)}")
    took = _seconds_of(columns, images, labels)
    left = seconds - (time.monotonic() - began) - 3 * took  # compare warms up
    rounds = min(max(int(left / max(took, 1e-6)), MIN_ROUNDS), MAX_ROUNDS)
    times = compare(columns, (images, labels), min_samples=rounds, min_s=0.0)
    where = moe_kernels.timing.device_name(device)
    return Comparison(where, batch_size, case.num_steps, times, ran, skipped)


class Step:
    """One contender: an attack, and a training step on what it found."""

    def __init__(
        self, network: nn.Module, attack: Attack, case: Case, *, dtype: torch.dtype, fused: bool
    ) -> None:
        self.network, self.attack, self._case = network, attack, case
        self._dtype = dtype
        self.forward: Callable[[Tensor], Tensor] = network
        parameters = [x for x in network.parameters() if x.requires_grad]
        options: dict[str, Any] = {"fused": True} if fused else {}
        # So small a rate that weights stay finite, whatever the network is.
        self._optimizer = torch.optim.SGD(parameters, 1e-4, 0.9, weight_decay=5e-4, **options)
        self.layout = torch.contiguous_format
        self.after: Callable[[], None] = lambda: None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Attack the batch and change the weights."""
        self.network.eval()
        adversarial = self.attack(images, labels, self._case.num_steps)
        self.network.train()
        low = self._dtype is not torch.float32
        with torch.autocast(images.device.type, self._dtype, enabled=low):
            logits = self.forward(adversarial.contiguous(memory_format=self.layout))
        loss = F.cross_entropy(logits.float(), labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.after()


def _builders(
    network: nn.Module, case: Case, images: Tensor, *, compiles: bool
) -> dict[str, Callable[[], tuple[Step, str]]]:
    """How to build each column, eager's first."""
    # Stock gradients of weights in bfloat16 take many times longer than in float32 on CPUs.
    dtype = torch.bfloat16 if images.is_cuda else torch.float32
    return {
        "eager": functools.partial(_eager, network, case),
        "stock": functools.partial(_stock, network, case, images, dtype, compiles=compiles),
        "dwf": functools.partial(_ours, network, case, images, dtype),
    }


def _eager(network: nn.Module, case: Case) -> tuple[Step, str]:
    own = copy.deepcopy(network)
    attack = eager_attack(_plain(own), case.epsilon, case.step_size)
    step = Step(own, attack, case, dtype=torch.float32, fused=False)
    step.forward = _plain(own)
    return _in_full_float32(step), "float32, NCHW, autograd"


def _stock(
    network: nn.Module, case: Case, images: Tensor, dtype: torch.dtype, *, compiles: bool
) -> tuple[Step, str]:
    def build(*, compiled: bool, graphed: bool) -> Step:
        layout = torch.channels_last
        own = copy.deepcopy(network).to(memory_format=layout)
        frozen = _Frozen(copy.deepcopy(own).eval(), compiled=compiled)
        budget = case.epsilon, case.step_size
        attack = StockAttack(
            frozen, images, *budget, dtype=dtype, compiled=compiled, graphed=graphed
        )
        step = Step(own, attack, case, dtype=dtype, fused=True)
        step.layout = layout
        step.forward = _plain(torch.compile(own, **COMPILE) if compiled else own)
        step.after = functools.partial(attack.follow, own)
        step(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))
        return step

    step, ran = first_that_runs(build, images.device, compiles=compiles)
    return step, f"{str(dtype).removeprefix('torch.')}, {ran}"


def _ours(network: nn.Module, case: Case, images: Tensor, dtype: torch.dtype) -> tuple[Step, str]:
    own = copy.deepcopy(network)
    model = planned(own)
    of_attack = dtype if images.is_cuda else None  # on a CPU as the plan sees fit

    def attack(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        return pgd(
            attack_target(model, images, dtype=of_attack),
            images,
            labels,
            epsilon=case.epsilon,
            step_size=case.step_size,
            num_steps=num_steps,
            random_start=False,
        )

    step = Step(own, attack, case, dtype=dtype, fused=images.is_cuda)
    step.forward = TrainMode(own) if images.device.type == "cpu" else own
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for _ in range(2):  # a graph is captured at the second step
        step(images, labels)
    target = attack_target(model, images, dtype=of_attack)
    how = f"no plan: {target.reason}" if target.plan is None else target.plan.back_end
    return step, f"dwf.pgd, {how}"


class _Frozen(nn.Module):
    """The attack's own copy of the network, compiled if it is to be."""

    def __init__(self, network: nn.Module, *, compiled: bool) -> None:
        super().__init__()
        self.network = network
        self._call = [_plain(torch.compile(network, **COMPILE) if compiled else network)]

    def forward(self, images: Tensor) -> Tensor:
        return self._call[0](images)


def _plain(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The network with the ops of this package, if it has any, in plain torch."""

    def forward(images: Tensor) -> Tensor:
        with moe_kernels.implementation("reference"):
            return network(images)

    return forward


def _in_full_float32(step: Step) -> Step:
    step.attack, step.forward = without_tf32(step.attack), without_tf32(step.forward)
    return step


def _inputs(
    network: nn.Module, case: Case, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, *case.image_shape, generator=generator).to(device)
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(images[:1])
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError("the network does not return logits [B, K]")
    return images, torch.randint(logits.shape[1], (batch_size,), generator=generator).to(device)


def _seconds_per_image(network: nn.Module, case: Case, device: torch.device) -> float:
    """Of eager's whole step, from one forward and backward pass of a few images."""
    few = torch.rand(MIN_BATCH, *case.image_shape, device=device)
    own = copy.deepcopy(network).eval()

    def once() -> None:
        leaf = few.clone().requires_grad_()
        torch.autograd.grad(own(leaf).float().sum(), leaf)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        once()
    except Exception as error:
        shape = list(case.image_shape)
        raise ConfigError(f"the network does not run on images {shape}: {error}") from error
    began = time.perf_counter()
    once()
    return (time.perf_counter() - began) / MIN_BATCH * (case.num_steps + 2)


def _seconds_of(columns: dict[str, Step], images: Tensor, labels: Tensor) -> float:
    began = time.perf_counter()
    for step in columns.values():
        step(images, labels)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began


def _gain(network: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor) -> float:
    """What an attack adds to the mean loss, judged in float32 by an untouched copy."""
    judge = copy.deepcopy(network).eval()
    with torch.no_grad():
        clean, attacked = (
            float(F.cross_entropy(judge(x).float(), labels)) for x in (images, adversarial)
        )
    return attacked - clean


def _check(
    step: Step, network: nn.Module, images: Tensor, labels: Tensor, case: Case, reference: float
) -> None:
    """Raise ValueError if a contender's attack leaves the ball or gains too little."""
    # With the weights that the reference had.
    with torch.no_grad():
        for mine, original in zip(_state(step.network), _state(network), strict=True):
            mine.copy_(original)
    step.after()
    step.network.eval()
    adversarial = step.attack(images, labels, case.num_steps).detach()
    far = float((adversarial - images).abs().max())
    if not far <= case.epsilon + 1e-6 or adversarial.min() < 0 or adversarial.max() > 1:
        raise ValueError(f"its attack leaves the ball: {far:.4g} of {case.epsilon:.4g}")
    found = _gain(network, images, labels, adversarial)
    if not found >= MIN_GAIN * reference:
        raise ValueError(f"its attack adds {found:.4g} to the loss, eager's {reference:.4g}")


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
