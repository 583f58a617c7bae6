"""Whole attacks, trainings and evaluations on a GPU: they run, and mean what they mean on the CPU.

What each computes has tests of its own there. These run on a real GPU, or on the rehearsed one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rehearsal
import torch
from plan_networks import resnet
from small_models import Noisy, SmallNet
from small_runs import assert_same_run, train_interrupted
from torch import Tensor, nn

import dwf
from dwf import attacks, checkpoint, presets
from dwf.checks import ConfigError
from dwf.compat import AutoAttack
from dwf.config import Config, EvaluationConfig, apply_overrides
from dwf.defenses import DEFENSES
from dwf.models import MlpGate
from dwf.models.pathways import PathwayMixture, PathwayResNet, build_router
from dwf.progress import read_metrics
from dwf.training import loop, train
from moe_kernels import info, op

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

only_rehearsed = pytest.mark.skipif(not rehearsal.running, reason="counted in a rehearsal")
CUDA = torch.device("cuda", 0)
RADII = {"linf": 0.06, "l2": 0.6}
SHAPE, NUM_CLASSES, NUM_IMAGES = (3, 8, 8), 10, 6


# Attacks ----------------------------------------------------------------------------------------


def mixture() -> dwf.Mixture:
    """A model with a plan."""
    normalize = dwf.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    experts = [resnet("resnet6", 4, seed=e) for e in range(2)]
    return dwf.Mixture(experts, MlpGate(SHAPE, 2, hidden=4), normalize)


def unplanned() -> nn.Module:
    """A model that autograd differentiates: softplus is in no plan."""
    return SmallNet(SHAPE, NUM_CLASSES)


MODELS: dict[str, Callable[[], nn.Module]] = {"mixture": mixture, "unplanned": unplanned}


@functools.cache
def model_on(name: str, device: torch.device) -> nn.Module:
    """The same one for all tests, which leave it as it is and keep its plan."""
    return MODELS[name]().to(device).eval()


# name -> the attack in few steps, from (model, images, labels) and its options
SHORT: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "fgsm": (attacks.fgsm, {}),
    "pgd": (attacks.pgd, {"num_steps": 4, "num_restarts": 2, "random_start": True}),
    "pgd-normal-start": (attacks.pgd, {"num_steps": 3, "random_start": "normal"}),
    "pgd-momentum": (attacks.pgd, {"num_steps": 3, "random_start": False, "momentum": 0.75}),
    "bim": (attacks.bim, {"num_steps": 3}),
    "mim": (attacks.mim, {"num_steps": 3}),
    "apgd": (attacks.apgd, {"num_steps": 6, "num_restarts": 2}),
    "apgd-dlr": (attacks.apgd, {"num_steps": 6, "loss": "dlr"}),
    "fab": (attacks.fab, {"num_steps": 4, "num_restarts": 2}),
    "square": (attacks.square, {"num_queries": 30, "num_restarts": 2}),
    "simba": (attacks.simba, {"num_queries": 30}),
    "hop-skip-jump": (attacks.hop_skip_jump, {"num_queries": 80, "initial_points": 20}),
    "carlini-wagner": (attacks.carlini_wagner, {"num_searches": 2, "num_steps": 8}),
    "ddn": (attacks.ddn, {"num_steps": 12}),
    "random-noise": (attacks.random_noise, {"num_draws": 3}),
}
STEPPED = ("pgd", "pgd-normal-start", "pgd-momentum", "bim", "mim")
ONLY_L2 = ("carlini-wagner", "ddn")
UNTARGETED = ("random-noise", "apgd-dlr")


def attacked(
    name: str,
    norm: str,
    device: torch.device,
    model: nn.Module,
    *,
    targeted: bool = False,
    labels: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """Adversarial images on the device, after checks of what every attack promises."""
    function, options = SHORT[name]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(NUM_IMAGES, *SHAPE, generator=generator).to(device)
    if labels is None:
        with torch.no_grad():
            labels = model(images).argmax(dim=1)
    if targeted:
        more["targets"] = (labels + 1) % NUM_CLASSES
    radius = RADII[norm]
    if name in STEPPED:
        options = options | {"step_size": radius / 2}
    found = function(model, images, labels, epsilon=radius, norm=norm, **options, **more)
    assert found.device == device
    assert found.dtype is torch.float32
    delta = (found - images).flatten(1)
    size = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert float(size.max()) <= radius * (1 + 1e-5)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    return found


def class_of(found: Tensor, model: nn.Module) -> Tensor:
    """The class [B] that a model on the CPU sees in each image."""
    with torch.no_grad():
        return model(found.cpu()).argmax(dim=1)


NORMS = [(name, norm) for name in SHORT for norm in RADII if norm == "l2" or name not in ONLY_L2]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "norm"), NORMS)
def test_an_attack_is_as_strong_as_on_the_cpu(name: str, norm: str, model: str) -> None:
    devices = CUDA, torch.device("cpu")
    images = [attacked(name, norm, device, model_on(model, device)) for device in devices]
    classes = [class_of(x, model_on(model, torch.device("cpu"))) for x in images]
    assert (classes[0] != classes[1]).sum() <= 1  # which bfloat16 or another order may tip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "norm"), [x for x in NORMS if x[0] not in UNTARGETED])
def test_a_targeted_attack(name: str, norm: str, model: str) -> None:
    attack = functools.partial(attacked, name, norm, CUDA, model_on(model, CUDA), targeted=True)
    assert torch.equal(attack(), attack())


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square"])
def test_a_random_model_is_averaged(name: str) -> None:
    model = Noisy(unplanned(), std=0.1).to(CUDA).eval()
    options: dict[str, Any] = {"labels": torch.arange(NUM_IMAGES, device=CUDA), "eot_samples": 3}
    state = torch.cuda.get_rng_state()
    first, again = (attacked(name, "linf", CUDA, model, **options) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def pathways() -> PathwayMixture:
    network = PathwayResNet((1, 1), num_pathways=2, width=4)
    return PathwayMixture(network, build_router(2, width=2, seed=1))


@pytest.mark.parametrize("make", [mixture, pathways])
def test_views_are_attacked_around_plans_in_captured_steps(make: Callable[[], nn.Module]) -> None:
    model = make().to(CUDA).eval()
    images = torch.rand(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0)).to(CUDA)
    for view in dwf.models.attack_views(model):
        report = attacks.AttackReport()
        attacks.pgd(
            view.make(images),
            images,
            torch.arange(NUM_IMAGES, device=CUDA),
            epsilon=0.1,
            step_size=0.05,
            num_steps=4,
            random_start=False,
            report=report,
        )
        assert report.reason is None, view.name
        assert report.graph == "captured", view.name


def test_nearest_adversarial_images() -> None:
    model = unplanned().to(CUDA).eval()
    images = torch.rand(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0)).to(CUDA)
    labels = model(images).argmax(dim=1)
    found = attacks.minimum_norm(attacks.fab, model, images, labels, norm="linf", num_steps=4)
    assert found.distance.device == CUDA
    assert (found.distance >= 0).all()


def test_the_original_interface() -> None:
    """Of AutoAttack: its default device is a GPU."""
    model = model_on("unplanned", CUDA)
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(CUDA)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    attack = AutoAttack(
        model, norm="Linf", eps=0.06, version="custom", attacks_to_run=["square"], verbose=False
    )
    attack.square.n_queries = 10
    assert attack.run_standard_evaluation(images, labels, bs=3).device == CUDA


# Training ---------------------------------------------------------------------------------------

SETTINGS = """
    device=cuda data.num_train=32 data.num_validation=10 model.width=4 validate_every=1
    validation_steps=2 checkpoint_every=3 log_every=2
"""
# Interrupted there; the run goes on from the checkpoint of that moment.
STOP = 1
# Side by side and jointly; with a router; with tensors that a phase keeps.
COMPARED = ["dwf", "robust-experts", "free-at"]


def short(preset: str) -> Config:
    """One epoch of two steps for each phase."""
    config = presets.find(preset)
    phases = [x for x in ("pretrain", "joint") if getattr(config, x) is not None]
    sizes = [f"{x}.{y}" for x in phases for y in ("num_epochs=1", "batch_size=16")]
    return apply_overrides(config, [*SETTINGS.split(), *sizes])


def preset_of(defense: str) -> str:
    return "smoke" if defense == "dwf" else f"{defense.replace('-', '_')}_digits"


@pytest.mark.parametrize("defense", [x for x in DEFENSES if x not in COMPARED])
def test_training_goes_on_after_a_stop(defense: str, tmp_path: Path) -> None:
    model = train_interrupted(short(preset_of(defense)), tmp_path / "run", STOP)
    assert all(x.device == CUDA and x.isfinite().all() for x in model.state_dict().values())
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize("defense", COMPARED)
def test_a_stop_changes_nothing(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "prune", lambda folder: None)
    train(short(preset_of(defense)), tmp_path / "whole", quiet=True)
    train_interrupted(short(preset_of(defense)), tmp_path / "run", STOP)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_moves_between_devices(tmp_path: Path) -> None:
    trained = train(short("plain_digits"), tmp_path / "run", quiet=True)
    here, there = dwf.load(tmp_path / "run"), dwf.load(tmp_path / "run").to(CUDA)
    for name, value in trained.state_dict().items():
        assert value.device == there.state_dict()[name].device == CUDA
        assert torch.equal(value.cpu(), here.state_dict()[name])
        assert torch.equal(value, there.state_dict()[name])


TRAIN_ON_A_RANK = """
import hashlib, sys
import rehearsal
if sys.argv[2] == "rehearsed":
    rehearsal.start()
import test_on_gpu
print(test_on_gpu.bits_after_training(sys.argv[1]))
assert rehearsal.take_problems() == []
"""


def bits_after_training(folder: str) -> str:
    """A hash of the weights that this process has at the end of a run of several."""
    device = f"device=cuda:{0 if rehearsal.running else os.environ['LOCAL_RANK']}"
    model = train(apply_overrides(short("smoke"), [device]), folder, quiet=True)
    dwf.distributed.shutdown()
    weights = [x.cpu().numpy().tobytes() for x in model.state_dict().values()]
    return hashlib.sha256(b"".join(weights)).hexdigest()


@pytest.mark.skipif(
    not rehearsal.running and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place["PYTHONPATH"] = os.pathsep.join(map(str, (tests, tests.parent)))
    kind = "rehearsed" if rehearsal.running else "real"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_ON_A_RANK, str(tmp_path / "run"), kind],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0][0] == said[1][0]


def waits_of_steps(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[rehearsal.Counts]:
    """What each step of a training made the host wait for, between its rows of metrics."""
    found: list[rehearsal.Counts] = []
    step = loop.train_step

    def counted(*arguments: Any) -> Any:
        with rehearsal.counted() as events:
            numbers = step(*arguments)
        found.append(events)
        return numbers

    monkeypatch.setattr(loop, "train_step", counted)
    config = apply_overrides(short(preset), ["data.num_train=64", "validate_every=0"])
    train(config, tmp_path / "run", quiet=True)
    return found


@only_rehearsed
def test_a_training_step_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once what it uses is chosen, planned and captured; a row of metrics then waits once."""
    *_, last = waits_of_steps("smoke", tmp_path, monkeypatch)
    assert last.where("syncs") == last.where("copies") == {}


@only_rehearsed
def test_rows_of_metrics_wait_once(tmp_path: Path) -> None:
    with rehearsal.counted() as events:
        train(short("plain_digits"), tmp_path / "run", quiet=True)
    waits = {
        k: n for k, n in events.where("syncs").items() if k.startswith("dwf/training/recorder")
    }
    rows = [x for x in read_metrics(tmp_path / "run") if x["kind"] == "train"]
    assert sum(waits.values()) == len(rows) + 1  # the clock of the estimate starts once


# Evaluation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Divided We Fall after a few steps."""
    return train(short("smoke"), tmp_path_factory.mktemp("trained") / "run", quiet=True)


@pytest.mark.parametrize("suite", ["paper", "quick", "standard"])
@pytest.mark.usefixtures("brief_suites")
def test_a_suite(suite: str, trained: nn.Module) -> None:
    settings = EvaluationConfig(
        num_steps=(2, 3),
        multi_start_steps=2,
        adaptive_steps=2,
        diagnostic_images=2,
        diagnostic_steps=3,
    )
    images = dwf.data.load("digits", split="test").subset(torch.arange(4))
    found = dwf.evaluate(trained, images, settings, suite=suite, device="cuda")
    assert found.num_images == 4
    assert found.verdict


def test_each_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert dwf.distributed.init() == CUDA
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match="torch sees"):
        dwf.distributed.init(absent)


def test_the_report_of_this_machine() -> None:
    facts = info.collect(selftest=True)
    assert [x["device"] for x in facts["gpus"]] == ["cuda:0"]
    checked = {x["op"] for x in facts["selftest"] if x["device"].startswith("cuda")}
    assert checked == set(op.registry())
    assert torch.cuda.get_device_name(0) in info.render(facts)
