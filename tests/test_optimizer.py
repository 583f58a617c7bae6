"""SGD, its cosine and the average of the weights, against the formulas written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dwf.config import PhaseConfig
from dwf.defenses import Phase
from dwf.training.muon import orthogonalized
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
        (
            {"schedule": "one-cycle"},
            {0: 1 / 25, 0.15: 0.52, 0.3: 1, 0.65: 0.5 + 0.5 / 250_000, 1: 1 / 250_000},
        ),
        (  # the cosine takes the three quarters after the warm-up
            {"schedule": "cosine", "warm_up": 0.25},
            {0: 0, 0.125: 0.5, 0.25: 1, 0.625: 0.5, 1: 0},
        ),
    ],
)
def test_learning_rates(schedule, expected):
    config = PhaseConfig(**schedule)
    for t, factor in expected.items():
        assert learning_rate_factor(config, t) == pytest.approx(factor, abs=1e-12)


def test_one_cycle_is_that_of_torch():
    """Torch's first step is at 0 and its last at T - 1; its rates at the same shares are ours."""
    (weight,) = parameters = [nn.Parameter(torch.zeros(1))]
    sgd = torch.optim.SGD(parameters, lr=1.0)
    num_steps = 1001
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        sgd, max_lr=1.0, total_steps=num_steps, pct_start=0.3, cycle_momentum=False
    )
    config = PhaseConfig(schedule="one-cycle")
    for step in range(num_steps):
        assert learning_rate_factor(config, step / (num_steps - 1)) == pytest.approx(
            theirs.get_last_lr()[0], abs=4e-3
        )
        weight.grad = torch.zeros(1)
        sgd.step()
        if step < num_steps - 1:
            theirs.step()


class TestSettings:
    def test_decay_spares_vectors(self):
        """Without a gradient only decay moves a weight: by 1 - lr d, and only matrices."""
        module = Gated()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        schedule = replace(SCHEDULE, decay_vectors=False, momentum=0.0)
        optimizer = Optimizer(phase(module, schedule=schedule), T)
        optimizer.set_step(0)
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in module.named_parameters():
            factor = 1 - 0.1 * 0.05 if name == "expert" else 1.0
            torch.testing.assert_close(p.detach(), factor * before[name])

    @pytest.mark.parametrize(("limit", "factor"), [(1.0, 0.2), (10.0, 1.0)])
    def test_long_gradients_are_shortened(self, limit, factor):
        """Gradients (3, 0) and 4 have length 5 together."""
        module = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(1)})
        schedule = replace(SCHEDULE, max_gradient=limit, momentum=0.0, weight_decay=0.0)
        optimizer = Optimizer(phase(module, None, schedule), T)
        optimizer.set_step(0)
        module["a"].grad, module["b"].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
        optimizer.step()
        torch.testing.assert_close(module["a"].detach(), torch.tensor([-0.3 * factor, 0.0]))
        torch.testing.assert_close(module["b"].detach(), torch.tensor([-0.4 * factor]))

    def test_rates_by_the_beginning_of_names(self):
        module = nn.ParameterDict({"experts": torch.zeros(1), "other": torch.zeros(1)})
        schedule = replace(SCHEDULE, momentum=0.0, weight_decay=0.0)
        faster = replace(phase(module, None, schedule), rates={"experts": 9.0})
        optimizer = Optimizer(faster, T)
        assert optimizer.set_step(0) == 0.1
        for p in module.values():
            p.grad = torch.ones(1)
        optimizer.step()
        assert module["experts"].item() == pytest.approx(-0.9)
        assert module["other"].item() == pytest.approx(-0.1)


class TestMuon:
    def test_orthogonalized(self):
        """All singular values near 1, the vectors those of the matrix."""
        matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        for wide in (matrix, matrix.T):
            found = orthogonalized(wide)
            values = torch.linalg.svdvals(found)
            assert values.min() > 0.6
            assert values.max() < 1.3
            u, _, v = torch.linalg.svd(wide, full_matrices=False)
            assert (u.T @ found @ v.T).diagonal().min() > 0.6

    def test_first_step_of_a_matrix_and_a_vector(self):
        """A matrix of rank 1, G = 2 a b^T: its direction is about a b^T, times .2 sqrt(3); a
        vector takes Adam's first step, the sign."""
        a, b = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 2.0, 2.0]) / 3
        module = nn.ParameterDict({"m": torch.ones(2, 3), "v": torch.ones(2)})
        schedule = replace(SCHEDULE, optimizer="muon", learning_rate=0.1, weight_decay=0.5)
        optimizer = Optimizer(phase(module, None, schedule), T)
        optimizer.set_step(0)
        module["m"].grad, module["v"].grad = 2 * torch.outer(a, b), torch.tensor([5.0, -0.1])
        optimizer.step()
        moved = (0.95 - module["m"].detach()) / (0.1 * 0.2 * math.sqrt(3))
        scale = float(a @ moved @ b)
        assert 0.6 < scale < 1.3
        torch.testing.assert_close(moved, scale * torch.outer(a, b), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(module["v"].detach(), torch.tensor([0.85, 1.05]))
