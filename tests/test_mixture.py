"""The soft mixture: eqs. (1)-(2) by hand, its auxiliary outputs, its size, its errors."""

import pytest
import torch
from small_models import (
    NUM_CLASSES,
    SHAPE,
    Linear,
    SmallNet,
    everything,
    make_images,
    make_labels,
)
from torch import nn

from dwf.attacks import input_gradient, pgd
from dwf.checks import ConfigError, ModelOutputError
from dwf.models import Mixture, MixtureOutput, MlpGate, Normalize, ResNet
from dwf.models.networks import RESNETS

IMAGES, LABELS = make_images(4), make_labels(4)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_mixture(num_experts=3, normalize=None):
    gate = MlpGate(SHAPE, num_experts, hidden=8)
    nn.init.normal_(gate.layers[3].weight)
    experts = [SmallNet(seed=e) for e in range(num_experts)]
    return Mixture(experts, gate, normalize).eval()


def by_hand(mixture, images):
    x = mixture.normalize(images)
    gate_logits = mixture.gate(x)
    logits = torch.zeros(len(images), NUM_CLASSES)
    for b in range(len(images)):
        weights = [torch.exp(g) for g in gate_logits[b]]
        for e, expert in enumerate(mixture.experts):
            logits[b] += weights[e] / sum(weights) * expert(x)[b]
    return logits


@pytest.mark.parametrize("normalize", [None, Normalize(MEAN, STD)], ids=["pixels", "normalized"])
@pytest.mark.parametrize("num_experts", [1, 3, 9])
def test_formula(num_experts, normalize):
    mixture = make_mixture(num_experts, normalize)
    torch.testing.assert_close(mixture(IMAGES), by_hand(mixture, IMAGES), rtol=1e-5, atol=1e-6)


def test_auxiliary_outputs():
    mixture = make_mixture()
    output = mixture(IMAGES, return_aux=True)
    assert isinstance(output, MixtureOutput)
    assert torch.equal(output.logits, mixture(IMAGES))
    assert torch.equal(output.gate_logits, mixture.gate(IMAGES))
    torch.testing.assert_close(output.gate_weights, output.gate_logits.softmax(dim=1))
    torch.testing.assert_close(output.gate_weights.sum(dim=1), torch.ones(4))
    assert output.expert_logits.shape == (3, 4, NUM_CLASSES)
    for e in range(3):
        assert torch.equal(output.expert_logits[e], mixture.experts[e](IMAGES))


def test_fresh_gate_is_the_mean_of_the_experts():
    mixture = Mixture([Linear(seed=e) for e in range(4)], MlpGate(SHAPE, 4))
    mean = torch.stack([expert(IMAGES) for expert in mixture.experts]).mean(dim=0)
    torch.testing.assert_close(mixture(IMAGES), mean)


def test_gradient_flows_through_experts_and_gate():
    """To the images: by finite differences in float64. To the weights: none is left out."""
    mixture = make_mixture(normalize=Normalize(MEAN, STD)).double()
    images = IMAGES.double()
    assert torch.autograd.gradcheck(
        lambda x: mixture(x.view(1, *SHAPE)).logsumexp(1), images[0].flatten().requires_grad_()
    )
    mixture(images).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in mixture.parameters())


def test_attacks_follow_the_gate():
    """The gradient at the images is that of the formula by hand, gate included."""
    mixture = make_mixture()
    leaf = IMAGES.clone().requires_grad_()
    loss = nn.functional.cross_entropy(by_hand(mixture, leaf), LABELS, reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    found = input_gradient(mixture, IMAGES, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        mixture.gate.layers[3].weight.zero_()
    assert not torch.allclose(input_gradient(mixture, IMAGES, LABELS), expected, rtol=0.1)


def test_one_expert_as_a_model():
    mixture = make_mixture(normalize=Normalize(MEAN, STD))
    output = mixture(IMAGES, return_aux=True)
    for e in range(3):
        assert torch.equal(mixture.expert(e)(IMAGES), output.expert_logits[e])
    assert mixture.expert(1).network is mixture.experts[1]


def test_architectures_may_differ():
    mixture = Mixture([Linear(), SmallNet(), nn.Sequential(Linear())], MlpGate(SHAPE, 3))
    assert mixture(IMAGES).shape == (4, NUM_CLASSES)


def test_names():
    assert make_mixture(2).expert_names == ["expert 0", "expert 1"]
    mixture = Mixture([Linear(), Linear()], MlpGate(SHAPE, 2), expert_names=("benign", "pgd"))
    assert mixture.expert_names == ["benign", "pgd"]
    assert mixture.num_experts == 2


def test_the_papers_size():
    block, num_blocks = RESNETS["resnet18"]
    with torch.device("meta"):
        experts = [ResNet(block, num_blocks) for _ in range(9)]
    mixture = Mixture(experts, MlpGate((3, 32, 32), 9), Normalize(MEAN, STD))
    assert sum(p.numel() for p in mixture.parameters()) == 100_960_163


def test_under_autocast():
    mixture = make_mixture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = mixture(IMAGES)
    torch.testing.assert_close(logits.float(), mixture(IMAGES), rtol=0.1, atol=0.1)
    options = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 3, "random_start": True}
    before = everything(mixture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pgd(mixture, IMAGES, LABELS, **options)
    assert (found - IMAGES).abs().max() <= 0.1 + 1e-6
    assert everything(mixture) == before


def test_empty_batch():
    mixture = make_mixture()
    output = mixture(IMAGES[:0], return_aux=True)
    assert output.logits.shape == (0, NUM_CLASSES)
    assert output.expert_logits.shape == (3, 0, NUM_CLASSES)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Mixture([], MlpGate(SHAPE, 1)), "experts: an empty list"),
            (
                lambda: Mixture([Linear(), len], MlpGate(SHAPE, 2)),
                r"experts\[1\]: expected a torch.nn.Module, found builtin_function",
            ),
            (lambda: Mixture([Linear()], len), "gate: expected a torch.nn.Module"),
            (
                lambda: Mixture([Linear()], MlpGate(SHAPE, 1), expert_names=["a", "b"]),
                "expert_names: 2 names for 1 experts",
            ),
        ],
    )
    def test_when_made(self, make, message):
        with pytest.raises(ConfigError, match=message):
            make()

    @pytest.mark.parametrize(
        ("experts", "gate", "message"),
        [
            ([0, 1], Linear(num_classes=3), r"gate: expected gate_logits \[4, 2\], found \[4, 3\]"),
            ([0, 1], nn.Flatten(0), r"gate: expected gate_logits \[4, 2\], found \[768\]"),
            ([0, "tuple"], None, r"experts\[1\]: expected logits \[4, 5\] .* found tuple"),
            (["tuple", 0], None, r"experts\[0\]: expected logits \[4, K\], found tuple"),
            ([0, "classes"], None, r"experts\[1\]: expected logits \[4, 5\].*, found \[4, 7\]"),
            ([0, "features"], None, r"experts\[1\]: .*, found \[4, 3, 8, 8\]"),
            (
                ["features", 0],
                None,
                r"experts\[0\]: expected logits \[4, K\], found \[4, 3, 8, 8\]",
            ),
            ([0, "one image"], None, r"experts\[1\]: .*, found \[1, 5\]"),
        ],
    )
    def test_at_the_first_batch(self, experts, gate, message):
        class Tuple(nn.Module):
            def forward(self, images):
                return (images.flatten(1),)

        class OneImage(Linear):
            def forward(self, images):
                return super().forward(images[:1])

        kinds = {
            0: Linear(),
            1: Linear(seed=1),
            "tuple": Tuple(),
            "classes": Linear(num_classes=7),
            "features": nn.Identity(),
            "one image": OneImage(),
        }
        mixture = Mixture([kinds[e] for e in experts], gate or Linear(num_classes=2))
        with pytest.raises(ModelOutputError, match=message):
            mixture(IMAGES)
