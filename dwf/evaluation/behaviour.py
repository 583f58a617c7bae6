"""Look at a model where attacks walk: are its answers and its gradients what they claim to be?

:func:`behaviour` takes a few images, walks a short PGD on them, and measures at clean and at
attacked images. It only measures; ``behaviour_findings`` say which measurements are reasons to
doubt. Every pass is by the model itself and by autograd, never by a plan.

The cost is counted by `NUM_FORWARDS` and `NUM_BACKWARDS`, passes for each image looked at.

Sources: Carlini et al., arXiv:1902.06705; Pintor et al., arXiv:2106.09947 (gradients that do not
follow the output); Croce et al., arXiv:2202.13711 (optimization inside forward); first-order
stationarity from Wang et al., arXiv:2112.08304.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.losses import Model, margin
from dwf.attacks.norms import ascent, project, uniform_in_ball
from dwf.attacks.setup import AttackBatch
from dwf.attacks.source import float32_verdicts, judge
from dwf.attacks.surrogate import on_eight_bits
from dwf.evaluation.inner_gradients import num_inner_gradients
from dwf.evaluation.measures import answer_change, answer_scale, parts
from dwf.evaluation.statements import unlike_its_statements
from dwf.models.experts import ExpertModel

# Images looked at, and those of them that are asked one by one.
NUM_IMAGES, NUM_ALONE = 64, 8
NUM_STEPS, STEP = 20, 0.2  # of the walk; a share of epsilon
LATE = (0, 5, NUM_STEPS)  # states of the walk at which the gradient is compared
# Steps along the gradient's sign, in pixels: the better of the two agrees with an honest gradient.
DERIVATIVE_STEPS = (2e-3, 2e-4)
JUMP = 1e-4  # how far images are moved to see jumps, in pixels
# How far beside the 8-bit grid images are compared with those on it, in levels. Whole levels would
# count how much of the ball rounding takes away: a tenth of a radius of 8/255.
BESIDE = 0.25
JUMPS_ABOVE = 0.02  # of the spread of answers
RAISE_STEPS, RAISE_STEP = 10, 0.05  # toward a larger margin, as a share of epsilon
NUM_BACKWARDS = NUM_STEPS + 1 + RAISE_STEPS + 1
NUM_FORWARDS = NUM_BACKWARDS + 2 * len(DERIVATIVE_STEPS) * len(LATE) + 16


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What a model showed where attacks walk. Masks are [N] bool on the CPU.

    Attributes:
        sample_index: [N], places of the images looked at.
        random: passes differ from one to the next, so nothing else was measured.
        derivative: [N], what moving along the gradient changes the margin by, as a share of what
            the gradient predicts, at the state of the walk where it is worst: 1 for a gradient that
            is the derivative. NaN where the gradient is zero.
        differs: how much answers change in another circumstance, by its name; the largest change
            of an answer as a share of the spread of all answers (`answer_change`).
        jumps: images whose answer jumps within 1e-4 of the clean or of the attacked image.
        rounding: attacked images that are judged otherwise on the 8-bit grid than beside it.
        stands_rounded, stands_float: whether each attacked image stands there, on and beside it.
        raised: images that fell while the margin was raised.
        inner_gradients: calls of autograd inside one forward pass.
        stationarity: [N], how far the end of the walk is from a point where no step helps, as a
            share of what the gradient would allow; of images that stand there, else NaN.
        unlike: images, clean or attacked, at which a mixture's answer is not what its gate and its
            experts say.
        one_pass: accuracy of single passes on clean and attacked images; None if deterministic.
        preferred: [N, 4], the expert with the largest weight of a mixture's gate, on the clean and
            on the attacked image, each by its own weights and by its soft ones.
    """

    sample_index: Tensor
    random: bool
    derivative: Tensor
    differs: dict[str, float] = field(default_factory=dict)
    jumps: Tensor | None = None
    rounding: Tensor | None = None
    stands_rounded: Tensor | None = None
    stands_float: Tensor | None = None
    raised: Tensor | None = None
    inner_gradients: int = 0
    stationarity: Tensor | None = None
    unlike: Tensor | None = None
    one_pass: tuple[float, float] | None = None
    preferred: Tensor | None = None


def untouched_copy(model: Model) -> Model | None:
    """A deep copy of a module; None of what cannot be copied, or is no module."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever the parts of a model raise when they are copied
        return None


def _beside(rounded: Tensor, attacked: Tensor) -> Tensor:
    """The attacked images, moved to within a quarter of a level of what they are rounded to."""
    far = BESIDE / 255
    return rounded + (attacked - rounded).clamp(-far, far)


def behaviour(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    untouched: Model | None = None,
    gradient_of: Model | None = None,
    num_votes: int = 1,
    seed: int = 0,
    sample_index: Tensor,
) -> Behaviour:
    """Walk and measure on images [N, C, H, W] that the model gets right; N is small.

    Args:
        untouched: a copy of the model from before its first pass, see `untouched_copy`.
        gradient_of: what attacks differentiate in the model's place; see `honest_gradient`.
        num_votes: passes that judge a random model.

    The model and all random states are as before.
    """
    device = images.device
    with undisturbed(model, device, seed=seed), float32_verdicts(device), torch.no_grad():
        look = _Look(model, images, labels, epsilon, norm, seed, sample_index)
        return look.measured(untouched, gradient_of, num_votes)


@dataclass(frozen=True, eq=False)
class _Look:
    model: Model
    images: Tensor
    labels: Tensor
    epsilon: float
    norm: str
    seed: int
    sample_index: Tensor

    def measured(
        self, untouched: Model | None, gradient_of: Model | None, num_votes: int
    ) -> Behaviour:
        n = len(self.images)
        index, nothing = self.sample_index.cpu(), torch.full((n,), torch.nan)
        if n == 0:
            return Behaviour(index, False, nothing)
        clean, again = self._asked(self.images), self._asked(self.images)
        scale = answer_scale(clean)
        states, gradients = self._walk(self.model)
        attacked = states[-1]
        if float(answer_change(clean, again, scale).max()) > 1e-3:
            one_pass = self._one_pass(attacked) if num_votes > 1 else None
            return Behaviour(index, True, nothing, one_pass=one_pass)
        hard = self._asked(attacked)
        its_verdict = judge(hard, self.labels)[0]
        derivative = self._derivative(self.model, states, gradients)
        stationarity = self._stationarity(gradients[-1], attacked, its_verdict)
        if gradient_of is not None:  # the better of what attacks may follow
            walked, along = self._walk(gradient_of)
            other = self._derivative(gradient_of, walked, along)
            derivative = torch.where((other - 1).abs() < (derivative - 1).abs(), other, derivative)
            # what falls on the way through a view is no attack that ended
            stands = its_verdict & judge(self._asked(walked[-1]), self.labels)[0]
            other = self._stationarity(along[-1], walked[-1], stands)
            stationarity = torch.minimum(stationarity, other)
        rounded = on_eight_bits(attacked, self._batch(), self.norm)
        of_rounded = judge(self._asked(rounded), self.labels)[0]
        of_near = judge(self._asked(_beside(rounded, attacked)), self.labels)[0]
        unlike = preferred = None
        if isinstance(self.model, ExpertModel):
            preferred = self._preferred(self.model, attacked).cpu()
            unlike = unlike_its_statements(self.model, self.images, clean, scale)
            unlike |= unlike_its_statements(self.model, attacked, hard, scale)
        return Behaviour(
            index,
            False,
            derivative.cpu(),
            differs=self._circumstances(attacked, clean, hard, scale, untouched),
            jumps=self._jumps(attacked, clean, hard, scale).cpu(),
            rounding=(of_near != of_rounded).cpu(),
            stands_rounded=of_rounded.cpu(),
            stands_float=of_near.cpu(),
            raised=self._raised(gradient_of or self.model).cpu(),
            inner_gradients=num_inner_gradients(lambda: ask(self.model, self.images[:1])),
            stationarity=stationarity.cpu(),
            unlike=None if unlike is None else unlike.cpu(),
            preferred=preferred,
        )

    def _batch(self) -> AttackBatch:
        radius = torch.full_like(self.labels, self.epsilon, dtype=torch.float32)
        return AttackBatch(self.images, self.labels, self.sample_index, radius, 0.0, 1.0)

    def _asked(self, images: Tensor, model: Model | None = None) -> Tensor:
        logits: Tensor = ask(model or self.model, images)
        return logits.float()

    def _gradient(self, model: Model, x: Tensor) -> Tensor:
        """Of the margin at x; zero where the model has none."""
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            loss = margin(ask(model, leaf), self.labels)
            if not loss.requires_grad:
                return torch.zeros_like(x)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
        found = torch.zeros_like(x) if gradient is None else gradient
        return found.detach().float().nan_to_num(0.0)

    def _moved(self, x: Tensor, direction: Tensor) -> Tensor:
        return project(x + direction, self.images, self._batch().epsilon, self.norm, 0.0, 1.0)

    def _walk(self, model: Model) -> tuple[list[Tensor], list[Tensor]]:
        """States of a PGD on the margin at `LATE`, and the gradient at each."""
        noise = uniform_in_ball(
            self.seed, self.sample_index, self.images.shape[1:], self.norm, stream=7
        )
        x = (self.images + self.epsilon * noise).clamp(0, 1)
        states, gradients = [], []
        for step in range(NUM_STEPS + 1):
            gradient = self._gradient(model, x)
            if step in LATE:
                states.append(x)
                gradients.append(gradient)
            if step < NUM_STEPS:
                x = self._moved(x, STEP * self.epsilon * ascent(gradient, self.norm))
        return states, gradients

    def _derivative(self, model: Model, states: list[Tensor], gradients: list[Tensor]) -> Tensor:
        """[N]: measured change of the margin over the predicted one, at the worst state."""
        worst = torch.full((len(self.images),), torch.nan, device=self.images.device)
        for x, gradient in zip(states, gradients, strict=True):
            best = torch.full_like(worst, torch.nan)
            direction = gradient.sign()
            slope = gradient.abs().flatten(1).sum(dim=1, dtype=torch.float64)
            for h in DERIVATIVE_STEPS:
                ahead = self._asked(x + h * direction, model)
                behind = self._asked(x - h * direction, model)
                above, below = margin(ahead, self.labels), margin(behind, self.labels)
                predicted = 2 * h * slope
                share = ((above - below).double() / predicted).float().clamp(-1, 3)
                # less than the rounding of the logits is nothing to be compared
                noise = 1e-4 * torch.maximum(ahead.abs().amax(dim=1), behind.abs().amax(dim=1))
                share = share.masked_fill((predicted <= noise) | share.isnan(), torch.nan)
                better = best.isnan() | ((share - 1).abs() < (best - 1).abs())
                best = torch.where(better, share, best)
            worse = worst.isnan() | ((best - 1).abs() > (worst - 1).abs())
            worst = torch.where(worse, best, worst)
        return worst

    def _circumstances(
        self,
        attacked: Tensor,
        clean: Tensor,
        hard: Tensor,
        scale: float,
        untouched: Model | None,
    ) -> dict[str, float]:
        """How much the answers of clean and attacked images change, by circumstance."""

        def change(answer: Callable[[Tensor], Tensor], count: int | None = None) -> float:
            pairs = ((self.images[:count], clean[:count]), (attacked[:count], hard[:count]))
            return max(float(answer_change(old, answer(x), scale).max()) for x, old in pairs)

        def alone(x: Tensor) -> Tensor:
            return torch.cat([self._asked(part) for part in parts(x, 1)])

        def recorded(x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self._asked(x.detach().clone().requires_grad_()).detach()

        def allowed(x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self._asked(x.detach()).detach()

        found = {
            "alone": change(alone, NUM_ALONE),
            "with a gradient recorded": change(recorded),
            "with gradients allowed": change(allowed),
        }
        if untouched is not None:
            with undisturbed(untouched, self.images.device, seed=self.seed):
                found["by a copy from before the first pass"] = change(
                    lambda x: self._asked(x, untouched)
                )
        return found

    def _jumps(self, attacked: Tensor, clean: Tensor, hard: Tensor, scale: float) -> Tensor:
        """[N] bool: the answer moves by more than `JUMPS_ABOVE` of the spread within 1e-4."""
        jumps = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)
        shape = self.images.shape[1:]
        noise = uniform_in_ball(self.seed, self.sample_index, shape, "linf", stream=8).sign()
        for x, old in ((self.images, clean), (attacked, hard)):
            near = self._asked((x + JUMP * noise).clamp(0, 1))
            jumps |= answer_change(old, near, scale) > JUMPS_ABOVE
        return jumps

    def _raised(self, along: Model) -> Tensor:
        """[N] bool: images that the model gets wrong after steps toward a larger margin."""
        x = self.images
        for _ in range(RAISE_STEPS):
            gradient = self._gradient(along, x)
            x = self._moved(x, -RAISE_STEP * self.epsilon * ascent(gradient, self.norm))
        return ~judge(self._asked(x), self.labels)[0]

    def _stationarity(self, gradient: Tensor, x: Tensor, stands: Tensor) -> Tensor:
        """[N]: what the gradient at x says is left to gain in the ball, as a share of all it could.

        0 at a point from which no step inside ball and box helps to first order, 1 at its opposite.
        """
        if self.norm == "linf":
            low = (self.images - self.epsilon).clamp(min=0)
            high = (self.images + self.epsilon).clamp(max=1)
            left = torch.where(gradient > 0, high - x, low - x) * gradient
            whole = (high - low) * gradient.abs()
            share = left.flatten(1).sum(dim=1) / whole.flatten(1).sum(dim=1)
        else:
            size = gradient.flatten(1).norm(dim=1)
            along = ((x - self.images) * gradient).flatten(1).sum(dim=1)
            share = (self.epsilon * size - along) / (2 * self.epsilon * size)
        return share.masked_fill(~stands, torch.nan)

    def _preferred(self, mixture: ExpertModel, attacked: Tensor) -> Tensor:
        """[N, 4]: the gate's first choice on clean and on attacked images, by either weights."""
        gates = mixture.gate_weights, mixture.soft_gate_weights
        choices = [gate(x).argmax(dim=1) for x in (self.images, attacked) for gate in gates]
        return torch.stack(choices, dim=1)

    def _one_pass(self, attacked: Tensor) -> tuple[float, float]:
        """Accuracy of single passes, on clean and on attacked images."""

        def accuracy(x: Tensor) -> float:
            passes = [judge(self._asked(x), self.labels)[0].double().mean() for _ in range(5)]
            return float(torch.stack(passes).mean())

        return accuracy(self.images), accuracy(attacked)
