"""The compiled kernels, called by address: odd sizes, edge values, threads, errors."""

from __future__ import annotations

import ast
import math
import platform
import threading
import time
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import native, reference
from moe_kernels.native import FLOATS
from moe_kernels.testing import assert_accurate, unequal_bits

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"no compiled module: {native.missing}")
needs_cuda_build = pytest.mark.skipif(not native.has_cuda, reason="built without CUDA kernels")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.real_gpu,  # by address
            needs_cuda_build,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
# The paper's; one expert; odd; one image; one class; more experts than a warp; many classes; large
# enough for several threads.
SHAPES = [
    (8, 9, 10),
    (4, 1, 10),
    (3, 5, 7),
    (1, 9, 10),
    (2, 3, 1),
    (3, 70, 33),
    (2, 9, 1000),
    (900, 9, 10),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-E{0[1]}-K{0[2]}".format)


def call(name: str, tensors: list[Tensor], *numbers: Any, num_threads: int = 0) -> None:
    """Run a kernel on the device of its tensors; the dtype is that of the second one."""
    addresses = [x.data_ptr() for x in tensors]
    if tensors[0].is_cuda:
        dtype, stream = FLOATS.index(tensors[1].dtype), torch.cuda.current_stream().cuda_stream
        getattr(native.module, f"{name}_cuda")(*addresses, *numbers, dtype, stream)
    else:
        getattr(native.module, name)(*addresses, *numbers, num_threads)


def forward(gate_logits: Tensor, expert_logits: Tensor, num_threads: int = 0) -> Tensor:
    E, B, K = expert_logits.shape
    logits = torch.full_like(expert_logits[0], math.nan)
    tensors = [gate_logits, expert_logits, logits]
    call("softmax_combine", tensors, B, E, K, num_threads=num_threads)
    return logits


def backward(
    grad_logits: Tensor, gate_logits: Tensor, expert_logits: Tensor, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    E, B, K = expert_logits.shape
    grads = torch.full_like(gate_logits, math.nan), torch.full_like(expert_logits, math.nan)
    tensors = [grad_logits, gate_logits, expert_logits, *grads]
    call("softmax_combine_backward", tensors, B, E, K, num_threads=num_threads)
    return grads


def cross_entropy(
    gate_logits: Tensor, expert_logits: Tensor, labels: Tensor, num_threads: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    E, B, K = expert_logits.shape
    loss = torch.full((B,), math.nan, device=gate_logits.device)
    grads = torch.full_like(gate_logits, math.nan), torch.full_like(expert_logits, math.nan)
    tensors = [gate_logits, expert_logits, labels, loss, *grads]
    call("softmax_combine_cross_entropy", tensors, B, E, K, num_threads=num_threads)
    return loss, *grads


def step(
    adversarial: Tensor, grad: Tensor, images: Tensor, epsilon: Tensor, step_size: Tensor
) -> Tensor:
    moved = adversarial.clone()
    P = math.prod(images.shape[1:])
    call("linf_step", [moved, grad, images, epsilon, step_size], len(images), P, 0.0, 1.0)
    return moved


def step_reference(
    adversarial: Tensor, grad: Tensor, images: Tensor, epsilon: Tensor, step_size: Tensor
) -> Tensor:
    moved = adversarial.clone()
    reference.linf_step_(moved, grad, images, epsilon, step_size, 0.0, 1.0)
    return moved


def make_inputs(
    B: int, E: int, K: int, scale: float = 1.0, device: str = "cpu", dtype: Any = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_logits, gate_logits, expert_logits, labels."""
    generator = torch.Generator().manual_seed(B + E + K)
    floats = [
        (torch.randn(size, generator=generator) * scale).to(device, dtype)
        for size in [(B, K), (B, E), (E, B, K)]
    ]
    return *floats, torch.randint(K, (B,), generator=generator).to(device)  # type: ignore[return-value]


def make_step(
    shape: tuple[int, ...], device: str = "cpu", dtype: Any = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """adversarial, grad, images, epsilon, step_size, with ties, NaN and infinities in grad."""
    generator = torch.Generator().manual_seed(sum(shape))
    images, noise = (torch.rand(shape, generator=generator) for _ in range(2))
    grad = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf])
    grad.view(-1)[: len(special)] = special[: grad.numel()]
    epsilon, step_size = (torch.rand(shape[0], generator=generator) / 4 for _ in range(2))
    adversarial = images + epsilon.view(-1, *[1] * (len(shape) - 1)) * (2 * noise - 1)
    tensors = adversarial, grad.to(dtype), images, epsilon, step_size
    return tuple(x.to(device) for x in tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["mild", "saturated"])
@shapes
def test_accuracy(shape: tuple[int, int, int], scale: float, device: str) -> None:
    for dtype in FLOATS if device == "cuda" else FLOATS[:1]:
        grad, gate, expert, labels = make_inputs(*shape, scale, device, dtype)
        assert_accurate(forward, reference.softmax_combine, [gate, expert])
        assert_accurate(backward, reference.softmax_combine_backward, [grad, gate, expert])
        assert_accurate(
            cross_entropy, reference.softmax_combine_cross_entropy, [gate, expert, labels]
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape",
    [(8, 3, 32, 32), (3, 1, 5, 7), (1, 1), (2, 3), (5, 1), (40, 3, 32, 32)],
    ids=str,
)
def test_linf_step_bits(shape: tuple[int, ...], device: str) -> None:
    for dtype in FLOATS if device == "cuda" else FLOATS[:1]:
        assert unequal_bits(step, step_reference, make_step(shape, device, dtype)) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_linf_step_needs_no_alignment(offset: int, device: str) -> None:
    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)

    def shifted_step(adversarial: Tensor, grad: Tensor, images: Tensor, *rest: Tensor) -> Tensor:
        return step(shifted(adversarial), shifted(grad), shifted(images), *rest)

    assert unequal_bits(shifted_step, step_reference, make_step((3, 1, 5, 7), device)) == []


@pytest.mark.parametrize("device", DEVICES)
def test_nan_pixels_stay_nan(device: str) -> None:
    adversarial, grad, images, epsilon, step_size = make_step((2, 3, 4, 4), device)
    adversarial[0, 0, 1, 2] = math.nan
    images[1, 2, 3, 3] = math.nan
    moved = step(adversarial, grad, images, epsilon, step_size)
    assert moved.isnan().nonzero().tolist() == [[0, 0, 1, 2], [1, 2, 3, 3]]


@pytest.mark.parametrize("device", DEVICES)
def test_linf_step_by_hand(device: str) -> None:
    def row(*values: float) -> Tensor:
        return torch.tensor([values], device=device)

    images = row(0.5, 0.5, 0.0, 1.0, 0.5, 0.5)
    grad = row(3.0, -1e-30, -1.0, 1.0, 0.0, math.nan)
    adversarial = row(0.5, 0.3125, 0.0, 1.0, 0.625, 0.625)
    epsilon, step_size = row(0.25)[0], row(0.125)[0]
    moved = step(adversarial, grad, images, epsilon, step_size)
    # A step; a step cut off by the ball; by 0; by 1; none; none.
    assert moved.tolist() == [[0.625, 0.25, 0.0, 1.0, 0.625, 0.625]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["gate_logits", "expert_logits", "every gate logit"])
def test_what_is_not_finite_spreads_as_in_torch(place: str, value: float, device: str) -> None:
    grad, gate, expert, labels = make_inputs(4, 3, 5, device=device)
    if place == "gate_logits":
        gate[1, 2] = value
    elif place == "expert_logits":
        expert[2, 1, 3] = value
    else:
        gate[1] = value
    pairs: list[tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]] = [
        (forward, reference.softmax_combine, [gate, expert]),
        (backward, reference.softmax_combine_backward, [grad, gate, expert]),
        (cross_entropy, reference.softmax_combine_cross_entropy, [gate, expert, labels]),
    ]
    for ours, plain, inputs in pairs:
        assert_accurate(ours, plain, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label", [-1, 5, -(2**62), 2**62])
def test_label_that_is_no_class_gives_nan_to_its_image_alone(label: int, device: str) -> None:
    _, gate, expert, labels = make_inputs(4, 3, 5, device=device)
    expected = cross_entropy(gate, expert, labels)
    labels[2] = label
    loss, grad_gate, grad_expert = cross_entropy(gate, expert, labels)
    for found, right, axis in zip((loss, grad_gate, grad_expert), expected, (0, 0, 1), strict=True):
        assert found.select(axis, 2).isnan().all()
        rest = torch.tensor([0, 1, 3], device=device)
        assert torch.equal(found.index_select(axis, rest), right.index_select(axis, rest))


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy_is_stable(device: str) -> None:
    gate, labels = torch.zeros(2, 1, device=device), torch.tensor([0, 1], device=device)
    expert = torch.tensor([[[3e4, -3e4], [3e4, -3e4]]], device=device)
    loss, _, grad_expert = cross_entropy(gate, expert, labels)
    assert loss.tolist() == [0.0, 6e4]
    assert grad_expert.tolist() == [[[0.0, 0.0], [1.0, -1.0]]]


@pytest.mark.parametrize("suffix", ["", pytest.param("_cuda", marks=needs_cuda_build)])
def test_empty_batch_is_no_call(suffix: str) -> None:
    trailing = (0, 0) if suffix else ()
    for name, num_addresses in [
        ("softmax_combine", 3),
        ("softmax_combine_backward", 5),
        ("softmax_combine_cross_entropy", 6),
    ]:
        getattr(native.module, name + suffix)(*[0] * num_addresses, 0, 9, 10, *trailing)
    getattr(native.module, f"linf_step{suffix}")(*[0] * 5, 0, 3072, 0.0, 1.0, *trailing)


def test_number_of_threads_changes_no_bit() -> None:
    grad, gate, expert, labels = make_inputs(1000, 9, 10)
    for run, inputs in [
        (forward, [gate, expert]),
        (backward, [grad, gate, expert]),
        (cross_entropy, [gate, expert, labels]),
    ]:
        results = [run(*inputs, num_threads=n) for n in (1, 2, 7)]  # type: ignore[operator]
        for other in results[1:]:
            assert unequal_bits(lambda x=other: x, lambda x=results[0]: x, []) == []


def test_calls_from_many_threads() -> None:
    inputs = [make_inputs(50 + i, 9, 10)[1:] for i in range(8)]
    expected = [cross_entropy(*x) for x in inputs]
    faults: list[str] = []

    def work(index: int) -> None:
        for _ in range(50):
            faults.extend(
                unequal_bits(cross_entropy, lambda *_: expected[index], inputs[index]),
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_releases_the_gil() -> None:
    B, E, K = 60_000, 200, 1  # mostly exponentials: some 50 ms of work in 100 MB
    gate, expert = torch.zeros(B, E), torch.zeros(E, B, K)
    times: list[float] = []

    def work() -> None:
        times.append(time.perf_counter())
        forward(gate, expert, num_threads=1)
        times.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    start, end = times
    margin = (end - start) / 4
    assert any(start + margin < tick < end - margin for tick in ticks)


def test_wrong_arguments_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.module.softmax_combine(0, 0, 0, 4, 9)


@needs_cuda_build
def test_unknown_dtype_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"):
        native.module.softmax_combine_cuda(0, 0, 0, 4, 9, 10, dtype=3, stream=0)


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="here a launch succeeds")
def test_launch_without_a_gpu_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA error \d+: .+"):
        native.module.softmax_combine_cuda(0, 0, 0, 4, 9, 10, dtype=0, stream=0)


def test_attributes() -> None:
    archs = native.module.cuda_archs
    assert native.module.has_cuda == native.has_cuda == bool(archs)
    assert all(isinstance(x, str) for x in archs)
    story = native.build_story()
    if story is not None:
        assert story["cuda"]["archs"] == archs


def test_hidden_build_is_found_on_the_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(native, "build_story", lambda: None)
    found = native.hidden_build.__wrapped__
    monkeypatch.setattr(native, "hidden_build", found)
    here = Path(native.__file__).resolve().parents[1]
    monkeypatch.setattr("sys.path", [str(here), str(tmp_path)])
    assert found() is None
    assert native._load() == (None, f"{here} was never built, only copied")
    assert not caplog.records
    build = tmp_path / "moe_kernels" / f"_native{EXTENSION_SUFFIXES[0]}"
    build.parent.mkdir()
    build.touch()
    assert found() == build
    assert native._load()[0] is None
    assert len(caplog.records) == 1
    monkeypatch.setattr(native, "build_story", lambda: {"line": "pure Python, because"})
    assert found() is None
    assert native._load() == (None, "pure Python, because")


Arguments = list[tuple[str, bool]]  # name, whether it has a default


def stub_arguments() -> dict[str, Arguments]:
    """The functions and classes of the stub."""
    path = Path(native.__file__).with_name("_native.pyi")
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    (layers,) = [x for x in nodes if isinstance(x, ast.ClassDef) and x.name == "Layers"]
    nodes.remove(layers)
    found = {}
    for node in [*nodes, *layers.body]:
        name = getattr(node, "name", "")
        function = node.body[-1] if isinstance(node, ast.ClassDef) else node
        if isinstance(function, ast.FunctionDef):
            spec = function.args
            found[name] = [(x.arg, False) for x in spec.args if x.arg != "self"]
            for i in range(1, len(spec.defaults) + 1):
                found[name][-i] = (found[name][-i][0], True)
            found[name] += [
                (x.arg, default is not None)
                for x, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
            ]
    return found


def built_arguments() -> dict[str, Arguments]:
    """Those of the compiled module, from the signatures that pybind11 writes."""
    found = {}
    contents = vars(native.module)
    for name in {"avx512", "avx2"} & contents.keys():
        contents = contents | vars(contents[name])
    for name, value in contents.items():
        if not callable(value) or name.startswith("_"):
            continue
        signature = (value.__init__ if isinstance(value, type) else value).__doc__.splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
        parts = [x for x in inside.split(", ") if x != "*" and not x.startswith("self:")]
        found[name] = [(x.partition(":")[0], " = " in x) for x in parts]
    return found


def test_stub_agrees_with_the_module() -> None:
    stub, built = stub_arguments(), built_arguments()
    assert {name: stub.get(name) for name in built} == built
    names = {x for x in vars(native.module) if not x.startswith("_")}
    text = Path(native.__file__).with_name("_native.pyi").read_text(encoding="utf-8")
    assert all(f"\n{name}: " in text for name in names - built.keys())
    # What a build may be without: CUDA, or Hopper's instructions, or the layers of x86-64.
    missing = {name for name in stub if name not in built}
    if not native.has_cuda:
        missing = {name for name in missing if not name.endswith("_cuda")}
    if "90a-real" not in native.module.cuda_archs:
        missing.discard("conv_sm90a")
    if platform.machine() == "x86_64":
        assert not missing


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80-real"], (8, 0), True),
        (["80-real"], (8, 9), True),  # a later minor version of the same generation
        (["80-real"], (9, 0), False),  # another generation
        (["86-real"], (8, 0), False),
        (["90a-real"], (9, 0), True),
        (["90a-real"], (10, 0), False),
        (["100-real"], (10, 3), True),
        (["120-real"], (12, 0), True),
        (["80-virtual"], (12, 1), True),  # PTX, compiled by the driver
        (["90-virtual"], (8, 9), False),
        ([], (9, 0), False),
    ],
)
def test_supports_device(
    archs: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module:
        cuda_archs = archs

    monkeypatch.setattr(native, "module", Module)
    monkeypatch.setattr(native, "has_cuda", bool(archs))
    assert native.supports_device(capability) is runs
