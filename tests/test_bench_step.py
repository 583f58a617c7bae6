"""Contenders of benchmarks/bench_step.py compute the same, and the gates catch who does not.

Numbers are not looked at here, nor is a GPU; what only a GPU can run is checked up to its door.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_step
import gates
import pytest
import rows
import torch
from attack_columns import Column, attack_columns, eager_attack, stock_attack
from bench import Bench
from step_models import EPSILON, Case, PlainMixture, make_inputs, plain_model
from torch import Tensor, nn
from training_columns import EagerTraining, training_columns

from dwf.bench import stock
from moe_kernels import timing
from moe_kernels.plan import choose
from moe_kernels.processor import bfloat16_is_fast

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
CASE = Case("resnet6", 4, 8, batch_size=8, num_steps=3, needs_gpu=False)


@pytest.fixture(scope="module")
def inputs() -> tuple[Any, Tensor, Tensor]:
    """Mixture, images, labels."""
    return make_inputs(CASE, CPU)


@pytest.fixture(scope="module")
def reference(inputs: tuple[Any, Tensor, Tensor]) -> Any:
    return gates.make_reference(*inputs, CASE.num_steps)


# The model and its contenders -------------------------------------------------------------------


def test_plain_mixture_is_the_mixture(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, _ = inputs
    for memory_format in (torch.contiguous_format, torch.channels_last):
        plain = PlainMixture(mixture, memory_format).eval()
        torch.testing.assert_close(plain(images), mixture(images), rtol=1e-5, atol=1e-6)
    names = [name for name, _ in mixture.named_parameters()]
    # Another order of the same layers: updates are compared as one vector.
    assert names == [name for name, _ in plain.named_parameters()]
    assert not any(a is b for a, b in zip(mixture.parameters(), plain.parameters(), strict=True))


def test_inputs_are_worth_attacking(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, _ = inputs
    gate_weights = mixture(images, return_aux=True).gate_weights
    assert gate_weights.std(dim=1).min() > 1e-3
    assert len(set(map(tuple, mixture.expert(0)(images).tolist()))) == len(images)
    assert all(not x.training for x in mixture.modules())


def contenders(*inputs: Any) -> Iterator[tuple[str, Any]]:
    for name, build in attack_columns(*inputs).items():
        with contextlib.suppress(ImportError):
            yield name, build()


# Where bfloat16 is no faster, all columns are float32.
IN_FLOAT32 = {"stock fp32", "ours fp32"} if bfloat16_is_fast(CPU) else set()


@pytest.mark.parametrize("fast", [True, False])
def test_stock_takes_the_faster_dtype(
    fast: bool, inputs: tuple[Any, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 without its instructions takes stock ten times as long: a straw man."""
    monkeypatch.setattr(choose, "bfloat16_is_fast", lambda device: fast)
    columns = attack_columns(*inputs)
    assert columns["stock"].args[-1] is (torch.float32, torch.bfloat16)[fast]
    assert ("stock fp32" in columns) is fast
    trainings = training_columns(inputs[0], CASE, inputs[1], 100)
    assert trainings["ours"].keywords["precision"] == ("float32", "bfloat16")[fast]
    assert ("stock fp32" in trainings) is fast


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the toolboxes' imports
def test_every_contender_passes_the_gate(
    inputs: tuple[Any, Tensor, Tensor], reference: Any
) -> None:
    mixture, _, _ = inputs
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    found = {}
    for name, column in contenders(*inputs):
        found[name] = gates.judge_attack(column, reference, *inputs, CASE.num_steps)
    assert {"eager", "stock", "ours", *IN_FLOAT32} <= set(found)
    assert found["eager"]["sign_agreement"] == 1
    assert all(torch.equal(before[name], x) for name, x in mixture.state_dict().items())


def minus(attack: Callable[..., Tensor], images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    return (2 * images - attack(images, labels, num_steps)).clamp(0, 1)


def twice(attack: Callable[..., Tensor], images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    step = attack(images, labels, num_steps) - images
    return (images + step * 2 * EPSILON / step.abs().clamp_min(1e-9)).clamp(0, 1)


def one_step(attack: Callable[..., Tensor], images: Tensor, labels: Tensor, _: int) -> Tensor:
    return attack(images, labels, 1)


def half(attack: Callable[..., Tensor], images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    return torch.cat([attack(images, labels, num_steps)[:-1], images[-1:]])


def not_a_number(attack: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return attack(*inputs) * torch.nan


BUGS = {
    "descends": minus,
    "leaves the ball": twice,
    "takes one step whatever is asked": one_step,
    "forgets the last image": half,
    "NaN": not_a_number,
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("bug", BUGS)
def test_the_gate_rejects(
    bug: str, precision: str, inputs: tuple[Any, Tensor, Tensor], reference: Any
) -> None:
    eager = eager_attack(plain_model(inputs[0]))
    column = Column(functools.partial(BUGS[bug], eager), bug, precision)
    with pytest.raises(AssertionError, match=bug):
        gates.judge_attack(column, reference, *inputs, CASE.num_steps)


def test_the_gate_rejects_wrong_logits(inputs: tuple[Any, Tensor, Tensor], reference: Any) -> None:
    mixture, _, _ = inputs
    plain = plain_model(mixture)
    eager = eager_attack(plain)
    dropped = plain_model(mixture)
    dropped.calls = [dropped.calls[0], *dropped.calls[:-1]]
    column = Column(eager, "swapped experts", "bfloat16", dropped)
    with pytest.raises(AssertionError, match="logits are off"):
        gates.judge_attack(column, reference, *inputs, CASE.num_steps)


@pytest.mark.filterwarnings("default")  # a compiler remarks on this and that
@pytest.mark.slow
def test_compiled_once_for_all_experts(
    inputs: tuple[Any, Tensor, Tensor], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    # Traces as on a GPU, without generating code.
    monkeypatch.setitem(stock.COMPILE, "backend", "aot_eager")
    mixture, images, _ = inputs
    attack = stock_attack(mixture, images, compiled=True, graphed=False)
    column = Column(attack, "compiled", "bfloat16", attack.logits)
    gates.judge_attack(column, reference, *inputs, CASE.num_steps)
    assert counters["stats"]["unique_graphs"] == 2  # expert, and the step of the image


class FakeStream:
    """Says who waited for whom, and what ran where."""

    current: FakeStream

    def __init__(self, name: str = "side") -> None:
        self.name = name
        self.waited_for: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other.name)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        before, FakeStream.current = FakeStream.current, self
        yield
        FakeStream.current = before


def test_capture_warms_up_on_the_stream_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeStream.current = default = FakeStream("default")
    log: list[str] = []
    graph = SimpleNamespace(replay=lambda: log.append("replay"))

    @contextlib.contextmanager
    def capture(found: Any, stream: FakeStream) -> Iterator[None]:
        assert found is graph
        assert default.waited_for == ["side"]  # the warm-up is over before the capture begins
        log.append("capture")
        with stream.use():
            yield

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream.current)
    monkeypatch.setattr(torch.cuda, "stream", FakeStream.use)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = stock.captured(lambda: log.append(FakeStream.current.name))
    assert log == ["side"] * 3 + ["capture", "side"]
    replay()
    assert log[-1] == "replay"
    assert FakeStream.current is default


def test_a_step_keeps_its_addresses_and_leaves_no_gradient(
    inputs: tuple[Any, Tensor, Tensor],
) -> None:
    mixture, images, labels = inputs
    attack = stock_attack(mixture, images, compiled=False, graphed=False)

    def addresses() -> list[int]:
        state = [attack.images, attack.labels, attack.adversarial, attack.gradient]
        return [x.data_ptr() for x in (*state, *attack.model.parameters(), *attack.model.buffers())]

    before = addresses()
    first = attack(images, labels, 3)
    other = make_inputs(dataclasses.replace(CASE, network="resnet8"), CPU)[1].flip(0)
    attack(other, labels, 2)
    attack.follow(attack.model)
    assert addresses() == before
    assert all(x.grad is None for x in attack.model.parameters())
    # A second batch leaves nothing behind for the third.
    assert torch.equal(attack(images, labels, 3), first)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=pytest.mark.real_gpu)],  # no compiler below a dispatch mode
    ids=["eager", "compiled"],
)
def test_a_graph_replays_the_step(compiled: bool) -> None:
    torch.compiler.reset()
    mixture, images, labels = make_inputs(CASE, torch.device("cuda", 0))
    attack = stock_attack(mixture, images, compiled=compiled, graphed=True)
    column = Column(attack, "graph", "bfloat16", attack.logits)
    for batch, classes in ((images, labels), (images.flip(0), labels.roll(1))):
        expected = gates.make_reference(mixture, batch, classes, CASE.num_steps)
        gates.judge_attack(column, expected, mixture, batch, classes, CASE.num_steps)


def test_ways_are_tried_in_order_and_reasons_kept() -> None:
    tried = []

    def build(*, compiled: bool, graphed: bool) -> str:
        tried.append((compiled, graphed))
        if compiled:
            raise RuntimeError("no compiler\nand more")
        return "attack"

    found, ran = stock.first_that_runs(build, torch.device("cuda"))
    assert found == "attack"
    assert tried == [(True, True), (False, True)]
    assert ran.startswith("channels_last, CUDA graph; not channels_last, torch.compile")
    assert "RuntimeError: no compiler" in ran
    assert "and more" not in ran

    def broken(*, compiled: bool, graphed: bool) -> str:
        raise RuntimeError("nothing works")

    with pytest.raises(RuntimeError, match="nothing works"):
        stock.first_that_runs(broken, torch.device("cuda"))
    assert "CPU" in stock.first_that_runs(lambda **ways: ways, CPU)[1]


def test_who_cannot_run_is_skipped_and_who_is_wrong_is_not() -> None:
    def missing() -> Any:
        raise ImportError("No module named 'toolbox'")

    def large() -> Any:
        raise torch.OutOfMemoryError

    builders = {"a": lambda: 1, "b": missing, "c": large}
    said: list[str] = []
    columns, quality, skipped = gates.build_all(builders, lambda _: {"error": 0.0}, said.append)
    assert (columns, quality) == ({"a": 1}, {"a": {"error": 0.0}})
    assert "toolbox" in skipped["b"]
    assert "memory" in skipped["c"]
    assert [line.split(" (")[0] for line in said[:1]] == ["a: built, and right"]
    assert "b: skipped, not installed" in said[1]

    def red(column: Any) -> dict[str, float]:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        gates.build_all(builders, red, said.append)


def test_rows_are_per_step() -> None:
    times = {"ours": timing.Timing(12.0, 10.0, 16.0, 5, 0.5)}
    found = bench_step.describe(times, 4, 32, {"ours": "it"}, {"ours": {"sign_agreement": 1.0}})
    assert found["ours"] == {
        **{"median_ms": 3.0, "p20_ms": 2.5, "p80_ms": 4.0, "num_samples": 5, "ratio": 0.5},
        **{"images_per_s": 32 / 3e-3, "ran": "it", "sign_agreement": 1.0},
    }


# Training ---------------------------------------------------------------------------------------


def trainings(mixture: Any, images: Tensor) -> dict[str, Any]:
    builders = training_columns(mixture, CASE, images, 100)
    return {name: build() for name, build in builders.items()}


@pytest.mark.slow
def test_every_training_takes_the_same_steps(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, labels = inputs
    found = trainings(mixture, images)
    assert set(found) == {"eager", "stock", "ours", *IN_FLOAT32}
    expected = gates.first_update(found["eager"], images, labels)
    # Twice: the second step attacks the model that the first one made, at the next rate.
    for name in found.keys() - {"eager"}:
        update = gates.first_update(found[name], images, labels)
        errors = gates.judge_training(found[name], update, expected)
        assert errors["loss_error"] < (1e-5 if "fp32" in name else 1e-3)
    losses = {name: float(training(images.flip(0), labels)) for name, training in found.items()}
    for name, loss in losses.items():
        tolerance = 1e-2 if name in ("stock", "ours") else 1e-4  # these are in bfloat16
        assert loss == pytest.approx(losses["eager"], rel=tolerance)


def test_the_training_gate_rejects(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, labels = inputs
    training = EagerTraining(mixture, CASE.num_steps, 100)
    loss, update = gates.first_update(training, images, labels)
    for wrong in [(1.1 * loss, update), (loss, -update), (float("nan"), update)]:
        with pytest.raises(AssertionError):
            gates.judge_training(training, wrong, (loss, update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_attacked_copy_follows_its_model(
    dtype: torch.dtype, inputs: tuple[Any, Tensor, Tensor]
) -> None:
    mixture, images, _ = inputs
    attack = stock_attack(mixture, images, dtype=dtype, compiled=False, graphed=False)
    model = PlainMixture(mixture, torch.channels_last)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.5)
        model.train()(images)
    attack.follow(model)
    for mine, theirs in zip(attack.model.modules(), model.modules(), strict=True):
        if isinstance(mine, (nn.Conv2d, nn.Linear)):
            assert mine.weight.dtype is dtype
            assert torch.equal(mine.weight, theirs.weight.to(dtype))
        elif isinstance(mine, nn.BatchNorm2d):
            assert torch.equal(mine.running_var, theirs.running_var)
            assert not mine.training


# Rows -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_case_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWF_BENCH_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench_step, "matmul_tflop_per_s", lambda device: 1.0)
    monkeypatch.setattr(bench_step, "effort", lambda device: {"min_samples": 2, "min_s": 0.0})
    said: list[str] = []
    case = Case("resnet6", 4, 8, batch_size=4, num_steps=1, needs_gpu=False)
    tools = Bench(CPU, said.append)
    tools.record(bench_step.measure_training(case, tools))
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("step_")
    row = json.loads(path.read_text())
    assert (row["bench"], row["case"]) == ("step", f"training-step-{case}")
    assert row["columns"]["ours"]["num_samples"] == 2
    assert row["columns"]["ours"]["update_cosine"] > 0.99
    assert row["device"]
    assert any(line.startswith("ours: built, and right") for line in said)
    assert said[-1] == f"row written to {path}"
    assert rows.last("step", CPU, row["case"]) == row
    assert rows.last("step", CPU, "another case") is None


def test_a_case_that_is_stopped_leaves_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DWF_BENCH_RESULTS", str(tmp_path))
    calls: list[int] = []

    def ours() -> None:
        calls.append(1)
        if len(calls) == 8:  # three calls warm up
            raise KeyboardInterrupt

    tools = Bench(CPU, lambda line: None)
    columns = {"eager": lambda: None, "ours": ours}
    times = tools.time(columns, [], min_samples=10, min_s=0.0)
    assert times["eager"].num_samples == times["ours"].num_samples == 4
    described = {name: dataclasses.asdict(x) for name, x in times.items()}
    with pytest.raises(KeyboardInterrupt):
        tools.record({"bench": "step", "case": "a", "columns": described})
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["stopped"] is True
    calls[:] = [1] * 4  # stops in the first round: nothing to summarize
    with pytest.raises(KeyboardInterrupt):
        tools.time(columns, [], min_samples=10, min_s=0.0)


@pytest.mark.parametrize(("has_cpu", "refused"), [(True, False), (False, True)])
def test_nothing_is_measured_without_compiled_kernels(
    has_cpu: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.native, "has_cpu", has_cpu)
    if not refused:
        rows.refuse_unbuilt(CPU)
        return
    with pytest.raises(SystemExit, match=r"no row is measured without compiled kernels .*pip"):
        rows.refuse_unbuilt(CPU)


@pytest.mark.slow
def test_a_run_says_what_it_does(tmp_path: Path) -> None:
    """On a terminal that captures output, as users run it."""
    # pytest-benchmark would think that it runs in this test's worker
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["DWF_BENCH_RESULTS"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["benchmarks/bench_ops.py", "-k", "linf_step_-128x3x32x32-float32"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  timing eager, ours\n" in done.stdout
    assert len(list(tmp_path.iterdir())) == 1
