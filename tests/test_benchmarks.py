"""The benchmarks' own arithmetic: contenders that compute the same, gates that catch who does not.

Numbers are not looked at here, nor is a GPU; what only a GPU can run is checked up to its door.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dwf.models import build_network
from moe_kernels import lang, timing

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def module(name: str) -> Any:
    """A benchmark, which lies beside the packages and not in one."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


bench_step, bench_conv, measure_hardware, gpu_suite = map(
    module, ("bench_step", "bench_conv", "measure_hardware", "gpu_suite")
)

CASE = bench_step.Case("resnet6", 4, 8, batch_size=8, num_steps=3, needs_gpu=False)


@pytest.fixture(scope="module")
def inputs() -> tuple[Any, Tensor, Tensor]:
    """Mixture, images, labels."""
    found: tuple[Any, Tensor, Tensor] = bench_step.make_inputs(CASE, CPU)
    return found


@pytest.fixture(scope="module")
def reference(inputs: tuple[Any, Tensor, Tensor]) -> Any:
    return bench_step.make_reference(*inputs, CASE.num_steps)


# The model and its contenders -------------------------------------------------------------------


def test_plain_mixture_is_the_mixture(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, _ = inputs
    for memory_format in (torch.contiguous_format, torch.channels_last):
        plain = bench_step.PlainMixture(mixture, memory_format).eval()
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
    for name, build in bench_step.attack_columns(*inputs).items():
        with contextlib.suppress(ImportError):
            yield name, build()


@pytest.mark.filterwarnings("default")  # of the toolboxes' imports
def test_every_contender_passes_the_gate(
    inputs: tuple[Any, Tensor, Tensor], reference: Any
) -> None:
    mixture, _, _ = inputs
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    found = {}
    for name, column in contenders(*inputs):
        found[name] = bench_step.judge_attack(column, reference, *inputs, CASE.num_steps)
    assert {"eager", "stock", "stock fp32", "ours", "ours fp32"} <= set(found)
    assert found["eager"]["sign_agreement"] == 1
    assert all(torch.equal(before[name], x) for name, x in mixture.state_dict().items())


def minus(attack: Callable[..., Tensor], images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    return (2 * images - attack(images, labels, num_steps)).clamp(0, 1)


def twice(attack: Callable[..., Tensor], images: Tensor, labels: Tensor, num_steps: int) -> Tensor:
    step = attack(images, labels, num_steps) - images
    return (images + step * 2 * bench_step.EPSILON / step.abs().clamp_min(1e-9)).clamp(0, 1)


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
    eager = bench_step.eager_attack(bench_step.plain_model(inputs[0]))
    column = bench_step.Column(functools.partial(BUGS[bug], eager), bug, precision)
    with pytest.raises(AssertionError, match=bug):
        bench_step.judge_attack(column, reference, *inputs, CASE.num_steps)


def test_the_gate_rejects_wrong_logits(inputs: tuple[Any, Tensor, Tensor], reference: Any) -> None:
    mixture, _, _ = inputs
    plain = bench_step.plain_model(mixture)
    eager = bench_step.eager_attack(plain)
    dropped = bench_step.plain_model(mixture)
    dropped.calls = [dropped.calls[0], *dropped.calls[:-1]]
    column = bench_step.Column(eager, "swapped experts", "bfloat16", dropped)
    with pytest.raises(AssertionError, match="logits are off"):
        bench_step.judge_attack(column, reference, *inputs, CASE.num_steps)


@pytest.mark.filterwarnings("default")  # a compiler remarks on this and that
def test_compiled_once_for_all_experts(
    inputs: tuple[Any, Tensor, Tensor], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    # Traces as on a GPU, without generating code.
    monkeypatch.setitem(bench_step.COMPILE, "backend", "aot_eager")
    mixture, images, _ = inputs
    stock = bench_step.StockAttack(mixture, images, compiled=True, graphed=False)
    column = bench_step.Column(stock, "compiled", "bfloat16", stock.logits)
    bench_step.judge_attack(column, reference, *inputs, CASE.num_steps)
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
    replay = bench_step.captured(lambda: log.append(FakeStream.current.name))
    assert log == ["side"] * 3 + ["capture", "side"]
    replay()
    assert log[-1] == "replay"
    assert FakeStream.current is default


def test_a_step_keeps_its_addresses_and_leaves_no_gradient(
    inputs: tuple[Any, Tensor, Tensor],
) -> None:
    mixture, images, labels = inputs
    stock = bench_step.StockAttack(mixture, images, compiled=False, graphed=False)

    def addresses() -> list[int]:
        state = [stock.images, stock.labels, stock.adversarial, stock.gradient]
        return [x.data_ptr() for x in (*state, *stock.model.parameters(), *stock.model.buffers())]

    before = addresses()
    first = stock(images, labels, 3)
    other = bench_step.make_inputs(dataclasses.replace(CASE, network="resnet8"), CPU)[1].flip(0)
    stock(other, labels, 2)
    stock.follow(stock.model)
    assert addresses() == before
    assert all(x.grad is None for x in stock.model.parameters())
    # A second batch leaves nothing behind for the third.
    assert torch.equal(stock(images, labels, 3), first)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_graph_replays_the_step(compiled: bool) -> None:
    torch.compiler.reset()
    mixture, images, labels = bench_step.make_inputs(CASE, torch.device("cuda", 0))
    stock = bench_step.StockAttack(mixture, images, compiled=compiled, graphed=True)
    column = bench_step.Column(stock, "graph", "bfloat16", stock.logits)
    for batch, classes in ((images, labels), (images.flip(0), labels.roll(1))):
        expected = bench_step.make_reference(mixture, batch, classes, CASE.num_steps)
        bench_step.judge_attack(column, expected, mixture, batch, classes, CASE.num_steps)


def test_ways_are_tried_in_order_and_reasons_kept() -> None:
    tried = []

    def build(*, compiled: bool, graphed: bool) -> str:
        tried.append((compiled, graphed))
        if compiled:
            raise RuntimeError("no compiler\nand more")
        return "attack"

    found, ran = bench_step.first_that_runs(build, torch.device("cuda"))
    assert found == "attack"
    assert tried == [(True, True), (False, True)]
    assert ran.startswith("channels_last, CUDA graph; not channels_last, torch.compile")
    assert "RuntimeError: no compiler" in ran
    assert "and more" not in ran

    def broken(*, compiled: bool, graphed: bool) -> str:
        raise RuntimeError("nothing works")

    with pytest.raises(RuntimeError, match="nothing works"):
        bench_step.first_that_runs(broken, torch.device("cuda"))
    assert "CPU" in bench_step.first_that_runs(lambda **ways: ways, CPU)[1]


def test_who_cannot_run_is_skipped_and_who_is_wrong_is_not() -> None:
    def missing() -> Any:
        raise ImportError("No module named 'toolbox'")

    def large() -> Any:
        raise torch.OutOfMemoryError

    builders = {"a": lambda: 1, "b": missing, "c": large}
    columns, quality, skipped = bench_step.build_all(builders, lambda column: {"error": 0.0})
    assert (columns, quality) == ({"a": 1}, {"a": {"error": 0.0}})
    assert "toolbox" in skipped["b"]
    assert "memory" in skipped["c"]

    def red(column: Any) -> dict[str, float]:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        bench_step.build_all(builders, red)


def test_rows_are_per_step() -> None:
    times = {"ours": timing.Timing(12.0, 10.0, 16.0, 5, 0.5)}
    found = bench_step.describe(times, 4, 32, {"ours": "it"}, {"ours": {"sign_agreement": 1.0}})
    assert found["ours"] == {
        **{"median_ms": 3.0, "p20_ms": 2.5, "p80_ms": 4.0, "num_samples": 5, "ratio": 0.5},
        **{"images_per_s": 32 / 3e-3, "ran": "it", "sign_agreement": 1.0},
    }


# Training ---------------------------------------------------------------------------------------


def trainings(mixture: Any, images: Tensor) -> dict[str, Any]:
    builders = bench_step.training_columns(mixture, CASE, images, 100)
    return {name: build() for name, build in builders.items()}


def test_every_training_takes_the_same_steps(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, labels = inputs
    found = trainings(mixture, images)
    assert set(found) == {"eager", "stock", "ours"}
    expected = bench_step.first_update(found["eager"], images, labels)
    # Twice: the second step attacks the model that the first one made, at the next rate.
    for name in ("stock", "ours"):
        update = bench_step.first_update(found[name], images, labels)
        errors = bench_step.judge_training(found[name], update, expected)
        assert errors["loss_error"] < 1e-5
    losses = [float(training(images.flip(0), labels)) for training in found.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_the_training_gate_rejects(inputs: tuple[Any, Tensor, Tensor]) -> None:
    mixture, images, labels = inputs
    training = bench_step.EagerTraining(mixture, CASE.num_steps, 100)
    loss, update = bench_step.first_update(training, images, labels)
    for wrong in [(1.1 * loss, update), (loss, -update), (float("nan"), update)]:
        with pytest.raises(AssertionError):
            bench_step.judge_training(training, wrong, (loss, update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_attacked_copy_follows_its_model(
    dtype: torch.dtype, inputs: tuple[Any, Tensor, Tensor]
) -> None:
    mixture, images, _ = inputs
    stock = bench_step.StockAttack(mixture, images, dtype=dtype, compiled=False, graphed=False)
    model = bench_step.PlainMixture(mixture, torch.channels_last)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.5)
        model.train()(images)
    stock.follow(model)
    for mine, theirs in zip(stock.model.modules(), model.modules(), strict=True):
        if isinstance(mine, (nn.Conv2d, nn.Linear)):
            assert mine.weight.dtype is dtype
            assert torch.equal(mine.weight, theirs.weight.to(dtype))
        elif isinstance(mine, nn.BatchNorm2d):
            assert torch.equal(mine.running_var, theirs.running_var)
            assert not mine.training


# Convolutions -----------------------------------------------------------------------------------

SMALL_CONVS = [case for case in bench_conv.CASES if not case.needs_gpu]


@pytest.mark.parametrize("case", SMALL_CONVS, ids=str)
def test_convolutions_of_all_columns_are_the_same(case: Any) -> None:
    work = bench_conv.make_work(case, CPU)
    columns = {name: build() for name, build in bench_conv.builders(work).items()}
    assert set(columns) == {"eager", "ours"} | ({"grouped"} if not case.stem else set())
    assert bench_conv.judge(work, columns) == {}


@pytest.mark.parametrize("case", SMALL_CONVS, ids=str)
def test_the_gate_of_convolutions_rejects(case: Any) -> None:
    """What a layer adds to its sum left out, another expert's weights, and no result at all."""
    bare = dataclasses.replace(case, layer=case.layer._replace(residual=False, side=None))
    work, other = bench_conv.make_work(case, CPU), bench_conv.make_work(bare, CPU)
    ours = bench_conv.builders(work)["ours"]()
    left_out = bench_conv.builders(other)["ours"]()
    wrong = {"swapped": lambda: ours().flip(0), "none": lambda: torch.full_like(ours(), torch.nan)}
    if case.stem:
        wrong["swapped"] = lambda: ours().flip(1)  # images: experts share them
    if bare.layer != case.layer:
        wrong["left out"] = left_out
    assert set(bench_conv.judge(work, {"right": ours, **wrong})) == set(wrong)


def test_convolutions_timed_are_those_of_a_step() -> None:
    network = build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=0)
    leaf = torch.zeros(1, 3, 32, 32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        network.requires_grad_(False)(leaf).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    for backward, op in (
        (False, torch.ops.aten.convolution),
        (True, torch.ops.aten.convolution_backward),
    ):
        cases = [
            case
            for case in bench_conv.CASES
            if case.needs_gpu and case.num_images == 128 and case.backward is backward
        ]
        assert sum(case.count for case in cases) == 17
        gflop = sum(case.count * case.gflop for case in cases)
        assert gflop == pytest.approx(9 * 128 * counts[op] / 1e9, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL_CONVS, ids=str)
def test_convolutions_in_graphs(case: Any) -> None:
    work = bench_conv.make_work(case, torch.device("cuda", 0))
    made = bench_conv.builders(work)
    names = {"ours", *work.stock, *bench_conv.tiles(work)}
    assert names <= set(made)
    graphs = {name: bench_conv.graphed(made[name]()) for name in names}
    assert bench_conv.judge(work, graphs) == {}
    work.inputs[0].mul_(2)  # a replay reads its inputs anew
    assert bench_conv.judge(work, {"ours": graphs["ours"]}) == {}


# Hardware ---------------------------------------------------------------------------------------


def test_convolutions_are_those_of_the_network() -> None:
    network = build_network("resnet18", num_classes=10, width=64, in_channels=3, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    stated = sum(conv.count * conv.gflop(1) for conv in measure_hardware.RESNET18)
    assert stated == pytest.approx(counted / 1e9, rel=1e-12)
    assert len(measure_hardware.RESNET18) == 11
    assert measure_hardware.RESNET18[1].gflop(2, groups=9) == pytest.approx(18 * 0.075497472)


def test_a_measurement_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_broken(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
        yield {"measurement": "first"}
        raise RuntimeError("no such instruction")

    def whole(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
        yield {"measurement": "second"}

    monkeypatch.setattr(measure_hardware, "MEASUREMENTS", [half_broken, whole])
    later = time.monotonic() + 60
    found = list(measure_hardware.measure(CPU, small=True, deadline=later))
    assert [x["measurement"] for x in found] == ["first", "half_broken", "second"]
    assert found[1]["skipped"] == "RuntimeError: no such instruction"
    found = list(measure_hardware.measure(CPU, small=True, deadline=time.monotonic() - 1))
    assert [x["skipped"] for x in found] == ["the time was up"] * 2


def test_summary_weighs_convolutions_as_they_occur() -> None:
    base = {"measurement": "conv bf16", "batch_size": 128, "pass_": "forward"}
    rows = [
        {**base, "conv": "a", "count": 3, "median_ms": 1.0, "tflop_per_s": 100.0},
        {**base, "conv": "b", "count": 1, "median_ms": 3.0, "tflop_per_s": 20.0},
        {"measurement": "cache_bandwidth", "skipped": "no Triton"},
    ]
    lines = measure_hardware.summarize(rows)
    assert lines[0] == "cache_bandwidth: skipped, no Triton"
    assert "60.0 TFLOP/s over the network (20.0 to 100.0; 2 of 11 kinds)" in lines[1]


@pytest.mark.gpu
def test_every_measurement_runs_on_a_gpu() -> None:
    later = time.monotonic() + 300
    found = measure_hardware.measure(torch.device("cuda", 0), small=True, deadline=later)
    assert [x for x in found if "skipped" in x] == []


@pytest.mark.skipif(lang.missing is not None, reason=f"{lang.missing}")
@pytest.mark.skipif(lang.interpreted, reason="the interpreter's kernels are not compiled")
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
def test_the_reading_kernel_compiles_and_bypasses_l1(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = measure_hardware.read_kernel
    types = ["*fp32", "*fp32", "i32", "i32", "constexpr"]
    source = ASTSource(
        kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs={"BLOCK": measure_hardware.READ_BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(2)},
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    compiled = lang.triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    assert loads
    assert all(".cg." in line and ".v4." in line for line in loads)


# The suite --------------------------------------------------------------------------------------


def run(code: str, tmp_path: Path, *, limit_s: float = 30.0, **rest: Any) -> tuple[Any, str]:
    log = tmp_path / "log.txt"
    stage = gpu_suite.Stage("stage", [[sys.executable, "-c", code]], limit_s, **rest)
    outcome = gpu_suite.run_stage(stage, log, 60.0)
    return outcome, log.read_text()


def test_stage_that_works(tmp_path: Path) -> None:
    code = "import os; print('hello'); print(os.environ['KEY'])"
    outcome, log = run(code, tmp_path, environment={"KEY": "the last line"})
    assert (outcome.status, outcome.last) == ("ok", "the last line")
    assert "hello" in log


def test_stage_that_fails(tmp_path: Path) -> None:
    outcome, log = run("raise SystemExit('it broke')", tmp_path)
    assert (outcome.status, outcome.last) == ("failed", "it broke")
    assert "exit code 1" in log


def test_stage_that_hangs_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE_S", 0.2)
    # Both ignore the polite signal.
    sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = sleep + "print('child is up', flush=True); time.sleep(60)"
    code = (
        f"{sleep}import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    began = time.monotonic()
    outcome, _ = run(code, tmp_path, limit_s=2.0)
    assert outcome.status == "timed out"
    assert time.monotonic() - began < 10
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split(")")[-1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a stage that was ended still runs")


def test_stage_that_cannot_start_or_is_skipped(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    outcome = gpu_suite.run_stage(gpu_suite.Stage("none", [["/nowhere/program"]]), log, 5.0)
    assert outcome.status == "failed"
    assert "/nowhere/program" in outcome.last
    outcome = gpu_suite.run_stage(gpu_suite.Stage("no", skipped="no reason"), log, 5.0)
    assert (outcome.status, outcome.last) == ("skipped", "no reason")


def test_stage_stops_at_its_first_failure_and_reads_its_output(tmp_path: Path) -> None:
    heard: list[str] = []
    commands = [[sys.executable, "-c", f"print({n}); raise SystemExit({n - 1})"] for n in (1, 2, 3)]
    stage = gpu_suite.Stage("stage", commands, after=heard.append)
    outcome = gpu_suite.run_stage(stage, tmp_path / "log.txt", 30.0)
    assert outcome.status == "failed"
    assert "2\n" in heard[0]
    assert "3\n" not in heard[0]
    stage = gpu_suite.Stage("stage", commands[:1], after=lambda output: str(json.loads("{")))
    assert gpu_suite.run_stage(stage, tmp_path / "log.txt", 30.0).status == "failed"


def options(tmp_path: Path, **rest: Any) -> argparse.Namespace:
    defaults = {"out": tmp_path, "minutes": 9.0, "data": None, "dry_run": False}
    return argparse.Namespace(**{**defaults, **rest})


def test_plan_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        gpu_suite.importlib.util,
        "find_spec",
        lambda name: None if name == "pytest_benchmark" else find_spec(name),
    )
    plan = gpu_suite.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)
    stages = {stage.name: stage for stage in plan}
    assert "Triton kernels only" in stages["build"].skipped
    assert "--data" in stages["training"].skipped
    assert "without_pytest_benchmark" in stages["bench ops"].commands[0]
    assert "without pytest-benchmark" in stages["bench ops"].note


def test_plan_builds_for_this_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/bin/{name}")
    for capability, arch in [((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")]:
        gpu = {"capability": capability, "built": False}
        build = gpu_suite.build_stage(gpu, tmp_path, False, {}, 60.0)
        assert build.environment["MOE_KERNELS_CUDA_ARCHS"] == arch
        assert [x[1] for x in build.commands] == ["-S", "--build", "--install"]
    assert gpu_suite.build_stage({"built": True}, tmp_path, False, {}, 60.0).skipped


def test_without_a_gpu_it_says_what_it_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "probe", lambda: {"gpu": None, "torch": torch.__version__})
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out)]) == 2
    text = capsys.readouterr().out
    assert "-m gpu" in text
    assert text.rstrip().endswith("nothing was run; see --dry-run")
    assert not out.exists()


def test_time_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A greedy stage leaves some time for those behind it, and all together keep to the limit."""
    limits = []

    def fake(stage: Any, log: Path, seconds: float) -> Any:
        limits.append(min(seconds, stage.limit_s))
        status = "failed" if stage.name == "b" else "ok"
        return gpu_suite.Outcome(stage.name, status, 0.0, "")

    stages = [gpu_suite.Stage(name, [["true"]], 1000.0) for name in "abc"]
    monkeypatch.setattr(gpu_suite, "probe", lambda: {"gpu": "a GPU", "torch": "2"})
    monkeypatch.setattr(gpu_suite, "plan", lambda *_: stages)
    monkeypatch.setattr(gpu_suite, "run_stage", fake)
    assert gpu_suite.main(["--out", str(tmp_path), "--minutes", "2"]) == 1
    assert limits == pytest.approx([80, 95, 110], abs=1)
    limits.clear()
    chosen = ["--out", str(tmp_path), "--minutes", "2", "--stages", "c"]
    assert gpu_suite.main(chosen) == 0
    assert limits == pytest.approx([110], abs=1)
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("c ")


def test_summary_survives_rows_that_were_cut_off(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir()
    out.mkdir()
    column = {"median_ms": 2.0}
    columns = {"eager": {"median_ms": 8.0}, "ours": column}
    row = {"bench": "step", "case": "pgd-step", "columns": columns}
    (rows / "step_gpu_2026-01-01.jsonl").write_text(json.dumps(row) + '\n{"case": "pg')
    gpu_suite.collect_rows(rows, out)
    assert (out / "rows.jsonl").read_text() == json.dumps(row) + "\n"
    (out / "measurements.jsonl").write_text('{"measurement": "x", "skipped": "why"}\n')
    outcomes = [gpu_suite.Outcome("tests", "ok", 1.0, "12 passed")]
    text = gpu_suite.summarize_all(out, outcomes, {"gpu": "a GPU", "torch": "2"})
    assert "x: skipped, why" in text
    assert "pgd-step: eager 8, ours 2 ms; 4.00x eager" in text
    assert text.splitlines()[-1].startswith("tests")
    (rows / "ops_gpu_2026-01-01.jsonl").write_text('{"bench": "ops", "case": "no columns"}\n')
    gpu_suite.collect_rows(rows, out)
    text = gpu_suite.summarize_all(out, outcomes, {"gpu": "a GPU", "torch": "2"})
    assert "bench_lines: KeyError" in text
    assert "x: skipped, why" in text


def test_summary_adds_up_the_convolutions_of_a_step(tmp_path: Path) -> None:
    def row(count: int, **ms: float) -> dict[str, Any]:
        columns = {name: {"median_ms": value} for name, value in ms.items()}
        facts = {"bench": "conv", "backward": False, "batch_size": 128, "gflop": 1.0}
        return {**facts, "count": count, "columns": columns}

    rows = [row(1, eager=1.0, ours=0.25, native=0.25), row(4, eager=2.0, ours=0.5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    assert gpu_suite.conv_lines(tmp_path) == [
        "5 convolutions forward, N=128: eager 9 ms (0.556 TFLOP/s), ours 2.25 ms (2.22 TFLOP/s)"
    ]


def test_summary_compares_attacks(tmp_path: Path) -> None:
    column = {"robust_accuracy": 0.5, "sign_agreement": 0.98, "ratio": 0.25}
    row = {"bench": "attack_quality", "case": "smoke", "columns": {"slab bfloat16": column}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert gpu_suite.attack_lines(tmp_path) == [
        "smoke, slab bfloat16: robust accuracy 50.00 %, signs 98.00 %, time 0.250"
    ]


def test_log_of_a_talkative_stage_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "MAX_LOG_BYTES", 1000)
    log = tmp_path / "log.txt"
    log.write_text("what was there before\n")
    outcome, text = run("print('first'); print('x' * 5000); print('last')", tmp_path)
    assert outcome.last == "last"
    assert len(text) < 1200
    assert text.startswith("what was there before\n")
    assert "first" in text
    assert "... cut ..." in text
    assert text.rstrip().endswith("last")


def test_tests_that_take_too_long_say_what_failed_so_far(tmp_path: Path) -> None:
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time\ndef test_a():\n    assert 1 == 2\ndef test_b():\n    time.sleep(60)\n"
    )
    stages = gpu_suite.plan(options(tmp_path), {"capability": (9, 0)}, tmp_path)
    stage = next(x for x in stages if x.name == "tests")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    stage = dataclasses.replace(stage, commands=[command])
    outcome = gpu_suite.run_stage(stage, tmp_path / "log.txt", 6.0)
    assert outcome.status == "timed out"
    assert "assert 1 == 2" in (tmp_path / "log.txt").read_text()
    assert "1 failed" in outcome.last


@pytest.mark.slow
def test_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--dry-run"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    summary = (tmp_path / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    table = [line.split()[0] for line in summary.strip().splitlines()[-12:]]
    assert table == [
        *("tools", "build", "self-test", "tests", "bench", "tests", "bench", "attack"),
        *("hardware", "bench", "bench", "training"),
    ]
    assert "joint: validation clean" in summary
    assert "linf_step_-128x3x32x32-float32: eager" in summary
    assert "convolutions backward, N=16: eager" in summary
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.txt", "measurements.jsonl", "rows.jsonl", "summary.txt", "training.jsonl")
    }


def test_stand_in_for_pytest_benchmark() -> None:
    benchmark = module("without_pytest_benchmark").Benchmark()
    benchmark.extra_info |= {"ratio": 1.0}
    assert benchmark.pedantic(max, args=(1, 3), rounds=20, warmup_rounds=1) == 3
