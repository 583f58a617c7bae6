"""Square and uniform draws: against the paper's loops, and as attacks that need no gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
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
from dwf.attacks import AttackReport, AttackTarget
from dwf.attacks.losses import margin
from dwf.attacks.norms import uniform_in_ball
from dwf.attacks.random_noise import random_noise
from dwf.attacks.square import HALVED_AFTER, bump, share, square
from dwf.checks import ConfigError, LabelError, ModelOutputError, PixelRangeError

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
# Radii at which some of these images fall to the linear model, and some do not.
EPSILON = {"linf": 0.05, "l2": 0.5}
ATTACKS = {
    "square": lambda *batch, **options: square(*batch, **{"num_queries": 40, **options}),
    "noise": lambda *batch, **options: random_noise(*batch, **{"num_draws": 12, **options}),
}
BOTH = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def case(num_images=12, epsilon=None, norm="linf"):
    """A linear model, images it gets right, and a radius."""
    model, images = Linear(), make_images(num_images)
    return model, images, model(images).argmax(dim=1), epsilon or EPSILON[norm]


def fooled(model, images, labels):
    return model(images).argmax(dim=1) != labels


def distance(adversarial, images, norm):
    difference = (adversarial - images).double().flatten(1)
    return torch.linalg.vector_norm(difference, math.inf if norm == "linf" else 2, dim=1)


class Slow:
    """One image at a time, one pixel at a time, from the paper's algorithms 1 to 3."""

    def __init__(self, model, image, label, epsilon, seed, index):
        self.model, self.x, self.label, self.epsilon = model, image.double().numpy(), label, epsilon
        self.draw = lambda shape, stream: (
            moe_kernels.uniform_noise(seed, torch.tensor([index]), shape, restart=stream)[0]
            .double()
            .numpy()
        )

    def loss(self, a):
        logits = self.model(torch.from_numpy(a).float().unsqueeze(0))[0].tolist()
        return logits[self.label] - max(z for k, z in enumerate(logits) if k != self.label)

    def run(self, norm, num_queries):
        best = self.linf_start() if norm == "linf" else self.l2_start()
        best_loss, query, stream, length = self.loss(best), 1, 1, 16
        while query < num_queries:
            if best_loss < 0:
                return best
            steps = min(length, num_queries - query)
            C = len(best)
            noise = self.draw((steps, C + (2 if norm == "linf" else 5)), stream)
            for u in noise:
                p = slow_share(query, num_queries)
                tried = self.linf_step(best, u, p) if norm == "linf" else self.l2_step(best, u, p)
                if self.loss(tried) < best_loss:
                    best, best_loss = tried, self.loss(tried)
                query += 1
            stream, length = stream + 1, min(2 * length, 256)
        return best

    def linf_start(self):
        C, H, W = self.x.shape
        u, a = self.draw((C, 1, W), 0), self.x.copy()
        for c, i, j in np.ndindex(C, H, W):
            a[c, i, j] += self.epsilon * (-1 if u[c, 0, j] < 0.5 else 1)
        return a.clip(0, 1)

    def linf_step(self, best, u, p):
        C, H, W = best.shape
        side = min(max(round((p * H * W) ** 0.5), 1), H, W)
        row, column = int(u[0] * (H - side + 1)), int(u[1] * (W - side + 1))
        a = best.copy()
        for c in range(C):
            sign = -1 if u[2 + c] < 0.5 else 1
            for i in range(row, row + side):
                for j in range(column, column + side):
                    # the step of 2 epsilon, projected
                    moved = a[c, i, j] + 2 * self.epsilon * sign
                    low, high = self.x[c, i, j] - self.epsilon, self.x[c, i, j] + self.epsilon
                    a[c, i, j] = min(max(moved, low, 0), high, 1)
        return a

    def l2_start(self):
        C, H, W = self.x.shape
        side = max(min(H, W) // 5, 1)
        rows, columns = H // side, W // side
        u = self.draw((1 + C, rows, columns), 0)
        delta = np.zeros_like(self.x)
        for r in range(rows):
            for q in range(columns):
                shape = slow_bump(side)
                shape = shape.T if u[0, r, q] < 0.5 else shape
                i, j = (H - rows * side) // 2 + r * side, (W - columns * side) // 2 + q * side
                for c in range(C):
                    sign = -1 if u[1 + c, r, q] < 0.5 else 1
                    delta[c, i : i + side, j : j + side] = sign * shape
        return self.at_distance(delta)

    def l2_step(self, best, u, p):
        C, H, W = best.shape
        side = max(round((p * H * W) ** 0.5), 3)
        side = min(side + (side % 2 == 0), H, W)
        row, column, row2, column2 = (
            int(v * (n - side + 1)) for v, n in zip(u[:4], (H, W, H, W), strict=True)
        )
        here = np.s_[row : row + side, column : column + side]
        there = np.s_[row2 : row2 + side, column2 : column2 + side]
        both = np.zeros((H, W), bool)
        both[here] = both[there] = True
        delta = best - self.x
        left = max(self.epsilon**2 - (delta**2).sum(), 0) / C
        shape = slow_bump(side)
        shape = shape.T if u[4] < 0.5 else shape
        new = delta.copy()
        for c in range(C):
            old = delta[c][here]
            fresh = (-1 if u[5 + c] < 0.5 else 1) * shape + old / (1e-12 + norm_of(old))
            length = math.sqrt(left + (delta[c][both] ** 2).sum())
            new[c][there] = 0
            new[c][here] = fresh / (1e-12 + norm_of(fresh)) * length
        return self.at_distance(new)

    def at_distance(self, delta):
        return (self.x + self.epsilon * delta / norm_of(delta)).clip(0, 1)


def norm_of(values):
    return math.sqrt((values**2).sum())


def slow_share(query, num_queries):
    done = int((query - 1) / num_queries * 10_000)
    p = 0.8
    for after in HALVED_AFTER:
        if done > after:
            p /= 2
    return p


def slow_bump(side):
    """eta of section 4.2: halves eta^(h1, h2), with M and n of the paper, one above the other."""

    def half(h1, h2):
        n, eta = max(h1, h2) // 2, np.zeros((h1, h2))
        for r in range(1, h1 + 1):
            for s in range(1, h2 + 1):
                M = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
                eta[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(M + 1))
        return eta / norm_of(eta) if h1 else eta

    whole = np.concatenate([half(side // 2, side), -half(side - side // 2, side)])
    return whole / norm_of(whole)


class TestGeometry:
    @pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 11])
    def test_bump(self, side):
        np.testing.assert_allclose(bump(side).numpy(), slow_bump(side), atol=1e-7)
        assert bump(side).norm().item() == pytest.approx(1, abs=1e-6)

    def test_schedule(self):
        """Halved nine times, at the same share of any number of queries."""
        for num_queries in (10, 77, 5000, 10_000):
            for query in {1, 2, num_queries - 1, *range(1, num_queries, 37)}:
                assert share(query, num_queries, 0.8) == slow_share(query, num_queries)
        assert share(1, 10_000, 0.8) == 0.8
        assert [share(after + 2, 10_000, 0.8) for after in (10, 50, 8000)] == [0.4, 0.2, 0.8 / 512]

    @NORMS
    @pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (2, 12, 6), (1, 2, 3)])
    def test_the_papers_loop(self, norm, shape):
        model = Linear(shape, NUM_CLASSES)
        images = make_images(4, shape)
        labels = model(images).argmax(dim=1)
        index = torch.tensor([3, 0, 77, 100_000])
        for num_queries in (1, 2, 60):
            options = {"epsilon": 0.06, "norm": norm, "seed": 5, "sample_index": index}
            found = square(model, images, labels, num_queries=num_queries, **options)
            for b in range(4):
                slow = Slow(model, images[b], int(labels[b]), 0.06, 5, int(index[b]))
                expected = torch.from_numpy(slow.run(norm, num_queries)).float()
                torch.testing.assert_close(found[b], expected, rtol=0, atol=2e-6)


class TestNoise:
    @NORMS
    def test_any_of_the_draws(self, norm):
        """The first of N points that fools, or the one of largest margin loss: by brute force."""
        model, images, labels, _ = case(24)
        epsilon, index = {"linf": 0.1, "l2": 1.5}[norm], torch.arange(3, 27)
        points = []
        for draw in range(12):
            delta = uniform_in_ball(4, index, SHAPE, norm, stream=draw)
            points.append((images + epsilon * delta).clamp(0, 1))
        options = {"epsilon": epsilon, "norm": norm, "seed": 4, "sample_index": index}
        found = random_noise(model, images, labels, num_draws=12, **options)
        broken = torch.stack([fooled(model, a, labels) for a in points])
        losses = torch.stack([margin(model(a), labels) for a in points])
        for b in range(len(images)):
            first = broken[:, b].nonzero().flatten().tolist()
            which = first[0] if first else int(losses[:, b].argmax())
            torch.testing.assert_close(found[b], points[which][b], rtol=0, atol=2e-6)
        assert 0 < broken.any(dim=0).sum() < len(images)

    def test_one_forward_for_each_draw_of_an_image_that_stands(self):
        model, images, labels, _ = case(8)
        labels[:3] = (labels[:3] + 1) % NUM_CLASSES
        report = AttackReport()
        found = random_noise(model, images, labels, epsilon=1e-4, num_draws=10, report=report)
        assert torch.equal(found[:3], images[:3])
        assert report.num_forwards == 8 + 10 * 5
        assert report.num_backwards == 0


class TestTargets:
    @BOTH
    @NORMS
    def test_they_are_reached_and_nothing_else_counts(self, norm, attack):
        model, images, labels, _ = case(60, norm=norm)
        targets = (labels + 1) % 5
        options = {"norm": norm, "epsilon": 4 * EPSILON[norm]}
        found = attack(model, images, labels, targets=targets, **options)
        answers = model(found).argmax(dim=1)
        assert (answers == targets).sum() >= 3
        # wrong already, but not as was asked
        found = attack(model, images, (labels + 2) % 5, targets=targets, **options)
        assert torch.equal(model(found).argmax(dim=1) == targets, answers == targets)
        with pytest.raises(LabelError, match="targets: 7"):
            attack(model, images, labels, targets=torch.full((60,), 7), **options)


class TestSearch:
    @NORMS
    def test_budget_and_range(self, norm):
        """Over a million pixels, most of them at the end of their interval, black and white too."""
        model, images, labels, _ = case(360, norm=norm)
        epsilon = torch.linspace(0, 0.3, 360) * (1 if norm == "linf" else 8)
        for attack in ATTACKS.values():
            for clamp in ("pixels", "none"):
                found = (
                    attack(
                        clamped(model, clamp),
                        images,
                        labels,
                        epsilon=epsilon,
                        norm=norm,
                        num_restarts=2,
                    )
                    if attack is ATTACKS["square"]
                    else attack(clamped(model, clamp), images, labels, epsilon=epsilon, norm=norm)
                )
                assert (distance(found, images, norm) <= epsilon + 1e-6).all()
                if clamp == "pixels":
                    assert found.min() >= 0
                    assert found.max() <= 1
                assert torch.equal(found[0], images[0])  # a radius of zero

    def test_exact_on_a_linear_model(self):
        """Two classes: the corner that points along the weights decides; nothing beats it."""
        model, images = Linear(num_classes=2), make_images(60)
        labels = model(images).argmax(dim=1)
        direction = (model.weight[1] - model.weight[0]).sign()
        side = (1 - 2 * labels)[:, None, None, None]
        corner = (images + 0.02 * side * direction).clamp(0, 1)
        breakable = fooled(model, corner, labels)
        assert 10 < breakable.sum() < 50
        found = square(model, images, labels, epsilon=0.02, num_queries=800)
        broken = fooled(model, found, labels)
        assert not (broken & ~breakable).any()
        assert broken.sum() >= 0.9 * breakable.sum()

    @NORMS
    def test_where_gradients_are_hidden(self, norm):
        """Steps of the input have no gradient anywhere; queries do not ask for one."""
        linear, images, labels, epsilon = case(20, norm=norm)

        class Steps(nn.Module):
            def forward(self, x):
                return linear((x * 64).round() / 64)

        labels = Steps()(images).argmax(dim=1)
        report = AttackReport()
        found = square(
            Steps(), images, labels, epsilon=epsilon, norm=norm, num_queries=100, report=report
        )
        assert fooled(Steps(), found, labels).sum() >= 5
        assert report.num_backwards == 0

    def test_queries_are_counted(self):
        """One verdict of all, num_queries each for those that stand, and a last verdict."""
        model, images, labels, _ = case(8)
        labels[2:] = (labels[2:] + 1) % NUM_CLASSES
        report = AttackReport()
        for num_queries, num_restarts in ((1, 1), (50, 1), (20, 3)):
            found = square(
                model,
                images,
                labels,
                epsilon=1e-4,
                num_queries=num_queries,
                num_restarts=num_restarts,
                report=report,
            )
            assert torch.equal(found[2:], images[2:])  # wrong already
            assert report.num_forwards == 8 + num_restarts * 2 * (num_queries + 1)

    def test_found_images_cost_nothing_further(self):
        model, images, labels, _ = case(8)
        report = AttackReport()
        found = square(model, images, labels, epsilon=1.0, num_queries=3000, report=report)
        assert fooled(model, found, labels).all()
        assert report.num_forwards < 8 * 200

    @NORMS
    def test_more_queries_lower_the_loss(self, norm):
        model, images, labels, epsilon = case(30, norm=norm)
        options = {"epsilon": epsilon / 2, "norm": norm}
        losses = [
            margin(model(square(model, images, labels, num_queries=n, **options)), labels).mean()
            for n in (1, 10, 100)
        ]
        assert losses[0] < losses[1] < losses[2]

    @NORMS
    def test_restarts_never_help_the_defender(self, norm):
        model, images, labels, epsilon = case(60, norm=norm)
        options = {"epsilon": epsilon, "norm": norm, "num_queries": 12}
        broken, losses = [], []
        for restarts in (1, 2, 4):
            found = square(model, images, labels, num_restarts=restarts, **options)
            broken.append(fooled(model, found, labels))
            losses.append(margin(model(found), labels))
        for i in (0, 1):
            assert not (broken[i] & ~broken[i + 1]).any()
            standing = ~broken[i + 1]
            assert (losses[i + 1] >= losses[i])[standing].all()
        assert broken[0].sum() < broken[2].sum()

    def test_the_model_has_the_last_word(self):
        """A plan that sees every image broken, or nothing finite, or no change."""
        model, images, labels, epsilon = case(12)

        class Plan:
            deterministic, back_end, graphs = True, "planted", None

            def __init__(self, function):
                self.function = function
                self.gradient = None

            def gflop_per_image(self, shape):
                return None

            def __call__(self, x):
                return self.function(model(x))

        honest = square(model, images, labels, epsilon=epsilon, num_queries=60)
        target = AttackTarget(model, Plan(lambda z: z))
        assert torch.equal(square(target, images, labels, epsilon=epsilon, num_queries=60), honest)
        everyone = lambda z: z - 100 * nn.functional.one_hot(labels[: len(z)], NUM_CLASSES)  # noqa: E731
        for function in (everyone, lambda z: z * torch.inf):
            target, report = AttackTarget(model, Plan(function)), AttackReport()
            found = square(target, images, labels, epsilon=1e-4, num_queries=49, report=report)
            # asked at each of three verdicts, the model stands by its answer
            assert report.num_forwards == 12 * (1 + 49 + 3)
            assert (distance(found, images, "linf") <= 1e-4 + 1e-6).all()
            random_noise(target, images, labels, epsilon=1e-4, num_draws=9, report=report)
            assert report.num_forwards == 12 * (1 + 9 + 9)
        # a plan that no query changes: the image of the last verdict is the start
        target = AttackTarget(model, Plan(lambda z: 0 * z + nn.functional.one_hot(labels, 5)[:1]))
        start = square(model, images[:1], labels[:1], epsilon=epsilon, num_queries=1)
        found = square(target, images[:1], labels[:1], epsilon=epsilon, num_queries=20)
        assert torch.equal(found, start)

    @BOTH
    def test_logits_that_are_not_finite_are_a_failure(self, attack):
        linear, images, _, _ = case(10)
        labels = linear(images).argmax(dim=1)
        for bad in (torch.nan, torch.inf, -torch.inf):
            # fails a little away from each image
            def broken(x, bad=bad):
                moved = (x - images[: len(x)]).abs().amax(dim=(1, 2, 3)) > 1e-3
                return torch.where(moved.unsqueeze(1), bad, linear(x))

            found = attack(broken, images, labels, epsilon=0.01)
            assert ((found - images).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
            unmoved = attack(lambda x, bad=bad: linear(x) * bad, images, labels, epsilon=0.01)
            assert torch.equal(unmoved, images)

    @BOTH
    def test_a_random_model_by_its_mean(self, attack):
        model, (_, images, labels, epsilon) = Noisy(Linear(), 0.1), case(6)
        report = AttackReport()
        options = {"epsilon": epsilon, "eot_samples": 3}
        first = attack(model, images, labels, report=report, **options)
        assert report.num_forwards % 3 == 0
        assert torch.equal(first, attack(model, images, labels, **options))


class TestIndependence:
    """An image's adversary depends on its seed and sample index alone."""

    @BOTH
    @NORMS
    def test_of_batch_size_and_order(self, attack, norm):
        """Equal bits, while images of one batch fall at different times."""
        model, images, labels, epsilon = case(12, norm=norm)
        index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:12]
        options = {"epsilon": epsilon, "norm": norm, "seed": 8}
        whole = attack(model, images, labels, sample_index=index, **options)
        broken = fooled(model, whole, labels)
        assert attack is ATTACKS["noise"] or 0 < broken.sum() < 12
        for sizes in ((1,) * 12, (5, 7)):
            parts = [
                attack(model, x, y, sample_index=i, **options)
                for x, y, i in zip(
                    images.split(sizes), labels.split(sizes), index.split(sizes), strict=True
                )
            ]
            assert torch.equal(torch.cat(parts), whole)
        order = torch.arange(12).flip(0)
        mixed = attack(model, images[order], labels[order], sample_index=index[order], **options)
        assert torch.equal(mixed, whole[order])

    @BOTH
    def test_of_all_else(self, attack):
        model, images, labels, epsilon = case(6)
        options = {"epsilon": epsilon / 3}
        first = attack(model, images, labels, **options)
        torch.manual_seed(3)
        index = torch.arange(6)
        assert torch.equal(first, attack(model, images, labels, sample_index=index, **options))
        assert not torch.equal(first, attack(model, images, labels, seed=1, **options))
        moved = attack(model, images, labels, sample_index=index + 1, **options)
        assert not torch.equal(first, moved)
        with torch.no_grad():
            assert torch.equal(first, attack(model, images, labels, **options))
        with torch.inference_mode():
            assert torch.equal(first, attack(model, images, labels, **options))

    @BOTH
    def test_of_autocast(self, attack):
        """The search is in bfloat16; the state and the verdict are not."""
        model, images = SmallNet(), make_images(16)
        labels = model.eval()(images).argmax(dim=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = attack(model, images, labels, epsilon=0.03)
        assert found.dtype is torch.float32
        assert (distance(found, images, "linf") <= 0.03 + 1e-6).all()


class TestManners:
    @BOTH
    @NORMS
    def test_no_trace(self, attack, norm):
        images = make_images(4)
        labels = SmallNet().eval()(images).argmax(dim=1)
        for call in (None, 1, 2, 9):
            network = SmallNet()
            model = network if call is None else FailsAt(network, call)
            disordered(model)
            before = everything(model)
            if call is None:
                found = attack(model, images, labels, epsilon=1e-3, norm=norm)
                assert not found.requires_grad
            else:
                with pytest.raises(Injected):
                    attack(model, images, labels, epsilon=1e-3, norm=norm)
            assert everything(model) == before
        assert torch.equal(images, make_images(4))

    @BOTH
    def test_no_images(self, attack):
        images, labels = make_images(0), make_labels(0)
        assert attack(Linear(), images, labels, epsilon=0.1).shape == (0, *SHAPE)

    @BOTH
    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"images": make_images(4) * 255}, PixelRangeError),
            ({"images": make_images(4) * torch.nan}, PixelRangeError),
            ({"labels": torch.full((4,), NUM_CLASSES)}, LabelError),
            ({"labels": torch.zeros(4)}, LabelError),
            ({"model": Mapped(Linear(), lambda z: z.softmax(dim=1))}, ModelOutputError),
            ({"model": Mapped(Linear(), lambda z: (z, z))}, ModelOutputError),
            ({"epsilon": 8.0}, ConfigError),
            ({"epsilon": -0.1}, ConfigError),
            ({"epsilon": torch.rand(3)}, ConfigError),
            ({"norm": "l1"}, ConfigError),
            ({"norm": "l2", "epsilon": 99.0}, ConfigError),
            ({"bn_mode": "off"}, ConfigError),
            ({"eot_samples": 0}, ConfigError),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
    )
    def test_bad_input(self, attack, change, error):
        settings = {
            "model": Linear(),
            "images": make_images(4),
            "labels": make_labels(4),
            "epsilon": 0.1,
            **change,
        }
        batch = [settings.pop(name) for name in ("model", "images", "labels")]
        with pytest.raises(error):
            attack(*batch, **settings)

    @pytest.mark.parametrize(
        ("function", "setting", "message"),
        [
            (square, {"num_queries": 0}, "num_queries: 0"),
            (square, {"num_queries": 10.0}, "num_queries: 10.0"),
            (square, {"num_restarts": 0}, "num_restarts: 0"),
            (square, {"p_init": 0.0}, "p_init: 0.0"),
            (square, {"p_init": 1.5}, "p_init: 1.5"),
            (square, {"p_init": True}, "p_init: True"),
            (square, {"p_init": math.nan}, "p_init: nan"),
            (random_noise, {"num_draws": 0}, "num_draws: 0"),
        ],
    )
    def test_impossible_settings(self, function, setting, message):
        never = Mapped(Linear(), lambda z: pytest.fail("the model was asked"))
        with pytest.raises(ConfigError) as error:
            function(never, make_images(4), make_labels(4), epsilon=0.1, **setting)
        assert message in str(error.value)
