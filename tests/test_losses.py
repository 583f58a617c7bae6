"""Losses of attacks, against numbers worked by hand."""

import math

import pytest
import torch
from small_models import Linear, make_images, make_labels

import dwf
from dwf.attacks.losses import (
    cross_entropy,
    dlr,
    kl_divergence,
    kl_from,
    margin,
    targeted_dlr,
    toward,
)


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


def test_restarts_take_each_images_row_along():
    """Images that are done leave the batch, and the others are compared with what was theirs."""
    images, labels = make_images(6), make_labels(6)
    network = Linear()
    budget = {"epsilon": 0.05, "step_size": 0.02, "num_steps": 3}

    def attack(rows):
        return dwf.pgd(
            network,
            images[rows],
            labels[rows],
            **budget,
            random_start=True,
            num_restarts=4,
            loss=kl_from(network(images[rows])),
            sample_index=rows,
        )

    labels[::2] = network(images).argmax(dim=1)[::2]
    whole = attack(torch.arange(6))
    for b in range(6):
        assert torch.equal(attack(torch.tensor([b])), whole[b : b + 1])


class TestMarginAndRatios:
    LOGITS = torch.tensor([[4.0, 1.0, -1.0, 3.0], [0.0, 2.0, 5.0, 1.0]])
    LABELS = torch.tensor([0, 1])

    def test_margin_by_hand(self):
        assert margin(self.LOGITS, self.LABELS).tolist() == [-1.0, 3.0]

    def test_dlr_by_hand(self):
        """(3 - 4) / (4 - 1) and (5 - 2) / (5 - 1)."""
        torch.testing.assert_close(dlr(self.LOGITS, self.LABELS), torch.tensor([-1 / 3, 3 / 4]))

    def test_targeted_dlr_by_hand(self):
        """(-1 - 4) / (4 - (1 - 1) / 2) and (1 - 2) / (5 - (1 + 0) / 2)."""
        loss = targeted_dlr(self.LABELS, torch.tensor([2, 3]))
        expected = torch.tensor([-5 / 4, -1 / 4.5])
        torch.testing.assert_close(loss(self.LOGITS, self.LABELS), expected)
        part = loss.subset(torch.tensor([1]))
        torch.testing.assert_close(part(self.LOGITS[1:], self.LABELS[1:]), expected[1:])

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_ratios_do_not_know_the_scale(self, scale):
        labels, targets = self.LABELS, torch.tensor([2, 3])
        for loss in (dlr, targeted_dlr(labels, targets)):
            torch.testing.assert_close(loss(self.LOGITS * scale, labels), loss(self.LOGITS, labels))

    def test_few_classes(self):
        two, three = self.LOGITS[:, :2], self.LOGITS[:, :3]
        assert torch.equal(dlr(two, self.LABELS), margin(two, self.LABELS))
        assert not torch.equal(dlr(three, self.LABELS), margin(three, self.LABELS))
        targets = torch.tensor([1, 2])
        loss = targeted_dlr(self.LABELS, targets)(three, self.LABELS)
        assert loss.tolist() == [1.0 - 4.0, 5.0 - 2.0]

    @pytest.mark.parametrize("name", ["margin", "dlr", "targeted"])
    def test_gradients(self, name):
        labels = self.LABELS
        loss = {"margin": margin, "dlr": dlr, "targeted": targeted_dlr(labels, labels + 2)}[name]
        logits = self.LOGITS.double().requires_grad_()
        # float32 inside: finite differences of steps that it can hold
        assert torch.autograd.gradcheck(
            lambda z: loss(z, labels), (logits,), eps=1e-2, atol=1e-3, rtol=1e-2
        )

    @pytest.mark.parametrize("logits", [torch.zeros(2, 4), torch.full((2, 4), -7.0)])
    def test_ties(self, logits):
        labels = self.LABELS
        for loss in (margin, dlr, targeted_dlr(labels, labels + 2)):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, labels)
            assert value.tolist() == [0.0, 0.0]
            value.sum().backward()
            assert leaf.grad.isfinite().all()
            assert (leaf.grad[[0, 1], labels] < 0).all()  # less of the label is more loss

    def test_toward(self):
        loss = toward(cross_entropy, torch.tensor([2, 0]))
        expected = self.LOGITS.log_softmax(dim=1)[[0, 1], [2, 0]]
        torch.testing.assert_close(loss(self.LOGITS, self.LABELS), expected)


def test_cross_entropy_of_half_precision_is_float32():
    logits = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    loss = cross_entropy(logits.bfloat16(), torch.tensor([0, 1]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-2)), math.log(2)]))
