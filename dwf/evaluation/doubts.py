"""Measurements that cost little and show whether a robustness number can be believed.

:func:`contracts` looks at a model before any attack. :func:`doubts` asks, after a suite of attacks,
whether something that should be weaker finds what the suite did not: random noise, a single step,
images made on another model, views of a mixture. Both only measure; their ``findings`` say which
measurements are reasons to doubt. A thousand images are enough for either.

Source: the checklist of Carlini et al., arXiv:1902.06705.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwf.attacks.losses import Loss, Model, cross_entropy, margin
from dwf.attacks.pgd import input_gradient, pgd
from dwf.attacks.random_noise import random_noise
from dwf.attacks.source import undisturbed, voted
from dwf.attacks.target import AttackTarget, attack_target
from dwf.checks import check_count, check_images, check_labels, check_logits
from dwf.evaluation import verdict
from dwf.evaluation.verdict import Finding, seen
from dwf.models.experts import ExpertModel
from dwf.models.views import View

LOSSES: tuple[Loss, ...] = (cross_entropy, margin)
BATCH_SIZE = 500
NUM_STEPS, NUM_DRAWS = 20, 200
# Step size as a share of epsilon: 20 steps can then cross the ball twice.
STEP = 0.2
# Weights that move less than this from image to image are those of a gate that does not choose.
GATE_MOVES = 1e-6


@dataclass(frozen=True, eq=False)
class Contracts:
    """What a model showed before any attack. Masks are [N] on the CPU.

    Attributes:
        finite: images whose logits are finite.
        probabilities: all rows are probabilities, not logits.
        difference, in_company: of two passes, of two batches around an image, see
            `verdict.logit_difference`.
        changed_buffers, training_modules: names of buffers that a pass in eval mode changes, and of
            modules that stay in train mode after ``eval()``.
        bad_weights: names of parameters and buffers that hold NaN or infinity.
        gate_finite, gate_blind: images whose gate weights are finite; have a gradient of exactly
            zero although the weights differ from image to image. None without a gate, as are
            mean_weights and max_weights [E].
    """

    sample_index: Tensor
    labels: Tensor
    logits: Tensor  # [N, K] float32
    finite: Tensor
    probabilities: bool
    difference: float
    in_company: float
    changed_buffers: list[str]
    training_modules: list[str]
    bad_weights: list[str]
    max_pixel: float
    gate_finite: Tensor | None = None
    gate_blind: Tensor | None = None
    mean_weights: list[float] | None = None
    max_weights: list[float] | None = None

    def findings(
        self,
        *,
        declared_random: bool = False,
        eot_samples: int = 1,
        num_votes: int = 1,
        allow_probabilities: bool = False,
        views: bool = False,
    ) -> list[Finding]:
        """Those that hold; ``views``: the evaluation attacks views of the mixture as well."""
        found = verdict.held(
            verdict.non_finite_weights(self.bad_weights),
            verdict.non_finite(seen(~self.finite, self.sample_index)),
            verdict.not_logits(self.probabilities, declared=allow_probabilities),
            verdict.random_output(
                self.difference,
                declared=declared_random,
                eot_samples=eot_samples,
                num_votes=num_votes,
                training=self.training_modules,
            ),
            verdict.batch_dependent(self.difference, self.in_company),
            verdict.state_changed(self.changed_buffers),
            verdict.constant_output(self.logits.argmax(dim=1), self.labels),
            verdict.input_scale(self.max_pixel),
        )
        if self.gate_finite is not None:
            assert self.gate_blind is not None
            bad_gate, blind = ~self.gate_finite, seen(self.gate_blind, self.sample_index)
            found += verdict.held(
                verdict.non_finite(seen(bad_gate, self.sample_index), what="gate_weights"),
                verdict.dead_gate(self.mean_weights or [], self.max_weights or []),
                verdict.blind_gate(blind, views=views),
            )
        return found


def contracts(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    sample_index: Tensor | None = None,
) -> Contracts:
    """Three passes over clean images and one gradient of the gate, if there is one.

    The model, its buffers and all random states are as before.

    Raises:
        PixelRangeError, LabelError, ModelOutputError, ...: as :func:`dwf.attacks.pgd`, except that
            probabilities are measured, not refused.
    """
    check_images(images)
    labels = check_labels(labels, len(images))
    check_count(batch_size, "batch_size")
    module = model if isinstance(model, nn.Module) else None
    device = images.device
    with undisturbed(model, device, seed=seed), verdict.float32_verdicts(device), torch.no_grad():
        before = {name: buffer.clone() for name, buffer in module.named_buffers()} if module else {}
        order = torch.arange(len(images), device=device)
        logits = _logits(model, images, order, batch_size)
        again = _logits(model, images, order, batch_size)
        # other neighbors, and another number of them
        company = _logits(model, images, order.flip(0), max(1, min(batch_size, len(images)) // 2))
        after = dict(module.named_buffers()) if module else {}
        check_labels(labels, len(images), logits.shape[1])
        gate = _gate(model, images, batch_size) if isinstance(model, ExpertModel) else {}
        return Contracts(
            _index(sample_index, images).cpu(),
            labels.cpu(),
            logits.cpu(),
            logits.isfinite().all(dim=1).cpu(),
            verdict.are_probabilities(logits),
            verdict.logit_difference(logits, again),
            verdict.logit_difference(logits, company),
            [name for name, old in before.items() if not _same_bits(old, after.get(name))],
            [name for name, m in module.named_modules() if m.training] if module else [],
            [name for name, x in module.state_dict().items() if _is_bad(x)] if module else [],
            float(images.max()) if images.numel() else 1.0,
            **gate,
        )


def _logits(model: Model, images: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """Logits [N, K] float32 of all images, passed in this order in batches of this size."""
    rows: list[Tensor] = []
    for part in _parts(order, batch_size):
        output = check_logits(model(images[part].float()), len(part), allow_probabilities=True)
        rows.append(output.float())
    logits = torch.cat(rows) if rows else check_logits(model(images.float()), 0)
    return torch.empty_like(logits).index_copy_(0, order, logits)


def _gate(model: ExpertModel, images: Tensor, batch_size: int) -> dict[str, Any]:
    weights, moved = [], []
    for part in _parts(images.float(), batch_size):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            w = model.gate_weights(leaf)
            # any direction but the sum, which is 1
            total = (w * torch.linspace(1, 2, w.shape[1], device=w.device)).sum()
            gradient = None
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        weights.append(w.detach().double().cpu())
        moved.append(torch.zeros(len(part)) if gradient is None else _largest(gradient).cpu())
    all_weights = torch.cat(weights) if weights else torch.zeros(0, model.num_experts)
    finite = all_weights.isfinite().all(dim=1)
    if not bool(finite.any()):
        return {"gate_finite": finite, "gate_blind": torch.zeros_like(finite)}
    sound = all_weights[finite]
    chooses = bool((sound.amax(dim=0) - sound.amin(dim=0)).max() > GATE_MOVES)
    return {
        "gate_finite": finite,
        "gate_blind": (torch.cat(moved) == 0) & finite & chooses,
        "mean_weights": sound.mean(dim=0).tolist(),
        "max_weights": sound.amax(dim=0).tolist(),
    }


@dataclass(frozen=True, eq=False)
class Doubts:
    """What cheap attacks found after a suite. Masks are [N] on the CPU.

    Attributes:
        zero_cross_entropy, zero_margin: images at which that loss has a gradient of exactly zero.
        epsilons, accuracy: one PGD at half of epsilon, epsilon, twice epsilon and the distance
            of black to white, as far as these are no larger, and what it leaves of all images.
        stands_unbounded: images that it leaves at the last of these.
        pgd, noise, single_step: images broken by it within epsilon, by random draws, by one step,
            and not by the suite.
        transfer, views: for each source the images broken only by what was made on it.
    """

    sample_index: Tensor
    num_classes: int
    zero_cross_entropy: Tensor
    zero_margin: Tensor
    epsilons: list[float]
    accuracy: list[float]
    stands_unbounded: Tensor
    pgd: Tensor
    noise: Tensor
    single_step: Tensor
    transfer: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """Those that hold."""
        index = self.sample_index
        both = self.zero_cross_entropy & self.zero_margin
        alone = self.zero_cross_entropy & ~self.zero_margin
        found = verdict.held(
            verdict.zero_gradient(seen(both, index)),
            verdict.vanishing_gradient(seen(alone, index)),
            verdict.unbounded(seen(self.stands_unbounded, index), self.num_classes),
            verdict.epsilon_helps(self.epsilons, self.accuracy),
            verdict.pgd_wins(seen(self.pgd, index)),
            verdict.noise_wins(seen(self.noise, index)),
            verdict.single_step_wins(seen(self.single_step, index)),
        )
        if self.transfer:
            only, source = _union(self.transfer)
            found += verdict.held(verdict.transfer_wins(seen(only, index), source=source))
        if self.views:
            only, view = _union(self.views)
            found += verdict.held(verdict.view_wins(seen(only, index), view=view))
        return found


def doubts(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    correct: Tensor,
    epsilon: float,
    norm: str = "linf",
    sources: Mapping[str, Model] | None = None,
    views: Sequence[View] = (),
    num_steps: int = NUM_STEPS,
    num_draws: int = NUM_DRAWS,
    eot_samples: int = 1,
    num_votes: int = 1,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
) -> Doubts:
    """Try what should be weaker than a suite on the images that the suite left.

    Args:
        correct: [N] bool, what the suite left.
        sources: other models that images are made on, such as an undefended twin.
        views: of a mixture, if the suite did not attack them.
        num_votes: passes whose mean logits judge a random model.
    """
    labels = check_labels(labels, len(images))
    trial = _Trial(
        model, images, labels, _index(sample_index, images), norm, num_steps, eot_samples,
        num_votes, batch_size, seed, allow_probabilities,
    )  # fmt: skip
    with trial.going() as num_classes:
        every = torch.ones(len(images), dtype=torch.bool, device=images.device)
        clean = trial.stands(lambda x, y, index: x, every)
        left = correct.to(images.device) & clean
        zero_cross_entropy, zero_margin = (trial.zero_gradient(loss).cpu() for loss in LOSSES)
        # where any image may become any other: from black to white
        whole = 1.0 if norm == "linf" else math.sqrt(images[0].numel()) if len(images) else epsilon
        radii = sorted({min(r, whole) for r in (epsilon / 2, epsilon, 2 * epsilon, whole)})
        standing = [trial.stands_pgd(model, radius, clean) for radius in radii]
        within = [mask for radius, mask in zip(radii, standing, strict=True) if radius <= epsilon]
        again = left & ~torch.stack(within).all(dim=0)
        noise = left & ~trial.stands_noise(epsilon, num_draws, left)
        step = left & ~trial.stands_single_step(epsilon, left)
        elsewhere = {
            name: left & ~trial.stands_pgd(source, epsilon, left)
            for name, source in (sources or {}).items()
        }
        seen_from = {view.name: left & ~trial.stands_view(view, epsilon, left) for view in views}
        return Doubts(
            trial.sample_index.cpu(),
            num_classes,
            zero_cross_entropy,
            zero_margin,
            radii,
            [float(mask.double().mean()) if len(mask) else 0.0 for mask in standing],
            standing[-1].cpu(),
            again.cpu(),
            noise.cpu(),
            step.cpu(),
            {name: mask.cpu() for name, mask in elsewhere.items()},
            {name: mask.cpu() for name, mask in seen_from.items()},
        )


def transfer(
    model: Model,
    source: Model,
    images: Tensor,
    labels: Tensor,
    *,
    correct: Tensor,
    epsilon: float,
    norm: str = "linf",
    num_steps: int = NUM_STEPS,
    num_votes: int = 1,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
) -> Tensor:
    """[N] bool: images in ``correct`` that PGD on ``source`` turns into failures of ``model``."""
    labels = check_labels(labels, len(images))
    trial = _Trial(
        model, images, labels, _index(sample_index, images), norm, num_steps, 1,
        num_votes, batch_size, seed, allow_probabilities,
    )  # fmt: skip
    with trial.going():
        left = correct.to(images.device)
        return left & ~trial.stands_pgd(source, epsilon, left)


Attack = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, labels, index to adversarial


@dataclass(frozen=True, eq=False)
class _Trial:
    """A model and the images on which it is doubted."""

    model: Model
    images: Tensor
    labels: Tensor
    sample_index: Tensor
    norm: str
    num_steps: int
    eot_samples: int
    num_votes: int
    batch_size: int
    seed: int
    allow_probabilities: bool

    @contextlib.contextmanager
    def going(self) -> Iterator[int]:
        """The state that judging needs; gives the number of classes."""
        check_images(self.images)
        for value, name in ((self.batch_size, "batch_size"), (self.num_votes, "num_votes")):
            check_count(value, name)
        device = self.images.device
        with (
            # not the attacks' own draws: those have been attacked
            undisturbed(self.model, device, seed=self.seed + 1),
            verdict.float32_verdicts(device),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            # a finding of its own
            warnings.filterwarnings("ignore", message="the model's output does not depend")
            logits = self.model(self.images[:1].float())
            check_logits(logits, min(len(self.images), 1), allow_probabilities=True)
            check_labels(self.labels, len(self.labels), logits.shape[1])
            yield logits.shape[1]

    def stands(self, attack: Attack, among: Tensor) -> Tensor:
        """[N] bool: the images of ``among`` that the model still gets right."""
        standing = torch.zeros_like(among)
        for part in _parts(torch.nonzero(among)[:, 0], self.batch_size):
            adversarial = attack(self.images[part], self.labels[part], self.sample_index[part])
            logits = voted(self.model, adversarial, self.num_votes)
            standing[part] = verdict.judge(logits, self.labels[part])[0]
        return standing

    def stands_pgd(self, source: Model, epsilon: float, among: Tensor) -> Tensor:
        """After PGD on ``source`` by each loss, the later ones on what is left."""
        return self._stands_each_loss(lambda images: source, epsilon, among)

    def stands_view(self, view: View, epsilon: float, among: Tensor) -> Tensor:
        return self._stands_each_loss(view.make, epsilon, among)

    def _stands_each_loss(
        self, make: Callable[[Tensor], Model], epsilon: float, among: Tensor
    ) -> Tensor:
        for loss in LOSSES:

            def attack(x: Tensor, y: Tensor, index: Tensor, loss: Loss = loss) -> Tensor:
                return self._pgd(make(x), x, y, index, epsilon, loss, STEP * epsilon, True)

            among = self.stands(attack, among)
        return among

    def stands_single_step(self, epsilon: float, among: Tensor) -> Tensor:
        for loss in LOSSES:

            def attack(x: Tensor, y: Tensor, index: Tensor, loss: Loss = loss) -> Tensor:
                return self._pgd(self.model, x, y, index, epsilon, loss, epsilon, False)

            among = self.stands(attack, among)
        return among

    def stands_noise(self, epsilon: float, num_draws: int, among: Tensor) -> Tensor:
        def attack(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
            return random_noise(
                self.model,
                x,
                y,
                epsilon=epsilon,
                norm=self.norm,
                num_draws=num_draws,
                eot_samples=self.num_votes,
                seed=self.seed,
                sample_index=index,
                allow_probabilities=self.allow_probabilities,
            )

        return self.stands(attack, among)

    def zero_gradient(self, loss: Loss) -> Tensor:
        """[N] bool; by the model itself, since a plan may round."""
        exact = AttackTarget(self.model, reason="its gradient is looked at")
        masks = []
        places = torch.arange(len(self.images), device=self.images.device)
        for part in _parts(places, self.batch_size):
            gradient = input_gradient(
                exact,
                self.images[part],
                self.labels[part],
                loss=loss,
                seed=self.seed,
                allow_probabilities=self.allow_probabilities,
            )
            masks.append(_largest(gradient) == 0)
        return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)

    def _pgd(
        self,
        source: Model,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        epsilon: float,
        loss: Loss,
        step_size: float,
        iterate: bool,
    ) -> Tensor:
        return pgd(
            attack_target(source, images),
            images,
            labels,
            epsilon=epsilon,
            step_size=step_size,
            num_steps=self.num_steps if iterate else 1,
            random_start=iterate,
            norm=self.norm,
            eot_samples=self.eot_samples,
            loss=loss,
            seed=self.seed,
            sample_index=index,
            allow_probabilities=self.allow_probabilities,
        )


def _union(masks: Mapping[str, Tensor]) -> tuple[Tensor, str]:
    """Images of any mask, and the name of the mask that has most."""
    best = max(masks, key=lambda name: int(masks[name].sum()))
    return torch.stack(list(masks.values())).any(dim=0), best


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _index(sample_index: Tensor | None, images: Tensor) -> Tensor:
    if sample_index is None:
        return torch.arange(len(images), device=images.device)
    return sample_index.to(images.device)


def _largest(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).abs().amax(dim=1)


def _same_bits(old: Tensor, new: Tensor | None) -> bool:
    if new is None or old.shape != new.shape or old.dtype != new.dtype:
        return False
    return torch.equal(_bytes(old), _bytes(new))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
