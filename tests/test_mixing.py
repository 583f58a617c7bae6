"""MixedNUTS: the formulas by hand, the choice of its parameters, and what evaluations see."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dwf
from dwf.checks import ConfigError, DataError
from dwf.config import AttackConfig
from dwf.data import Batch
from dwf.defenses import Crafter, get
from dwf.defenses.adaptive_smoothing import gate_step
from dwf.defenses.mixing import tuned
from dwf.models import MixedModel, Stretch, attack_views, share_gate
from dwf.training import train


class Constant(nn.Module):
    """The same logits for every image, with a gradient of zero."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1) + 0 * images.flatten(1).sum(1, keepdim=True)


IMAGES = torch.full((2, 1, 4, 4), 0.5)


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


class TestStretch:
    def test_by_hand(self):
        """LN(1, 2, 3) = (-1, 0, 1); with c = .5 then GELU, |.|^2, times 3."""
        found = Stretch(3.0, 2.0, 0.5)(torch.tensor([[1.0, 2.0, 3.0]]))
        expected = [3 * math.copysign(gelu(u) ** 2, gelu(u)) for u in (-0.5, 0.5, 1.5)]
        torch.testing.assert_close(found, torch.tensor([expected]))

    def test_finite_gradient_where_gelu_is_zero(self):
        logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
        Stretch(1.0, 0.5, 0.0)(logits).sum().backward()
        assert logits.grad.isfinite().all()


class TestMixedModel:
    def test_by_hand(self):
        """.25 (.5, .5) + .75 (.8, .2) = (.725, .275)."""
        model = MixedModel(Constant(0.0, 0.0), Constant(math.log(4), 0.0), 0.75)
        expected = torch.tensor([[0.725, 0.275]] * 2).log()
        torch.testing.assert_close(model(IMAGES), expected)
        torch.testing.assert_close(model.gate_weights(IMAGES), torch.tensor([[0.25, 0.75]] * 2))

    def test_a_gate_gives_the_share(self):
        model = MixedModel(Constant(0.0, 0.0), Constant(math.log(4), 0.0), Constant(math.log(3)))
        torch.testing.assert_close(model(IMAGES), torch.tensor([[0.725, 0.275]] * 2).log())

    def test_a_sure_robust_network_is_never_outvoted(self):
        """Its margin is over (1 - a) / a: whatever the accurate network says, it decides."""
        robust = Constant(3.0, 0.0)  # probabilities .953, .047: margin .905
        against = Constant(-50.0, 50.0)
        assert MixedModel(against, robust, 0.53)(IMAGES).argmax(1).tolist() == [0, 0]
        assert MixedModel(against, robust, 0.52)(IMAGES).argmax(1).tolist() == [1, 1]

    def test_views_attack_its_parts(self):
        model = MixedModel(Constant(0.0, 0.0), Constant(1.0, 0.0), 0.75)
        names = [view.name for view in attack_views(model)]
        assert "expert 0 (accurate)" in names
        assert "expert 1 (robust)" in names
        assert "robust, not stretched" not in names
        model.stretch = Stretch(1.0, 2.0, 0.0)
        assert "robust, not stretched" in [view.name for view in attack_views(model)]

    def test_its_experts_and_their_weights_make_its_answer(self):
        scaled, stretched = (
            MixedModel(
                Constant(0.0, 0.5), Constant(1.0, 0.0), stretch=Stretch(2, 1, 0), accurate_scale=3
            ).expert(e)(IMAGES)
            for e in range(2)
        )
        assert scaled[0].tolist() == [0.0, 1.5]
        torch.testing.assert_close(stretched, Stretch(2, 1, 0)(torch.tensor([[1.0, 0.0]] * 2)))

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
    def test_share(self, share):
        with pytest.raises(ConfigError, match="share"):
            MixedModel(Constant(0.0), Constant(0.0), share)


class TestTuned:
    def test_keeps_what_it_promises(self):
        """Withstood images are surer than errors: nearly all errors can be outvoted."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(400, 10, generator=generator)
        withstood = noise[:200] + 6 * nn.functional.one_hot(torch.zeros(200).long(), 10)
        wrong = noise[200:] + 1 * nn.functional.one_hot(torch.zeros(200).long(), 10)
        stretch, share = tuned(withstood, wrong, 0.95)
        top = stretch(withstood).double().softmax(1).topk(2, dim=1).values
        margins = top[:, 0] - top[:, 1]
        cutoff = (1 - share) / share
        assert float((margins >= cutoff - 1e-9).double().mean()) == pytest.approx(0.95, abs=0.01)
        top = stretch(wrong).double().softmax(1).topk(2, dim=1).values
        assert float((top[:, 0] - top[:, 1] < cutoff).double().mean()) > 0.9

    def test_an_unsure_network_is_not_set_where_nothing_is_left_of_it(self):
        """Small margins: the accurate network needs weight, and M must leave the answers alone."""
        generator = torch.Generator().manual_seed(0)
        noise = 0.1 * torch.randn(800, 10, generator=generator)
        withstood, wrong = noise[:400] + torch.linspace(0.3, 0, 10), noise[400:]
        for keep in (0.985, 0.9):
            stretch, share = tuned(withstood, wrong, keep)
            assert (1 - share) / share >= 0.001
            kept = stretch(withstood).argmax(dim=1) == withstood.argmax(dim=1)
            assert float(kept.double().mean()) >= keep - 0.01

    def test_too_unsure(self):
        with pytest.raises(DataError, match=r"too unsure to keep 0\.9 .*; choose less"):
            tuned(torch.zeros(3, 10), torch.zeros(3, 10), 0.9)

    def test_nothing_to_set_it_by(self):
        with pytest.raises(DataError, match="makes no error"):
            tuned(torch.zeros(3, 10), torch.zeros(0, 10), 0.9)


class TestMix:
    def test_of_two_networks(self):
        """A linear network on one bright pixel of two, and one that is never wrong."""
        generator = torch.Generator().manual_seed(0)
        images = 0.5 + 0.5 * torch.rand(40, 1, 1, 2, generator=generator)
        labels = torch.arange(40) % 2
        images[labels == 0, :, :, 1] -= 0.4
        images[labels == 1, :, :, 0] -= 0.4
        robust = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            robust[1].weight.copy_(2 * torch.eye(2))
        mixed = dwf.mix(robust, robust, (images, labels), epsilon=0.1)
        assert isinstance(mixed, MixedModel)
        assert not mixed.training
        assert 0.5 < mixed.share < 1
        assert mixed(images).shape == (40, 2)

    def test_refuses_a_test_set(self):
        test_set = dwf.data.load("digits", split="test")
        with pytest.raises(ConfigError, match="not the test split"):
            dwf.mix(Constant(0.0), Constant(0.0), test_set, epsilon=0.1)


class TestAdaptiveSmoothing:
    def test_the_gate_starts_at_a_share(self):
        gate = share_gate((1, 4, 4), hidden=3, start=0.8)
        model = MixedModel(Constant(0.0, 0.0), Constant(1.0, 0.0), gate)
        torch.testing.assert_close(model.gate_weights(IMAGES), torch.tensor([[0.2, 0.8]] * 2))

    def test_loss_by_hand(self):
        """f is .2 (.5, .5) + .8 (.9, .1) = (.82, .18) for every image, attacked or not."""
        gate = share_gate((1, 4, 4), hidden=3, start=0.8)
        model = MixedModel(Constant(0.0, 0.0), Constant(math.log(9), 0.0), gate)
        batch = Batch(IMAGES, torch.tensor([0, 1]), torch.arange(2))
        crafter = Crafter(AttackConfig(num_steps=(1,)), 0, (0.5,), (0.5,))
        result = gate_step(model, model, batch, crafter, share=0.25)
        expected = -(math.log(0.82) + math.log(0.18)) / 2
        assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5)
        assert result.num_clean == 2

    def test_a_run_trains_the_gate_of_frozen_networks(self, tmp_path):
        config = dwf.apply_overrides(
            dwf.presets.find("adaptive_smoothing_digits"),
            [
                "device=cpu",
                "data.num_train=64",
                "data.num_validation=20",
                "model.width=2",
                "model.gate_hidden=4",
                "attack.num_steps=1",
                "pretrain.num_epochs=1",
                "pretrain.batch_size=32",
                "joint.num_epochs=1",
                "joint.batch_size=32",
                "validation_steps=1",
            ],
        )
        model = train(config, tmp_path / "whole", quiet=True)
        before = dwf.load(tmp_path / "whole", "pretrained").state_dict()
        changed = {
            name.split(".")[0]
            for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert changed == {"gate"}

    def test_a_users_two_networks(self, tmp_path):
        """Without the phases that train them."""
        config = dwf.presets.find("adaptive_smoothing_digits")
        gate = share_gate((1, 8, 8), hidden=3)
        mixed = MixedModel(Constant(0.0, 0.0), Constant(1.0, 0.0), gate)
        (phase,) = get("adaptive-smoothing").phases(mixed, replace(config, pretrain=None))
        assert phase.name == "joint"
        with pytest.raises(ConfigError, match="a model with a gate"):
            get("adaptive-smoothing").phases(
                MixedModel(Constant(0.0), Constant(0.0)), replace(config, pretrain=None)
            )
