"""Losses of attacks, against numbers worked by hand."""

import math

import pytest
import torch
from small_models import Linear, make_images, make_labels

import dwf
from dwf.attacks.losses import cross_entropy, kl_divergence, kl_from
from dwf.checks import ConfigError


def test_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 log 2 + 1/2 log 2/3."""
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(q, p).item() != pytest.approx(expected, rel=1e-2)
    assert kl_divergence(p, p).item() == 0


def test_kl_of_underflowing_probabilities_is_finite():
    """Score gaps of 320 make a softmax of exactly 0, where the plain formula's gradient is NaN."""
    scores = torch.tensor([[320.0, 0.0]], requires_grad=True)
    others = torch.tensor([[0.0, 320.0]], requires_grad=True)
    loss = kl_divergence(scores.log_softmax(dim=1), others.log_softmax(dim=1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(320.0)
    assert scores.grad.isfinite().all()
    assert others.grad.isfinite().all()


def test_kl_from_takes_no_gradient_to_the_clean_side():
    clean = torch.randn(3, 4, requires_grad=True)
    logits = torch.randn(3, 4, requires_grad=True)
    loss = kl_from(clean)(logits, torch.zeros(3, dtype=torch.int64))
    assert loss.shape == (3,)
    assert (loss >= 0).all()
    loss.sum().backward()
    assert clean.grad is None
    expected = logits.detach().softmax(dim=1) - clean.detach().softmax(dim=1)
    torch.testing.assert_close(logits.grad, expected)


def test_kl_in_an_attack_is_the_same_in_any_division_of_the_batch():
    """Each image is compared with its own clean logits."""
    images, labels = make_images(6), make_labels(6)
    network = Linear()

    def attack(rows):
        return dwf.pgd(
            network,
            images[rows],
            labels[rows],
            epsilon=0.1,
            step_size=0.02,
            num_steps=3,
            random_start="normal",
            loss=kl_from(network(images[rows])),
            sample_index=torch.arange(6)[rows],
        )

    whole = attack(slice(None))
    assert torch.equal(torch.cat([attack(slice(0, 2)), attack(slice(2, 6))]), whole)
    before, after = (network(x).log_softmax(dim=1) for x in (images, whole))
    assert (kl_divergence(before, after) > 0).all()


def test_kl_needs_all_rows():
    images, labels = make_images(2), make_labels(2)
    with pytest.raises(ConfigError, match="num_restarts > 1: restarts drop rows"):
        dwf.pgd(
            Linear(),
            images,
            labels,
            epsilon=0.1,
            step_size=0.02,
            num_steps=3,
            random_start=True,
            num_restarts=2,
            loss=kl_from(Linear()(images)),
        )


def test_cross_entropy_of_half_precision_is_float32():
    logits = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    loss = cross_entropy(logits.bfloat16(), torch.tensor([0, 1]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-2)), math.log(2)]))
