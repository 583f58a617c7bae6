"""Two processes compute what one computes, and attacks send nothing between them."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import before_steps, dense_mixture, rows, small_config, stop
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import dwf
from dwf import distributed
from dwf.attacks.target import attack_target
from dwf.checks import ConfigError
from dwf.config import EvaluationConfig
from dwf.data import load
from dwf.evaluation import Budget, Evaluation, evaluate_into
from dwf.models import build_network
from dwf.presets import single
from dwf.training import Stopped, train

WORLD = 2
SHORT = ("pretrain.num_epochs=1", "joint.num_epochs=1", "log_every=1", "checkpoint_every=1000")
# Seed 1, because an attack takes the sign of a gradient: one that is zero but for rounding can move
# its pixel the other way in another process, and from there on no two losses agree to 1e-6. One in
# a few hundred steps does that; with seed 0 it is the last one, three pixels of it.
IMAGE_DRAWS = ("attack.draw=image", "attack.random_start=true", "seed=1")
STOP_AFTER = 6


def configs():
    """Name, configuration for one process, for two, and who makes the model."""
    config = small_config(*SHORT)
    yield "dwf", config, config, None
    image_draws = small_config(*SHORT, *IMAGE_DRAWS)
    yield "image draws", image_draws, image_draws, None
    together = small_config(*SHORT, "model.num_pgd=2", "seed=1", "pretrain_together=always")
    yield "together", together, together, None
    for defense in ("fgsm-at", "pgd-at", "awp"):
        baseline = single(config, defense)
        yield defense, baseline, baseline, None
    joint = replace(config, pretrain=None)
    parts = replace(joint, joint=replace(joint.joint, accumulation=2))
    yield "accumulation", joint, parts, dense_mixture
    # BatchNorm sees parts: those of the global batch
    normed = single(config, "pgd-at")
    normed = replace(normed, pretrain=replace(normed.pretrain, accumulation=2))
    yield "accumulation with BatchNorm", normed, normed, None


NAMES = [name for name, *_ in configs()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder of runs: NAME-1 by one process, NAME-2 by two; and what the two have to tell."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(folder), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def told(folder, name):
    """What each process told under a name."""
    return [json.loads((folder / f"rank{rank}.json").read_text())[name] for rank in range(WORLD)]


def assert_equal_losses(one, two):
    assert len(one) == len(two) >= 4
    for single_row, double_row in zip(one, two, strict=True):
        expected = single_row.get("loss")
        assert double_row.get("loss") == (expected and pytest.approx(expected, rel=1e-6))
        assert {**double_row, "loss": expected} == {**single_row, "loss": expected}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_equal_losses(results, name):
    assert_equal_losses(rows(results / f"{name}-1"), rows(results / f"{name}-2"))


@pytest.mark.slow
def test_all_phases_were_compared(results):
    phases = {row["phase"] for row in rows(results / "dwf-2")}
    assert phases == {"expert-0-benign", "expert-1-fgsm", "expert-2-pgd", "joint"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_equal_weights_on_every_process(results, name):
    """Processes whose weights differ would drift apart, and nobody would see."""
    digests = told(results, f"{name} weights")
    assert digests[0] == digests[1]


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.slow
def test_attacks_send_nothing(results, bn_mode):
    for calls in told(results, "collectives"):
        assert calls["training step"] > 0  # the counter sees what DDP and BatchNorm send
        assert calls[f"pgd {bn_mode}"] == 0


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(results):
    message = f"stopped at step {STOP_AFTER}, saved; run the same command to continue"
    assert told(results, "stopped") == [message] * WORLD


@pytest.mark.slow
def test_one_process_continues_what_two_began(results):
    assert_equal_losses(rows(results / "dwf-1"), rows(results / "stopped"))


@pytest.mark.slow
def test_an_evaluation_is_shared_out(results):
    """One table, that of one process; each process attacked some of the images; one wrote."""
    one, two = (Evaluation.read(results / f"eval-{n}/evaluations/quick.json") for n in (1, 2))
    assert two.worst_case == one.worst_case
    for row, other in zip(two.attacks, one.attacks, strict=True):
        assert torch.equal(row.correct, other.correct)
        assert row.num_attacked == other.num_attacked
        assert (row.num_forwards, row.num_backwards) == (other.num_forwards, other.num_backwards)
    seen = told(results, "images seen")
    assert 0 < seen[1] < told(results, "images seen alone")[1]
    assert not list((results / "eval-2").rglob("*partial*"))


@pytest.mark.slow
def test_a_killed_process_is_named(results):
    message = (results / "lost.txt").read_text()
    assert re.match(r"rank 1 \(pid \d+\) is gone, so rank 0 cannot go on", message)
    assert "the same command continues" in message


@pytest.mark.slow
def test_global_batch_norm(results):
    """Output, gradients and statistics of each half are those of the whole; eval is torch's own."""
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(3).double(), make_rows().detach().double().requires_grad_()
    out = norm(x)
    (out * x.detach().cos()).sum().backward()
    for rank, found in enumerate(told(results, "batch norm")):
        half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
        for name, value in [
            ("out", out[half]),
            ("x.grad", x.grad[half]),
            ("running_mean", norm.running_mean),
            ("running_var", norm.running_var),
        ]:
            assert_near(found[name], value)
        assert found["eval equal"]
        assert found["without weights"] == "BatchNorm2d"
    # parameter gradients are those of the rows at hand, as everywhere under DDP
    total = sum(torch.tensor(found["weight.grad"]) for found in told(results, "batch norm"))
    assert_near(total.tolist(), norm.weight.grad)


def assert_near(found, truth):
    """Within float32's rounding of a sum of a hundred numbers."""
    error = (torch.tensor(found, dtype=torch.float64) - truth).abs().max()
    assert error <= 1e-5 * truth.abs().max()


class TestOneProcess:
    def test_is_rank_zero_of_one(self):
        assert (distributed.rank(), distributed.world_size()) == (0, 1)

    def test_sums_are_the_values(self):
        values = torch.tensor([1.0, 2.0])
        assert distributed.total(values) is values
        assert distributed.any_process(True)
        assert not distributed.any_process(False)
        distributed.barrier()

    def test_plans_are_those_of_one_process(self, monkeypatch):
        network = build_network("resnet6", num_classes=10, width=2, in_channels=1, seed=0)
        network = dwf.accelerate(network.eval())
        images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
        how = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 3, "random_start": False}
        alone = str(attack_target(network, images))
        expected = dwf.pgd(network, images, labels, **how)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        network = build_network("resnet6", num_classes=10, width=2, in_channels=1, seed=0)
        distributed.use_global_batch_norm(network)
        network = dwf.accelerate(network.eval())
        assert any(type(m) is distributed.GlobalBatchNorm2d for m in network.modules())
        target = attack_target(network, images)
        assert target.plan is not None
        assert str(target) == alone
        found = dwf.pgd(network, images, labels, **how)
        assert torch.equal(found, expected)

    def test_batch_norm_stays_torchs(self):
        model = nn.Sequential(nn.BatchNorm2d(3))
        distributed.use_global_batch_norm(model)
        assert type(model[0]) is nn.BatchNorm2d

    @pytest.mark.parametrize("device", ["cpus", "cuda:x", ""])
    def test_unknown_device(self, device):
        with pytest.raises(ConfigError, match="device"):
            distributed.init(device)

    def test_processes_that_cannot_meet(self, monkeypatch):
        for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ConfigError, match="RANK is '0', but the processes did not meet"):
            distributed.init("cpu")
        monkeypatch.setenv("LOCAL_RANK", "x")
        with pytest.raises(ConfigError, match="LOCAL_RANK is 'x'"):
            distributed.init("cpu")

    def test_an_error_of_ones_own_stays_what_it_is(self):
        with pytest.raises(RuntimeError, match=r"^gloo$"), distributed.naming_lost():
            raise RuntimeError("gloo")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
    def test_absent_device(self):
        with pytest.raises(ConfigError, match="torch sees 0 GPUs"):
            distributed.init("cuda")


class Collectives(TorchDispatchMode):
    """Counts what this process sends while it is open, DDP's own sums included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def make_rows():
    generator = torch.Generator().manual_seed(0)
    return (3 + torch.randn(8, 3, 4, 4, generator=generator)).requires_grad_()


def count_collectives():
    network = build_network("resnet6", num_classes=10, width=2, in_channels=1, seed=0)
    distributed.use_global_batch_norm(network)
    parallel = DistributedDataParallel(network)
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    calls = {}
    for bn_mode in ("eval", "train"):
        with Collectives() as seen:
            dwf.pgd(
                parallel,
                images,
                labels,
                epsilon=0.1,
                step_size=0.05,
                num_steps=3,
                random_start=True,
                bn_mode=bn_mode,
            )
        calls[f"pgd {bn_mode}"] = seen.count
    with Collectives() as seen:
        F.cross_entropy(parallel(images), labels).backward()
    return calls | {"training step": seen.count}


def global_batch_norm(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    distributed.use_global_batch_norm(model)
    norm, half = model[0], len(make_rows()) // WORLD
    x = make_rows().detach()[rank * half : (rank + 1) * half].requires_grad_()
    out = norm(x)
    (out * x.detach().cos()).sum().backward()
    found = {"out": out, "x.grad": x.grad, "weight.grad": norm.weight.grad}
    found |= dict(norm.named_buffers())
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    return {name: value.tolist() for name, value in found.items()} | {
        "eval equal": torch.equal(norm.eval()(x), plain.eval()(x)),
        "without weights": type(model[1]).__name__,
    }


def stop_one_process(folder, rank):
    with before_steps(stop, *[STOP_AFTER - 1] * (rank == 1)):
        try:
            train(small_config(*SHORT), folder, quiet=True)
        except Stopped as stopped:
            return str(stopped)


IMAGES_SEEN = [0]  # not in the model, whose attributes an evaluation restores


class Counting(nn.Module):
    """Counts the images that attacks see; without a plan, because its forward counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images):
        IMAGES_SEEN[0] += len(images)
        return self.layers(images)


def evaluated(folder, *, shared):
    model, before = Counting(), IMAGES_SEEN[0]
    settings = EvaluationConfig(batch_size=8, num_images=60, epsilon=0.02, diagnostic_images=0)
    budget = Budget(num_steps=3, num_queries=5)
    options = {"suite": "quick", "budget": budget, "name": "quick", "shared": shared}
    evaluate_into(folder, model, load("digits", split="test"), settings, **options)
    return IMAGES_SEEN[0] - before


def lose_one_process(folder, rank):
    """Kill rank 1 before a step; rank 0 writes down what it is told."""
    kill_self = lambda run: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    with before_steps(kill_self, *[STOP_AFTER - 1] * (rank == 1)):
        try:
            train(small_config(*SHORT), folder / "lost", quiet=True)
        except distributed.ProcessLostError as lost:
            (folder / "lost.txt").write_text(str(lost))


def work(folder: Path, rank: int) -> None:
    found = {}
    for name, _, config, make in configs():
        model = train(config, folder / f"{name}-2", model=make and make(), quiet=True)
        weights = [value.numpy().tobytes() for value in model.state_dict().values()]
        found[f"{name} weights"] = hashlib.sha256(b"".join(weights)).hexdigest()
    found["collectives"] = count_collectives()
    found["batch norm"] = global_batch_norm(rank)
    found["stopped"] = stop_one_process(folder / "stopped", rank)
    found["images seen"] = evaluated(folder / "eval-2", shared=True)
    found["images seen alone"] = evaluated(folder / f"eval-alone-{rank}", shared=False)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    lose_one_process(folder, rank)
    distributed.shutdown()


def main(folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    for name, config, _, make in configs():
        train(config, folder / f"{name}-1", model=make and make(), quiet=True)
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD}
            os.environ |= {key: str(value) for key, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            try:
                work(folder, rank)
            finally:
                sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else os._exit(0)
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, -signal.SIGKILL]  # the last thing that they do
    evaluated(folder / "eval-1", shared=False)
    train(small_config(*SHORT), folder / "stopped", quiet=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
