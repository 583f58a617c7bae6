"""Gradients for attacks, and that fetching them leaves no trace."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_attacks import pgd_snapshots
from small_models import (
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
from torch.nn.parallel import DistributedDataParallel

from dwf.attacks import cross_entropy, fgsm, input_gradient, pgd
from dwf.attacks.autograd import Autograd
from dwf.attacks.door import undisturbed
from dwf.attacks.losses import TargetLoss
from dwf.attacks.source import GradientSource
from dwf.attacks.target import inner_model
from dwf.checks import ConfigError, LabelError, ModelOutputError

CPU = torch.device("cpu")
IMAGES, LABELS = make_images(4), make_labels(4)
BUDGET = {"epsilon": 0.1, "step_size": 0.03}
# every public function that differentiates, each with at least ten passes
ENTRIES = {
    "pgd": lambda model, **options: pgd(
        model, IMAGES, LABELS, **BUDGET, num_steps=10, random_start=False, **options
    ),
    "restarts": lambda model, **options: pgd(
        model,
        IMAGES,
        LABELS,
        **BUDGET,
        num_steps=3,
        random_start=True,
        num_restarts=3,
        eot_samples=3,
        **options,
    ),
    "pgd_snapshots": lambda model, **options: pgd_snapshots(
        model, IMAGES, LABELS, **BUDGET, num_steps=[1, 10], **options
    ),
}
SINGLE = {
    "fgsm": lambda model, **options: fgsm(model, IMAGES, LABELS, epsilon=0.1, **options),
    "input_gradient": lambda model, **options: input_gradient(model, IMAGES, LABELS, **options),
}


class TestLeavesNoTrace:
    @pytest.mark.parametrize("bn_mode", ["eval", "train"])
    @pytest.mark.parametrize("entry", [*ENTRIES, *SINGLE])
    def test_after_success(self, entry, bn_mode):
        model = disordered(SmallNet())
        before = everything(model)
        {**ENTRIES, **SINGLE}[entry](model, bn_mode=bn_mode)
        assert everything(model) == before

    @pytest.mark.parametrize("bn_mode", ["eval", "train"])
    @pytest.mark.parametrize("call", range(1, 11))
    @pytest.mark.parametrize("entry", ENTRIES)
    def test_after_an_exception_at_each_pass(self, entry, call, bn_mode):
        model = disordered(FailsAt(SmallNet(), call))
        before = everything(model)
        with pytest.raises(Injected):
            ENTRIES[entry](model, bn_mode=bn_mode)
        assert everything(model) == before

    @pytest.mark.parametrize("place", ["loss", "backward"])
    def test_after_an_exception_elsewhere(self, place):
        model = disordered(SmallNet())
        before = everything(model)

        def fail(*_):
            raise Injected

        def loss(logits, labels):
            if place == "loss":
                fail()
            logits.register_hook(fail)
            return cross_entropy(logits, labels)

        for entry in SINGLE.values():
            with pytest.raises(Injected):
                entry(model, loss=loss, bn_mode="train")
        assert everything(model) == before

    def test_callers_tensors(self):
        model = SmallNet()
        images, labels, index = IMAGES.clone().requires_grad_(), LABELS.clone(), torch.arange(4)
        epsilon, step = torch.full((4,), 0.1), torch.full((4,), 0.02)
        found = pgd(
            model,
            images,
            labels,
            epsilon=epsilon,
            step_size=step,
            num_steps=torch.tensor([1, 2, 3, 4]),
            random_start=True,
            sample_index=index,
        )
        assert not found.requires_grad
        assert found.grad_fn is None
        assert images.grad is None
        assert torch.equal(images.detach(), IMAGES)
        assert torch.equal(labels, LABELS)
        assert index.tolist() == [0, 1, 2, 3]
        assert torch.equal(epsilon, torch.full((4,), 0.1))
        assert torch.equal(step, torch.full((4,), 0.02))

    def test_result_is_not_the_callers_tensor(self):
        model = SmallNet()
        for images in (IMAGES, IMAGES[:0]):
            found = fgsm(model, images, LABELS[: len(images)], epsilon=0.0)
            assert torch.equal(found, images)
            assert found.data_ptr() != images.data_ptr() or len(images) == 0

    @pytest.mark.parametrize("bn_mode", ["eval", "train"])
    @pytest.mark.parametrize("training", [False, True])
    def test_a_graph_that_waits_for_its_backward(self, training, bn_mode):
        """Attack between a forward and its backward: the gradients are those without it."""
        model = SmallNet().train(training)
        model.dropout.p = 0.0
        grads = []
        for attacked in (False, True):
            model.zero_grad()
            loss = F.cross_entropy(model(IMAGES), LABELS)
            if attacked:
                ENTRIES["pgd"](model, bn_mode=bn_mode)
            loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_a_buffer_that_the_forward_replaces(self):
        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = Linear()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, images):
                self.calls = self.calls + 1
                return self.network(images)

        model = Counts()
        before = everything(model)
        ENTRIES["pgd"](model)
        assert everything(model) == before

    def test_only_batch_norm_trains_and_only_when_asked(self):
        seen = []

        class Watch(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = SmallNet()

            def forward(self, images):
                seen.append([m.training for m in (self.network.bn, self.network.dropout, self)])
                return self.network(images)

        model = Watch().train()
        SINGLE["fgsm"](model)
        SINGLE["fgsm"](model, bn_mode="train")
        assert seen == [[False, False, False], [True, False, False]]
        with pytest.raises(ConfigError, match="did you mean 'train'"):
            SINGLE["fgsm"](model, bn_mode="trian")

    def test_bn_mode_is_the_one_asked_for(self):
        """By hand: the same network with its normalization written out."""
        model = SmallNet().train()
        for bn_mode in ("eval", "train"):
            leaf = IMAGES.clone().requires_grad_()
            hidden = model.conv(leaf)
            bn = model.bn
            if bn_mode == "train":
                mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
            else:
                mean, var = bn.running_mean, bn.running_var
            scale = (var + bn.eps).rsqrt()[:, None, None]
            normal = (hidden - mean[:, None, None]) * scale
            normal = normal * bn.weight[:, None, None] + bn.bias[:, None, None]
            logits = model.linear(F.softplus(normal).flatten(1))
            (expected,) = torch.autograd.grad(F.cross_entropy(logits, LABELS) * 4, leaf)
            found = input_gradient(model, IMAGES, LABELS, bn_mode=bn_mode)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class TestRandomState:
    def test_a_random_model_draws_from_the_attacks_seed(self):
        model = Noisy(Linear())
        torch.manual_seed(1)
        first = ENTRIES["pgd"](model, seed=5)
        torch.manual_seed(2)
        assert torch.equal(first, ENTRIES["pgd"](model, seed=5))
        assert not torch.equal(first, ENTRIES["pgd"](model, seed=6))

    def test_the_callers_stream_goes_on(self):
        torch.manual_seed(3)
        expected = torch.rand(4)[1:]
        torch.manual_seed(3)
        torch.rand(1)
        ENTRIES["restarts"](Noisy(Linear()))
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
    def test_any_integer_is_a_seed(self, seed):
        assert torch.equal(ENTRIES["pgd"](Linear(), seed=seed), ENTRIES["pgd"](Linear()))


class TestSurroundings:
    """The caller may be anywhere; the result is the same."""

    def test_no_grad_and_inference_mode(self):
        model = SmallNet()
        expected = {name: entry(model) for name, entry in {**ENTRIES, **SINGLE}.items()}
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for name, entry in {**ENTRIES, **SINGLE}.items():
                    torch.testing.assert_close(entry(model), expected[name], rtol=0, atol=0)
        assert torch.is_grad_enabled()

    def test_tensors_made_in_inference_mode(self):
        model = SmallNet()
        with torch.inference_mode():
            images, labels = make_images(4), make_labels(4)
        found = pgd(model, images, labels, **BUDGET, num_steps=10, random_start=False)
        assert torch.equal(found, ENTRIES["pgd"](model))
        assert not found.is_inference()
        loss = F.cross_entropy(model(found), LABELS)
        loss.backward()  # an inference tensor could not be saved for this

    def test_autocast(self):
        model = SmallNet()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for entry in (*ENTRIES.values(), *SINGLE.values()):
                found = entry(model)
                found = found[-1] if isinstance(found, list) else found
                assert found.dtype is torch.float32
                assert found.isfinite().all()
            assert model(IMAGES).dtype is torch.bfloat16

    def test_distributed_wrapper_stays_out_of_it(self, tmp_path, monkeypatch):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
        try:
            model = SmallNet()
            parallel = DistributedDataParallel(model)

            def forward(*_, **__):
                raise AssertionError("an attack went through the wrapper, which communicates")

            monkeypatch.setattr(DistributedDataParallel, "forward", forward)
            assert inner_model(parallel) is model
            assert inner_model(model) is model
            for entry in ENTRIES.values():
                found, expected = entry(parallel), entry(model)
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
        finally:
            dist.destroy_process_group()

    def test_any_callable(self):
        model = SmallNet().eval()
        expected = ENTRIES["pgd"](model)
        assert torch.equal(ENTRIES["pgd"](lambda images: model(images)), expected)


class TestGradientSource:
    def test_linear_model_in_closed_form(self):
        """d/dx sum_b CE_b = sum_k (softmax(logits)_k - [k is the label]) weight_k."""
        model = Linear()
        found = GradientSource(model, cross_entropy)(IMAGES, LABELS)
        slope = model(IMAGES).softmax(dim=1) - F.one_hot(LABELS, 5)
        expected = torch.einsum("bk,kchw->bchw", slope.double(), model.weight.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert found.is_contiguous()
        assert not found.requires_grad

    def test_the_loss_is_summed(self):
        """An image's gradient does not know how many others there are."""
        model = Linear()
        whole = GradientSource(model, cross_entropy)(IMAGES, LABELS)
        for b in range(4):
            alone = GradientSource(model, cross_entropy)(IMAGES[b : b + 1], LABELS[b : b + 1])
            assert torch.equal(whole[b : b + 1], alone)

    def test_mean_over_samples(self):
        model = Noisy(Linear())
        with undisturbed(model, CPU, seed=7):
            found = GradientSource(model, cross_entropy, eot_samples=3)(IMAGES, LABELS)
        with undisturbed(model, CPU, seed=7):
            one = GradientSource(model, cross_entropy)
            expected = sum(one(IMAGES, LABELS) for _ in range(3)) / 3
        torch.testing.assert_close(found, expected)

    def test_passes_are_counted(self):
        source = GradientSource(Linear(), cross_entropy, eot_samples=3)
        source(IMAGES, LABELS)
        source(IMAGES[:2], LABELS[:2])
        assert source.passes == 3 * 4 + 3 * 2

    def test_passes_are_counted_by_kind(self):
        source = GradientSource(Linear(), cross_entropy, eot_samples=3)
        source.gradient_and_logits(IMAGES, LABELS)
        source.logits(IMAGES)
        source.fooled(IMAGES[:2], LABELS[:2])
        assert (source.passes, source.num_forwards, source.num_backwards) == (12, 30, 12)

    def test_gradient_and_logits_are_means_over_samples(self):
        model = Noisy(Linear())
        with undisturbed(model, CPU, seed=7):
            source = GradientSource(model, cross_entropy, eot_samples=3)
            found = source.gradient_and_logits(IMAGES, LABELS)
        with undisturbed(model, CPU, seed=7):
            one = GradientSource(model, cross_entropy)
            passes = [one.gradient_and_logits(IMAGES, LABELS) for _ in range(3)]
        for value, singles in zip(found, zip(*passes, strict=True), strict=True):
            torch.testing.assert_close(value, torch.stack(singles).mean(dim=0))
            assert not value.requires_grad

    def test_another_loss_for_one_call(self):
        model = Linear()
        source = GradientSource(model, cross_entropy)
        loss = TargetLoss(
            lambda logits, classes: -logits.gather(1, classes).sum(1), LABELS[:, None]
        )
        grad, logits = source.gradient_and_logits(IMAGES, LABELS, loss)
        torch.testing.assert_close(grad, -model.weight[LABELS])
        torch.testing.assert_close(logits, model(IMAGES).detach())
        expected = GradientSource(model, cross_entropy)(IMAGES, LABELS)
        assert torch.equal(source(IMAGES, LABELS), expected)

    def test_the_model_in_float32_decides_who_is_fooled(self):
        """By hand, under autocast, and whatever a plan says."""

        class Says(Autograd):
            def __call__(self, images):
                return torch.zeros(len(images), 5)

        seen = []
        model = Mapped(
            nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), lambda z: (seen.append(z), z)[1]
        )
        source = GradientSource(model, cross_entropy, plan=Says(model))
        with torch.autocast("cpu", torch.bfloat16):
            fooled = source.fooled(IMAGES, LABELS)
            assert source.logits(IMAGES).tolist() == [[0.0] * 5] * 4
        assert [z.dtype for z in seen] == [torch.float32]
        assert torch.equal(fooled, seen[0].argmax(dim=1) != LABELS)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_logits_that_are_not_finite_are_fooled(self, value):
        def damage(logits):
            logits = torch.nn.functional.one_hot(LABELS, 5).float() * 9 + 0 * logits
            logits[1, 3] = value
            return logits

        source = GradientSource(Mapped(Linear(), damage), cross_entropy)
        assert source.fooled(IMAGES, LABELS).tolist() == [False, True, False, False]

    def test_a_verdict_as_first_pass_is_checked(self):
        probabilities = GradientSource(lambda images: Linear()(images).softmax(1), cross_entropy)
        for call in (probabilities.fooled, lambda images, _: probabilities.logits(images)):
            with pytest.raises(ModelOutputError, match="probabilities"):
                call(IMAGES, LABELS)
        with pytest.raises(LabelError, match=r"5 at \[0\], expected 0 to 4"):
            GradientSource(Linear(), cross_entropy).fooled(IMAGES, torch.full((4,), 5))

    def test_a_loss_of_ones_own(self):
        """Pull one logit down: the gradient is minus that row of the weights."""
        model = Linear()
        source = GradientSource(model, lambda logits, labels: -logits[:, 2])
        assert torch.equal(source(IMAGES, LABELS), -model.weight[2].expand(4, -1, -1, -1))

    @pytest.mark.parametrize("kind", ["no_grad", "detach", "constant"])
    def test_output_that_does_not_depend_on_the_input(self, kind):
        network = Linear()
        constant = nn.Parameter(torch.randn(4, 5))
        forward = {
            "no_grad": torch.no_grad()(network),
            "detach": lambda images: network(images.detach()),
            "constant": lambda images: constant,
        }[kind]
        with pytest.warns(UserWarning, match="no gradient to follow"):
            found = fgsm(forward, IMAGES, LABELS, epsilon=0.1)
        assert torch.equal(found, IMAGES)

    def test_only_the_first_pass_is_checked(self):
        outputs = iter([torch.zeros(4, 5), torch.full((4, 5), 0.2)])
        source = GradientSource(
            lambda images: next(outputs) + 0 * images.sum(dim=(1, 2, 3))[:, None], cross_entropy
        )
        for _ in range(2):  # the second output looks like probabilities, by accident
            source(IMAGES, LABELS)
        probabilities = GradientSource(lambda images: Linear()(images).softmax(1), cross_entropy)
        with pytest.raises(ModelOutputError, match="probabilities"):
            probabilities(IMAGES, LABELS)
        with pytest.raises(LabelError, match=r"5 at \[0\], expected 0 to 4"):
            GradientSource(Linear(), cross_entropy)(IMAGES, torch.full((4,), 5))

    def test_probabilities_by_consent(self):
        def model(images):
            return Linear()(images).softmax(dim=1)

        found = fgsm(model, IMAGES, LABELS, epsilon=0.1, allow_probabilities=True)
        assert (found - IMAGES).abs().max() > 0.09


def test_cross_entropy_is_float32_per_image():
    logits = torch.randn(4, 5)
    expected = -logits.log_softmax(dim=1)[torch.arange(4), LABELS]
    torch.testing.assert_close(cross_entropy(logits, LABELS), expected)
    assert cross_entropy(logits.bfloat16(), LABELS).dtype is torch.float32


def test_no_warnings_in_the_usual_case():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for entry in (*ENTRIES.values(), *SINGLE.values()):
            entry(SmallNet())
