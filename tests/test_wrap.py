"""Normalization as a layer, and networks trained elsewhere as models of pixels."""

import pytest
import torch
from small_models import SmallNet, make_images

from dwf.checks import ConfigError, ImageError
from dwf.models import Normalize, as_pixel_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_by_hand():
    images = make_images(2)
    found = Normalize(MEAN, STD)(images)
    for c in range(3):
        expected = (images[:, c] - MEAN[c]) / STD[c]
        torch.testing.assert_close(found[:, c], expected)


def test_travels_with_the_state_dict():
    other = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    other.load_state_dict(Normalize(MEAN, STD).state_dict())
    assert other.mean.flatten().tolist() == pytest.approx(MEAN)
    assert other.std.flatten().tolist() == pytest.approx(STD)
    assert not list(other.parameters())


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.2, 0.2)), ((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((0.5,), (float("nan"),))],
)
def test_impossible(mean, std):
    with pytest.raises(ConfigError, match="one of each per channel, std > 0"):
        Normalize(mean, std)


def test_wrong_channels_do_not_broadcast():
    with pytest.raises(ImageError, match=r"expected shape \[B, 3, H, W\], found \[2, 1, 8, 8\]"):
        Normalize(MEAN, STD)(make_images(2, (1, 8, 8)))
    with pytest.raises(ImageError, match=r"found \[3, 8, 8\]"):
        Normalize(MEAN, STD)(make_images(2)[0])


def test_pixel_model_shares_its_network():
    network = SmallNet().eval()
    model = as_pixel_model(network, MEAN, STD).eval()
    images = make_images(3)
    assert torch.equal(model(images), network(Normalize(MEAN, STD)(images)))
    assert model.network is network
    with torch.no_grad():
        network.linear.bias.add_(1)
    assert torch.equal(model(images), network(Normalize(MEAN, STD)(images)))
