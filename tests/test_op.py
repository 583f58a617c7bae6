"""The machinery of ops: check, choice, dispatch, names, derivatives, errors."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_kernels
from moe_kernels import lang, native, op, select, timing
from moe_kernels.arguments import check_floating, check_integers, check_shapes
from moe_kernels.op import Op
from moe_kernels.select import implementation

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
_numbers = itertools.count()

MakeOp = Callable[..., Op]


@pytest.fixture
def make_op(monkeypatch: pytest.MonkeyPatch) -> MakeOp:
    """Ops that double their input, out of the registry again after the test."""
    monkeypatch.setattr(op, "_registry", dict(op._registry))

    def make(**settings: Any) -> Op:
        name = f"test_double_{next(_numbers)}"
        return Op(
            f"{name}(Tensor images) -> Tensor",
            **{
                "body": lambda images: 2 * images,
                "fake": torch.empty_like,
                "examples": [((3, 4),), ((1, 7),)],
                **settings,
            },
        )

    return make


class Recorder:
    """An implementation that notes what it was given."""

    def __init__(self, factor: float = 2.0) -> None:
        self.calls: list[Tensor] = []
        self.factor = factor

    def __call__(self, images: Tensor) -> Tensor:
        self.calls.append(images)
        return self.factor * images


def register(double: Op, name: str, function: Any, **settings: Any) -> Any:
    return double.implementation(name, **{"device": "cpu", **settings})(function)


def test_right_implementation_is_used(make_op: MakeOp) -> None:
    double = make_op()
    native_double = register(double, "native", Recorder())
    images = torch.rand(5)
    assert torch.equal(double(images), 2 * images)
    assert torch.equal(native_double.calls[-1], images)
    assert double.selected(CPU, torch.float32) == "native"


@pytest.mark.parametrize("seen", ["everywhere", "in the second example only"])
def test_wrong_implementation_is_dropped_with_one_line(
    seen: str, make_op: MakeOp, caplog: pytest.LogCaptureFixture
) -> None:
    double = make_op()

    def wrong(images: Tensor) -> Tensor:
        right = 2 * images
        if seen == "everywhere" or images.shape == (1, 7):
            right[0, -1] += 0.01
        return right

    register(double, "native", wrong)
    images = torch.rand(3, 4)
    for _ in range(3):
        assert torch.equal(double(images), 2 * images)
    assert len(caplog.records) == 1
    assert f"{double.name}: native is not used on cpu for torch.float32: it is wrong" in caplog.text
    assert double.selected(CPU, torch.float32) == "reference"
    with implementation("native"), pytest.raises(ValueError, match=r"'native' .* it is wrong"):
        double(images)


def test_failing_implementation_is_dropped_with_one_line(
    make_op: MakeOp, caplog: pytest.LogCaptureFixture
) -> None:
    double = make_op()

    def fails(images: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")

    register(double, "native", fails)
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert len(caplog.records) == 1
    assert "it fails: RuntimeError: no kernel image is available" in caplog.text


@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_implementation_that_writes_nothing_is_dropped(make_op: MakeOp) -> None:
    double = make_op()
    register(double, "native", torch.empty_like)
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))


def test_exact_op_drops_what_is_one_bit_off(make_op: MakeOp) -> None:
    factor = 2 * (1 + 2**-22)
    close = make_op()
    exact = make_op(exact=True)
    for double in (close, exact):
        register(double, "native", Recorder(factor))
    assert close.selected(CPU, torch.float32) == "native"
    assert exact.selected(CPU, torch.float32) == "reference"


def test_order_on_the_cpu_is_fixed_and_no_clock_is_read(
    make_op: MakeOp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "compare", lambda *a, **k: pytest.fail("read a clock"))
    monkeypatch.setattr(lang, "interpreted", False)
    double = make_op()
    register(double, "native", Recorder())
    assert double.selected(CPU, torch.float32) == "native"
    register(double, "triton", Recorder())
    assert [x.name for x in double.implementations] == ["native", "triton"]
    double(torch.ones(3))


def fake_times(**medians: float) -> Any:
    return lambda columns, inputs, **_: {
        name: SimpleNamespace(median_ms=medians[name]) for name in columns
    }


def test_fastest_right_implementation_is_chosen_and_remembered(
    make_op: MakeOp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(select, "choices", lambda: select.Choices(tmp_path / "choices.json"))
    monkeypatch.setattr(timing, "compare", fake_times(native=3.0, reference=2.0, triton=1.0))
    monkeypatch.setattr(lang, "interpreted", True)
    double = make_op()
    register(double, "native", Recorder())
    register(double, "triton", Recorder(2.1))
    key, args = op._Key(CPU, torch.float32, 3, False), (torch.ones(4),)
    # Triton would be fastest, and is wrong.
    assert double._choose(key, args).name == "reference"
    monkeypatch.setattr(timing, "compare", lambda *a, **k: pytest.fail("timed again"))
    double._chosen.clear()
    assert double._choose(key, args).name == "reference"
    # Another size is another choice.
    monkeypatch.setattr(timing, "compare", fake_times(native=1.0, reference=2.0))
    assert double._choose(key._replace(shape_class=4), args).name == "native"


def test_nothing_is_chosen_during_capture(
    make_op: MakeOp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double = make_op()
    recorder = register(double, "native", Recorder())
    monkeypatch.setattr(op, "_capturing", lambda device: True)
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert not recorder.calls
    assert "run the step once before capturing" in caplog.text
    monkeypatch.setattr(op, "_capturing", lambda device: False)
    assert double.selected(CPU, torch.float32) == "native"


def test_check_leaves_the_callers_state(make_op: MakeOp) -> None:
    double = make_op()
    register(double, "native", Recorder())
    images = torch.rand(3, 4, requires_grad=True)
    state, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    double(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad_mode
    assert images.grad is None


def test_only_declared_dtypes_reach_an_implementation(make_op: MakeOp) -> None:
    double = make_op()
    recorder = register(double, "native", Recorder(), dtypes=[torch.float32])
    double(torch.ones(2))
    calls = len(recorder.calls)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert double(torch.ones(2, dtype=dtype)).dtype is dtype
    assert len(recorder.calls) == calls


def test_mixtures_go_to_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_registry", dict(op._registry))
    add = Op(
        "test_add(Tensor left, Tensor right, Tensor labels) -> Tensor",
        body=lambda left, right, labels: left + right + labels,
        fake=lambda left, right, labels: torch.empty_like(left),
        examples=[((3,), (3,), lambda generator: torch.arange(3))],
        fixed_dtypes={"labels": torch.int64},
    )
    calls = []

    @add.implementation("native", device="cpu")
    def _native(left: Tensor, right: Tensor, labels: Tensor) -> Tensor:
        calls.append(left.dtype)
        return left + right + labels

    one, labels = torch.ones(3), torch.arange(3)
    add(one, one, labels)
    calls.clear()
    add(one, one, labels)
    assert calls == [torch.float32]
    add(one, one.double(), labels)
    add(one, one, labels.int())
    assert calls == [torch.float32]
    with implementation("native"), pytest.raises(ValueError, match="a mixture of dtypes"):
        add(one, one.double(), labels)


def test_implementation_receives_contiguous_tensors(make_op: MakeOp) -> None:
    double = make_op()
    recorder = register(double, "native", Recorder())
    images = torch.rand(4, 6).t()[::2]
    assert torch.equal(double(images), 2 * images)
    assert recorder.calls[-1].is_contiguous()


def test_sizes_that_are_declined_go_to_the_body(make_op: MakeOp) -> None:
    double = make_op()
    register(double, "native", lambda x: NotImplemented if x.numel() > 100 else 2 * x)
    assert double.selected(CPU, torch.float32) == "native"
    assert torch.equal(double(torch.ones(200)), torch.full((200,), 2.0))


def test_implementation_that_fails_at_a_call_is_not_asked_again(
    make_op: MakeOp, caplog: pytest.LogCaptureFixture
) -> None:
    """It is right on the examples, and has, say, too little shared memory for these sizes."""

    def function(images: Tensor) -> Tensor:
        if len(images) > 5:
            asked.append(len(images))
            raise RuntimeError("out of resource: shared memory")
        return 2 * images

    asked: list[int] = []
    double = make_op()
    register(double, "native", function)
    with caplog.at_level("WARNING", "moe_kernels"):
        for size in (2, 7, 7, 2):
            images = torch.rand(size)
            assert torch.equal(double(images), 2 * images)
    assert asked == [7]
    assert [x.message for x in caplog.records if "shared memory" in x.message] == [
        f"{double.name}: native failed on cpu and is not used any more for such sizes: "
        "RuntimeError: out of resource: shared memory"
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_what_is_asked_for_by_name_fails_loudly(make_op: MakeOp, error: type[Exception]) -> None:
    def function(images: Tensor) -> Tensor:
        if len(images) > 5:
            raise error("planted")
        return 2 * images

    double = make_op()
    register(double, "native", function)
    with moe_kernels.implementation("native"), pytest.raises(error, match="planted"):
        double(torch.rand(7))
    if error is torch.OutOfMemoryError:
        with pytest.raises(error, match="planted"):
            double(torch.rand(7))


def test_unbuilt_implementation_is_not_offered(make_op: MakeOp) -> None:
    double = make_op()
    register(double, "native", Recorder(), built=False)
    (found,) = double.implementations
    assert found.available() == "not built, `python -m moe_kernels.info` says why"
    assert double.selected(CPU, torch.float32) == "reference"
    assert double.selftest(CPU) == []


def test_selftest_reports_every_implementation(make_op: MakeOp) -> None:
    double = make_op()
    register(double, "native", Recorder(2.1), dtypes=[torch.float32, torch.bfloat16])
    results = double.selftest(CPU)
    assert [(x.op, x.implementation) for x in results] == [(double.name, "native")] * 2
    assert all(x.fault and "it is wrong" in x.fault for x in results)


@pytest.mark.real_gpu
def test_every_shipped_implementation_is_right(device: torch.device) -> None:
    ops = op.registry()
    results = [result for one in ops.values() for result in one.selftest(device)]
    assert [x for x in results if x.fault] == []
    if native.has_cpu and device.type == "cpu":
        native_ops = {
            name
            for name, one in op.registry().items()
            if any((x.name, x.device) == ("native", "cpu") for x in one.implementations)
        }
        assert {x.op for x in results if x.implementation == "native"} == native_ops
    for one in ops.values():
        names = {x.name for x in one.implementations} | {"reference"}
        assert one.selected(device, torch.float32) in names


def test_named_implementation(make_op: MakeOp) -> None:
    double = make_op()
    recorder = register(double, "native", Recorder())
    with implementation("reference"):
        double(torch.ones(2))
        with implementation("native"):
            double(torch.ones(2))
        count = len(recorder.calls)
        double(torch.ones(2))
    assert len(recorder.calls) == count > 0


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="unknown implementation 'cuda', expected one of native"),
        implementation("cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "dtype", "reason"),
    [
        ({"built": False}, torch.float32, "not built"),
        ({"device": "cuda"}, torch.float32, "no CUDA device|it runs on cuda, the tensors are on"),
        ({"dtypes": [torch.float32]}, torch.float64, "float32 alone; found torch.float64 on cpu"),
        (None, torch.float32, "the op has none of that name"),
    ],
)  # fmt: skip
def test_named_but_impossible(
    settings: dict[str, Any] | None, dtype: torch.dtype, reason: str, make_op: MakeOp
) -> None:
    double = make_op()
    if settings is not None:
        register(double, "native", Recorder(), **settings)
    message = f"{double.name}: implementation 'native' was asked for, but .*({reason})"
    with implementation("native"), pytest.raises(ValueError, match=message):
        double(torch.ones(2, dtype=dtype))


def test_name_holds_for_this_thread_only(make_op: MakeOp) -> None:
    double = make_op()
    recorder = register(double, "native", Recorder())
    double(torch.ones(2))
    recorder.calls.clear()
    with implementation("reference"):
        thread = threading.Thread(target=lambda: double(torch.ones(2)))
        thread.start()
        thread.join()
        assert len(recorder.calls) == 1
        double(torch.ones(2))
    assert len(recorder.calls) == 1


def test_name_holds_in_the_backward_pass_as_well(make_op: MakeOp) -> None:
    # A backward op takes the gradients of the outputs, then the inputs.
    backward = Op(
        f"test_double_backward_{next(_numbers)}(Tensor grad, Tensor images) -> Tensor",
        body=lambda grad, images: 2 * grad,
        fake=lambda grad, images: torch.empty_like(grad),
        examples=[((3,), (3,))],
    )
    double = make_op(backward=backward)
    calls = []

    @backward.implementation("native", device="cpu")
    def _native(grad: Tensor, images: Tensor) -> Tensor:
        calls.append(grad)
        return 2 * grad

    images = torch.rand(3, requires_grad=True)
    register(double, "native", Recorder())
    with implementation("reference"):
        doubled = double(images)
    doubled.sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, torch.full((3,), 2.0))
    assert not calls


@pytest.mark.slow
def test_name_from_the_environment() -> None:
    program = (
        "import torch, moe_kernels\n"
        "gate, expert = torch.ones(2, 3), torch.ones(3, 2, 4)\n"
        "with moe_kernels.implementation('reference'): moe_kernels.softmax_combine(gate, expert)\n"
        "try: moe_kernels.softmax_combine(gate, expert)\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "MOE_KERNELS_IMPLEMENTATION": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "implementation 'nonsense' was asked for, but the op has none" in done.stdout


def test_without_a_derivative_backward_raises(make_op: MakeOp) -> None:
    double = make_op()
    result = double(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match=f"{double.name} has no derivative"):
        result.sum().backward()


def test_check_shapes_returns_the_sizes() -> None:
    spec = "gate_logits [B, E], images [B, ...]"
    sizes = check_shapes(spec, torch.ones(2, 3), torch.ones(2, 1, 8, 8))
    assert sizes == {"B": 2, "E": 3}


def test_check_shapes_leaves_out_what_is_missing_and_takes_known_sizes() -> None:
    spec = "x [N, C], skip [N, C], bias [O]"
    assert check_shapes(spec, torch.ones(2, 3), None, torch.ones(4), C=3) == {
        "N": 2,
        "C": 3,
        "O": 4,
    }
    with pytest.raises(ValueError, match=r"x: expected shape \[N=2, C=5\], found \[2, 3\]"):
        check_shapes(spec, torch.ones(2, 3), None, torch.ones(4), C=5)


def test_check_dtypes() -> None:
    check_floating(images=torch.ones(2), weight=torch.ones(2, dtype=torch.bfloat16))
    check_integers(labels=torch.ones(2, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"weight: expected a floating dtype, found torch\.int64"):
        check_floating(images=torch.ones(2), weight=torch.ones(2, dtype=torch.int64))
    for dtype in (torch.float32, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=f"labels: expected an integer dtype, found {dtype}"):
            check_integers(labels=torch.ones(2, dtype=dtype))


def test_optional_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_registry", dict(op._registry))
    asked: list[tuple[Any, ...]] = []

    def key(*args: Any) -> int:
        asked.append(args)
        return len(args[0])

    add = Op(
        f"test_add_{next(_numbers)}(Tensor a, Tensor? b, Tensor? c) -> Tensor",
        body=lambda a, b, c: a + (0 if b is None else b) + (0 if c is None else c.to(a.dtype)),
        fake=lambda a, b, c: torch.empty_like(a),
        examples=[((3,), (3,), (3,)), ((2,), None, None)],
        fixed_dtypes={"c": torch.float32},
        key=key,
    )
    calls = []

    @add.implementation("native", device="cpu")
    def _native(a: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
        calls.append((a, b, c))
        return add._body.function(a, b, c)

    one, half = torch.ones(4), torch.ones(4, dtype=torch.bfloat16)
    assert torch.equal(add(one, None, one), 2 * one)
    assert torch.equal(add(half, half, one), 3 * half)
    count = len(calls)
    assert count > 2
    # A mixture is for the body, missing tensors or not.
    assert torch.equal(add(half, None, half), 2 * half)
    assert torch.equal(add(one, half, None), 2 * one)
    assert len(calls) == count
    torch.library.opcheck(add.overload, (one, None, one))
    with pytest.raises(RuntimeError, match="has no derivative"):
        add(one.clone().requires_grad_(), None, one).sum().backward()
    assert add._key(torch.device("cuda"), torch.float32, (one, None, None)).shape_class == 4
    assert asked == [(one, None, None)]


@pytest.mark.slow
@pytest.mark.skipif(lang.interpreted, reason="this is the interpreter's run")
@pytest.mark.skipif(lang.missing is not None, reason=f"{lang.missing}")
def test_triton_kernels_in_the_interpreter() -> None:
    """Two ops on the CPU's tensors; `.ci/run` runs those of every op on a rehearsed GPU."""
    names = ("softmax_combine", "linf_step")
    files = [f"tests/test_{name}.py" for name in names]
    # Spinning BLAS threads make contended runs ten times slower.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 40


def test_public_names() -> None:
    assert all(callable(getattr(moe_kernels, name)) for name in moe_kernels.__all__)
