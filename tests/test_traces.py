"""Traces of PGD against PGD itself, and heatmaps of experts, without touching the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import Linear, SmallNet, make_dataset
from torch import nn

from dwf.attacks import pgd
from dwf.checks import ConfigError
from dwf.config import EvaluationConfig
from dwf.data.batches import to_unit_range
from dwf.evaluation import evaluate
from dwf.evaluation.record import LossOverSteps
from dwf.evaluation.traces import MAX_IMAGES, last_feature_layer, trace
from dwf.models import LinearGate, Mixture, Normalize

pytestmark = pytest.mark.usefixtures("one_thread")
EPSILON = 0.1
SETTINGS = EvaluationConfig(epsilon=EPSILON, diagnostic_images=6, batch_size=4)


def conv_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def mixture() -> Mixture:
    experts = [conv_net(0), conv_net(1)]
    normalize = Normalize((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    return Mixture(experts, LinearGate((3, 8, 8), 2), normalize).eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_state_is_that_of_pgd(norm):
    dataset, model = make_dataset(12), Linear()
    _, arrays = trace(model, dataset, SETTINGS, norm=norm, num_steps=3, num_restarts=2, seed=7)
    places = arrays["trace_sample_index"]
    assert places.tolist() == [0, 2, 4, 6, 8, 10]
    images, labels = to_unit_range(dataset.images[places]), dataset.labels[places]
    for steps in (1, 3):
        attacked = pgd(
            model, images, labels, epsilon=EPSILON, step_size=0.1 * EPSILON, num_steps=steps,
            random_start=True, norm=norm, seed=7, sample_index=torch.from_numpy(places),
        )  # fmt: skip
        logits = model(attacked)
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        np.testing.assert_allclose(
            arrays["trace_loss"][0, steps], loss.detach().numpy(), rtol=1e-5, atol=1e-6
        )
        correct = (logits.argmax(dim=1) == labels).numpy()
        np.testing.assert_array_equal(arrays["trace_correct"][0, steps], correct)
    assert not np.array_equal(arrays["trace_loss"][0], arrays["trace_loss"][1])


def test_table_is_that_of_its_arrays():
    found, arrays = trace(SmallNet(), make_dataset(9), SETTINGS, num_steps=4, num_restarts=3)
    loss, correct = arrays["trace_loss"], arrays["trace_correct"]
    assert loss.shape == correct.shape == (3, 5, 6)
    stands = np.ones(6, dtype=bool)
    expected = []
    for state in correct.reshape(-1, 6):
        stands = stands & state
        expected.append(stands.mean())
    assert np.ravel(found.accuracy).tolist() == expected
    for k in range(5):
        values = loss[:, k].ravel().astype(float)
        assert found.loss.mean[k] == pytest.approx(values.mean())
        assert found.loss.low[k] == pytest.approx(np.quantile(values, 0.1))
        assert found.loss.high[k] == pytest.approx(np.quantile(values, 0.9))
    # an attack that ascends
    assert found.loss.mean[-1] > found.loss.mean[0]


def test_batch_size_changes_nothing():
    one, other = (
        trace(
            Linear(), make_dataset(7), EvaluationConfig(epsilon=EPSILON, batch_size=size),
            num_steps=2, num_restarts=2,
        )[1]
        for size in (3, 7)
    )  # fmt: skip
    np.testing.assert_array_equal(one["trace_loss"], other["trace_loss"])


def test_nothing_is_disturbed():
    model = mixture().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, make_dataset(5), SETTINGS, num_steps=1, num_restarts=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_non_finite_outputs_are_broken_and_have_no_loss():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with torch.no_grad():
        model[1].weight.fill_(float("inf"))
    found, _ = trace(model, make_dataset(3), SETTINGS, num_steps=1, num_restarts=1)
    assert found.accuracy == [[0.0, 0.0]]
    assert found.loss == LossOverSteps([None] * 2, [None] * 2, [None] * 2)


def test_heatmaps_by_the_formula():
    model, dataset = mixture(), make_dataset(6)
    found, arrays = trace(model, dataset, SETTINGS, num_steps=1, num_restarts=1)
    assert found.experts == model.expert_names
    maps = arrays["cam_maps"]
    assert maps.shape == (2, 4, 4, 4)
    np.testing.assert_allclose(maps.sum(axis=(2, 3)), 1, rtol=1e-5)
    images = to_unit_range(dataset.images[:4])
    np.testing.assert_array_equal(arrays["cam_images"], images.numpy())
    for e, network in enumerate(model.experts):
        for b in range(4):
            features = network[:5](model.normalize(images[b : b + 1])).detach().requires_grad_()
            score = network[5:](features)[0, dataset.labels[b]]
            (grad,) = torch.autograd.grad(score, features)
            cam = (grad.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)[0].relu().detach()
            total = float(cam.sum())
            expected = cam / total if total > 1e-8 else torch.full_like(cam, 1 / cam.numel())
            np.testing.assert_allclose(maps[e, b], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_no_heatmaps_without_feature_maps():
    linear = [nn.Sequential(nn.Flatten(), nn.Linear(192, 5)) for _ in range(2)]
    flat = Mixture(linear, LinearGate((3, 8, 8), 2), Normalize((0.0,) * 3, (1.0,) * 3))
    for model in (flat.eval(), Linear()):
        found, arrays = trace(model, make_dataset(3), SETTINGS, num_steps=1, num_restarts=1)
        assert found.experts == []
        assert "cam_maps" not in arrays


class NoGradient(nn.Module):
    """The same network; nothing outside learns how its output came about."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, images):
        return self.network(images)


class Detour(nn.Module):
    """Feature maps that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(192, 5), nn.Conv2d(3, 2, 3)

    def forward(self, images):
        logits = self.linear(images.flatten(1))
        self.conv(images)
        return logits


def test_experts_that_cannot_be_explained():
    normalize, gate = Normalize((0.0,) * 3, (1.0,) * 3), LinearGate((3, 8, 8), 2)
    for odd in (NoGradient(conv_net(0)), Detour()):
        model = Mixture([odd, conv_net(1)], gate, normalize).eval()
        _, arrays = trace(model, make_dataset(3), SETTINGS, num_steps=1, num_restarts=1)
        assert "cam_maps" not in arrays


def test_each_step_of_a_random_model_draws_anew():
    draws = []

    class Drawing(Linear):
        def forward(self, images):
            if torch.is_grad_enabled():
                draws.append(float(torch.rand(())))
            return super().forward(images)

    trace(Drawing(), make_dataset(2), SETTINGS, num_steps=4, num_restarts=2)  # in one batch
    assert len(draws) == len(set(draws)) == 4


def test_last_feature_layer():
    network, images = conv_net(0), torch.zeros(2, 3, 8, 8)
    assert last_feature_layer(network, images) is network[4]  # not the pooling to one place
    assert last_feature_layer(nn.Sequential(nn.ReLU(), nn.Flatten()), images) is None


def test_number_of_images():
    many = make_dataset(MAX_IMAGES + 50)
    settings = EvaluationConfig(epsilon=EPSILON, diagnostic_images=1000)
    found, _ = trace(Linear(), many, settings, num_steps=1, num_restarts=1)
    assert found.num_images == MAX_IMAGES
    with pytest.raises(ConfigError, match="diagnostic_images: 0 images"):
        trace(Linear(), many, EvaluationConfig(diagnostic_images=0))


def test_in_an_evaluation(tmp_path):
    settings = EvaluationConfig(diagnostic_images=2, num_images=3)
    result = evaluate(Linear(), make_dataset(4), settings, suite="quick", epsilon=0.02)
    assert result.to_json()["traces"]["num_images"] == 2
    result.write(tmp_path / "quick.json")
    with np.load(tmp_path / "quick.npz") as arrays:
        assert arrays["trace_loss"].shape[2] == 2
