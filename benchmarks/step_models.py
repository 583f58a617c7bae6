"""Build the mixtures and batches that the step benchmarks time, and their copies in stock torch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dwf
from dwf.bench.stock import COMPILE
from dwf.config import AttackConfig, Config, DataConfig, ModelConfig, PhaseConfig
from dwf.defenses import ModelFacts, get

EPSILON, STEP_SIZE = 8 / 255, 2 / 255
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclasses.dataclass(frozen=True)
class Case:
    """Experts of one kind, and the batch of images they see."""

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


def joint_config(case: Case, precision: str) -> Config:
    """Joint training alone, with attacks of one strength: nothing that is timed is drawn."""
    return Config(
        preset="benchmark",
        defense="dwf",
        precision="bf16" if precision == "bfloat16" else "fp32",
        data=DataConfig(num_validation=128),
        model=ModelConfig(
            case.network,
            case.width,
            num_fgsm=min(4, case.num_experts - 1),
            num_pgd=max(case.num_experts - 5, 0),
        ),
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
    """Return the mixture in eval mode, random images [B, 3, H, W] and labels [B].

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
        open_relus(mixture)
        mixture.to(device)
        for norm in norms:
            norm.momentum = 1.0  # this batch's statistics alone
        mixture.train()(images)
        for norm in norms:
            norm.momentum = 0.1
    return mixture.eval(), images, labels


@torch.no_grad()
def open_relus(network: nn.Module) -> nn.Module:
    """Let ReLUs of residual blocks mostly pass and their branches be small, in place."""
    for block in network.modules():
        if isinstance(getattr(block, "bn2", None), nn.BatchNorm2d):
            block.bn1.bias.fill_(1.0)  # type: ignore[union-attr, operator]
            block.bn2.weight.fill_(0.05)  # type: ignore[union-attr, operator]
    return network


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
        """Call the experts through torch.compile from now on."""
        self.calls = [torch.compile(expert, **COMPILE) for expert in self.experts]

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalize(images)
        expert_logits = torch.stack([expert(x) for expert in self.calls])  # [E, B, K]
        gate_weights = self.gate(x).softmax(dim=1)  # [B, E], float32 also under autocast
        logits: Tensor = (gate_weights.T.unsqueeze(2) * expert_logits).sum(dim=0)
        return logits


def plain_model(mixture: dwf.Mixture) -> PlainMixture:
    """The copy that toolboxes get: float32, NCHW, parameters that ask for gradients."""
    return PlainMixture(mixture, torch.contiguous_format).eval()


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient [B, C, H, W] of the summed cross-entropy, by autograd."""
    leaf = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]
