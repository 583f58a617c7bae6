"""ResNets for small images: pytorch-cifar's keys, sizes and arithmetic, at other sizes too."""

import pytest
import torch
import torch.nn.functional as F
from small_models import make_images
from torch import nn

from dwf.checks import ConfigError
from dwf.models import RESNETS, ResNet, build_network
from dwf.models.networks import BasicBlock


def build(name="resnet18", num_classes=10, width=8, in_channels=3, seed=0):
    return build_network(
        name, num_classes=num_classes, width=width, in_channels=in_channels, seed=seed
    )


def batch_norm_keys(prefix):
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{prefix}.{name}" for name in names]


def pytorch_cifar_keys(num_blocks):
    """State-dict keys of pytorch-cifar's ResNet with basic blocks, in its order."""
    keys = ["conv1.weight", *batch_norm_keys("bn1")]
    for stage, count in enumerate(num_blocks, start=1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for i in (1, 2):
                keys += [f"{at}.conv{i}.weight", *batch_norm_keys(f"{at}.bn{i}")]
            if stage > 1 and block == 0:
                keys += [f"{at}.shortcut.0.weight", *batch_norm_keys(f"{at}.shortcut.1")]
    return [*keys, "linear.weight", "linear.bias"]


class TestPytorchCifar:
    def test_number_of_parameters(self):
        assert sum(p.numel() for p in build(width=64).parameters()) == 11_173_962

    @pytest.mark.parametrize(
        ("name", "num_blocks"), [("resnet18", (2, 2, 2, 2)), ("resnet34", (3, 4, 6, 3))]
    )
    def test_keys(self, name, num_blocks):
        assert list(build(name, width=4).state_dict()) == pytorch_cifar_keys(num_blocks)

    def test_shapes(self):
        state = build(width=64).state_dict()
        assert state["conv1.weight"].shape == (64, 3, 3, 3)
        assert state["layer1.1.conv2.weight"].shape == (64, 64, 3, 3)
        assert state["layer2.0.conv1.weight"].shape == (128, 64, 3, 3)
        assert state["layer2.0.shortcut.0.weight"].shape == (128, 64, 1, 1)
        assert state["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
        assert state["linear.weight"].shape == (10, 512)

    def test_bottleneck_keys_and_size(self):
        with torch.device("meta"):
            network = ResNet(*_blocks("resnet50"))
        state = network.state_dict()
        assert sum(p.numel() for p in network.parameters()) == 23_520_842
        assert state["layer1.0.conv3.weight"].shape == (256, 64, 1, 1)
        assert state["layer1.0.shortcut.0.weight"].shape == (256, 64, 1, 1)
        assert state["linear.weight"].shape == (10, 2048)

    def test_arithmetic(self):
        """Written out from the state dict alone, with the original's 4x4 pooling at the end."""
        network = build().eval()
        for buffer in network.buffers():
            if buffer.is_floating_point():
                nn.init.uniform_(buffer, 0.5, 1.5)
        state = network.state_dict()

        def normalized(x, at):
            return F.batch_norm(
                x,
                state[f"{at}.running_mean"],
                state[f"{at}.running_var"],
                state[f"{at}.weight"],
                state[f"{at}.bias"],
            )

        images = make_images(2, (3, 32, 32))
        x = F.relu(normalized(F.conv2d(images, state["conv1.weight"], padding=1), "bn1"))
        for stage in range(1, 5):
            for block in range(2):
                at = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                out = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
                out = F.relu(normalized(out, f"{at}.bn1"))
                out = normalized(F.conv2d(out, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
                if stride == 2:
                    x = F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=2)
                    x = normalized(x, f"{at}.shortcut.1")
                x = F.relu(out + x)
        x = F.avg_pool2d(x, 4).flatten(1)
        expected = F.linear(x, state["linear.weight"], state["linear.bias"])
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def _blocks(name):
    return RESNETS[name]


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (32, 32), (64, 64), (8, 13), (1, 1)])
@pytest.mark.parametrize("name", ["resnet6", "resnet18"])
def test_any_image_size(name, size):
    network = build(name, width=4).eval()
    assert network(make_images(2, (3, *size))).shape == (2, 10)


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize(
    ("width", "in_channels", "num_classes"), [(1, 1, 2), (4, 3, 100), (6, 2, 1)]
)
def test_any_width(name, width, in_channels, num_classes):
    network = build(name, num_classes, width, in_channels).eval()
    stages = len(RESNETS[name][1])
    assert network(make_images(2, (in_channels, 8, 8))).shape == (2, num_classes)
    expansion = RESNETS[name][0].expansion
    assert network.linear.in_features == width * 2 ** (stages - 1) * expansion


def test_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build("resnet6", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, third = build("resnet6", seed=5), build("resnet6", seed=6)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.conv1.weight, third.conv1.weight)


def test_weights_lie_channels_last():
    weight = build("resnet6").conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_impossible():
    with pytest.raises(ConfigError, match=r"model.network: 'resnet19' .*did you mean 'resnet18'"):
        build("resnet19")
    with pytest.raises(ConfigError, match="width: 0"):
        build(width=0)
    with pytest.raises(ConfigError, match="num_classes: 0"):
        build(num_classes=0)
    for num_blocks in ((), (1, 1, 1, 1, 1)):
        with pytest.raises(ConfigError, match="one to four stages"):
            ResNet(BasicBlock, num_blocks)
