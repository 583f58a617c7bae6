"""Auto-PGD: against a slow loop from the paper, against other code, and within its budget."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    NUM_CLASSES,
    SHAPE,
    Curved,
    FailsAt,
    Injected,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    disordered,
    everything,
    make_images,
    make_labels,
)
from torch import nn

import moe_kernels
from dwf.attacks import AttackReport, apgd, cross_entropy, dlr, margin, pgd
from dwf.attacks.apgd import STREAMS, windows
from dwf.attacks.autograd import Autograd
from dwf.checks import ConfigError, LabelError, ModelOutputError

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = make_images(12)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
LOSSES = pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
RADIUS = {"linf": 0.02, "l2": 0.25}


def network():
    return Curved().eval()


def right_labels(model, images=IMAGES):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def is_wrong(model, images, labels):
    with torch.no_grad():
        return model(images).argmax(dim=1) != labels


def slow_loss(z, y, name, target):
    """Of one image's logits [K], as the papers define them."""
    ordered = sorted(z, reverse=True)
    if name == "ce":
        return F.cross_entropy(z[None], torch.tensor([y]))
    if name == "dlr":
        other = max(z[i] for i in range(len(z)) if i != y)
        return -(z[y] - other) / (ordered[0] - ordered[2])
    return -(z[y] - z[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


def slow_apgd(model, image, y, epsilon, norm, loss, num_steps, start, target):
    """Algorithm 1 for one image; its steps of 100 are checkpoints 22, 41, 57, 70, 80, 87, 93, 99.

    Returns all iterates, their losses, and the number of times that the step was halved.
    """
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    checkpoints = [math.ceil(round(x * num_steps, 6)) for x in p]

    def project(x):
        if norm == "linf":
            x = torch.max(torch.min(x, image + epsilon), image - epsilon)
        else:
            x = image + (x - image) * min(1.0, epsilon / float((x - image).norm() + 1e-12))
        return x.clamp(0, 1)

    def evaluate(x):
        leaf = x.clone().requires_grad_()
        value = slow_loss(model(leaf[None])[0], y, loss, target)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.sign() if norm == "linf" else gradient / gradient.norm()

    step = 2 * epsilon
    x = previous = start
    value, direction = evaluate(x)
    best = (value, x, direction)
    iterates, values = [x], [value]
    halved_before, best_before, halvings, last = True, value, 0, 0
    for k in range(num_steps):
        a = 1.0 if k == 0 else 0.75
        z = project(x + step * direction)
        x, previous = project(x + a * (z - x) + (1 - a) * (x - previous)), x
        value, direction = evaluate(x)
        iterates.append(x)
        values.append(value)
        if value > best[0]:
            best = (value, x, direction)
        if k + 1 in checkpoints:
            rises = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            few = rises <= 0.75 * (k + 1 - last)
            stuck = not halved_before and best[0] == best_before
            halved_before, best_before, last = few or stuck, best[0], k + 1
            if few or stuck:
                step, halvings = step / 2, halvings + 1
                _, x, direction = best
    return iterates, values, halvings


def start_of(norm, loss, num_images, run=0, seed=0):
    stream = STREAMS[loss] + run
    noise = moe_kernels.uniform_noise(seed, torch.arange(num_images), SHAPE, restart=stream)
    if norm == "linf":
        t = 2 * noise - 1
        size = t.abs().amax(dim=(1, 2, 3), keepdim=True)
    else:
        t = math.sqrt(2) * torch.erfinv((2 * noise - 1).clamp(-1 + 2e-7, 1 - 2e-7))
        size = t.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return t / size


class TestAlgorithm:
    def test_checkpoints_of_the_paper(self):
        """p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06)."""
        ends = torch.tensor(windows(100)).cumsum(dim=0).tolist()
        assert ends == [22, 41, 57, 70, 80, 87, 93, 99]
        assert windows(1) == [1]
        assert windows(20) == [4, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
        for n in range(1, 120):
            assert n - min(windows(n)) < sum(windows(n)) <= n

    @NORMS
    @LOSSES
    def test_by_a_slow_loop(self, norm, loss):
        """The same outcome for each image; where nothing is found, the same best point."""
        model = network()
        labels = right_labels(model)
        epsilon, num_targets = RADIUS[norm] / 2, 2 if loss == "dlr-targeted" else 1
        order = model(IMAGES).argsort(dim=1, descending=True)[:, 1:]
        found = apgd(
            model,
            IMAGES,
            labels,
            epsilon=epsilon,
            norm=norm,
            loss=loss,
            num_target_classes=num_targets if loss == "dlr-targeted" else None,
        )
        outcomes, all_halvings = [], 0
        for b in range(len(IMAGES)):
            iterates, values = [], []
            for run in range(num_targets):
                start = IMAGES + epsilon * start_of(norm, loss, len(IMAGES), run)
                these, its_values, halvings = slow_apgd(
                    model,
                    IMAGES[b],
                    int(labels[b]),
                    epsilon,
                    norm,
                    loss,
                    100,
                    start[b].clamp(0, 1),
                    int(order[b, run]),
                )
                all_halvings += halvings
                iterates += these
                values += its_values
                if is_wrong(model, torch.stack(these), labels[b]).any():
                    break
            wrong = is_wrong(model, torch.stack(iterates), labels[b])
            outcomes.append(bool(wrong.any()))
            if not outcomes[-1]:
                at = max(range(len(values)), key=values.__getitem__)
                # the sign of a vanishing gradient may differ in a batch
                off = (found[b] - iterates[at]).abs() > 1e-4
                assert off.float().mean() < 0.03
                target = int(order[b, at // 101])
                value = slow_loss(model(found[b : b + 1])[0], int(labels[b]), loss, target)
                assert value.item() == pytest.approx(values[at], abs=1e-4)
        assert is_wrong(model, found, labels).tolist() == outcomes
        assert 0 < sum(outcomes) < len(outcomes)
        assert all_halvings > 0

    @NORMS
    def test_optimum_of_a_linear_model(self, norm):
        """Two classes: the loss is one linear form, whose maximum in the ball is known."""
        model = Linear(num_classes=2)
        images = 0.5 + (IMAGES - 0.5) / 4  # room to every side
        labels = right_labels(model, images)
        weight = (model.weight[1] - model.weight[0]).detach()
        direction = weight.sign() if norm == "linf" else weight / weight.norm()
        sign = (1 - 2 * labels).view(-1, 1, 1, 1)
        optimum = images + RADIUS[norm] * 0.2 * sign * direction
        still = ~is_wrong(model, optimum, labels)
        assert still.sum() >= 3
        found = apgd(
            model, images, labels, epsilon=RADIUS[norm] * 0.2, norm=norm, loss="ce", num_steps=30
        )
        gain = model(found) - model(images)
        best = model(optimum) - model(images)
        torch.testing.assert_close(gain[still], best[still], rtol=1e-2, atol=1e-4)
        assert torch.equal(is_wrong(model, found, labels), ~still)


def two_classes(loss):
    return {"num_target_classes": 2} if loss == "dlr-targeted" else {}


class TestLossesAndTargets:
    def test_a_loss_by_name_or_as_a_function(self):
        model, options = network(), {"epsilon": 0.05, "num_steps": 6}
        labels = right_labels(model)
        for name, function in (("ce", cross_entropy), ("dlr", dlr), ("margin", margin)):
            by_name = apgd(model, IMAGES, labels, loss=name, **options)
            assert torch.equal(apgd(model, IMAGES, labels, loss=function, **options), by_name)
        own = apgd(model, IMAGES, labels, loss=lambda z, y: cross_entropy(2 * z, y), **options)
        assert own.shape == IMAGES.shape

    @NORMS
    @LOSSES
    def test_targets_are_reached_and_nothing_else_counts(self, norm, loss):
        model = network()
        labels = right_labels(model)
        targets = (labels + 1) % NUM_CLASSES
        options = {"epsilon": RADIUS[norm], "norm": norm, "loss": loss, "num_steps": 20}
        found = apgd(model, IMAGES, labels, targets=targets, **options)
        answers = model(found).argmax(dim=1)
        assert (answers == targets).sum() > (model(IMAGES).argmax(dim=1) == targets).sum() + 3
        wrong_already = (targets + 1) % NUM_CLASSES  # no label, no target: attacked all the same
        found = apgd(model, IMAGES, wrong_already, targets=targets, **options)
        assert (model(found).argmax(dim=1) == targets).sum() > 3

    def test_nearest_classes_of_another_loss(self):
        """A run toward one class each; any wrong class will do."""
        model = network()
        labels = right_labels(model)
        options = {"epsilon": 0.05, "num_steps": 20}
        found = apgd(model, IMAGES, labels, num_target_classes=NUM_CLASSES - 1, **options)
        assert 0 < is_wrong(model, found, labels).sum()


class TestPromises:
    @NORMS
    @LOSSES
    def test_budget_and_range(self, norm, loss):
        model = network()
        images = make_images(60)
        images[:4], images[4:8] = 0.0, 1.0
        epsilon = torch.linspace(0, 4 * RADIUS[norm], 60)
        for labels in (right_labels(model, images), make_labels(60)):
            options = {"norm": norm, "loss": loss, "num_steps": 7, **two_classes(loss)}
            found = apgd(model, images, labels, epsilon=epsilon, **options)
            difference = (found.double() - images).flatten(1)
            size = torch.linalg.vector_norm(difference, torch.inf if norm == "linf" else 2, dim=1)
            assert (size <= epsilon + 1e-6).all()
            assert 0 <= found.min() <= found.max() <= 1
            assert torch.equal(found[0], images[0])
            assert (size > 0).any()

    @NORMS
    @LOSSES
    @pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7)])
    def test_an_image_does_not_know_the_batch(self, sizes, loss, norm):
        """Some are found early and leave, some late, some never; all to equal bits."""
        model = Linear()
        labels = right_labels(model)
        labels[3] += 1
        labels %= NUM_CLASSES
        options = {"loss": loss, "norm": norm, "num_steps": 12, "num_restarts": 2, "seed": 4}
        options |= {"epsilon": RADIUS[norm] / 4, **two_classes(loss)}
        index = torch.arange(12) * 7 + 1
        whole = apgd(model, IMAGES, labels, sample_index=index, **options)
        assert 1 < is_wrong(model, whole, labels).sum() < 12
        parts = [
            apgd(model, images, part, sample_index=its_index, **options)
            for images, part, its_index in zip(
                IMAGES.split(sizes), labels.split(sizes), index.split(sizes), strict=True
            )
        ]
        assert torch.equal(torch.cat(parts), whole)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        mixed = apgd(model, IMAGES[order], labels[order], sample_index=index[order], **options)
        assert torch.equal(mixed, whole[order])

    def test_wrong_already_comes_back_and_costs_one_pass(self):
        model = network()
        labels = (right_labels(model) + 1) % NUM_CLASSES
        report = AttackReport()
        found = apgd(model, IMAGES, labels, epsilon=0.1, report=report)
        assert torch.equal(found, IMAGES)
        assert (report.num_forwards, report.num_backwards) == (12, 0)

    def test_who_is_found_costs_nothing_further(self):
        model = network()
        labels = right_labels(model)
        report = AttackReport()
        found = apgd(model, IMAGES, labels, epsilon=1.0, report=report)
        assert is_wrong(model, found, labels).all()
        assert report.num_backwards == 12 * 23  # the start, and up to the first checkpoint

    @NORMS
    def test_more_runs_and_targets_never_help_the_defender(self, norm):
        model, images = network(), make_images(100)
        labels = right_labels(model, images)
        options = {"norm": norm, "epsilon": RADIUS[norm] * 0.7}
        few = {"loss": "ce", "num_steps": 1}
        targeted = {"loss": "dlr-targeted", "num_steps": 4, "epsilon": RADIUS[norm] * 0.35}
        for more in (
            [{**options, **few, "num_restarts": n} for n in (1, 2, 4)],
            [{**options, **targeted, "num_target_classes": n} for n in (1, 2, 9)],
        ):
            wrong = [
                is_wrong(model, apgd(model, images, labels, **setting), labels) for setting in more
            ]
            assert 0 < wrong[0].sum() < 100
            for less, greater in pairwise(wrong):
                assert not (less & ~greater).any()
            assert wrong[0].sum() < wrong[-1].sum()

    def test_stronger_than_pgd_of_as_many_steps(self):
        model, images = network(), make_images(200)
        labels = right_labels(model, images)
        plain = pgd(
            model, images, labels, epsilon=0.02, step_size=0.005, num_steps=10, random_start=True
        )
        found = apgd(model, images, labels, epsilon=0.02, num_steps=10)
        assert is_wrong(model, found, labels).sum() >= is_wrong(model, plain, labels).sum()

    @pytest.mark.parametrize("num_classes", [2, 3])
    @LOSSES
    def test_few_classes(self, loss, num_classes):
        model = Linear(num_classes=num_classes)
        labels = right_labels(model)
        options = {"epsilon": 0.05, "loss": loss, "num_steps": 10}
        found = apgd(model, IMAGES, labels, allow_probabilities=True, **options)
        assert found.isfinite().all()
        assert is_wrong(model, found, labels).any()

    def test_empty_batch(self):
        found = apgd(network(), IMAGES[:0], make_labels(0), epsilon=0.1)
        assert found.shape == (0, *SHAPE)

    @pytest.mark.parametrize("num_steps", [1, 2, 3])
    def test_few_steps(self, num_steps):
        model = network()
        labels = right_labels(model)
        found = apgd(model, IMAGES, labels, epsilon=0.05, num_steps=num_steps)
        assert is_wrong(model, found, labels).any()


class TestSearchAndVerdict:
    class Boasts(Autograd):
        """A plan whose logits are wrong about who is fooled: it says all are, or none."""

        def __init__(self, model, bias):
            super().__init__(model)
            self.bias = bias

        def gradient(self, images, labels, loss=None):
            grad, logits = super().gradient(images, labels, loss)
            if self.bias is None:
                return grad, torch.zeros_like(logits).index_fill(1, torch.tensor(4), 1.0)
            return grad, logits.scatter_add(
                1, self.bias[: len(logits), None], torch.full((len(logits), 1), 100.0)
            )

    def test_the_model_decides(self):
        """Candidates that only the plan takes for wrong are not handed out as found."""
        from dwf.attacks import AttackTarget

        model = network()
        labels = right_labels(model)
        labels_other_than_4 = labels != 4
        images, labels = IMAGES[labels_other_than_4], labels[labels_other_than_4]
        target = AttackTarget(model, self.Boasts(model, None))
        report = AttackReport()
        found = apgd(target, images, labels, epsilon=1e-4, num_steps=10, report=report)
        assert not is_wrong(model, found, labels).any()
        assert report.num_backwards == 11 * len(images)  # and nobody left

    def test_what_the_plan_takes_for_right_is_shown_at_the_end(self):
        from dwf.attacks import AttackTarget

        model = network()
        labels = torch.full((12,), 2)
        images = IMAGES[right_labels(model) == 2]
        labels = labels[: len(images)]
        assert len(images) > 0
        target = AttackTarget(model, self.Boasts(model, labels))
        report = AttackReport()
        found = apgd(target, images, labels, epsilon=0.5, num_steps=10, report=report)
        assert report.num_backwards == 11 * len(images)
        assert is_wrong(model, found, labels).any()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_logits_that_are_not_finite_are_wrong(self, value):
        model = network()

        class Breaks(nn.Module):
            """Away from the clean images there is nothing."""

            def forward(self, images):
                far = (images - IMAGES[: len(images)]).abs().amax(dim=(1, 2, 3)) > 1e-3
                return torch.where(far[:, None], value, model(images))

        labels = right_labels(model)
        found = apgd(Breaks(), IMAGES, labels, epsilon=0.01, num_steps=5)
        assert found.isfinite().all()
        assert ((found - IMAGES).abs().amax(dim=(1, 2, 3)) > 1e-3).all()

    def test_nan_from_the_start(self):
        model = Mapped(network(), lambda logits: logits * math.nan)
        found = apgd(model, IMAGES, make_labels(12), epsilon=0.1)
        assert torch.equal(found, IMAGES)

    def test_autocast_searches_and_float32_decides(self):
        model = network()
        labels = right_labels(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = apgd(model, IMAGES, labels, epsilon=0.02, num_steps=10)
        assert found.dtype is torch.float32
        plain = apgd(model, IMAGES, labels, epsilon=0.02, num_steps=10)
        differ = is_wrong(model, found, labels) != is_wrong(model, plain, labels)
        assert differ.sum() <= 1

    def test_eot_over_noise(self):
        """One pass of a noisy model misleads; the mean over many finds as much as without noise."""
        model, images = network(), make_images(40)
        labels = right_labels(model, images)
        noisy = Noisy(model, std=1.0)
        found = {
            samples: is_wrong(
                model,
                apgd(
                    noisy,
                    images,
                    labels,
                    epsilon=0.02,
                    num_steps=8,
                    eot_samples=samples,
                ),
                labels,
            ).sum()
            for samples in (1, 16)
        }
        assert found[16] > found[1]


class TestSideEffects:
    @NORMS
    @pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
    def test_none(self, loss, norm):
        model = disordered(Noisy(SmallNet()))
        before = everything(model)
        apgd(model, IMAGES, make_labels(12), epsilon=0.1, norm=norm, loss=loss, num_steps=5)
        assert everything(model) == before

    @pytest.mark.parametrize("call", [1, 2, 5, 8])
    def test_none_after_an_exception(self, call):
        network = SmallNet().eval()
        labels = right_labels(network)
        model = disordered(FailsAt(network, call))
        before = everything(model)
        with pytest.raises(Injected):
            apgd(model, IMAGES, labels, epsilon=1e-3, num_steps=10)
        assert everything(model) == before

    def test_under_no_grad_and_inference_mode(self):
        model = network()
        labels = right_labels(model)
        expected = apgd(model, IMAGES, labels, epsilon=0.02, num_steps=5)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                found = apgd(model, IMAGES, labels, epsilon=0.02, num_steps=5)
            assert torch.equal(found, expected)
            assert not found.is_inference()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ConfigError, "loss: 'DLR' is unknown", {"loss": "DLR"}),
        (ConfigError, "norm: 'l1' is unknown", {"norm": "l1"}),
        (ConfigError, "num_steps: 0", {"num_steps": 0}),
        (ConfigError, "num_restarts: 0", {"num_restarts": 0}),
        (ConfigError, "num_target_classes: 0", {"num_target_classes": 0}),
        (ConfigError, "did you mean 8/255", {"epsilon": 8}),
        (LabelError, "labels: 5 at", {"labels": torch.full((12,), 5)}),
        (ModelOutputError, "probabilities", {"model": Mapped(Linear(), lambda z: z.softmax(1))}),
    ],
)
def test_bad_input(error, message, options):
    options = {"model": Linear(), "labels": make_labels(12), "epsilon": 0.1, **options}
    model, labels = options.pop("model"), options.pop("labels")
    with pytest.raises(error, match=message):
        apgd(model, IMAGES, labels, **options)
