"""Files of torch.save are read to the bit, and nothing in them runs."""

import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from dwf.checks import CheckpointError
from dwf.models import build_network, load_public
from dwf.models.public_weights import without_wrappers
from dwf.torch_file import followed, read_state_dict


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def tensors():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=generator)
    return {
        "a": whole,
        "transposed": whole.t(),
        "part": whole[1:3, 2:],
        "half": whole.half(),
        "bfloat": whole.bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


class TestReading:
    @pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
    def test_to_the_bit(self, wrap, tmp_path):
        expected = tensors()
        whole = OrderedDict(expected) if wrap is None else {wrap: expected, "epoch": 3, "lr": [0.1]}
        torch.save(whole, tmp_path / "x.pt")
        found = read_state_dict(tmp_path / "x.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)

    def test_parameters_and_an_optimizer_beside_them(self, tmp_path):
        network = nn.Linear(3, 2)
        sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        network(torch.ones(1, 3)).sum().backward()
        sgd.step()
        state = {"net": dict(network.named_parameters()), "optimizer": sgd.state_dict()}
        torch.save(state, tmp_path / "x.pt")
        assert torch.equal(read_state_dict(tmp_path / "x.pt")["weight"], network.weight)


class TestSafety:
    def test_nothing_runs(self, tmp_path):
        trap = tmp_path / "written"
        torch.save({"state_dict": tensors(), "extra": Evil(trap)}, tmp_path / "x.pt")
        assert read_state_dict(tmp_path / "x.pt").keys() == tensors().keys()
        assert not trap.exists()
        torch.save(Evil(trap), tmp_path / "y.pt")
        with pytest.raises(CheckpointError, match="expected a state dict"):
            read_state_dict(tmp_path / "y.pt")
        assert not trap.exists()

    def test_damaged_files(self, tmp_path):
        torch.save(tensors(), tmp_path / "x.pt")
        data = (tmp_path / "x.pt").read_bytes()
        for cut in (10, len(data) // 2):
            (tmp_path / "cut.pt").write_bytes(data[:cut])
            with pytest.raises(CheckpointError, match=r"cut\.pt: "):
                read_state_dict(tmp_path / "cut.pt")
        with pytest.raises(CheckpointError, match="not found"):
            read_state_dict(tmp_path / "none.pt")
        with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
            archive.writestr("a.txt", "b")
        with pytest.raises(CheckpointError, match=r"without data\.pkl"):
            read_state_dict(tmp_path / "other.pt")

    def test_views_outside_of_their_storage(self, tmp_path):
        torch.save({"a": torch.zeros(64)}, tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt") as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        (pickle,) = [name for name in entries if name.endswith("data.pkl")]
        # the size (64,) becomes (65,)
        entries[pickle] = entries[pickle].replace(b"K@\x85", b"KA\x85", 1)
        with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        with pytest.raises(CheckpointError, match="a lies outside of its storage"):
            read_state_dict(tmp_path / "y.pt")

    def test_unknown_instructions(self):
        with pytest.raises(ValueError, match="instruction"):
            followed(b"\x80\x02c__main__\nX\n)\x81}b(I1\nI2\nios\nsystem\n.")


class TestPublicWeights:
    @pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "wrn16_4"])
    def test_a_robustbench_checkpoint(self, name, tmp_path):
        """In a wrapper, with constants of its normalization, a block twice, and nine classes."""
        network = build_network(name, num_classes=9, width=64, in_channels=3, seed=1).eval()
        state = {f"module.{name}": value for name, value in network.state_dict().items()}
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        state |= {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}
        state["module.sub_block1.layer.0.conv1.weight"] = torch.zeros(1)
        torch.save({"state_dict": state}, tmp_path / "x.pt")
        mean, std = (0.49, 0.48, 0.45), (0.2, 0.2, 0.2)
        model = load_public(tmp_path / "x.pt", name, mean=mean, std=std)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        normalized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(model(images), network(normalized))

    def test_another_network(self, tmp_path):
        torch.save(nn.Linear(4, 10).state_dict(), tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="another architecture, missing"):
            load_public(tmp_path / "x.pt", "resnet18")

    def test_wrappers(self):
        weights = {"module.model.a": torch.zeros(1), "module.model.b": torch.zeros(1)}
        assert set(without_wrappers(weights)) == {"a", "b"}
