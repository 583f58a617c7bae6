"""FAB and Carlini-Wagner: projection, closed forms, other libraries, budget, no trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from small_attacks import clamped
from small_models import (
    NUM_CLASSES,
    SHAPE,
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
from dwf.attacks import apgd, carlini_wagner, ddn, fab, minimum_norm
from dwf.attacks.fab import to_hyperplane
from dwf.attacks.losses import margin
from dwf.attacks.target import AttackReport
from dwf.checks import ConfigError, ImageError, LabelError, ModelOutputError, PixelRangeError
from dwf.models import Mixture, MlpGate, Normalize, build_network

pytestmark = pytest.mark.usefixtures("one_thread")

B = 6
IMAGES = make_images(B)
GRAY = 0.3 + 0.4 * IMAGES
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
SHORT_CW = {"num_searches": 5, "num_steps": 40, "learning_rate": 0.05}
# every attack of the module, short
ENTRIES = {
    "fab": lambda *batch, **options: fab(
        *batch, **{"epsilon": 0.3, "num_steps": 12, "num_restarts": 2, **options}
    ),
    "fab-l2": lambda *batch, **options: fab(
        *batch, **{"epsilon": 3.0, "num_steps": 12, "norm": "l2", **options}
    ),
    "fab-targeted": lambda *batch, **options: fab(
        *batch, **{"epsilon": 0.3, "num_steps": 12, "num_target_classes": 9, **options}
    ),
    "fab-unbounded": lambda *batch, **options: fab(
        *batch, **{"epsilon": None, "num_steps": 12, **options}
    ),
    "cw": lambda *batch, **options: carlini_wagner(
        *batch, **{"epsilon": 3.0, **SHORT_CW, **options}
    ),
    "cw-unbounded": lambda *batch, **options: carlini_wagner(*batch, **{**SHORT_CW, **options}),
    "ddn": lambda *batch, **options: ddn(*batch, **{"epsilon": 3.0, "num_steps": 40, **options}),
    "ddn-unbounded": lambda *batch, **options: ddn(*batch, **{"num_steps": 40, **options}),
}
ALL = pytest.mark.parametrize("entry", ENTRIES)


class Curved(nn.Module):
    """Two layers, many boundaries near by; equal bits in every batch, as Linear."""

    def __init__(self, num_classes=NUM_CLASSES):
        super().__init__()
        self.hidden = Linear(num_classes=24, seed=1)
        generator = torch.Generator().manual_seed(2)
        self.register_buffer("weight", torch.randn(num_classes, 24, generator=generator))

    def forward(self, images):
        hidden = torch.sin(self.hidden(images))
        return (hidden.unsqueeze(1) * self.weight).sum(dim=2)


def classes_of(model, images):
    """Labels that the model gets right."""
    with torch.no_grad():
        return model(images).argmax(dim=1)


def size(difference, norm):
    flat = difference.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


def box_projection(x, w, gap, norm):
    """The shortest move by scipy: a linear program, or SLSQP. None if the box is out of reach."""
    most = np.where(w * gap > 0, w * (1 - x), -w * x)
    reach = np.maximum(most, 0).sum() if gap > 0 else np.minimum(most, 0).sum()
    if abs(reach) < abs(gap):
        return None
    n = len(x)
    if norm == "linf":
        cost = np.append(np.zeros(n), 1.0)
        upper = np.hstack([np.vstack([np.eye(n), -np.eye(n)]), -np.ones((2 * n, 1))])
        bounds = [(-v, 1 - v) for v in x] + [(0, None)]
        found = optimize.linprog(cost, upper, np.zeros(2 * n), np.append(w, 0)[None], [gap], bounds)
        return found.fun
    found = optimize.minimize(
        lambda d: 0.5 * d @ d,
        np.zeros(n),
        jac=lambda d: d,
        method="SLSQP",
        bounds=[(-v, 1 - v) for v in x],
        constraints={"type": "eq", "fun": lambda d: w @ d - gap, "jac": lambda d: w},
        options={"ftol": 1e-14, "maxiter": 300},
    )
    assert found.success
    return math.sqrt(2 * found.fun)


class TestProjection:
    @staticmethod
    def move(x, w, gap, norm, low=0.0, high=1.0):
        x, w, gap = (torch.tensor(v, dtype=torch.float32) for v in (x, w, gap))
        return to_hyperplane(x, w, gap, norm, low, high)

    def test_by_hand(self):
        """Three pixels, <w, move> = 1: free, one pixel at its edge, both ways, out of reach."""
        x = [[0.5, 0.5, 0.5], [0.9, 0.5, 0.5], [0.1, 0.5, 0.5], [0.9, 0.9, 0.9]]
        w = [[1.0, -1.0, 2.0], [1.0, -1.0, 2.0], [-1.0, 1.0, -2.0], [1.0, 0.0, 2.0]]
        found = self.move(x, w, [1.0, 1.0, 1.0, 1.0], "linf")
        # 1 = 4 t;  1 = 0.1 + 3 t;  likewise;  only 0.3 can be covered
        expected = [[0.25, -0.25, 0.25], [0.1, -0.3, 0.3], [-0.1, 0.3, -0.3], [0.1, 0.0, 0.1]]
        torch.testing.assert_close(found, torch.tensor(expected))
        found = self.move(x, w, [1.0, 1.0, 1.0, 1.0], "l2")
        # 1 = 6 t;  1 = 0.1 + 5 t;  likewise;  only 0.3 can be covered
        expected = [
            [1 / 6, -1 / 6, 2 / 6],
            [0.1, -0.18, 0.36],
            [-0.1, 0.18, -0.36],
            [0.1, 0.0, 0.1],
        ]
        torch.testing.assert_close(found, torch.tensor(expected))

    @NORMS
    def test_against_scipy(self, norm):
        generator = np.random.default_rng(0)
        reached = unreached = 0
        for case in range(60):
            n = int(generator.integers(1, 9))
            x = generator.random(n).round(int(generator.integers(0, 3)))  # often at an edge
            w = generator.normal(size=n) * (generator.random(n) < 0.8)
            gap = float(generator.normal() * generator.choice([0.1, 1.0, 3.0]))
            found = self.move(x[None], w[None], [gap], norm)[0].numpy()
            assert ((x + found >= -1e-6) & (x + found <= 1 + 1e-6)).all(), case
            expected = box_projection(x, w, gap, norm)
            if expected is None:
                unreached += 1
                edge = np.where(w * gap > 0, 1 - x, np.where(w * gap < 0, -x, 0.0))
                np.testing.assert_allclose(found, edge, atol=1e-6)
            else:
                reached += 1
                assert w @ found == pytest.approx(gap, abs=1e-5)
                length = np.abs(found).max() if norm == "linf" else np.linalg.norm(found)
                assert length == pytest.approx(expected, abs=1e-5, rel=1e-4), case
        assert min(reached, unreached) >= 10

    @NORMS
    @pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
    def test_large_images_of_any_scale(self, norm, scale):
        """3,072 pixels, many at the edge: on the plane and in the box, and nothing is shorter."""
        x = (make_images(20, (3, 32, 32)) * 1.5 - 0.25).clamp(0, 1)
        w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        most = torch.where(w > 0, w * (1 - x), -w * x).flatten(1).sum(dim=1)
        gap = most * torch.linspace(0.001, 0.999, 20)
        move = to_hyperplane(x, w * scale, gap * scale, norm, 0.0, 1.0)
        covered = (w.double() * move.double()).flatten(1).sum(dim=1)
        torch.testing.assert_close(covered, gap.double(), rtol=1e-4, atol=0)
        assert (x + move).min() >= -1e-6
        assert (x + move).max() <= 1 + 1e-6
        # optimal: those that are not at the edge share one level
        free = ((x + move) > 1e-4) & ((x + move) < 1 - 1e-4)
        level = move.abs() / (1 if norm == "linf" else w.abs())
        for row, its in zip(level.double(), free, strict=True):
            if its.any():
                assert row[its].max() - row[its].min() <= 1e-3 * row[its].max()
                at_edge = move.new_ones(()).double() * row[its].max()
                assert (row[~its] <= at_edge * 1.001).all()

    @NORMS
    def test_what_must_not_move(self, norm):
        x = torch.rand(4, 3, 2, 2)
        zero = torch.zeros_like(x)
        assert torch.equal(to_hyperplane(x, zero, torch.ones(4), norm, 0.0, 1.0), zero)
        assert torch.equal(to_hyperplane(x, x, torch.zeros(4), norm, 0.0, 1.0), zero)
        assert to_hyperplane(x[:0], x[:0], torch.ones(0), norm, 0.0, 1.0).shape == (0, 3, 2, 2)

    @NORMS
    def test_no_box(self, norm):
        x, w = torch.randn(4, 9), torch.randn(4, 9)
        gap = torch.tensor([1.0, -2.0, 30.0, 0.1])
        found = to_hyperplane(x, w, gap, norm, -math.inf, math.inf)
        if norm == "linf":
            expected = w.sign() * (gap / w.abs().sum(dim=1))[:, None]
        else:
            expected = w * (gap / (w * w).sum(dim=1))[:, None]
        torch.testing.assert_close(found, expected)


def nearest_boundary(model, images, labels, norm):
    """Distance to the boundary of a linear model where the box does not bind, [B]."""
    w, z = model.weight.detach().double().flatten(1), model(images).detach().double()
    dual = 1 if norm == "linf" else 2
    distance = torch.full(z.shape, math.inf, dtype=torch.float64)
    for b, label in enumerate(labels.tolist()):
        for k in set(range(z.shape[1])) - {label}:
            gap, normal = z[b, label] - z[b, k], w[k] - w[label]
            distance[b, k] = gap / torch.linalg.vector_norm(normal, dual)
    return distance.amin(dim=1)


class TestLinearModel:
    """The boundary is where it seems to be, so the distance has a closed form."""

    @NORMS
    @pytest.mark.parametrize("targeted", [False, True])
    def test_fab(self, norm, targeted):
        model = Linear()
        labels = classes_of(model, GRAY)
        truth = nearest_boundary(model, GRAY, labels, norm)
        # the last step goes beyond the boundary by eta - 1 of the way from beta
        settings = {"num_target_classes": 9 if targeted else None, "num_steps": 40}
        for eta, excess in ((1.05, 6e-3), (1.0005, 5e-4)):
            found = minimum_norm(fab, model, GRAY, labels, norm=norm, eta=eta, **settings)
            ratio = found.distance.double() / truth
            assert ratio.min() >= 1 - 1e-5
            assert ratio.max() <= 1 + excess + 1e-5
            torch.testing.assert_close(found.distance.double(), size(found.images - GRAY, norm))
        # at a radius: found or not as the closed form says
        for share, fooled in ((0.99, 0), (1.01, B)):
            found = fab(model, GRAY, labels, epsilon=(share * truth).float(), norm=norm, **settings)
            assert (classes_of(model, found) != labels).sum() == fooled
            if not fooled:
                assert torch.equal(found, GRAY)

    @NORMS
    def test_bisection_of_a_radius(self, norm):
        model = Linear()
        labels = classes_of(model, GRAY)
        truth = nearest_boundary(model, GRAY, labels, norm)
        settings = {"norm": norm, "largest": 1.5 * float(truth.max()), "loss": "margin"}
        found = minimum_norm(apgd, model, GRAY, labels, num_radii=9, num_steps=20, **settings)
        torch.testing.assert_close(found.distance.double(), size(found.images - GRAY, norm))
        assert (classes_of(model, found.images) != labels).all()
        ratio = found.distance.double() / truth
        assert ratio.min() >= 1 - 1e-5
        assert ratio.max() <= 1.01
        # one radius alone, and the way back to the image from what it found
        once = minimum_norm(apgd, model, GRAY, labels, num_radii=1, num_steps=20, **settings)
        reached = once.distance.isfinite()
        assert torch.equal(reached, truth < settings["largest"] / 2)
        assert (once.distance[reached].double() <= 1.3 * truth[reached]).all()

    def test_bisection_finds_what_is_there(self):
        model = Linear()
        labels = classes_of(model, GRAY)
        labels[0] = (labels[0] + 1) % NUM_CLASSES  # wrong already
        tiny = {"num_radii": 3, "largest": 1e-4, "num_steps": 3}
        found = minimum_norm(apgd, model, GRAY, labels, norm="linf", **tiny)
        assert found.distance.tolist() == [0.0] + [math.inf] * (B - 1)
        assert torch.equal(found.images, GRAY)
        empty = minimum_norm(apgd, model, GRAY[:0], labels[:0], norm="l2", **tiny)
        assert empty.distance.shape == (0,)
        with pytest.raises(ConfigError, match="largest: goes with num_radii"):
            minimum_norm(fab, model, GRAY, labels, norm="linf", largest=0.5)

    @NORMS
    def test_fab_where_the_box_binds(self, norm):
        """Two classes: the truth is one projection, of which scipy knows the length."""
        model = Linear((1, 3, 3), num_classes=2)
        images = make_images(8, (1, 3, 3)).round()
        images[::2] = images[::2] * 0.9 + 0.05
        labels = classes_of(model, images)
        found = minimum_norm(fab, model, images, labels, norm=norm, eta=1.0005)
        w, z = model.weight.detach().double().numpy(), model(images).detach().double().numpy()
        reachable = 0
        for b, label in enumerate(labels.tolist()):
            normal = (w[1 - label] - w[label]).ravel()
            x = images[b].double().numpy().ravel()
            truth = box_projection(x, normal, z[b, label] - z[b, 1 - label], norm)
            if truth is None:
                assert found.distance[b] == math.inf
                assert torch.equal(found.images[b], images[b])
            else:
                reachable += 1
                assert found.distance[b].item() == pytest.approx(truth, rel=1e-3)
        assert reachable >= 3

    def test_carlini_wagner(self):
        model = Linear()
        labels = classes_of(model, GRAY)
        truth = nearest_boundary(model, GRAY, labels, "l2")
        settings = {"num_steps": 200, "num_searches": 6, "initial_c": 0.1, "learning_rate": 0.02}
        found = minimum_norm(carlini_wagner, model, GRAY, labels, norm="l2", **settings)
        ratio = found.distance.double() / truth
        assert ratio.min() >= 1 - 1e-5
        assert ratio.max() <= 1.08
        settings |= {"num_searches": 5, "num_steps": 80}
        for epsilon, fooled in ((0.99 * truth, 0), (1.2 * truth + 0.1, B)):
            bounded = carlini_wagner(model, GRAY, labels, epsilon=epsilon.float(), **settings)
            assert (classes_of(model, bounded) != labels).sum() == fooled
            if not fooled:
                assert torch.equal(bounded, GRAY)

    def test_carlini_wagner_with_few_steps_finds_something_for_every_image(self):
        """At the paper's rate so few steps do not lead away from black and white."""
        model = Linear()
        images = (IMAGES > 0.5).float()
        labels = classes_of(model, images)
        settings = {"num_searches": 6, "num_steps": 20}
        found = carlini_wagner(model, images, labels, **settings)
        slow = carlini_wagner(model, images, labels, learning_rate=0.01, **settings)
        assert (classes_of(model, found) != labels).all()
        assert not (classes_of(model, slow) != labels).all()

    def test_carlini_wagner_targeted(self):
        """The distance to one boundary, which for two classes is that to any."""
        model = Linear()
        labels = classes_of(model, GRAY)
        targets = (labels + 2) % NUM_CLASSES
        found = carlini_wagner(model, GRAY, labels, targets=targets, num_steps=80, initial_c=1.0)
        assert torch.equal(classes_of(model, found), targets)
        w, z = model.weight.detach().flatten(1), model(GRAY).detach()
        rows = torch.arange(B)
        normal = w[targets] - w[labels]
        least = (z[rows, labels] - z[rows, targets]) / normal.norm(dim=1)
        assert (size(found - GRAY, "l2") >= least.double() * (1 - 1e-5)).all()

    @NORMS
    def test_fab_targeted(self, norm):
        """The distance to the boundary with one class, and only that class counts."""
        model = Linear()
        labels = classes_of(model, GRAY)
        targets = (labels + 2) % NUM_CLASSES
        found = minimum_norm(fab, model, GRAY, labels, norm=norm, targets=targets, num_steps=40)
        reached = found.distance.isfinite()
        assert reached.sum() >= B - 1
        assert torch.equal(classes_of(model, found.images)[reached], targets[reached])
        anything = minimum_norm(fab, model, GRAY, labels, norm=norm, num_steps=40)
        assert (found.distance >= anything.distance * (1 - 1e-3)).all()
        with pytest.raises(LabelError, match="is the label itself"):
            fab(model, GRAY, labels, epsilon=0.1, targets=labels)

    def test_a_wrong_class_that_is_no_target_is_at_no_distance(self):
        """Wrong already, but not as was asked; nothing is found, so nothing is near."""
        model = Mapped(Linear(), lambda z: 2 * torch.eye(NUM_CLASSES)[1] + 0 * z)
        labels = torch.zeros(B, dtype=torch.int64)
        for target, distance in ((2, torch.inf), (1, 0.0)):
            found = minimum_norm(
                carlini_wagner,
                model,
                GRAY,
                labels,
                norm="l2",
                targets=torch.full((B,), target),
                num_steps=3,
            )
            assert torch.equal(found.distance, torch.full((B,), distance))

    def test_confidence(self):
        model = Linear()
        labels = classes_of(model, GRAY)
        settings = {"num_steps": 100, "num_searches": 4, "initial_c": 1.0}
        near = carlini_wagner(model, GRAY, labels, **settings)
        far = carlini_wagner(model, GRAY, labels, confidence=2.0, **settings)
        assert (margin(model(far).detach(), labels) >= 2.0 - 1e-5).all()
        assert (size(far - GRAY, "l2") > size(near - GRAY, "l2")).all()


def slow_carlini_wagner(model, images, labels, c, num_steps, learning_rate):
    """One descent for each image by torch.optim.Adam and autograd; its closest success."""
    best = images.clone()
    for b in range(len(images)):
        x0, nearest = images[b : b + 1], math.inf
        w = torch.atanh((2 * x0 - 1) * 0.999999).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=learning_rate)
        for _ in range(num_steps):
            x = (torch.tanh(w) + 1) / 2
            logits = model(x)[0]
            others = torch.cat([logits[: labels[b]], logits[labels[b] + 1 :]])
            short = logits[labels[b]] - others.max()
            distance = ((x - x0) ** 2).sum()
            if short <= 0 and distance < nearest:
                nearest = distance.item()
                best[b] = x.detach()[0]
            optimizer.zero_grad()
            (distance + c * short.clamp(min=0)).backward()
            optimizer.step()
    return best


def test_carlini_wagner_is_torch_adam_on_the_published_loss():
    model = Curved()
    labels = classes_of(model, IMAGES)
    expected = slow_carlini_wagner(model, IMAGES, labels, 3.0, 9, 0.02)
    found = carlini_wagner(
        model, IMAGES, labels, num_searches=1, initial_c=3.0, num_steps=9, learning_rate=0.02
    )
    assert not torch.equal(expected, IMAGES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_plan_of_a_mixture_serves():
    """One gradient a step from the plan, with the result of autograd."""
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    experts = [
        build_network("resnet6", num_classes=NUM_CLASSES, width=4, in_channels=3, seed=e)
        for e in range(2)
    ]
    model = Mixture(experts, MlpGate(SHAPE, 2), normalize).eval()
    labels = classes_of(model, IMAGES)
    for attack, norm, settings in (
        (fab, "linf", {"num_target_classes": 9, "num_steps": 6}),
        (
            carlini_wagner,
            "l2",
            {"num_searches": 2, "num_steps": 25, "initial_c": 10.0, "learning_rate": 0.03},
        ),
    ):
        fast, slow = AttackReport(), AttackReport()
        found = minimum_norm(attack, model, IMAGES, labels, norm=norm, report=fast, **settings)
        with moe_kernels.implementation("reference"):
            expected = minimum_norm(
                attack, model, IMAGES, labels, norm=norm, report=slow, **settings
            )
        assert fast.back_end != slow.back_end == "autograd"
        assert expected.distance.isfinite().any()
        torch.testing.assert_close(found.distance, expected.distance, rtol=1e-3, atol=0)


class TestPromises:
    @ALL
    def test_result_fools_or_is_the_image(self, entry):
        """Within epsilon and [0, 1] to the last bit."""
        norm = "linf" if entry in ("fab", "fab-targeted", "fab-unbounded") else "l2"
        images = make_images(24)
        model = Curved()
        labels = classes_of(model, images)
        labels[::6] = (labels[::6] + 1) % NUM_CLASSES  # wrong already
        epsilon = torch.linspace(0.0, 0.04 if norm == "linf" else 0.4, 24)
        options = {} if "unbounded" in entry else {"epsilon": epsilon}
        found = ENTRIES[entry](model, images, labels, **options)
        assert found.dtype is torch.float32
        assert found.min() >= 0
        assert found.max() <= 1
        moved = (found != images).flatten(1).any(dim=1)
        assert not moved[::6].any()
        assert (classes_of(model, found) != labels)[moved].all()
        if "unbounded" in entry:
            assert moved.sum() == 20
        else:
            assert 3 <= moved.sum() < 20
            # the attack measures in float32
            assert (size(found - images, norm) <= epsilon.double() * (1 + 1e-6)).all()

    @ALL
    def test_batches(self, entry):
        """Alone, in another order, in parts: the same bits. On a model that has them too."""
        images = make_images(7)
        model = Linear()
        labels = classes_of(model, images)
        labels[2] = (labels[2] + 1) % NUM_CLASSES
        epsilon = {} if "unbounded" in entry else {"epsilon": torch.linspace(0.001, 0.2, 7)}
        index = torch.tensor([5, 17, 2, 99, 1, 0, 10**6])

        def attack(rows):
            options = {name: value[rows] for name, value in epsilon.items()}
            return ENTRIES[entry](
                model, images[rows], labels[rows], seed=3, sample_index=index[rows], **options
            )

        whole = attack(torch.arange(7))
        order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
        assert torch.equal(attack(order), whole[order])
        for rows in torch.arange(7).split(3):
            assert torch.equal(attack(rows), whole[rows])

    @ALL
    def test_repeats_and_leaves_no_trace(self, entry):
        model = disordered(SmallNet())
        labels = make_labels(B)
        before = everything(model)
        found = ENTRIES[entry](model, IMAGES, labels)
        assert everything(model) == before
        assert found.grad_fn is None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            again = ENTRIES[entry](model, IMAGES, labels)
        assert again.dtype is torch.float32
        with torch.inference_mode():
            assert torch.equal(ENTRIES[entry](model, IMAGES, labels), found)

    @ALL
    @pytest.mark.parametrize("call", [1, 2, 5])
    def test_no_trace_after_an_exception(self, entry, call):
        model = disordered(FailsAt(SmallNet(), call))
        before = everything(model)
        with pytest.raises(Injected):
            ENTRIES[entry](model, IMAGES, classes_of(SmallNet().eval(), IMAGES))
        assert everything(model) == before

    @ALL
    def test_empty_batch(self, entry):
        found = ENTRIES[entry](SmallNet(), IMAGES[:0], make_labels(0))
        assert found.shape == (0, *SHAPE)

    @ALL
    def test_wrong_already_costs_one_pass(self, entry):
        model = Curved()
        labels = (classes_of(model, IMAGES) + 1) % NUM_CLASSES
        report = AttackReport()
        found = ENTRIES[entry](model, IMAGES, labels, report=report)
        assert torch.equal(found, IMAGES)
        assert found.data_ptr() != IMAGES.data_ptr()
        assert (report.num_forwards, report.num_backwards) == (B, 0)

    @ALL
    def test_nan_logits_count_as_wrong(self, entry):
        """At the images at once; and where they appear near by, they are found."""
        labels = torch.zeros(B, dtype=torch.int64)
        always = Mapped(Linear(), lambda logits: logits * math.nan)
        assert torch.equal(ENTRIES[entry](always, IMAGES, labels), IMAGES)

        def broken_at_boundaries(logits):
            first, second = logits.topk(2, dim=1).values.unbind(dim=1)
            return torch.where((first - second < 0.2)[:, None], math.nan, logits)

        model = Mapped(Linear(), broken_at_boundaries)
        images = GRAY[model(GRAY).isfinite().all(dim=1)]
        assert len(images) >= B - 1
        labels = classes_of(model, images)
        found = ENTRIES[entry](model, images, labels)
        assert model(found).isnan().any()
        assert (model(found).isnan().any(dim=1) | (classes_of(model, found) != labels)).all()
        assert found.isfinite().all()

    @ALL
    def test_no_gradient(self, entry):
        """A constant model cannot be fooled, and nothing becomes NaN."""
        constant = Mapped(Linear(), lambda logits: 0 * logits + torch.arange(NUM_CLASSES))
        labels = torch.full((B,), NUM_CLASSES - 1)
        assert torch.equal(ENTRIES[entry](constant, IMAGES, labels), IMAGES)

    @ALL
    def test_gradient_that_is_not_finite(self, entry):
        class Root(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad * math.inf

        model = Mapped(Linear(), Root.apply)
        labels = classes_of(model, IMAGES)
        found = ENTRIES[entry](model, IMAGES, labels)
        moved = (found != IMAGES).flatten(1).any(dim=1)
        # a random start needs no gradient
        assert (classes_of(model, found) != labels)[moved].all()
        assert entry == "fab" or not moved.any()

    @ALL
    @pytest.mark.parametrize("num_classes", [2, 3])
    def test_few_classes(self, entry, num_classes):
        model = Curved(num_classes)
        labels = classes_of(model, IMAGES)
        options = {} if "unbounded" in entry else {"epsilon": 1.0}
        found = ENTRIES[entry](model, IMAGES, labels, **options)
        assert (classes_of(model, found) != labels).any()

    @pytest.mark.slow
    def test_random_model(self):
        """Mean gradients and mean logits; the same result twice."""
        model = Noisy(Linear(), std=0.2)
        labels = classes_of(Linear(), GRAY)
        for entry in ("fab", "cw"):
            found = ENTRIES[entry](model, GRAY, labels, eot_samples=8, seed=1)
            assert torch.equal(ENTRIES[entry](model, GRAY, labels, eot_samples=8, seed=1), found)
            assert (classes_of(Linear(), found) != labels).float().mean() >= 0.5


class TestSettings:
    @NORMS
    @pytest.mark.parametrize("targeted", [False, True])
    def test_more_restarts_steps_and_targets_never_find_less(self, norm, targeted):
        model = Curved()
        labels = classes_of(model, IMAGES)

        def distance(**options):
            settings = {"num_target_classes": 9 if targeted else None, "num_steps": 5, **options}
            return minimum_norm(fab, model, IMAGES, labels, norm=norm, **settings).distance

        one = distance()
        assert (distance(num_restarts=3) <= one).all()
        assert (distance(num_steps=15) <= one).all()
        if targeted:
            assert (one <= distance(num_target_classes=1)).all()

    @NORMS
    def test_restarts(self, norm):
        """A model that is flat around the image: random starts leave it, each with its noise."""
        linear = Linear(num_classes=1)
        images = torch.full((12, *SHAPE), 0.5)
        middle = linear(images[:1]).detach()

        def model(x):
            z = linear(x) - middle
            return torch.cat([0 * z + 2, 1 + 5 * (z - 0.15).relu()], dim=1)

        def found(**options):
            settings = {"epsilon": 0.3 if norm == "linf" else 3.0, "num_steps": 10, **options}
            return fab(model, images, torch.zeros(12, dtype=torch.int64), norm=norm, **settings)

        assert torch.equal(found(), images)
        four = found(num_restarts=4)
        fooled = classes_of(model, four) == 1
        assert 3 <= fooled.sum() <= 12
        assert torch.equal(four[~fooled], images[~fooled])
        assert (size(four - images, norm) <= (0.3 if norm == "linf" else 3.0) + 1e-6).all()
        assert not torch.equal(found(num_restarts=4, seed=1), four)
        assert torch.equal(found(num_restarts=4, sample_index=torch.arange(12)), four)
        index = torch.arange(12).flip(0)
        assert torch.equal(found(num_restarts=4, sample_index=index), four.flip(0))

    def test_costs(self):
        """K - 1 gradients a step, or one for a target; a forward each; what is found stops."""
        model = Curved()
        labels = classes_of(model, IMAGES)
        report = AttackReport()
        settings = {"epsilon": 1e-6, "num_steps": 7, "report": report}
        fab(model, IMAGES, labels, **settings)
        assert report.num_backwards == B * 7 * (NUM_CLASSES - 1)
        # a verdict and the order of the classes
        assert report.num_forwards == report.num_backwards + B * (2 + 7)
        fab(model, IMAGES, labels, num_target_classes=2, **settings)
        assert report.num_backwards == B * 7 * 2
        fab(model, IMAGES, labels, epsilon=1.0, num_steps=100, report=report)
        assert report.num_backwards == B * 10 * (NUM_CLASSES - 1)
        carlini_wagner(
            model, IMAGES, labels, epsilon=1e-6, num_steps=9, num_searches=2, report=report
        )
        assert report.num_backwards <= B * 18

    def test_unclamped_space(self):
        """Normalized images are not in [0, 1] and need not be."""
        model = Linear()
        z = 4 * IMAGES - 2
        labels = classes_of(model, z)
        truth = nearest_boundary(model, z, labels, "l2")
        found = minimum_norm(fab, clamped(model, "none"), z, labels, norm="l2", num_steps=20)
        torch.testing.assert_close(found.distance.double(), truth, rtol=6e-3, atol=0)
        with pytest.raises(ConfigError, match="clamp: 'none', but Carlini-Wagner"):
            carlini_wagner(clamped(model, "none"), z, labels)

    def test_minimum_norm_without_success(self):
        """Infinity where nothing was found, zero where there was nothing to find."""
        constant = Mapped(Linear(), lambda logits: 0 * logits + torch.arange(NUM_CLASSES))
        labels = torch.full((B,), NUM_CLASSES - 1)
        labels[0] = 0
        for attack, norm in ((fab, "linf"), (carlini_wagner, "l2")):
            found = minimum_norm(attack, constant, IMAGES, labels, norm=norm, num_steps=3)
            assert found.distance.tolist() == [0.0] + [math.inf] * (B - 1)
            assert torch.equal(found.images, IMAGES)
            empty = minimum_norm(attack, constant, IMAGES[:0], labels[:0], norm=norm)
            assert empty.distance.shape == (0,)


class TestBadInput:
    @ALL
    def test_batch(self, entry):
        model, labels = SmallNet(), make_labels(B)
        bad = IMAGES.clone()
        bad[1, 2, 3, 4] = math.nan
        with pytest.raises(PixelRangeError, match=r"nan at \[1, 2, 3, 4\]"):
            ENTRIES[entry](model, bad, labels)
        with pytest.raises(LabelError, match="expected shape"):
            ENTRIES[entry](model, IMAGES, labels[:2])
        with pytest.raises(LabelError, match="expected 0 to 4"):
            ENTRIES[entry](model, IMAGES, labels + 5)
        with pytest.raises(ImageError, match="sample_index"):
            ENTRIES[entry](model, IMAGES, labels, sample_index=torch.arange(2))
        with pytest.raises(ModelOutputError, match="probabilities"):
            ENTRIES[entry](Mapped(model, lambda z: z.softmax(dim=1)), IMAGES, labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"norm": "l1"}, "norm: 'l1' is unknown"),
            ({"epsilon": 8.0}, "epsilon: 8 is larger"),
            ({"epsilon": -0.1}, "epsilon: -0.1"),
            ({"num_steps": 0}, "num_steps: 0"),
            ({"num_restarts": 0}, "num_restarts: 0"),
            ({"num_target_classes": 0}, "num_target_classes: 0"),
            ({"num_target_classes": 2, "targets": make_labels(B)}, "chosen by targets already"),
            ({"alpha_max": 1.5}, "alpha_max 1.5"),
            ({"alpha_max": -0.5}, "alpha_max: -0.5"),
            ({"eta": 0.0}, "eta: 0.0"),
            ({"beta": 2.0}, "beta 2.0"),
            ({"eot_samples": 0}, "eot_samples: 0"),
        ],
    )
    def test_fab(self, options, message):
        with pytest.raises(ConfigError, match=message):
            fab(SmallNet(), IMAGES, make_labels(B), **{"epsilon": 0.1, **options})

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"norm": "linf"}, ConfigError, "norm: 'linf', Carlini-Wagner is for 'l2'"),
            ({"epsilon": 100.0}, ConfigError, "epsilon: 100 is larger"),
            ({"num_steps": 0}, ConfigError, "num_steps: 0"),
            ({"num_searches": 0}, ConfigError, "num_searches: 0"),
            ({"confidence": -1.0}, ConfigError, "confidence: -1.0"),
            ({"learning_rate": 0.0}, ConfigError, "learning_rate: 0.0"),
            ({"initial_c": -1.0}, ConfigError, "initial_c: -1.0"),
            ({"targets": torch.zeros(2, dtype=torch.int64)}, LabelError, "targets: expected shape"),
            ({"targets": torch.full((B,), 9)}, LabelError, r"targets: 9 at \[0\], expected 0 to 4"),
            ({"targets": make_labels(B)}, LabelError, "is the label itself"),
        ],
    )
    def test_carlini_wagner(self, options, error, message):
        with pytest.raises(error, match=message):
            carlini_wagner(SmallNet(), IMAGES, make_labels(B), **options)
