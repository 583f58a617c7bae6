"""FGSM and PGD: against their formulas, against other libraries, and within their budget."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_attacks import clamped, pgd_from_gradient, pgd_snapshots
from small_models import (
    NUM_CLASSES,
    SHAPE,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    make_images,
    make_labels,
)
from torch import nn

import moe_kernels
from dwf.attacks import bim, cross_entropy, fgsm, input_gradient, margin, mim, pgd
from dwf.attacks.ascent import Ascent, ascend
from dwf.attacks.setup import Setup
from dwf.checks import ConfigError, ImageError, LabelError
from dwf.models import build_network

IMAGES, LABELS = make_images(6), make_labels(6)
PLAIN = {"epsilon": 8 / 255, "step_size": 2 / 255, "num_steps": 10, "random_start": False}


def make_model(name):
    if name == "linear":
        return Linear().eval()
    if name == "smooth":
        return SmallNet().eval()
    network = build_network("resnet6", num_classes=NUM_CLASSES, width=4, in_channels=3, seed=0)
    return network.eval()


MODELS = pytest.mark.parametrize("model", ["linear", "smooth", "resnet6"])


def gradient_at(model, images, labels, loss=cross_entropy):
    leaf = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(model(leaf), labels).sum(), leaf)
    return grad


def slow_pgd(model, images, labels, start, epsilon, step_size, num_steps, low=0.0, high=1.0):
    """The formula, a pixel at a time, in float32 as the state is."""
    f = np.float32
    x, a = images.numpy(), start.clone().numpy()
    for _ in range(num_steps):
        grad = gradient_at(model, torch.from_numpy(a.copy()), labels).numpy()
        for at in np.ndindex(*a.shape):
            moved = f(a[at] + f(step_size) * np.sign(grad[at]))
            moved = min(max(moved, f(x[at] - f(epsilon))), f(x[at] + f(epsilon)))
            a[at] = min(max(moved, f(low)), f(high))
    return torch.from_numpy(a)


class TestFormula:
    @MODELS
    def test_fgsm(self, model):
        model = make_model(model)
        expected = slow_pgd(model, IMAGES, LABELS, IMAGES, 0.07, 0.07, 1)
        found = fgsm(model, IMAGES, LABELS, epsilon=0.07)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
        by_hand = (IMAGES + 0.07 * gradient_at(model, IMAGES, LABELS).sign()).clamp(0, 1)
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-7)

    @MODELS
    def test_pgd(self, model):
        model = make_model(model)
        expected = slow_pgd(model, IMAGES, LABELS, IMAGES, 0.06, 0.02, 7)
        found = pgd(
            model, IMAGES, LABELS, epsilon=0.06, step_size=0.02, num_steps=7, random_start=False
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)

    def test_random_start(self):
        """x + U(-epsilon, epsilon), clamped; from there as ever."""
        model = make_model("smooth")
        index = torch.tensor([9, 3, 100_000, 0, 7, 8])
        noise = moe_kernels.uniform_noise(11, index, SHAPE)
        start = (IMAGES + (2 * noise - 1) * 0.06).clamp(0, 1)
        expected = slow_pgd(model, IMAGES, LABELS, start, 0.06, 0.02, 4)
        found = pgd(
            model,
            IMAGES,
            LABELS,
            epsilon=0.06,
            step_size=0.02,
            num_steps=4,
            random_start=True,
            seed=11,
            sample_index=index,
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)

    def test_known_start(self):
        """Goes on from there, moved into the ball first."""
        model = SmallNet().eval()
        start = (IMAGES + 0.2 * make_images(6, seed=1)).clamp(0, 1)
        inside = torch.minimum(start, IMAGES + 0.06)
        settings = {"epsilon": 0.06, "step_size": 0.02, "num_steps": 4, "random_start": False}
        expected = slow_pgd(model, IMAGES, LABELS, inside, 0.06, 0.02, 4)
        found = pgd(model, IMAGES, LABELS, start=start, **settings)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
        with pytest.raises(ConfigError, match="start: given"):
            pgd(model, IMAGES, LABELS, start=start, **{**settings, "random_start": True})
        with pytest.raises(ImageError, match="start"):
            pgd(model, IMAGES, LABELS, start=start[:2], **settings)

    def test_normal_start(self):
        """The image, moved by N(0, 0.001^2); TRADES. Nothing else changes."""
        settings = {**PLAIN, "random_start": "normal", "num_steps": 1, "step_size": 1e-9}
        still = lambda logits, labels: 0 * logits.sum(dim=1)  # noqa: E731
        start = pgd(clamped(Linear(), "none"), IMAGES, LABELS, **settings, loss=still)
        noise = (start - IMAGES).flatten()
        assert noise.std().item() == pytest.approx(1e-3, rel=0.1)
        assert noise.mean().abs() < 1e-4
        inside = noise.abs() < 1e-3
        assert inside.double().mean().item() == pytest.approx(0.683, abs=0.06)
        settings |= {"epsilon": 1e-4, "step_size": 1e-5}
        assert (pgd(Linear(), IMAGES, LABELS, **settings) - IMAGES).abs().max() <= 1.01e-4
        with pytest.raises(ConfigError, match="random_start"):
            pgd(Linear(), IMAGES, LABELS, **{**PLAIN, "random_start": "gaussian"})

    def test_unclamped_space(self):
        """What views of normalized images use: no range at all, or [0, 1] against its nature."""
        model = make_model("smooth")
        z = 4 * IMAGES - 2
        for clamp, low, high in (("none", -np.inf, np.inf), ("unit", 0.0, 1.0)):
            expected = slow_pgd(model, z, LABELS, z, 0.5, 0.2, 4, low, high)
            found = pgd(
                clamped(model, clamp),
                z,
                LABELS,
                epsilon=0.5,
                step_size=0.2,
                num_steps=4,
                random_start=False,
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        with pytest.raises(ConfigError, match="clamp: 'all' is unknown"):
            fgsm(clamped(model, "all"), IMAGES, LABELS, epsilon=0.1)

    def test_exact_optimum_on_a_linear_model(self):
        """Two classes: the loss grows with one linear form, so its maximum is a corner."""
        model = Linear(num_classes=2)
        difference = model.weight[1] - model.weight[0]
        direction = (difference * (1 - 2 * LABELS.clamp(max=1))[:, None, None, None]).sign()
        optimum = (IMAGES + 0.1 * direction).clamp(0, 1)
        labels = LABELS.clamp(max=1)
        found = fgsm(model, IMAGES, labels, epsilon=0.1)
        torch.testing.assert_close(found, optimum, rtol=0, atol=2e-7)
        options = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 8}
        for random_start in (False, True):
            found = pgd(model, IMAGES, labels, **options, random_start=random_start)
            torch.testing.assert_close(found, optimum, rtol=0, atol=1e-6)

    def test_another_loss(self):
        model = make_model("smooth")

        def second_class(logits, labels):
            return logits[:, 1]

        expected = IMAGES + 0.05 * gradient_at(model, IMAGES, LABELS, second_class).sign()
        found = fgsm(model, IMAGES, LABELS, epsilon=0.05, loss=second_class)
        torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=1e-7)


class TestBudget:
    def test_ten_million_pixels(self):
        """None outside its ball by more than 1e-6, none outside [0, 1]."""
        shape, B = (3, 32, 32), 512
        flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        images, labels = make_images(B, shape), make_labels(B, 10)
        images[:8], images[8:16] = 0.0, 1.0
        spread = torch.linspace(0, 1, B)
        settings = [
            {"epsilon": epsilon, "step_size": epsilon / 2, "random_start": random_start}
            for epsilon in (1e-7, 1 / 255, 8 / 255, 0.3, 1.0)
            for random_start in (False, True)
        ]
        settings += [
            {"epsilon": spread, "step_size": spread.flip(0).clamp(min=1e-3), "random_start": True},
            {"epsilon": 8 / 255, "step_size": 1.0, "random_start": True},
            {"epsilon": spread, "step_size": 0.01, "random_start": True, "num_restarts": 2},
        ]
        num_pixels = num_outside = 0
        for setting in settings:
            for precision in (None, torch.bfloat16):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
                    found = pgd(flat, images, labels, num_steps=2, **setting)
                assert found.dtype is torch.float32
                epsilon = torch.as_tensor(setting["epsilon"], dtype=torch.float64)
                distance = (found.double() - images.double()).abs()
                outside = distance > epsilon.view(-1, 1, 1, 1) + 1e-6
                outside |= (found < 0) | (found > 1) | found.isnan()
                num_outside += int(outside.sum())
                num_pixels += found.numel()
        assert num_pixels >= 10**7
        assert num_outside == 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_float_images_become_float32(self, dtype):
        images = IMAGES.to(dtype)
        found = pgd(SmallNet(), images, LABELS, **PLAIN)
        assert found.dtype is torch.float32
        expected = pgd(SmallNet(), images.float(), LABELS, **PLAIN)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
    def test_any_strides(self, layout):
        images = {
            "channels_last": IMAGES.to(memory_format=torch.channels_last),
            "strided": make_images(12, (3, 16, 16))[::2, :, ::2, 1::2],
            "expanded": IMAGES[:1].expand(6, -1, -1, -1),
        }[layout]
        found = pgd(Linear(), images, LABELS, **PLAIN)
        assert found.is_contiguous()
        assert torch.equal(found, pgd(Linear(), images.contiguous(), LABELS, **PLAIN))

    def test_network_in_channels_last(self):
        model = make_model("resnet6")
        expected = pgd(model, IMAGES, LABELS, **PLAIN)
        images = IMAGES.to(memory_format=torch.channels_last)
        assert torch.equal(pgd(model, images, LABELS, **PLAIN), expected)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
    def test_any_integer_labels(self, dtype):
        found = pgd(SmallNet(), IMAGES, LABELS.to(dtype), **PLAIN)
        assert torch.equal(found, pgd(SmallNet(), IMAGES, LABELS, **PLAIN))

    def test_empty_batch(self):
        images, labels = IMAGES[:0], LABELS[:0]
        model = SmallNet()
        assert fgsm(model, images, labels, epsilon=0.1).shape == (0, *SHAPE)
        assert pgd(model, images, labels, **{**PLAIN, "random_start": True}).shape == (0, *SHAPE)
        assert input_gradient(model, images, labels).shape == (0, *SHAPE)
        found = pgd_snapshots(
            model, images, labels, epsilon=0.1, step_size=0.1, num_steps=[1, 2, 3]
        )
        assert [a.shape for a in found] == [(0, *SHAPE)] * 3


def slow_l2(model, images, labels, start, epsilon, step_size, num_steps, decay=None):
    """PGD in L2, or with decay momentum in L2, an image at a time, in float64 but for gradients."""
    found = []
    for b in range(len(images)):
        x, a = images[b].double(), start[b].double()
        velocity = torch.zeros_like(x)
        for _ in range(num_steps):
            grad = gradient_at(model, a[None].float(), labels[b : b + 1])[0].double()
            if decay is not None:
                grad = velocity = decay * velocity + grad / grad.abs().mean()
            a = a + step_size * grad / grad.norm()
            size = float((a - x).norm())
            a = (x + (a - x) * min(1.0, epsilon / size)).clamp(0, 1)
        found.append(a.float())
    return torch.stack(found)


class TestL2:
    @MODELS
    def test_by_a_slow_loop(self, model):
        model = make_model(model)
        expected = slow_l2(model, IMAGES, LABELS, IMAGES, 0.5, 0.2, 6)
        found = pgd(
            model,
            IMAGES,
            LABELS,
            epsilon=0.5,
            step_size=0.2,
            num_steps=6,
            random_start=False,
            norm="l2",
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        one = fgsm(model, IMAGES, LABELS, epsilon=0.5, norm="l2")
        expected = slow_l2(model, IMAGES, LABELS, IMAGES, 0.5, 0.5, 1)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)

    def test_exact_optimum_on_a_linear_model(self):
        """Two classes and room to every side: the farthest point along the weights."""
        model, labels = Linear(num_classes=2), LABELS.clamp(max=1)
        images = 0.5 + (IMAGES - 0.5) / 4
        weight = (model.weight[1] - model.weight[0]).detach()
        optimum = images + 0.5 * (1 - 2 * labels).view(-1, 1, 1, 1) * weight / weight.norm()
        for attack in (
            fgsm(model, images, labels, epsilon=0.5, norm="l2"),
            pgd(
                model,
                images,
                labels,
                epsilon=0.5,
                step_size=0.2,
                num_steps=40,
                random_start=True,
                norm="l2",
            ),
        ):
            torch.testing.assert_close(attack, optimum, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("random_start", [False, True, "normal"])
    def test_budget_and_range(self, random_start):
        shape, B = (3, 32, 32), 128
        flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        images, labels = make_images(B, shape), make_labels(B, 10)
        images[:8], images[8:16] = 0.0, 1.0
        epsilon = torch.linspace(0, 50, B)
        for step_size in (0.01, 100.0):
            found = pgd(
                flat,
                images,
                labels,
                epsilon=epsilon,
                step_size=step_size,
                num_steps=4,
                random_start=random_start,
                norm="l2",
            )
            size = (found.double() - images).flatten(1).norm(dim=1)
            assert (size <= epsilon * (1 + 1e-6) + 1e-6).all()
            assert 0 <= found.min() <= found.max() <= 1
            assert (size > 0).sum() >= B - 1

    @pytest.mark.parametrize("sizes", [(1,) * 6, (2, 4)])
    def test_independence_of_the_batch(self, sizes):
        options = {"epsilon": 0.3, "step_size": 0.1, "num_steps": 4, "random_start": True}
        options |= {"norm": "l2", "num_restarts": 2, "seed": 8}
        index = torch.tensor([40, 2, 31, 7, 5, 1000])
        whole = pgd(Linear(), IMAGES, LABELS, sample_index=index, **options)
        parts = [
            pgd(Linear(), images, labels, sample_index=part, **options)
            for images, labels, part in zip(
                IMAGES.split(sizes), LABELS.split(sizes), index.split(sizes), strict=True
            )
        ]
        assert torch.equal(torch.cat(parts), whole)

    def test_a_stopped_image_stays(self):
        steps = torch.tensor([2, 9, 2, 9, 2, 9])
        options = {"epsilon": 0.3, "step_size": 0.1, "random_start": False, "norm": "l2"}
        found = pgd(SmallNet(), IMAGES, LABELS, num_steps=steps, **options)
        short = pgd(SmallNet(), IMAGES, LABELS, num_steps=2, **options)
        assert torch.equal(found[::2], short[::2])
        assert not torch.equal(found[1::2], short[1::2])

    def test_nan_gradients_move_nothing(self):
        model = Mapped(SmallNet(), lambda logits: logits * torch.nan)
        assert torch.equal(fgsm(model, IMAGES, LABELS, epsilon=0.5, norm="l2"), IMAGES)
        assert torch.equal(mim(model, IMAGES, LABELS, **WITHOUT_START), IMAGES)


WITHOUT_START = {name: value for name, value in PLAIN.items() if name != "random_start"}


class TestBimAndMim:
    @MODELS
    def test_bim_is_pgd_from_the_image(self, model):
        model = make_model(model)
        found = bim(model, IMAGES, LABELS, **WITHOUT_START)
        assert torch.equal(found, pgd(model, IMAGES, LABELS, **PLAIN))

    @MODELS
    @pytest.mark.parametrize("decay", [1.0, 0.5])
    def test_mim_by_hand(self, model, decay):
        model = make_model(model)
        a, velocity = IMAGES.clone(), torch.zeros_like(IMAGES)
        for _ in range(5):
            grad = gradient_at(model, a, LABELS)
            velocity = decay * velocity + grad / grad.abs().mean(dim=(1, 2, 3), keepdim=True)
            a = (a + 0.02 * velocity.sign()).clamp(IMAGES - 0.06, IMAGES + 0.06).clamp(0, 1)
        budget = {"epsilon": 0.06, "step_size": 0.02, "num_steps": 5}
        found = mim(model, IMAGES, LABELS, decay=decay, **budget)
        # where gradients cancel, rounding decides on the sign
        assert ((found - a).abs() > 1e-6).float().mean() < 2e-3
        plain = bim(model, IMAGES, LABELS, **budget)
        assert torch.equal(mim(model, IMAGES, LABELS, decay=0.0, **budget), plain)

    def test_mim_in_l2(self):
        expected = slow_l2(SmallNet().eval(), IMAGES, LABELS, IMAGES, 0.5, 0.2, 5, decay=1.0)
        budget = {"epsilon": 0.5, "step_size": 0.2, "num_steps": 5, "norm": "l2"}
        found = mim(SmallNet(), IMAGES, LABELS, **budget)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class TestTargeted:
    TARGETS = (LABELS + 1) % NUM_CLASSES

    @MODELS
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_descends_the_loss_toward_the_target(self, model, norm):
        model = make_model(model)

        def away(logits, labels):
            return -F.cross_entropy(logits, self.TARGETS, reduction="none")

        budget = {**PLAIN, "norm": norm}
        found = pgd(model, IMAGES, LABELS, targets=self.TARGETS.int(), **budget)
        assert torch.equal(found, pgd(model, IMAGES, LABELS, loss=away, **budget))
        before, after = (cross_entropy(model(x), self.TARGETS) for x in (IMAGES, found))
        assert (after < before).all()

    def test_any_loss(self):
        model = Linear(num_classes=2)
        labels = LABELS.clamp(max=1)
        away = fgsm(model, IMAGES, labels, epsilon=0.1, loss=margin)
        toward = fgsm(model, IMAGES, labels, epsilon=0.1, loss=margin, targets=1 - labels)
        assert torch.equal(away, toward)  # of two classes there is one other

    def test_restarts_stop_at_the_target(self):
        """Wrong is not enough: an image is done when the model gives its target."""
        model, passes = Linear(), []
        counted = Mapped(model, lambda logits: (passes.append(len(logits)), logits)[1])
        options = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 2, "random_start": True}
        logits = model(IMAGES)
        wrong = (logits.argmax(dim=1) + 1) % NUM_CLASSES
        others = (wrong + 1) % NUM_CLASSES
        found = pgd(counted, IMAGES, others, targets=wrong, num_restarts=3, **options)
        reached = model(found).argmax(dim=1) == wrong
        assert passes[:3] == [6, 6, 6]
        first = pgd(model, IMAGES, others, targets=wrong, **options)
        open_ = model(first).argmax(dim=1) != wrong
        assert passes[3:6] == [int(open_.sum())] * min(int(open_.sum()), 1) * 3
        assert reached.sum() >= (~open_).sum()
        assert torch.equal(found[~open_], first[~open_])

    def test_bad_targets(self):
        for targets, message in (
            (self.TARGETS[:2], r"targets: expected shape \[6\]"),
            (self.TARGETS.float(), "targets: expected integers"),
            (self.TARGETS + 5, r"targets: \d at \[0\], expected 0 to 4"),
            (LABELS, r"targets: \d at \[0\] is the label itself, .* 6 of 6 are"),
        ):
            with pytest.raises(LabelError, match=message):
                pgd(Linear(), IMAGES, LABELS, targets=targets, **PLAIN)


class TestExactEqualities:
    @MODELS
    def test_fgsm_is_one_step(self, model):
        model = make_model(model)
        options = {"epsilon": 0.05, "step_size": 0.05, "num_steps": 1}
        for start in (False, True):
            found = fgsm(model, IMAGES, LABELS, epsilon=0.05, random_start=start, seed=2)
            one = pgd(model, IMAGES, LABELS, **options, random_start=start, seed=2)
            assert torch.equal(found, one)

    def test_fgsm_at_radius_zero_is_the_image(self):
        epsilon = torch.tensor([0.0, 0.1, 0.0, 0.1, 0.1, 0.1])
        assert torch.equal(fgsm(SmallNet(), IMAGES, LABELS, epsilon=0.0), IMAGES)
        found = fgsm(SmallNet(), IMAGES, LABELS, epsilon=epsilon)
        assert torch.equal(found[epsilon == 0], IMAGES[epsilon == 0])
        assert torch.equal(found[1:2], fgsm(SmallNet(), IMAGES, LABELS, epsilon=0.1)[1:2])

    @MODELS
    @pytest.mark.parametrize("bn_mode", ["eval", "train"])
    def test_snapshots_are_separate_runs(self, model, bn_mode):
        model = make_model(model)
        steps = [1, 3, 4, 9]
        options = {"epsilon": 0.06, "step_size": 0.02, "bn_mode": bn_mode, "seed": 4}
        found = pgd_snapshots(model, IMAGES, LABELS, num_steps=steps, **options)
        assert len({a.data_ptr() for a in found}) == len(steps)
        for adversarial, num_steps in zip(found, steps, strict=True):
            alone = pgd(model, IMAGES, LABELS, num_steps=num_steps, random_start=False, **options)
            assert torch.equal(adversarial, alone)

    def test_snapshots_of_a_random_model(self):
        model = Noisy(Linear())
        options = {"epsilon": 0.06, "step_size": 0.02, "eot_samples": 2, "seed": 4}
        found = pgd_snapshots(model, IMAGES, LABELS, num_steps=[2, 5], **options)
        for adversarial, num_steps in zip(found, (2, 5), strict=True):
            alone = pgd(model, IMAGES, LABELS, num_steps=num_steps, random_start=False, **options)
            assert torch.equal(adversarial, alone)

    @MODELS
    @pytest.mark.parametrize("bn_mode", ["eval", "train"])
    def test_a_known_gradient_is_used_as_it_is(self, model, bn_mode):
        model = make_model(model)
        gradient = input_gradient(model, IMAGES, LABELS, bn_mode=bn_mode)
        counted = Mapped(model, lambda logits: (passes.append(1), logits)[1])
        for attack, saved in (
            (
                lambda **known: pgd_from_gradient(
                    counted, IMAGES, LABELS, epsilon=0.05, step_size=0.05, **known
                ),
                1,
            ),
            (
                lambda **known: pgd_from_gradient(
                    counted,
                    IMAGES,
                    LABELS,
                    epsilon=8 / 255,
                    step_size=2 / 255,
                    num_steps=10,
                    **known,
                ),
                10,
            ),
            (
                lambda **known: pgd_snapshots(
                    counted,
                    IMAGES,
                    LABELS,
                    epsilon=0.05,
                    step_size=0.01,
                    num_steps=[2, 3],
                    **known,
                ),
                3,
            ),
        ):
            passes: list[int] = []
            expected = attack(bn_mode=bn_mode)
            assert len(passes) == saved
            passes.clear()
            found = attack(bn_mode=bn_mode, gradient=gradient)
            assert len(passes) == saved - 1
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("random_start", [True, "normal"])
    def test_a_block_of_rows_has_its_own_seed(self, random_start):
        """Three blocks in one batch are three attacks with a seed each."""
        images, labels, index = IMAGES, LABELS, torch.arange(2).repeat(3)
        setup = Setup(model=Linear(), images=images, labels=labels, epsilon=0.1, sample_index=index)
        how = Ascent(step_size=0.02, num_steps=3, random_start=random_start, block_seeds=(7, 8, 9))
        found = setup.held(ascend(setup, how))
        for seed, own, its_labels, part in zip(
            (7, 8, 9), images.split(2), labels.split(2), found.split(2), strict=True
        ):
            options = {"epsilon": 0.1, "step_size": 0.02, "num_steps": 3, "seed": seed}
            alone = pgd(Linear(), own, its_labels, random_start=random_start, **options)
            assert torch.equal(part, alone)

    def test_any_float_gradient(self):
        gradient = input_gradient(Linear(), IMAGES, LABELS)
        expected = fgsm(Linear(), IMAGES, LABELS, epsilon=0.1)
        for known in (
            gradient.double(),
            gradient.to(memory_format=torch.channels_last),
            gradient.clone().requires_grad_(),
        ):
            found = pgd_from_gradient(
                Linear(), IMAGES, LABELS, epsilon=0.1, step_size=0.1, gradient=known
            )
            assert torch.equal(found, expected)

    def test_eot_of_one_is_plain(self):
        for model in (SmallNet(), Noisy(Linear())):
            found = pgd(model, IMAGES, LABELS, **PLAIN, eot_samples=1)
            assert torch.equal(found, pgd(model, IMAGES, LABELS, **PLAIN))

    def test_eot_on_a_deterministic_model_is_plain(self):
        """The mean of 4 equal gradients has their sign."""
        found = pgd(SmallNet(), IMAGES, LABELS, **PLAIN, eot_samples=4)
        assert torch.equal(found, pgd(SmallNet(), IMAGES, LABELS, **PLAIN))

    def test_eot_finds_the_direction_under_noise(self):
        """One pass in four points the wrong way; the mean over many does not."""

        class Flips(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = Linear()

            def forward(self, images):
                return self.network(images) * (1.0 if torch.rand(()) < 0.75 else -1.0)

        def first_logit(logits, labels):
            return logits[:, 0]

        expected = fgsm(Linear(), IMAGES, LABELS, epsilon=0.1, loss=first_logit)
        options = {"epsilon": 0.1, "step_size": 0.1, "num_steps": 1, "random_start": False}
        agree = {1: 0, 40: 0}
        for samples in agree:
            for seed in range(20):
                found = pgd(
                    Flips(),
                    IMAGES,
                    LABELS,
                    eot_samples=samples,
                    seed=seed,
                    loss=first_logit,
                    **options,
                )
                agree[samples] += torch.equal(found, expected)
        assert 10 <= agree[1] <= 19
        assert agree[40] == 20

    def test_the_last_iterate_after_exactly_num_steps_gradients(self):
        passes = []
        model = Mapped(Linear(), lambda logits: (passes.append(1), logits)[1])
        for steps in (1, 2, 7):
            passes.clear()
            pgd(model, IMAGES, LABELS, **{**PLAIN, "num_steps": steps})
            assert len(passes) == steps


class TestPerImage:
    """A batch of images with budgets of their own is image-by-image runs."""

    EPSILON = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 1.0])
    STEP = torch.tensor([0.01, 0.02, 0.003, 0.01, 0.05, 0.3])
    STEPS = torch.tensor([1, 7, 3, 3, 5, 2])

    @pytest.mark.parametrize("random_start", [False, True])
    def test_budgets(self, random_start):
        model = Linear()
        options = {"random_start": random_start, "seed": 3}
        found = pgd(
            model,
            IMAGES,
            LABELS,
            epsilon=self.EPSILON,
            step_size=self.STEP,
            num_steps=self.STEPS,
            **options,
        )
        for b in range(6):
            alone = pgd(
                model,
                IMAGES[b : b + 1],
                LABELS[b : b + 1],
                epsilon=float(self.EPSILON[b]),
                step_size=float(self.STEP[b]),
                num_steps=int(self.STEPS[b]),
                sample_index=torch.tensor([b]),
                **options,
            )
            assert torch.equal(found[b : b + 1], alone)

    def test_fgsm(self):
        found = fgsm(Linear(), IMAGES, LABELS, epsilon=self.EPSILON)
        for b in range(6):
            epsilon = float(self.EPSILON[b])
            alone = fgsm(Linear(), IMAGES[b : b + 1], LABELS[b : b + 1], epsilon=epsilon)
            assert torch.equal(found[b : b + 1], alone)

    def test_a_stopped_image_stays_outside_of_the_ball_too(self):
        """Not even projected again: with its budget used up, an image is exactly as it was."""
        steps = torch.tensor([2, 9, 2, 9, 2, 9])
        found = pgd(SmallNet(), IMAGES, LABELS, **{**PLAIN, "num_steps": steps})
        short = pgd(SmallNet(), IMAGES, LABELS, **{**PLAIN, "num_steps": 2})
        assert torch.equal(found[::2], short[::2])

    @pytest.mark.parametrize(
        "setting",
        [
            {"epsilon": torch.rand(5)},
            {"step_size": torch.rand(6, 1)},
            {"num_steps": torch.ones(7, dtype=torch.int64)},
        ],
    )
    def test_wrong_shapes(self, setting):
        (name,) = setting
        with pytest.raises(ConfigError, match=f"{name}: expected a number or one for each of 6"):
            pgd(Linear(), IMAGES, LABELS, **{**PLAIN, **setting})


class TestIndependence:
    """An image's adversary depends on its seed, sample index and restart alone."""

    @pytest.mark.parametrize("num_restarts", [1, 3])
    @pytest.mark.parametrize("sizes", [(6,), (1,) * 6, (2, 4), (5, 1)])
    def test_of_the_batch_size(self, sizes, num_restarts):
        options = {**PLAIN, "random_start": True, "num_restarts": num_restarts, "seed": 8}
        index = torch.tensor([40, 2, 31, 7, 5, 1000])
        whole = pgd(Linear(), IMAGES, LABELS, sample_index=index, **options)
        parts = [
            pgd(Linear(), images, labels, sample_index=part, **options)
            for images, labels, part in zip(
                IMAGES.split(sizes), LABELS.split(sizes), index.split(sizes), strict=True
            )
        ]
        assert torch.equal(torch.cat(parts), whole)

    def test_of_the_order(self):
        options = {**PLAIN, "random_start": True, "seed": 8}
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        whole = pgd(Linear(), IMAGES, LABELS, sample_index=torch.arange(6), **options)
        mixed = pgd(Linear(), IMAGES[order], LABELS[order], sample_index=order, **options)
        assert torch.equal(mixed, whole[order])

    def test_of_the_batch_for_a_network(self):
        """Convolutions may round differently in another batch; hardly a sign changes."""
        model = make_model("resnet6")
        options = {**PLAIN, "random_start": True, "seed": 8}
        whole = pgd(model, IMAGES, LABELS, **options)
        single = torch.cat(
            [
                pgd(
                    model,
                    IMAGES[b : b + 1],
                    LABELS[b : b + 1],
                    sample_index=torch.tensor([b]),
                    **options,
                )
                for b in range(6)
            ]
        )
        assert ((whole - single).abs() > 1e-6).float().mean() < 0.01
        assert torch.equal(model(whole).argmax(dim=1), model(single).argmax(dim=1))

    def test_of_the_global_random_state(self):
        options = {**PLAIN, "random_start": True}
        torch.manual_seed(1)
        first = pgd(Linear(), IMAGES, LABELS, **options)
        torch.manual_seed(2)
        assert torch.equal(first, pgd(Linear(), IMAGES, LABELS, **options))

    def test_but_not_of_seed_and_index(self):
        options = {**PLAIN, "random_start": True, "num_steps": 1}
        first = pgd(Linear(), IMAGES, LABELS, **options)
        index = torch.arange(6)
        assert torch.equal(first, pgd(Linear(), IMAGES, LABELS, sample_index=index, **options))
        assert not torch.equal(first, pgd(Linear(), IMAGES, LABELS, seed=1, **options))
        other = pgd(Linear(), IMAGES, LABELS, sample_index=index + 1, **options)
        assert not torch.equal(first, other)


class TestMoreIsNeverLess:
    """More effort never helps the defender, image by image."""

    IMAGES, LABELS = make_images(200), make_labels(200, seed=5)

    @staticmethod
    def correct(model, adversarial, labels):
        with torch.no_grad():
            return model.eval()(adversarial).argmax(dim=1) == labels

    def test_restarts(self):
        model = SmallNet()
        labels = model.eval()(self.IMAGES).argmax(dim=1)  # all correct before the attack
        options = {"epsilon": 0.1, "step_size": 0.02, "num_steps": 4, "random_start": True}
        robust = [
            self.correct(model, pgd(model, self.IMAGES, labels, num_restarts=n, **options), labels)
            for n in (1, 2, 5)
        ]
        assert 0 < robust[0].sum() < 200
        for fewer, more in zip(robust[1:], robust[:-1], strict=True):
            assert not (fewer & ~more).any()

    def test_restarts_keep_the_first_success_or_the_highest_loss(self):
        model = SmallNet().eval()
        labels = model(self.IMAGES).argmax(dim=1)
        options = {"epsilon": 0.03, "step_size": 0.01, "num_steps": 4}
        starts = []
        for restart in range(3):
            noise = moe_kernels.uniform_noise(6, torch.arange(200), SHAPE, restart=restart)
            a = (self.IMAGES + (2 * noise - 1) * 0.03).clamp(0, 1)
            for _ in range(4):
                grad = gradient_at(model, a, labels)
                a = moe_kernels.linf_step_(a.clone(), grad, self.IMAGES, 0.03, 0.01)
            starts.append(a)
        with torch.no_grad():
            logits = torch.stack([model(a) for a in starts])
        fooled = logits.argmax(dim=2) != labels  # [restarts, B]
        loss = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
        best = torch.where(fooled.any(dim=0), fooled.int().argmax(dim=0), loss.argmax(dim=0))
        assert len(best.unique()) == 3
        expected = torch.stack(starts)[best, torch.arange(200)]
        found = pgd(
            model, self.IMAGES, labels, random_start=True, num_restarts=3, seed=6, **options
        )
        # in a smaller batch the last bit of a gradient may differ, rarely its sign
        assert ((found - expected).abs() > 1e-6).float().mean() < 1e-3

    def test_epsilon_on_a_linear_model(self):
        """Closed form for two classes: the margin less what the pixels' room allows."""
        model = Linear(num_classes=2)
        labels = model(self.IMAGES).argmax(dim=1)
        before = torch.ones(200, dtype=torch.bool)
        for epsilon in (0.0, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 1.0):
            found = fgsm(model, self.IMAGES, labels, epsilon=epsilon)
            correct = self.correct(model, found, labels)
            difference = (model.weight[1] - model.weight[0]).double()
            difference = difference * (2 * labels - 1)[:, None, None, None]
            room = torch.where(difference > 0, self.IMAGES, 1 - self.IMAGES).double()
            logits = model(self.IMAGES).double()
            margin = (logits[:, 1] - logits[:, 0]) * (2 * labels - 1)
            margin -= (difference.abs() * room.clamp(max=epsilon)).flatten(1).sum(dim=1)
            sure = margin.abs() > 1e-4
            assert sure.sum() > 190
            assert torch.equal(correct[sure], margin[sure] > 0)
            assert not (correct & ~before)[sure].any()
            before = correct
        assert before.sum() == 0  # a whole pixel range leaves nothing

    def test_steps_on_a_linear_model(self):
        """Each step of a convex loss with one slope gains until the corner is reached."""
        model = Linear(num_classes=2)
        labels = self.LABELS.clamp(max=1)
        found = pgd_snapshots(
            model,
            self.IMAGES,
            labels,
            epsilon=0.1,
            step_size=0.02,
            num_steps=[1, 2, 3, 5, 6, 20],
        )
        with torch.no_grad():
            loss = torch.stack([cross_entropy(model(a), labels) for a in (self.IMAGES, *found)])
        assert (loss[1:] >= loss[:-1] - 1e-5).all()
        corner = fgsm(model, self.IMAGES, labels, epsilon=0.1)
        torch.testing.assert_close(found[-1], corner, rtol=0, atol=1e-6)


class TestBrokenModels:
    def test_a_nan_gradient_moves_nothing(self):
        model = Mapped(SmallNet(), lambda logits: logits * torch.nan)
        assert torch.equal(fgsm(model, IMAGES, LABELS, epsilon=0.1), IMAGES)
        assert torch.equal(pgd(model, IMAGES, LABELS, **PLAIN), IMAGES)
        assert input_gradient(model, IMAGES, LABELS).isnan().any()

    def test_nan_in_one_image_leaves_the_others_alone(self):
        def damage(logits):
            return logits * torch.tensor([1, 1, torch.nan, 1, 1, 1])[:, None]

        found = pgd(Mapped(Linear(), damage), IMAGES, LABELS, **PLAIN)
        expected = pgd(Linear(), IMAGES, LABELS, **PLAIN)
        expected[2] = IMAGES[2]
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_restarts_stop_at_logits_that_are_not_finite(self, value):
        """Such an image is broken already: nothing is gained by going on."""
        passes = []

        def damage(logits):
            passes.append(len(logits))
            return logits + value

        found = pgd(
            Mapped(SmallNet(), damage),
            IMAGES,
            torch.zeros(6, dtype=torch.int64),
            epsilon=0.1,
            step_size=0.1,
            num_steps=2,
            random_start=True,
            num_restarts=5,
        )
        assert passes == [6, 6, 6]  # one start: two steps and the verdict
        assert found.isfinite().all()


class TestImpossibleSettings:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"num_restarts": 2}, "num_restarts > 1 needs random_start=True"),
            ({"num_restarts": 0}, "num_restarts: 0"),
            ({"eot_samples": 0}, "eot_samples: 0"),
            ({"num_steps": 0}, "num_steps: 0"),
            ({"norm": "l1"}, "norm: 'l1' is unknown"),
            ({"momentum": -1.0}, "momentum: -1.0"),
            ({"num_steps": 2.0}, "num_steps: 2.0"),
            ({"num_steps": torch.ones(6)}, "num_steps: expected integers, found torch.float32"),
            ({"num_steps": torch.arange(6)}, "num_steps: 0.0 is not possible"),
            ({"step_size": 0.0}, "step_size: 0.0"),
            ({"step_size": torch.arange(6) / 6}, "step_size: 0.0"),
        ],
    )
    def test_pgd(self, setting, message):
        with pytest.raises(ConfigError) as error:
            pgd(Linear(), IMAGES, LABELS, **{**PLAIN, **setting})
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"random_start": True, "gradient": IMAGES}, "random_start=True starts elsewhere"),
            ({"start": IMAGES, "gradient": IMAGES}, "a start .* elsewhere"),
            ({"block_seeds": (1, 2, 3, 4)}, "6 images do not divide into 4"),
            (
                {"block_seeds": (1, 2), "random_start": True, "num_restarts": 2},
                "block_seeds need num_restarts=1",
            ),
        ],
    )
    def test_below_the_public_functions(self, setting, message):
        setup = Setup(model=Linear(), images=IMAGES, labels=LABELS, epsilon=0.1)
        with pytest.raises(ConfigError, match=message):
            ascend(setup, Ascent(step_size=0.02, num_steps=2, **setting))

    def test_a_gradient_of_other_images(self):
        setup = Setup(model=Linear(), images=IMAGES, labels=LABELS, epsilon=0.1)
        with pytest.raises(ImageError, match=r"gradient: .*found torch.float32 \[3, 3, 8, 8\]"):
            ascend(setup, Ascent(step_size=0.02, num_steps=2, gradient=IMAGES[:3]))

    @pytest.mark.parametrize("num_steps", [[], [3, 1], [1, 1], [0, 1], [1, 2.5, 3]])
    def test_snapshots(self, num_steps):
        with pytest.raises(ConfigError, match="steps"):
            pgd_snapshots(Linear(), IMAGES, LABELS, epsilon=0.1, step_size=0.1, num_steps=num_steps)
