"""One PGD step of the mixture and one joint training step: toolboxes, the best stock torch, ours.

Every column has to move the images like the reference before it is timed: a red gate prints no
number. Networks are untrained, since the time of a step does not depend on the weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dwf
from dwf.attacks import attack_target
from dwf.config import AttackConfig, Config, DataConfig, ModelConfig, PhaseConfig
from dwf.defenses import Batch, Crafter, ModelFacts, get
from dwf.training.optimizer import Optimizer
from moe_kernels.op import registry
from moe_kernels.timing import Timing, compare

if TYPE_CHECKING:
    from conftest import Record

# A compiler's remark about an unused feature must not end a measurement.
pytestmark = pytest.mark.filterwarnings("default")

T = TypeVar("T")
Attack = Callable[[Tensor, Tensor, int], Tensor]  # images, labels, num_steps -> adversarial

EPSILON, STEP_SIZE = 8 / 255, 2 / 255
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

# One compilation serves all nine experts; without fullgraph a tenth would run uncompiled, silently.
# The default mode: max-autotune takes minutes to look for convolutions faster than cuDNN's.
COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}

# Required of a column in float32, and of one that computes in bfloat16.
MIN_AGREEMENT = {"float32": 0.999, "bfloat16": 0.97}
MAX_LOGITS_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
MIN_GAIN = {"float32": 0.999, "bfloat16": 0.98}
MAX_LOSS_ERROR = {"float32": 1e-3, "bfloat16": 2e-2}
MIN_COSINE = {"float32": 0.99, "bfloat16": 0.97}
# Rows of the batch that are also computed in float64.
TRUTH_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """Nine experts of one kind, and the batch of images they see."""

    network: str
    width: int
    image_size: int
    batch_size: int
    num_steps: int
    needs_gpu: bool
    num_experts: int = 9
    takes_minutes: bool = False  # on a CPU: run with DWF_BENCH_FULL=1

    def __str__(self) -> str:
        return f"{self.network}-w{self.width}-{self.image_size}px-B{self.batch_size}"


PGD_CASES = [
    Case("resnet10", 8, 32, batch_size=8, num_steps=3, needs_gpu=False),
    Case("resnet6", 16, 8, batch_size=64, num_steps=8, needs_gpu=False),
    *(
        Case("resnet18", 64, 32, B, num_steps=steps, needs_gpu=False, takes_minutes=True)
        for B, steps in ((64, 1), (8, 4), (1, 4))
    ),
    *(Case("resnet18", 64, 32, B, num_steps=4, needs_gpu=True) for B in (128, 512, 256, 32)),
]
TRAINING_CASES = [
    Case("resnet10", 8, 16, batch_size=8, num_steps=3, needs_gpu=False),
    Case("resnet18", 64, 32, batch_size=128, num_steps=10, needs_gpu=True),
]


class Column(NamedTuple):
    """One contender. `precision` is that of the network: "float32" or "bfloat16"."""

    attack: Attack
    ran: str
    precision: str
    logits: Callable[[Tensor], Tensor] | None = None


# The model --------------------------------------------------------------------------------------


def joint_config(case: Case, precision: str) -> Config:
    """Joint training alone, with attacks of one strength: nothing that is timed is drawn."""
    return Config(
        preset="benchmark",
        defense="dwf",
        precision="bf16" if precision == "bfloat16" else "fp32",
        data=DataConfig(num_validation=128),
        model=ModelConfig(case.network, case.width, num_fgsm=4, num_pgd=case.num_experts - 5),
        attack=AttackConfig(
            fgsm_epsilon=(EPSILON,),
            epsilon=EPSILON,
            step_size=STEP_SIZE,
            num_steps=(case.num_steps,),
        ),
        pretrain=None,
        joint=PhaseConfig(
            num_epochs=1,
            batch_size=case.batch_size,
            learning_rate=LEARNING_RATE,
            gate_learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        ),
    )


def make_inputs(case: Case, device: torch.device) -> tuple[dwf.Mixture, Tensor, Tensor]:
    """The mixture in eval mode, random images [B, 3, H, W] and labels [B].

    Residual branches start small and ReLUs mostly open. As in trained networks, rounding then flips
    the sign of few input gradients; at default weights bfloat16 flips up to 12 %, and no gate could
    tell that from a bug.
    """
    shape = (3, case.image_size, case.image_size)
    mixture = get("dwf").build(joint_config(case, "float32"), ModelFacts(shape, 10, MEAN, STD))
    assert isinstance(mixture, dwf.Mixture)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch_size, *shape, generator=generator).to(device)
    labels = torch.randint(10, (case.batch_size,), generator=generator).to(device)
    with torch.no_grad():
        last = list(mixture.gate.parameters())[-2]  # zeros: the gate would have no gradient
        last.copy_(0.1 * torch.randn(last.shape, generator=generator))
        norms = [x for x in mixture.modules() if isinstance(x, nn.BatchNorm2d)]
        for block in mixture.modules():
            if isinstance(getattr(block, "bn2", None), nn.BatchNorm2d):
                block.bn1.bias.fill_(1.0)  # type: ignore[union-attr, operator]
                block.bn2.weight.fill_(0.05)  # type: ignore[union-attr, operator]
        mixture.to(device)
        for norm in norms:
            norm.momentum = 1.0  # this batch's statistics alone
        mixture.train()(images)
        for norm in norms:
            norm.momentum = 0.1
    return mixture.eval(), images, labels


class PlainMixture(nn.Module):
    """A copy of the mixture in stock torch ops alone, as its paper writes it.

    `calls` are the experts as `forward` calls them: themselves, or compiled.
    """

    def __init__(self, mixture: dwf.Mixture, memory_format: torch.memory_format) -> None:
        super().__init__()
        mixture = copy.deepcopy(mixture).to(memory_format=memory_format)
        self.normalize, self.experts, self.gate = mixture.normalize, mixture.experts, mixture.gate
        self.calls: list[Callable[[Tensor], Tensor]] = list(self.experts)

    def compile_experts(self) -> None:
        self.calls = [torch.compile(expert, **COMPILE) for expert in self.experts]

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalize(images)
        expert_logits = torch.stack([expert(x) for expert in self.calls])  # [E, B, K]
        gate_weights = self.gate(x).softmax(dim=1)  # [B, E], float32 also under autocast
        logits: Tensor = (gate_weights.T.unsqueeze(2) * expert_logits).sum(dim=0)
        return logits


def plain_model(mixture: dwf.Mixture) -> PlainMixture:
    """What toolboxes get: float32, NCHW, parameters that ask for gradients, as users have them."""
    return PlainMixture(mixture, torch.contiguous_format).eval()


def without_tf32(function: Callable[..., T]) -> Callable[..., T]:
    """Float32 convolutions in full precision, and cuDNN's default choice of algorithm."""

    @functools.wraps(function)
    def run(*args: Any) -> T:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return function(*args)

    return run


def without_tf32_column(column: Column) -> Column:
    """The same contender, in full float32."""
    logits = None if column.logits is None else without_tf32(column.logits)
    return column._replace(attack=without_tf32(column.attack), logits=logits)


# Attacks ----------------------------------------------------------------------------------------


def eager_attack(model: nn.Module) -> Attack:
    """PGD as toolboxes write it."""

    def attack(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        adversarial = images.clone()
        for _ in range(num_steps):
            adversarial.requires_grad_()
            loss = F.cross_entropy(model(adversarial), labels)
            (grad,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial.detach() + STEP_SIZE * grad.sign()
            delta = (moved - images).clamp(-EPSILON, EPSILON)
            adversarial = (images + delta).clamp(0, 1)
        return adversarial

    return attack


def move_(adversarial: Tensor, gradient: Tensor, images: Tensor) -> None:
    """Sign, step, projection and clip, in place."""
    moved = adversarial + STEP_SIZE * gradient.sign()
    moved = torch.minimum(torch.maximum(moved, images - EPSILON), images + EPSILON)
    adversarial.copy_(moved.clamp(0, 1))


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step into a CUDA graph; calling the result replays it.

    `step` reads and writes tensors that stay where they are, and leaves no gradient behind.
    """
    # Not the default stream, which cannot be captured; and warm-up and capture on the same one,
    # because autograd runs a node's backward on the stream of its forward.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, lets cuDNN choose, allocates its workspaces
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


class StockAttack:
    """PGD as a good engineer writes it for one model and batch size, in stock torch.

    channels_last, bfloat16 weights under autocast (which would cast frozen float32 ones anew at
    every step), parameters frozen, experts and update compiled, a whole step in one CUDA graph.
    BatchNorm is not folded: compiled, it is part of the pass over memory that ReLU needs anyway.
    The image that moves stays float32.
    """

    def __init__(
        self,
        mixture: dwf.Mixture,
        images: Tensor,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool,
        graphed: bool,
    ) -> None:
        self.model = PlainMixture(mixture, torch.channels_last).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
        self._dtype = dtype
        self._move = move_
        if compiled:
            self.model.compile_experts()
            self._move = torch.compile(move_, **COMPILE)
        self.images = images.contiguous(memory_format=torch.channels_last).clone()
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.adversarial = self.images.clone()
        self.gradient = torch.empty_like(self.images)
        self.step: Callable[[], None] = self._step
        if graphed:
            self.step = captured(self._step)
        else:
            self._step()

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        self.load(images, labels)
        for _ in range(num_steps):
            self.step()
        return self.adversarial.clone()

    def load(self, images: Tensor, labels: Tensor) -> None:
        """Start from other images, in place: a graph knows addresses."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.adversarial.copy_(images)

    def follow(self, model: nn.Module) -> None:
        """Take over the weights and statistics of a model with the same layers, in place."""
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        with torch.no_grad():
            for dtype in {mine.dtype for mine, _ in pairs}:
                mine, theirs = zip(*(pair for pair in pairs if pair[0].dtype is dtype), strict=True)
                torch._foreach_copy_(mine, theirs)

    def logits(self, images: Tensor) -> Tensor:
        """As a step computes them, also by what was compiled for it: same layout, with a tape."""
        leaf = images.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        with torch.enable_grad():
            return self._logits(leaf).detach()

    def _logits(self, leaf: Tensor) -> Tensor:
        # The cache of casts would hand a tensor of one capture to the next.
        with torch.autocast(
            leaf.device.type,
            self._dtype,
            enabled=self._dtype is not torch.float32,
            cache_enabled=False,
        ):
            logits: Tensor = self.model(leaf)
        return logits.float()

    def _step(self) -> None:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            leaf = self.adversarial.detach().requires_grad_()
            loss = F.cross_entropy(self._logits(leaf), self.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        self.gradient.copy_(gradient)
        self._move(self.adversarial, self.gradient, self.images)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Floating parameters and buffers, in the order of the layers."""
    return [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]


def first_that_runs(
    build: Callable[..., T], device: torch.device, *, compiles: bool = False
) -> tuple[T, str]:
    """The fastest way that works here, and what it is, with the reasons against faster ones.

    `build(compiled=, graphed=)` raises if its way does not work. Unless it `compiles`, a CPU does
    without: there that takes longer than all measurements of a small case.
    """
    refused: list[str] = []
    ways = [(True, True), (False, True), (True, False), (False, False)]
    if device.type != "cuda":
        refused.append("CPU: no CUDA graph" if compiles else "CPU: no CUDA graph, not compiled")
        ways = [(True, False), (False, False)] if compiles else [(False, False)]
    for compiled, graphed in ways:
        names = [
            *(["torch.compile (each expert)"] if compiled else []),
            *(["CUDA graph"] if graphed else []),
        ]
        ran = ", ".join(["channels_last", *names])
        try:
            return build(compiled=compiled, graphed=graphed), "; ".join([ran, *refused])
        except Exception as error:
            if (compiled, graphed) == ways[-1]:
                raise
            # Compilers and captures fail in as many types as there are reasons.
            message = (str(error).splitlines() or [""])[0][:160]
            refused.append(f"not {ran}: {type(error).__name__}: {message}")
    raise AssertionError("ways is not empty")


def torchattacks_attack(model: nn.Module) -> Attack:
    torchattacks = importlib.import_module("torchattacks")
    attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=1, random_start=False)

    def run(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        attack.steps = num_steps
        adversarial: Tensor = attack(images, labels)
        return adversarial

    return run


def foolbox_attack(model: nn.Module, device: torch.device) -> Attack:
    foolbox = importlib.import_module("foolbox")
    adopted = foolbox.models.PyTorchModel(model, bounds=(0, 1), device=device)

    def run(images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        attack = foolbox.attacks.LinfPGD(
            abs_stepsize=STEP_SIZE, steps=num_steps, random_start=False
        )
        criterion = foolbox.criteria.Misclassification(labels)
        adversarial: Tensor = attack.run(adopted, images, criterion, epsilon=EPSILON)
        return adversarial

    return run


class OurAttack:
    """dwf.pgd on the mixture's plan. Weights are folded at every call, as in a training step."""

    def __init__(self, mixture: dwf.Mixture, dtype: torch.dtype) -> None:
        self._mixture = mixture
        self._dtype = dtype

    def __call__(self, images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
        return dwf.pgd(
            attack_target(self._mixture, images, dtype=self._dtype),
            images,
            labels,
            epsilon=EPSILON,
            step_size=STEP_SIZE,
            num_steps=num_steps,
            random_start=False,
        )

    def column(self, images: Tensor, labels: Tensor, precision: str) -> Column:
        target = attack_target(self._mixture, images, dtype=self._dtype)
        if target.plan is None:
            raise RuntimeError(f"the mixture has no plan: {target.reason}")
        for _ in range(3):  # a graph is captured at the second step
            self(images, labels, 2)
        ran = f"dwf.pgd, {target.plan.back_end}, {target.plan.graphs.status}"
        return Column(self, ran, precision, target.plan)


def attack_columns(
    mixture: dwf.Mixture, images: Tensor, labels: Tensor, *, compiles: bool = False
) -> dict[str, Callable[[], Column]]:
    """All contenders, built when called; the first one is what the others are compared with.

    `compiles`: give torch.compile the time it takes on a CPU as well.
    """
    device = images.device
    plain = plain_model(mixture)

    def stock(dtype: torch.dtype, precision: str) -> Column:
        build = functools.partial(StockAttack, mixture, images, dtype=dtype)
        attack, ran = first_that_runs(build, device, compiles=compiles)
        return Column(attack, f"{precision}, {ran}", precision, attack.logits)

    def plain_logits(images: Tensor) -> Tensor:
        return plain(images)  # type: ignore[no-any-return]

    eager = eager_attack(plain)
    columns = {
        "eager": lambda: Column(
            without_tf32(eager), "float32, NCHW, autograd", "float32", without_tf32(plain_logits)
        ),
        "stock": lambda: stock(torch.bfloat16, "bfloat16"),
        "torchattacks": lambda: Column(
            without_tf32(torchattacks_attack(plain)), "torchattacks.PGD", "float32"
        ),
        "foolbox": lambda: Column(
            without_tf32(foolbox_attack(plain, device)), "foolbox LinfPGD", "float32"
        ),
        "ours": lambda: OurAttack(mixture, torch.bfloat16).column(images, labels, "bfloat16"),
        "ours fp32": lambda: without_tf32_column(
            OurAttack(mixture, torch.float32).column(images, labels, "float32")
        ),
    }
    if device.type == "cuda":
        # Convolutions in TF32 are torch's default; the gate takes them for what they are.
        columns["eager tf32"] = lambda: Column(eager, "as eager, with TF32", "bfloat16")
    else:
        columns["stock fp32"] = lambda: stock(torch.float32, "float32")
    return columns


# Gates ------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What a right attack does: computed in plain float32, its first rows also in float64."""

    truth_logits: Tensor  # [R, K] float64
    truth_step: Tensor  # [R, C, H, W] float64, after one step
    step: Tensor  # [B, C, H, W]
    weight: Tensor  # [B, C, H, W], size of the gradient at the images
    clean_loss: float
    gain: float  # of loss, after all steps


def make_reference(
    mixture: dwf.Mixture, images: Tensor, labels: Tensor, num_steps: int
) -> Reference:
    rows = slice(TRUTH_ROWS)
    double = plain_model(mixture).double()
    plain = plain_model(mixture)
    attack = without_tf32(eager_attack(plain))
    clean_loss = _mean_loss(plain, images, labels)
    with torch.no_grad():
        truth_logits = double(images[rows].double())
    return Reference(
        truth_logits,
        eager_attack(double)(images[rows].double(), labels[rows], 1),
        attack(images, labels, 1),
        without_tf32(_gradient)(plain, images, labels).abs(),
        clean_loss,
        _mean_loss(plain, attack(images, labels, num_steps), labels) - clean_loss,
    )


def judge_attack(
    column: Column,
    reference: Reference,
    mixture: dwf.Mixture,
    images: Tensor,
    labels: Tensor,
    num_steps: int,
) -> dict[str, float]:
    """How near a column comes to the reference; AssertionError if that is not near enough."""
    step = column.attack(images, labels, 1)
    adversarial = column.attack(images, labels, num_steps)
    # A step moves every pixel by its length, one way or the other, so equal pixels are equal signs.
    same_as_truth = (step[:TRUTH_ROWS] - reference.truth_step).abs() < STEP_SIZE / 2
    same = (step - reference.step).abs() < STEP_SIZE / 2
    loss = _mean_loss(plain_model(mixture), adversarial, labels)
    found = {
        "sign_agreement_float64": float(same_as_truth.double().mean()),
        "sign_agreement": float(same.double().mean()),
        "weighted_sign_agreement": float((same * reference.weight).sum() / reference.weight.sum()),
        "gain_over_reference": (loss - reference.clean_loss) / reference.gain,
    }
    if column.logits is not None:
        with torch.no_grad():
            logits = column.logits(images)[:TRUTH_ROWS].double()
        error = (logits - reference.truth_logits).norm() / reference.truth_logits.norm()
        found["logits_error"] = float(error)
    precision = column.precision
    faults = [
        f"{name} {value:.5f}, expected at least {least:.5f}"
        for name, value in found.items()
        if name != "logits_error"
        and not value >= (least := (MIN_GAIN if "gain" in name else MIN_AGREEMENT)[precision])
    ]
    if not found.get("logits_error", 0.0) <= MAX_LOGITS_ERROR[precision]:
        faults.append(f"logits are off by {found['logits_error']:.2e} of their norm")
    outside = (adversarial - images).abs() > EPSILON + 1e-6
    outside |= (adversarial < 0) | (adversarial > 1)
    if bool(outside.any()):
        faults.append(f"{int(outside.sum())} pixels outside of the ball or of [0, 1]")
    assert not faults, f"{column.ran}: {'; '.join(faults)}"
    return found


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    loss = F.cross_entropy(model(leaf), labels, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


@without_tf32
def _mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def gflop_per_image(mixture: dwf.Mixture, images: Tensor, labels: Tensor) -> float:
    """Of one step: forward and gradient of the input, as torch counts them."""
    model = plain_model(mixture).requires_grad_(False)
    leaf = images[:1].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(leaf), labels[:1]).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 1e9


# Training ---------------------------------------------------------------------------------------


class Training:
    """One contender: calling it takes one joint step of algorithm 3, and gives the loss."""

    model: nn.Module
    ran: str
    precision: str

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class EagerTraining(Training):
    """Algorithm 3 line by line: float32, NCHW, each attack on its own."""

    ran, precision = "float32, NCHW, autograd", "float32"

    def __init__(self, mixture: dwf.Mixture, num_steps: int, total_steps: int) -> None:
        self.model = plain_model(mixture)
        self._attack = eager_attack(self.model)
        self._num_steps = num_steps
        self._optimizer, self._schedule = make_sgd(self.model, total_steps)

    @without_tf32
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.model.eval()
        gradient = _gradient(self.model, images, labels)
        fgsm = (images + EPSILON * gradient.sign()).clamp(0, 1)
        pgd = self._attack(images, labels, self._num_steps)
        self.model.train()
        logits = self.model(torch.cat([images, fgsm, pgd]))
        loss = F.cross_entropy(logits, labels.repeat(3))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()


class StockTraining(Training):
    """The same in the best stock torch: StockAttack, whose first gradient serves FGSM as well;
    bfloat16 autocast, compiled experts and fused SGD in the training step.

    No graph around the training step: at its size the GPU is slower than the launches.
    """

    def __init__(
        self,
        mixture: dwf.Mixture,
        images: Tensor,
        num_steps: int,
        total_steps: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool,
        graphed: bool,
    ) -> None:
        self.model = PlainMixture(mixture, torch.channels_last).train()
        self._attack = StockAttack(mixture, images, dtype=dtype, compiled=compiled, graphed=graphed)
        self._dtype = dtype
        self._num_steps = num_steps
        self._optimizer, self._schedule = make_sgd(self.model, total_steps, fused=True)
        if compiled:
            self.model.compile_experts()
            # Compiles for all of them, and must not move the statistics of any.
            spare = torch.compile(copy.deepcopy(self.model.experts[0]), **COMPILE)
            rows = torch.cat([images] * 3).contiguous(memory_format=torch.channels_last)
            with self._autocast(images.device):
                spare(self.model.normalize(rows)).float().sum().backward()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        attack = self._attack
        attack.load(images, labels)
        attack.step()
        fgsm = (attack.images + EPSILON * attack.gradient.sign()).clamp(0, 1)
        for _ in range(self._num_steps - 1):
            attack.step()
        batch = torch.cat([attack.images, fgsm, attack.adversarial])
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self._autocast(images.device):
                logits = self.model(batch)
            loss = F.cross_entropy(logits.float(), labels.repeat(3))
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        attack.follow(self.model)
        return loss.detach()

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype is not torch.float32)


class OurTraining(Training):
    """What dwf.train does with a batch, less the average of the weights, which is an extra."""

    def __init__(self, mixture: dwf.Mixture, case: Case, precision: str, total_steps: int) -> None:
        config = joint_config(case, precision)
        self.model = copy.deepcopy(mixture)
        self.ran, self.precision = f"dwf's joint step, precision={config.precision}", precision
        (self._phase,) = get("dwf").phases(self.model, config)
        self._optimizer = Optimizer(self._phase, total_steps)
        dtype = torch.float32 if precision == "float32" else None
        self._crafter = Crafter(config.attack, 0, MEAN, STD, dtype)
        self._step = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        batch = Batch(images, labels, torch.arange(len(images), device=images.device))
        self._optimizer.set_step(self._step)
        self._step += 1
        self._optimizer.zero_grad()
        self.model.train()
        with torch.autocast(
            images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
            result = self._phase.step(self.model, self.model, batch, self._crafter)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return result.loss.detach()


def make_sgd(
    model: nn.Module, total_steps: int, **options: Any
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR]:
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, **options
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def training_columns(
    mixture: dwf.Mixture, case: Case, images: Tensor, total_steps: int
) -> dict[str, Callable[[], Training]]:
    """All contenders, built when called; the first one is what the others are compared with."""

    def stock(dtype: torch.dtype, precision: str) -> Training:
        arguments = mixture, images, case.num_steps, total_steps
        build = functools.partial(StockTraining, *arguments, dtype=dtype)
        training, ran = first_that_runs(build, images.device)
        training.ran, training.precision = f"{precision}, {ran}", precision
        return training

    columns: dict[str, Callable[[], Training]] = {
        "eager": lambda: EagerTraining(mixture, case.num_steps, total_steps)
    }
    if images.device.type == "cuda":
        columns["stock"] = lambda: stock(torch.bfloat16, "bfloat16")
        columns["ours"] = lambda: OurTraining(mixture, case, "bfloat16", total_steps)
        columns["ours fp32"] = lambda: WithoutTF32(
            OurTraining(mixture, case, "float32", total_steps)
        )
    else:
        # Gradients of weights in bfloat16 take many times longer than in float32 on CPUs.
        columns["stock"] = lambda: stock(torch.float32, "float32")
        columns["ours"] = lambda: OurTraining(mixture, case, "float32", total_steps)
    return columns


class WithoutTF32(Training):
    """Another training, in full float32."""

    def __init__(self, training: Training) -> None:
        self.model, self.ran, self.precision = training.model, training.ran, training.precision
        self._call = without_tf32(training)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return self._call(images, labels)


def first_update(training: Training, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Loss of the first step, and what the step added to the parameters, as one vector."""
    before = [x.detach().clone() for x in training.model.parameters()]
    loss = float(training(images, labels))
    after = training.model.parameters()
    return loss, torch.cat([(y.detach() - x).flatten() for x, y in zip(before, after, strict=True)])


def judge_training(
    training: Training, found: tuple[float, Tensor], expected: tuple[float, Tensor]
) -> dict[str, float]:
    """How near the first step comes to the reference's; AssertionError if not near enough."""
    loss_error = abs(found[0] - expected[0]) / expected[0]
    # In float64: a sum over all parameters of nine experts loses digits in float32.
    cosine = float(F.cosine_similarity(found[1].double(), expected[1].double(), dim=0))
    precision = training.precision
    faults = []
    if not loss_error <= MAX_LOSS_ERROR[precision]:
        faults.append(f"loss {found[0]:.6f}, expected {expected[0]:.6f}")
    if not cosine >= MIN_COSINE[precision]:
        faults.append(f"the update's cosine with the reference's is {cosine:.5f}")
    assert not faults, f"{training.ran}: {'; '.join(faults)}"
    return {"loss_error": loss_error, "update_cosine": cosine}


def matmul_tflop_per_s(device: torch.device) -> float:
    """What this machine does with a large bfloat16 product right now."""
    size = 8192 if device.type == "cuda" else 4096
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    took = compare({"matmul": torch.matmul}, (a, b), min_samples=3, min_s=0.0)["matmul"]
    return 2 * size**3 / took.p20_ms / 1e9


# Rows -------------------------------------------------------------------------------------------


def build_all(
    builders: Mapping[str, Callable[[], T]], judge: Callable[[T], dict[str, float]]
) -> tuple[dict[str, T], dict[str, dict[str, float]], dict[str, str]]:
    """Columns that run here and passed their gate, what the gate found, and who was skipped."""
    columns, quality, skipped = {}, {}, {}
    for name, build in builders.items():
        try:
            column = build()
            quality[name] = judge(column)
        except ImportError as error:
            skipped[name] = f"not installed: {error}"
        except torch.OutOfMemoryError:
            skipped[name] = "not enough memory on this GPU"
        else:
            columns[name] = column
    return columns, quality, skipped


def describe(
    times: Mapping[str, Timing],
    num_steps: int,
    batch_size: int,
    ran: Mapping[str, str],
    quality: Mapping[str, dict[str, float]],
) -> dict[str, dict[str, Any]]:
    """Per column, milliseconds of one step out of `num_steps` that were timed together."""
    columns = {}
    for name, time in times.items():
        median_ms = time.median_ms / num_steps
        columns[name] = {
            "median_ms": median_ms,
            "p20_ms": time.p20_ms / num_steps,
            "p80_ms": time.p80_ms / num_steps,
            "num_samples": time.num_samples,
            "ratio": time.ratio,
            "images_per_s": 1e3 * batch_size / median_ms,
            "ran": ran[name],
            **quality[name],
        }
    return columns


def start(case: Case, device: torch.device) -> dict[str, Any]:
    """Skip what this machine cannot do; what a row says about its case otherwise."""
    if case.needs_gpu != (device.type == "cuda"):
        pytest.skip("too slow for a CPU" if case.needs_gpu else "a small case, for a CPU")
    if case.takes_minutes and not os.environ.get("DWF_BENCH_FULL"):
        pytest.skip("takes minutes on a CPU, DWF_BENCH_FULL=1 runs it")
    torch.compiler.reset()  # each case is compiled for its own shapes
    return {
        "network": case.network,
        "width": case.width,
        "num_experts": case.num_experts,
        "batch_size": case.batch_size,
        "image_shape": [3, case.image_size, case.image_size],
        "num_steps": case.num_steps,
        "epsilon": EPSILON,
        "step_size": STEP_SIZE,
        "random_start": False,
        "bn_mode": "eval",
        "implementation": {
            "softmax_combine": registry()["softmax_combine"].selected(device, torch.bfloat16),
            "linf_step_": registry()["linf_step_"].selected(device, torch.float32),
        },
    }


def effort(device: torch.device) -> dict[str, Any]:
    """How long `compare` measures: every call is a whole attack or training step."""
    if device.type == "cuda":
        return {"min_samples": 10, "min_s": 0.5}
    return {"min_samples": 5, "min_s": 0.0}


@pytest.mark.parametrize("case", PGD_CASES, ids=str)
def test_pgd_step(case: Case, device: torch.device, record: Record) -> None:
    row = start(case, device)
    mixture, images, labels = make_inputs(case, device)
    reference = make_reference(mixture, images, labels, case.num_steps)

    def judge(column: Column) -> dict[str, float]:
        return judge_attack(column, reference, mixture, images, labels, case.num_steps)

    builders = attack_columns(mixture, images, labels, compiles=case.takes_minutes)
    columns, quality, skipped = build_all(builders, judge)
    before = matmul_tflop_per_s(device)
    times = compare(
        {name: column.attack for name, column in columns.items()},
        (images, labels, case.num_steps),
        **effort(device),
    )
    ran = {name: column.ran for name, column in columns.items()}
    gflop = gflop_per_image(mixture, images, labels)
    described = describe(times, case.num_steps, case.batch_size, ran, quality)
    # Before and after: the columns ran at clocks somewhere between.
    matmul = max(before, matmul_tflop_per_s(device))
    for column_row in described.values():
        rate = gflop * column_row["images_per_s"] / 1e3
        column_row |= {"tflop_per_s": rate, "of_bf16_matmul": rate / matmul}
    row |= {"kind": "pgd step", "gflop_per_image": gflop, "bf16_matmul_tflop_per_s": matmul}
    row |= {"columns": described, "skipped": skipped}
    record("step", {"case": f"pgd-step-{case}", **row})


@pytest.mark.parametrize("case", TRAINING_CASES, ids=str)
def test_training_step(case: Case, device: torch.device, record: Record) -> None:
    row = start(case, device)
    mixture, images, labels = make_inputs(case, device)
    # So long a schedule that the learning rate stays what it is while the clock runs.
    total_steps = 1_000_000
    expected = first_update(EagerTraining(mixture, case.num_steps, total_steps), images, labels)

    def judge(training: Training) -> dict[str, float]:
        return judge_training(training, first_update(training, images, labels), expected)

    builders = training_columns(mixture, case, images, total_steps)
    columns, quality, skipped = build_all(builders, judge)
    times = compare(columns, (images, labels), **effort(device))
    ran = {name: training.ran for name, training in columns.items()}
    described = describe(times, 1, case.batch_size, ran, quality)
    row |= {"kind": "training step", "columns": described, "skipped": skipped}
    record("step", {"case": f"training-step-{case}", **row})
