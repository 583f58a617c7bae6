"""Attacks on normalized images: the protocol of the published tables, against work by hand."""

import pytest
import torch
from small_models import Linear, SmallNet, everything, make_dataset, make_images, make_labels
from torch import nn

from dwf.attacks import pgd
from dwf.attacks.space import NormalizedSpace, attack_space
from dwf.config import EvaluationConfig
from dwf.evaluation import evaluate
from dwf.models import as_pixel_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES, LABELS = make_images(6), make_labels(6)


def normalized(images):
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def attack_by_hand(network, z, labels, epsilon, step_size, num_steps, clamp):
    """PGD on z, with ``network`` a function of z; the clamp of "unit" is [0, 1] all the same."""
    a = z.clone()
    for _ in range(num_steps):
        leaf = a.clone().requires_grad_()
        loss = nn.functional.cross_entropy(network(leaf), labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf)
        a = torch.clamp(a + step_size * grad.sign(), z - epsilon, z + epsilon)
        if clamp == "unit":
            a = a.clamp(0, 1)
    return a


def test_there_and_back():
    view = NormalizedSpace(nn.Identity(), MEAN, STD)
    z = view.from_pixels(IMAGES)
    torch.testing.assert_close(z, normalized(IMAGES))
    torch.testing.assert_close(view.to_pixels(z), IMAGES, rtol=0, atol=1e-6)
    torch.testing.assert_close(view(z), IMAGES, rtol=0, atol=1e-6)


def test_a_pixel_model_seen_from_z_is_its_network():
    network = SmallNet().eval()
    view = NormalizedSpace(as_pixel_model(network, MEAN, STD), MEAN, STD)
    z = normalized(IMAGES)
    torch.testing.assert_close(view(z), network(z), rtol=1e-4, atol=1e-5)


def test_pixels_are_left_alone():
    model = Linear()
    space = attack_space(model, "pixels", "unit", MEAN, STD)
    assert space.model is model
    assert space.enter(IMAGES) is IMAGES
    assert space.leave(IMAGES) is IMAGES
    assert space.clamp == "pixels"


@pytest.mark.parametrize("clamp", ["unit", "none"])
@pytest.mark.parametrize(("step_size", "num_steps"), [(0.02, 1), (0.005, 10)], ids=["fgsm", "pgd"])
def test_attack_by_hand(clamp, step_size, num_steps):
    network = SmallNet().eval()
    space = attack_space(as_pixel_model(network, MEAN, STD), "paper-compat", clamp, MEAN, STD)
    z = normalized(IMAGES)
    found = pgd(
        space,
        space.enter(IMAGES),
        LABELS,
        epsilon=0.02,
        step_size=step_size,
        num_steps=num_steps,
        random_start=False,
    )
    expected = attack_by_hand(network, z, LABELS, 0.02, step_size, num_steps, clamp)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if clamp == "unit":
        assert found.min() >= 0
        assert found.max() <= 1
        assert (found == 0).float().mean() > 0.1  # what the clamp does to normalized images
    else:
        assert (found - z).abs().max() <= 0.02 + 1e-6
    pixels = space.leave(found)
    torch.testing.assert_close(
        network(found), as_pixel_model(network, MEAN, STD).eval()(pixels), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("clamp", ["unit", "none"])
def test_table_by_hand(clamp):
    """The whole table of the paper-compat protocol: benign z as it is, attacked z clamped."""
    dataset = make_dataset(40)
    network = SmallNet().eval()
    with torch.no_grad():
        network.linear.weight.mul_(8)
    model = as_pixel_model(network, dataset.mean, dataset.std)
    z = normalized(dataset.images.float() / 255)
    labels = network(z).argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 5
    dataset = make_dataset(40, labels=labels)
    settings = EvaluationConfig(
        fgsm_epsilon=(0.01, 0.05),
        epsilon=0.02,
        step_size=0.005,
        num_steps=(3, 10),
        multi_start_steps=0,
        adaptive_steps=0,
    )
    before = everything(model)
    result = evaluate(model, dataset, settings, protocol="paper-compat", clamp=clamp, suite="paper")
    assert everything(model) == before
    expected = {"clean": z}
    for epsilon in (0.01, 0.05):
        expected[f"FGSM {epsilon}"] = attack_by_hand(network, z, labels, epsilon, epsilon, 1, clamp)
    for steps in (3, 10):
        expected[f"PGD-{steps}"] = attack_by_hand(network, z, labels, 0.02, 0.005, steps, clamp)
    assert [row.name for row in result.attacks] == list(expected)
    for row in result.attacks:
        correct = network(expected[row.name]).argmax(dim=1) == labels
        assert torch.equal(row.correct, correct), row.name
    assert result.attacks[0].accuracy == 0.75
    finding = next(f for f in result.findings if f.name == "protocol")
    assert finding.severity == "suspect"
    assert result.to_json()["protocol"] == "paper-compat"
    assert result.to_json()["clamp"] == clamp
