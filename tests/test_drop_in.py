"""A user's own networks: mixed, attacked by us and by other libraries, judged, and put back."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_attacks import pgd_snapshots
from small_models import everything, make_dataset, make_images, make_labels
from torch import nn

import dwf
from dwf.attacks import input_gradient
from dwf.config import EvaluationConfig
from dwf.models import build_network

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SHAPE = (3, 32, 32)
IMAGES, LABELS = make_images(2, SHAPE), make_labels(2, 10)
BUDGET = {"epsilon": 8 / 255, "step_size": 2 / 255}
SETTINGS = EvaluationConfig((0.01, 0.03), 8 / 255, 2 / 255, (1, 2), 2, 2, 2, batch_size=2)


def torchvision_resnet18(seed):
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    torch.manual_seed(seed)
    return models.resnet18(num_classes=10)


def timm_resnet18(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm", reason="timm is not installed")
        torch.manual_seed(seed)
        return timm.create_model("resnet18", num_classes=10, pretrained=False)


def pytorch_cifar_resnet18(seed):
    return build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=seed)


def narrow_resnet18(seed):
    return build_network("resnet18", num_classes=10, width=8, in_channels=3, seed=seed)


FAMILIES = {
    "torchvision": torchvision_resnet18,
    "timm": timm_resnet18,
    "pytorch-cifar": pytorch_cifar_resnet18,
}


def mix(networks):
    experts = [dwf.as_pixel_model(network, mean=MEAN, std=STD) for network in networks]
    return dwf.Mixture(experts, gate=dwf.MlpGate(SHAPE, num_experts=len(experts)))


def check_attacks(model):
    """Every public attack, on any module: within budget, of some effect, leaving no trace."""
    before = everything(model)
    found = {
        "fgsm": dwf.fgsm(model, IMAGES, LABELS, epsilon=8 / 255),
        "pgd": dwf.pgd(model, IMAGES, LABELS, **BUDGET, num_steps=2, random_start=True),
        "restarts": dwf.pgd(
            model, IMAGES, LABELS, **BUDGET, num_steps=1, random_start=True, num_restarts=2
        ),
        "snapshots": pgd_snapshots(model, IMAGES, LABELS, **BUDGET, num_steps=[1, 2])[-1],
        "FGSM": dwf.FGSM(model)(IMAGES, LABELS),
        "PGD": dwf.PGD(model, num_steps=2, bn_mode="train")(IMAGES, LABELS),
    }
    for name, adversarial in found.items():
        distance = (adversarial - IMAGES).abs().max()
        assert 1 / 255 < distance <= 8 / 255 + 1e-6, name
        assert adversarial.min() >= 0, name
        assert adversarial.max() <= 1, name
    assert input_gradient(model, IMAGES, LABELS).abs().max() > 0
    assert everything(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_single_networks(family):
    model = dwf.as_pixel_model(FAMILIES[family](0), mean=MEAN, std=STD)
    check_attacks(model)
    result = dwf.evaluate(model, make_dataset(3, SHAPE, 10), SETTINGS, suite="paper")
    assert [row.kind for row in result.attacks] == [
        "clean", "fgsm", "fgsm", "pgd", "pgd", "multi_start", "adaptive"
    ]  # fmt: skip
    assert 0 <= result.robust_accuracy <= result.clean_accuracy <= 1


@pytest.mark.slow
def test_nine_networks_of_three_families():
    networks = [FAMILIES[family](e) for e in range(2) for family in ("torchvision", "timm")]
    networks += [narrow_resnet18(e) for e in range(5)]
    mixture = mix(networks)
    assert mixture.num_experts == 9
    check_attacks(mixture)
    before = everything(mixture)
    dataset = make_dataset(3, SHAPE, 10, labels=torch.tensor([0, 1, 9]))
    result = dwf.evaluate(mixture, dataset, SETTINGS, suite="paper")
    assert everything(mixture) == before
    assert len(result.experts.accuracy["clean"]) == 9
    assert result.gate.mean_weights["clean"][9] == pytest.approx([1 / 9] * 9)
    assert "worst case per image" in str(result)


def test_nine_checkpoints_become_a_mixture_in_three_lines(tmp_path):
    for e in range(9):
        save_file(
            {k: v.contiguous() for k, v in narrow_resnet18(e).state_dict().items()},
            tmp_path / f"expert-{e}.safetensors",
        )
    networks = [narrow_resnet18(100) for _ in range(9)]
    for network, path in zip(networks, sorted(tmp_path.iterdir()), strict=True):
        network.load_state_dict(load_file(path))

    experts = [dwf.as_pixel_model(network, mean=MEAN, std=STD) for network in networks]
    gate = dwf.MlpGate(image_shape=(3, 32, 32), num_experts=9)
    mixture = dwf.Mixture(experts, gate=gate).eval()

    z = (IMAGES - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        logits = mixture(IMAGES)
        expected = torch.stack([narrow_resnet18(e).eval()(z) for e in range(9)]).mean(dim=0)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_pytorch_cifar_checkpoint_with_a_distributed_prefix():
    """The published files were saved from a wrapper: torch's own helper takes its prefix off."""
    saved = {f"module.{k}": v for k, v in narrow_resnet18(1).state_dict().items()}
    nn.modules.utils.consume_prefix_in_state_dict_if_present(saved, "module.")
    network = narrow_resnet18(2)
    network.load_state_dict(saved, strict=True)
    assert torch.equal(network.linear.weight, narrow_resnet18(1).linear.weight)


def test_one_network_may_serve_twice():
    network = narrow_resnet18(0)
    mixture = mix([network, network]).eval()
    single = dwf.as_pixel_model(network, mean=MEAN, std=STD).eval()
    torch.testing.assert_close(mixture(IMAGES), single(IMAGES), rtol=1e-4, atol=1e-5)
    check_attacks(mixture)


def test_frozen_parts_stay_frozen():
    mixture = mix([narrow_resnet18(0), narrow_resnet18(1)])
    mixture.experts[0].requires_grad_(False)
    mixture.experts[1].eval()
    mixture.gate.train()
    check_attacks(mixture)
    assert not any(p.requires_grad for p in mixture.experts[0].parameters())
    assert all(p.requires_grad for p in mixture.experts[1].parameters())
