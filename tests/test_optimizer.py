"""SGD, its cosine and the average of the weights, against the formulas written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dwf.config import PhaseConfig
from dwf.defenses import Phase
from dwf.training.optimizer import Optimizer, learning_rate_factor

T = 40
SCHEDULE = PhaseConfig(learning_rate=0.1, gate_learning_rate=0.03, momentum=0.9, weight_decay=0.05)


class Gated(nn.Module):
    """An expert, a gate, and a name that only looks like the gate's."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.expert = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.gate = nn.ParameterDict({"weight": torch.randn(2, generator=generator)})
        self.gatekeeper = nn.Parameter(torch.randn(2, generator=generator))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, step):
        """A loss whose gradients change from step to step."""
        return sum(((p - math.sin(step + 1)) ** 2).sum() for p in self.parameters())


def phase(module, gate_prefix="gate.", schedule=SCHEDULE):
    return Phase("joint", module, schedule, None, gate_prefix=gate_prefix)


def take(optimizer, module, steps):
    for step in steps:
        optimizer.set_step(step)
        optimizer.zero_grad()
        module(step).backward()
        optimizer.step()


class TestOptimizer:
    def test_cosine(self):
        """lr_t = lr_0 (1 + cos(pi t / T)) / 2, in each group from its own lr_0."""
        optimizer = Optimizer(phase(Gated()), T)
        for step in range(T):
            factor = (1 + math.cos(math.pi * step / T)) / 2
            assert optimizer.set_step(step) == pytest.approx(0.1 * factor, rel=1e-12)
            rates = [group["lr"] for group in optimizer._optimizer.param_groups]
            assert rates == pytest.approx([0.1 * factor, 0.03 * factor], rel=1e-12)
        assert optimizer.set_step(0) == 0.1
        assert optimizer.set_step(T // 2) == pytest.approx(0.05)

    def test_steps_by_hand(self):
        """v = momentum v + (g + weight_decay w); w = w - lr v, with the gate's own lr."""
        module = Gated()
        expected = {name: p.detach().double().clone() for name, p in module.named_parameters()}
        velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
        take(Optimizer(phase(module), T), module, range(T))
        for step in range(T):
            factor = (1 + math.cos(math.pi * step / T)) / 2
            for name, w in expected.items():
                g = 2 * (w - math.sin(step + 1)) + 0.05 * w
                velocity[name] = 0.9 * velocity[name] + g
                expected[name] = (
                    w - (0.03 if name == "gate.weight" else 0.1) * factor * velocity[name]
                )
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)

    def test_without_a_gate(self):
        optimizer = Optimizer(phase(Gated(), gate_prefix=None), T)
        assert [len(group["params"]) for group in optimizer._optimizer.param_groups] == [3]

    @pytest.mark.parametrize("stop", [0, 1, 7])
    def test_state_continues_to_the_same_bits(self, stop):
        whole, first, second = Gated(), Gated(), Gated()
        take(Optimizer(phase(whole), T), whole, range(T))
        before = Optimizer(phase(first), T)
        take(before, first, range(stop))
        state = {name: value.clone() for name, value in before.state().items()}
        assert len(state) == (3 if stop else 0)
        second.load_state_dict(first.state_dict())
        after = Optimizer(phase(second), T)
        after.load(state)
        take(after, second, range(stop, T))
        for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_loaded_momentum_keeps_the_parameters_strides(self):
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = Optimizer(phase(conv), T)
        optimizer.load({"momentum_buffer/weight": torch.ones(4, 3, 3, 3)})
        momentum = optimizer._optimizer.state[conv.weight]["momentum_buffer"]
        assert momentum.stride() == conv.weight.stride()

    @pytest.mark.parametrize("stop", [0, 7])
    def test_resume_of_adam(self, stop):
        schedule = replace(SCHEDULE, optimizer="adam", learning_rate=0.01)
        whole, first, second = Gated(), Gated(), Gated()
        take(Optimizer(phase(whole, schedule=schedule), T), whole, range(12))
        before = Optimizer(phase(first, schedule=schedule), T)
        take(before, first, range(stop))
        second.load_state_dict(first.state_dict())
        after = Optimizer(phase(second, schedule=schedule), T)
        after.load({name: value.clone() for name, value in before.state().items()})
        take(after, second, range(stop, 12))
        for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_an_update_of_some_parameters(self):
        """The others keep value and momentum, though they have a gradient."""
        module, alone = Gated(), Gated()
        alone.gate.requires_grad_(False)
        alone.gatekeeper.requires_grad_(False)
        optimizer = Optimizer(phase(module), T)
        for step in range(3):
            optimizer.set_step(step)
            optimizer.zero_grad()
            module(step).backward()
            optimizer.step(lambda name: name == "expert")
        take(Optimizer(phase(alone), T), alone, range(3))
        for name, value in module.named_parameters():
            assert torch.equal(value, dict(alone.named_parameters())[name]), name
        assert list(optimizer.state()) == ["momentum_buffer/expert"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "cosine"}, {0: 1, 0.5: 0.5, 1: 0}),
        ({"schedule": "polynomial"}, {0: 1, 0.5: 0.5**0.9, 1: 0}),
        (
            {"schedule": "steps", "at": (0.5, 0.75), "factors": (0.1, 0.01)},
            {0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 1: 0.01},
        ),
        (
            {"schedule": "linear", "at": (0, 0.4, 1), "factors": (0, 1, 0)},
            {0: 0, 0.2: 0.5, 0.4: 1, 0.7: 0.5, 1: 0},
        ),
    ],
)
def test_learning_rates(schedule, expected):
    config = PhaseConfig(**schedule)
    for t, factor in expected.items():
        assert learning_rate_factor(config, t) == pytest.approx(factor, abs=1e-12)
