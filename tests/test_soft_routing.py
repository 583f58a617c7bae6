"""Soft values inside hard routing, against loops by hand; mixtures inside other models."""

from __future__ import annotations

import pytest
import torch
from small_models import Linear, Mapped, everything, make_images
from test_views_of_mixtures import MODELS, E, gate, gradient_of, pathways, shaken, sparse
from torch import nn

import moe_kernels
from dwf.models import Mixture, RoutedMixture, attack_views
from dwf.models.inner_views import mixture_inside, views_of
from dwf.models.soft_routing import SoftLogits, TowardWeakest, soft_choice

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = make_images(6)


@pytest.fixture(autouse=True)
def reference():
    with moe_kernels.implementation("reference"):
        yield


def softest(model, temperature):
    inside = model.softened_inside(temperature)
    return (SoftLogits(model, temperature) if inside is None else inside).eval()


class TestSoftChoice:
    def test_temperature_goes_from_mean_to_choice(self):
        scores = torch.tensor([[0.0, 3.0, 1.0]])
        assert (soft_choice(scores, 1e3) - 1 / 3).abs().max() < 0.01
        assert soft_choice(scores, 1e-2).tolist() == [[0.0, 1.0, 0.0]]
        torch.testing.assert_close(soft_choice(scores, 0.5), soft_choice(100 * scores + 7, 0.5))

    def test_has_a_gradient_however_sure_the_gate_is(self):
        leaf = torch.tensor([[0.0, 1e6]], requires_grad=True)
        soft_choice(leaf, 1.0)[0, 0].backward()
        assert leaf.grad.abs().max() > 0


class TestSoftInside:
    @pytest.mark.parametrize("name", ["routed", "dual", "synergy", "sparse", "pathways"])
    def test_a_low_temperature_is_the_hard_model(self, name):
        model = MODELS[name]().eval()
        if name == "dual":
            return  # its halves have one and two experts, whose scores have no spread
        torch.testing.assert_close(softest(model, 1e-3)(IMAGES), model(IMAGES))

    @pytest.mark.parametrize("name", ["dual", "sparse", "sparse of two", "pathways"])
    def test_the_gradient_is_the_derivative(self, name):
        """Unlike straight-through's, by the scores as they are."""
        model = MODELS[name]().double().eval()
        for part in model.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = False
        soft = softest(model, None)
        images = IMAGES.double()
        cost = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
        gradient = gradient_of(soft, images, cost)
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(images.shape, generator=generator).double()

        def value(x):
            with torch.no_grad():
                return (soft(x) * cost).sum()

        h = 1e-5
        measured = (value(images + h * direction) - value(images - h * direction)) / (2 * h)
        torch.testing.assert_close(measured, (gradient * direction).sum(), rtol=2e-2, atol=1e-3)

    def test_sparse_mixes_maps_inside_the_layer(self):
        """By hand: all experts of the layer on its input, with softened weights."""
        model = sparse(1).eval()
        (name, layer), *_ = list(model.layers.items())[-1:]
        seen = {}
        layer.register_forward_pre_hook(lambda module, x: seen.update(x=x[0]))
        model(IMAGES)
        x = seen["x"]
        p = layer.gate(x)
        weights = soft_choice(p.log(), 0.7)
        expected = sum(weights[:, e, None, None, None] * layer.experts[e](x) for e in range(E))
        _, network = model.softened_inside(0.7)
        found = network.get_submodule(name)(x)
        torch.testing.assert_close(found, expected)
        assert model.network.get_submodule(name) is layer

    def test_pathways_by_hand(self):
        model = pathways().eval()
        scores = model.gate_logits(IMAGES)
        expected = model.network(model.normalize(IMAGES), soft_choice(scores, 0.7))
        torch.testing.assert_close(model.softened_inside(0.7)(IMAGES), expected)


class TestTowardWeakest:
    def test_steers_the_gate_and_attacks_the_expert(self):
        model = RoutedMixture([Linear(seed=e) for e in range(E)], gate()).eval()
        view = TowardWeakest(model, IMAGES)
        own = model(IMAGES).argmax(dim=1)
        chosen = view._chosen

        def margin(x):
            logits = view(x)
            others = logits.scatter(1, own[:, None], -torch.inf).amax(dim=1)
            return others - logits.gather(1, own[:, None])[:, 0]

        leaf = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margin(leaf).sum(), leaf)
        moved = (IMAGES + 0.02 * gradient.sign()).detach()
        assert (margin(moved) > margin(IMAGES)).all()
        rows = torch.arange(len(IMAGES))
        before = model.soft_gate_weights(IMAGES)[rows, chosen]
        after = model.soft_gate_weights(moved)[rows, chosen]
        assert (after >= before - 0.02).float().mean() > 0.6

    def test_the_weakest_is_the_one_of_smallest_margin(self):
        """Expert 1 is expert 0 with nearly no margin."""
        strong, weak = Linear(seed=1), Linear(seed=1)
        shifted = Mapped(weak, lambda z: z.topk(2, dim=1).values[:, 1:].minimum(z) + 1e-3 * z)
        model = Mixture([strong, shifted], Linear(num_classes=2, seed=7)).eval()
        assert (TowardWeakest(model, IMAGES)._chosen == 1).all()
        assert (TowardWeakest(model, IMAGES, 1)._chosen == 0).all()


class Around(nn.Module):
    """A model with a mixture in it."""

    def __init__(self, mixture):
        super().__init__()
        self.body = nn.Sequential(mixture)

    def forward(self, images):
        return 2 * self.body((images - 0.1).clamp(0, 1))


class TestInside:
    def test_is_found_and_gets_its_views(self):
        mixture = MODELS["routed"]().eval()
        model = Around(mixture).eval()
        assert mixture_inside(model) == "body.0"
        views = views_of(model)
        assert [x.name for x in views] == [f"body.0: {x.name}" for x in attack_views(mixture)]
        before = everything(model)
        inner = (IMAGES - 0.1).clamp(0, 1)
        for view, own in zip(views, attack_views(mixture), strict=True):
            made = view.make(IMAGES)
            torch.testing.assert_close(made(IMAGES), 2 * own.make(inner)(inner), msg=view.name)
        assert everything(model) == before
        assert model.body[0] is mixture

    def test_a_mixture_has_its_own_views_and_others_none(self):
        mixture = shaken(MODELS["mixture"]()).eval()
        assert [x.name for x in views_of(mixture)] == [x.name for x in attack_views(mixture)]
        assert views_of(Linear()) == []
        assert views_of(lambda x: x) == []
        assert mixture_inside(mixture) is None
