"""Phases side by side: each ends with the bits that it would have had alone."""

import itertools
import time
from dataclasses import replace

import pytest
import torch
from small_defenses import FACTS
from small_models import FailsAt, Injected, Linear, SmallNet, everything, make_images, make_labels
from small_runs import (
    Crash,
    before_steps,
    bits,
    crash,
    dense_mixture,
    rows,
    small_config,
    stop,
)
from torch import nn

import dwf
import moe_kernels
from dwf import checkpoint
from dwf.attacks.ascent import Ascent, ascend
from dwf.attacks.setup import Setup
from dwf.checks import CheckpointError, ConfigError, ImageError, ModelOutputError
from dwf.config import AttackConfig, PhaseConfig
from dwf.defenses import Batch, Crafter, Phase, crafter, divided_we_fall
from dwf.defenses.side_by_side import one_by_one
from dwf.models import Group, Mixture
from dwf.presets import dwf_cifar10
from dwf.progress import read_metrics
from dwf.report.results import load_metrics
from dwf.training import Stopped, TrainingError, stage, train
from dwf.training.optimizer import Optimizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # trains many groups

# one benign expert, two of FGSM, three of PGD: 8 steps each, then 4 joint ones
SETTINGS = """
    model.num_fgsm=2 model.num_pgd=3 pretrain.num_epochs=2 joint.num_epochs=1 attack.num_steps=1,2,4
    validate_every=1 log_every=3 checkpoint_every=7
""".split()
GROUP_ENDS = [8, 24, 48]  # benign; FGSM; PGD
B = 5


def config(together="always", *overrides):
    return small_config(*SETTINGS, f"pretrain_together={together}", *overrides)


def tensors(folder, which="last"):
    return checkpoint.load(checkpoint.resolve(folder / "checkpoints", which))[0]


def by_step(found):
    return sorted(found, key=lambda row: (row["global_step"], row["kind"]))


def assert_same_training(folder, expected):
    """Equal weights when joint training begins and when it ends, equal average, equal rows."""
    assert by_step(rows(folder)) == by_step(rows(expected))
    for which in ("pretrained", "last", "best"):
        ours, theirs = tensors(folder, which), tensors(expected, which)
        assert ours.keys() == theirs.keys()
        for stem in ours:
            for name, value in ours[stem].items():
                assert torch.equal(value, theirs[stem][name]), (which, stem, name)


@pytest.fixture(scope="module")
def timed_run(tmp_path_factory):
    """A run whose experts trained side by side, with all of its checkpoints, and its seconds."""
    folder = tmp_path_factory.mktemp("together") / "run"
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda folder: None)
        train(config(), folder, quiet=True)
    return folder, time.monotonic() - started


@pytest.fixture(scope="module")
def run(timed_run):
    return timed_run[0]


class TestGroup:
    def networks(self):
        return [SmallNet(seed=seed) for seed in range(3)]

    def test_each_block_goes_through_its_network(self):
        networks, images = self.networks(), make_images(3 * B)
        group = Group(networks).eval()
        alone = [network(block) for network, block in zip(networks, images.chunk(3), strict=True)]
        assert torch.equal(group(images), torch.cat(alone))
        assert not torch.equal(alone[0], networks[1](images[:B]))

    def test_networks_are_shared(self):
        networks = self.networks()
        group = Group(networks)
        assert {id(p) for p in group.parameters()} == {
            id(p) for network in networks for p in network.parameters()
        }

    def test_rows_that_do_not_divide(self):
        with pytest.raises(ImageError, match="7 rows do not divide among 3 networks"):
            Group(self.networks())(make_images(7))

    def test_no_rows(self):
        assert Group(self.networks())(make_images(0)).shape == (0, 5)

    @pytest.mark.parametrize(
        ("networks", "message"),
        [([], "empty list"), ([nn.Flatten(), abs], r"networks\[1\]: expected a torch.nn.Module")],
    )
    def test_no_networks(self, networks, message):
        with pytest.raises(ConfigError, match=message):
            Group(networks)

    def test_outputs_that_do_not_fit(self):
        with pytest.raises(ModelOutputError, match=r"networks\[1\]: expected logits \[2, 5\]"):
            Group([Linear(), Linear(num_classes=4)])(make_images(4))

    def test_an_attack_leaves_no_trace(self):
        group = Group([*self.networks(), FailsAt(SmallNet(), 2)])
        before = everything(group)
        images, labels = make_images(4 * B), make_labels(4 * B)
        attack = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 3, "random_start": True}
        with pytest.raises(Injected):
            dwf.pgd(group, images, labels, **attack)
        assert everything(group) == before

    def test_a_plan_computes_what_the_group_computes(self):
        experts = divided_we_fall.build(config(), FACTS).experts
        group, images = Group(list(experts)[:3]).eval(), torch.rand(3 * B, 1, 8, 8)
        labels = make_labels(3 * B, 10)
        plan = group.attack_plan(dtype=torch.float32)
        torch.testing.assert_close(plan(images), group(images).detach(), rtol=1e-4, atol=1e-5)
        grad, _ = plan.gradient(images, labels)
        with moe_kernels.implementation("reference"):
            truth = dwf.attacks.input_gradient(group, images, labels)
        torch.testing.assert_close(grad, truth, rtol=1e-3, atol=1e-5)


class TestBlockSeeds:
    """An attack with one seed for each block is one attack for each block."""

    @pytest.mark.parametrize("random_start", [False, True])
    def test_are_several_attacks(self, random_start):
        networks = [SmallNet(seed=seed).eval() for seed in range(3)]
        images, labels = make_images(3 * B), make_labels(3 * B)
        index = torch.randperm(3 * B, generator=torch.Generator().manual_seed(0))
        epsilon = torch.tensor([0.05, 0.1, 0.2]).repeat_interleave(B)
        num_steps = torch.tensor([1, 4, 2]).repeat_interleave(B)
        seeds = (7, -1, 2**63 + 5)
        setup = Setup(
            model=Group(networks),
            images=images,
            labels=labels,
            epsilon=epsilon,
            sample_index=index,
        )
        how = Ascent(
            step_size=0.04, num_steps=num_steps, random_start=random_start, block_seeds=seeds
        )
        found = setup.held(ascend(setup, how))
        for e, network in enumerate(networks):
            block = slice(e * B, (e + 1) * B)
            alone = dwf.pgd(
                network,
                images[block],
                labels[block],
                epsilon=float(epsilon[e * B]),
                step_size=0.04,
                num_steps=int(num_steps[e * B]),
                random_start=random_start,
                seed=seeds[e],
                sample_index=index[block],
            )
            assert torch.equal(found[block], alone), e

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"block_seeds": (1, 2, 3, 4)}, "6 images do not divide into 4 equal blocks"),
            ({"block_seeds": (1, 2), "num_restarts": 2}, "block_seeds need num_restarts=1"),
        ],
    )
    def test_refused(self, options, message):
        setup = Setup(model=Linear(), images=make_images(6), labels=make_labels(6), epsilon=0.1)
        how = Ascent(step_size=0.05, num_steps=3, random_start=True, **options)
        with pytest.raises(ConfigError, match=message):
            ascend(setup, how)


ATTACKS = {
    "batch": {},
    "image": {"draw": "image"},
    "random start": {"random_start": True, "fgsm_random_start": True},
    "batch statistics": {"bn_mode": "train", "draw": "image"},
    "paper-compat": {"protocol": "paper-compat"},
}


class TestCrafter:
    @pytest.mark.parametrize("options", ATTACKS.values(), ids=ATTACKS)
    @pytest.mark.parametrize("name", ["fgsm", "pgd", "gradient"])
    def test_several_seeds_are_several_crafters(self, name, options):
        attack = AttackConfig(num_steps=(1, 3, 4), **options)
        networks = [SmallNet(seed=seed) for seed in range(3)]
        images, labels, mean = make_images(3 * B), make_labels(3 * B), (0.4, 0.5, 0.6)
        batch = Batch(images, labels, torch.arange(100, 100 + 3 * B))
        seeds = (3, 4, 5)
        craft = getattr(Crafter, name)
        blocks = batch.split(3)
        with moe_kernels.implementation("reference"):  # a plan of the group would round otherwise
            together = craft(Crafter(attack, seeds, mean, (0.2,) * 3), Group(networks), batch)
            alone = [
                craft(Crafter(attack, seed, mean, (0.2,) * 3), network, block)
                for seed, network, block in zip(seeds, networks, blocks, strict=True)
            ]
        assert torch.equal(together, torch.cat(alone))

    def test_draws_differ_between_blocks(self):
        attack = AttackConfig()
        drawn = Crafter(attack, tuple(range(8)), (0.5,), (0.5,)).draw(
            "num_steps", attack.num_steps, torch.arange(8 * B)
        )
        assert drawn.dtype == torch.int64
        assert all(len(block.unique()) == 1 for block in drawn.chunk(8))
        assert len(drawn.unique()) > 1


def stages(entries, together, device="cpu"):
    """Lengths of the stages that a run goes through."""
    settings = replace(dwf_cifar10(), pretrain_together=together)
    first, found = 0, []
    while first < len(one_by_one(entries)):
        found.append(stage.num_together(settings, entries, first, torch.device(device)))
        first += found[-1]
    return found


class TestWhatTrainsTogether:
    @pytest.fixture
    def phases(self):
        mixture = Mixture([nn.Linear(4, 2) for _ in range(9)], nn.Linear(4, 9))
        return divided_we_fall.phases(mixture, dwf_cifar10())

    @pytest.mark.parametrize(
        ("together", "device", "expected"),
        [
            ("auto", "cuda", [1, 4, 4, 1]),
            ("auto", "cpu", [1] * 10),
            ("always", "cpu", [1, 4, 4, 1]),
            ("never", "cuda", [1] * 10),
        ],
    )
    def test_the_switch(self, together, device, expected, phases):
        assert stages(phases, together, device) == expected

    def test_the_last_phase_is_alone(self, phases):
        """Best checkpoint and average are about it."""
        assert stages(phases[:-1], "always") == [1, 4, 3, 1]

    def test_shared_weights(self):
        """Experts of a mixture in which one stands twice are trained one after another."""
        twice, other = nn.Linear(4, 2), nn.Linear(4, 2)
        mixture = Mixture([twice, twice, other, twice], nn.Linear(4, 4))
        settings = config("always", "model.num_benign=0", "model.num_fgsm=4", "model.num_pgd=0")
        assert stages(divided_we_fall.phases(mixture, settings), "always") == [1] * 5

    def test_baselines(self, tmp_path):
        baseline = dwf.presets.single(config("always", "pretrain.num_epochs=1"), "pgd-at")
        train(baseline, tmp_path, quiet=True)
        assert {row["phase"] for row in rows(tmp_path)} == {"train"}


# Other draws, starts, images, parts and rows: none of them hides another's fault.
VARIED = """
    attack.draw=image attack.random_start=true attack.fgsm_random_start=true
    pretrain.accumulation=2 data.crop_padding=1 data.flip=true log_every=5
""".split()


class TestTraining:
    def assert_is_training_one_by_one(self, folder, *overrides, make=lambda: None):
        for together in ("always", "never"):
            train(config(together, *overrides), folder / together, model=make(), quiet=True)
        assert_same_training(folder / "always", folder / "never")

    @pytest.mark.parametrize("overrides", [[], VARIED], ids=["plain", "varied"])
    def test_is_training_one_by_one(self, overrides, tmp_path):
        """By a plan, which runs each network's block of rows alone."""
        self.assert_is_training_one_by_one(tmp_path, *overrides)

    @pytest.mark.usefixtures("reference")
    @pytest.mark.parametrize(
        "overrides", [[], [*VARIED, "attack.bn_mode=train"]], ids=["plain", "varied"]
    )
    def test_is_training_one_by_one_by_autograd(self, overrides, tmp_path):
        self.assert_is_training_one_by_one(tmp_path, *overrides)

    def test_is_training_one_by_one_with_dropout(self, tmp_path):
        def make():
            mixture = dense_mixture(6)
            for expert in mixture.experts:
                expert.insert(1, nn.Dropout(0.5))
            return mixture

        self.assert_is_training_one_by_one(tmp_path, "pretrain.accumulation=2", make=make)

    def test_one_attack_for_the_group(self, tmp_path, monkeypatch):
        """On the expert's rows alone, and on all rows of those that train together."""
        lengths = []
        ascend = crafter.ascend

        def spy(setup, how):
            lengths.append(len(setup.images))
            return ascend(setup, how)

        monkeypatch.setattr(crafter, "ascend", spy)
        train(config("always", "validate_every=0"), tmp_path, quiet=True)
        # FGSM experts; PGD experts; FGSM and PGD on the mixture
        assert lengths == [2 * 16] * 8 + [3 * 16] * 8 + [16, 16] * 4

    def test_members_differ(self, run):
        """Each has images, draws and weights of its own: none of this is one network six times."""
        found = tensors(run, "pretrained")["model"]
        for name in found:
            if name.startswith("experts.1.") and name.endswith("weight"):
                others = [name.replace(".1.", f".{e}.", 1) for e in (2, 3, 4, 5)]
                assert not any(torch.equal(found[name], found[other]) for other in others)

    def test_rows_read_as_those_of_phases_in_a_row(self, run):
        found = load_metrics(run / "metrics.jsonl")
        order = [phase for phase, _ in itertools.groupby(row.phase for row in found)]
        kinds = ["benign", "fgsm", "fgsm", "pgd", "pgd", "pgd"]
        assert order == [*(f"expert-{e}-{kind}" for e, kind in enumerate(kinds)), "joint"]

    def test_rows_share_the_time(self, timed_run):
        folder, wall = timed_run
        assert 0 < sum(row["seconds"] for row in read_metrics(folder)) < wall

    def test_checkpoints_are_due_as_often(self, run):
        """Every seven optimizer steps of whichever expert; names count them all."""
        found = [int(p.name[5:]) for p in checkpoint.checkpoints(run / "checkpoints")]
        # 8, then 2 at a time to 24, then 3 at a time to 48, then joint ones
        assert found == [7, 8, 14, 22, 24, 30, 36, 42, 48, 49, 52]

    def test_a_checkpoint_has_the_momentum_of_each(self, run):
        state = checkpoint.load(run / "checkpoints" / "step-00000036")[0]["optimizer"]
        names = {name.partition("/")[0] for name in state}
        assert names == {"expert-3-pgd", "expert-4-pgd", "expert-5-pgd"}
        assert len(state) % 3 == 0
        assert all("/" not in k for k in checkpoint.load(run / "checkpoints" / "step-00000007")[0])

    def test_not_finite_names_the_phase(self, tmp_path):
        def break_(run):
            next(run.phases[4].module.parameters()).data.fill_(torch.nan)

        # NaN gradients move nothing, so what is seen is the loss
        message = "phase expert-4-pgd: the loss of step 34 is"
        with before_steps(break_, 24 + 3), pytest.raises(TrainingError, match=message):
            train(config("always", "log_every=1"), tmp_path, quiet=True)


def interrupted(settings, folder, interrupt, at, **options):
    """Train until ``at`` optimizer steps are done and one more step is about to be."""
    with before_steps(interrupt, at), pytest.raises((Stopped, Crash)):
        train(settings, folder, quiet=True, **options)


# all steps of the FGSM and of the PGD experts but their last
STEPS_OF_GROUPS = [*range(8, 24 - 2, 2), *range(24, 48 - 3, 3)]


class TestResume:
    @pytest.mark.parametrize("interrupt", [stop, crash], ids=["stopped", "crashed"])
    @pytest.mark.parametrize(
        "steps", [[10, 33, 36], pytest.param(STEPS_OF_GROUPS, marks=pytest.mark.slow)], ids=len
    )
    def test_in_the_middle_of_groups(self, steps, interrupt, run, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "prune", lambda folder: None)
        for at in steps:
            interrupted(config(), tmp_path / "run", interrupt, at)
        train(config(), tmp_path / "run", quiet=True)
        assert rows(tmp_path / "run") == rows(run)
        for pointer in sorted((run / "checkpoints").glob("*.json")):
            assert (tmp_path / "run/checkpoints" / pointer.name).read_text() == pointer.read_text()
        for kept in checkpoint.checkpoints(run / "checkpoints"):
            assert bits(tmp_path / "run/checkpoints" / kept.name) == bits(kept), kept.name

    def test_a_group_goes_on_as_it_began(self, run, tmp_path, monkeypatch):
        """Begun on a GPU, continued on a CPU: "auto" is another choice there, the run the same."""
        auto, num_together = config("auto"), stage.num_together
        monkeypatch.setattr(checkpoint, "prune", lambda folder: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "num_together", lambda _, *rest: num_together(config(), *rest))
            interrupted(auto, tmp_path / "a", crash, 33)
        (tmp_path / "a").rename(tmp_path / "b")
        seen = []
        with before_steps(
            lambda run: seen.append(run.at.num_phases), *range(30, 48, 3), *range(48, 52)
        ):
            train(auto, tmp_path / "b", quiet=True)
        assert seen == [3] * 6 + [1] * 4  # from the checkpoint of step 30 on
        assert_same_training(tmp_path / "b", run)

    def test_another_choice_is_another_run(self, run):
        with pytest.raises(CheckpointError, match="pretrain_together was 'always', is 'never'"):
            train(config("never"), run, quiet=True)

    def test_momentum_of_an_unknown_parameter(self):
        module = nn.Linear(2, 2)
        optimizer = Optimizer(Phase("joint", module, PhaseConfig(), None), 10)
        with pytest.raises(CheckpointError, match=r"'other/weight' is of no parameter"):
            optimizer.load({"other/weight": torch.zeros(2, 2)})
