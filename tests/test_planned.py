"""Networks of whoever: evaluations plan them without being asked to; state dicts stay theirs."""

import copy

import pytest
import torch
from plan_networks import resnet
from small_models import SmallNet, make_dataset, make_images
from torch import nn

import dwf
from dwf.cli import main
from dwf.config import EvaluationConfig
from dwf.evaluation import Budget
from dwf.models.planned import Accelerated, planned

pytestmark = pytest.mark.usefixtures("brief_suites")


def states_equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


class TestStateDict:
    def test_keys_are_the_networks(self):
        network = resnet("resnet6", 8)
        model = dwf.accelerate(network)
        assert states_equal(model.state_dict(), network.state_dict())
        assert list(model.state_dict(prefix="a.")) == [f"a.{key}" for key in network.state_dict()]

    def test_either_loads_what_the_other_saved(self):
        first, second = resnet("resnet6", 8, seed=1), resnet("resnet6", 8, seed=2)
        model = dwf.accelerate(second)
        assert not model.load_state_dict(first.state_dict()).missing_keys
        assert states_equal(second.state_dict(), first.state_dict())
        third = resnet("resnet6", 8, seed=3)
        third.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict({"network.x": torch.zeros(1)})

    def test_as_a_part_of_another_module(self):
        first = nn.Sequential(dwf.accelerate(resnet("resnet6", 8, seed=1)), nn.ReLU())
        second = nn.Sequential(resnet("resnet6", 8, seed=2), nn.ReLU())
        assert list(first.state_dict()) == list(second.state_dict())
        first.load_state_dict(second.state_dict())
        assert states_equal(first.state_dict(), second.state_dict())
        found = first.load_state_dict({}, strict=False)
        assert "0.network.conv1.weight" in found.missing_keys

    def test_mode_and_copies(self):
        network = resnet("resnet6", 8).eval()
        model = dwf.accelerate(network)
        assert not model.training
        assert states_equal(copy.deepcopy(model).state_dict(), network.state_dict())


class TestWithoutBeingAsked:
    SETTINGS = EvaluationConfig(
        fgsm_epsilon=(),
        num_steps=(2,),
        multi_start_steps=0,
        adaptive_steps=0,
        diagnostic_images=4,
    )

    @pytest.mark.slow
    @pytest.mark.parametrize("suite", ["quick", "paper"])
    def test_an_evaluation_searches_by_a_plan(self, suite):
        network, dataset = resnet("resnet6", 8), make_dataset(4, num_classes=10)
        options = {"suite": suite, "epsilon": 0.01}
        if suite == "quick":
            options["budget"] = Budget(num_steps=5, num_queries=20)
        found = dwf.evaluate(network, dataset, self.SETTINGS, **options)
        assert "autograd" not in found.attack_path
        assert not hasattr(network, "attack_plan")
        accelerated = dwf.evaluate(dwf.accelerate(network), dataset, self.SETTINGS, **options)
        assert found.worst_case == accelerated.worst_case
        assert found.attack_path == accelerated.attack_path

    def test_what_cannot_be_planned_is_named_once(self, caplog):
        dataset = make_dataset(4)
        model = nn.Sequential(SmallNet(channels=5), nn.LogSoftmax(1)).eval()
        found = dwf.evaluate(model, dataset, self.SETTINGS, suite="quick", epsilon=0.01)
        assert "autograd" in found.attack_path
        lines = [line for line in caplog.messages if "attacked by autograd" in line]
        assert len(lines) <= 1
        assert not any("Accelerated" in line for line in caplog.messages)

    def test_the_attack_command(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "mine.py").write_text(
            "from dwf.models import build_network\n"
            "def net():\n"
            "    return build_network('resnet6', num_classes=10, width=4, in_channels=1, seed=0)\n"
        )
        seen = []
        plan = Accelerated.attack_plan
        monkeypatch.setattr(
            Accelerated, "attack_plan", lambda *a, **k: (seen.append(1), plan(*a, **k))[1]
        )
        monkeypatch.chdir(tmp_path)
        command = "attack --model mine.py:net --data digits --images 4 --quiet --attack fgsm"
        assert main(command.split()) == 0
        assert seen
        assert "FGSM(ResNet" in capsys.readouterr().out

    def test_what_offers_a_plan_stays_what_it_is(self):
        model = dwf.accelerate(SmallNet())
        assert planned(model) is model
        assert planned(torch.sin) is torch.sin
        assert torch.equal(
            planned(SmallNet().eval())(make_images(2)), SmallNet().eval()(make_images(2))
        )
