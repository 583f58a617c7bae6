"""grouped_conv and its input gradient: accuracy on every tile, mistakes, by hand, errors."""

# ruff: noqa: E741  (O is the letter of an axis)
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED, WAYS, Way
from torch import Tensor
from torch.nn.functional import conv2d

import moe_kernels
from moe_kernels import lang, reference
from moe_kernels.arguments import num_outputs
from moe_kernels.ops import grouped_conv as module
from moe_kernels.ops import grouped_conv_tiles as tiling
from moe_kernels.ops.grouped_conv import grouped_conv, grouped_conv_input_grad
from moe_kernels.testing import assert_accurate, errors

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory", "one_thread")

# E, H, W, N, C, O, kernel, stride, padding, and D and stride of the side input (0: none).
CASES = [
    (2, 3, 3, 16, 16, 16, (3, 3), 1, 1, 0, 1),
    (1, 4, 4, 16, 8, 16, (3, 3), 2, 1, 8, 2),
    (3, 5, 3, 5, 3, 5, (3, 3), 2, 1, 3, 2),
    (2, 4, 5, 3, 4, 2, (1, 1), 2, 0, 0, 1),
    (1, 7, 7, 2, 3, 4, (7, 7), 2, 3, 0, 1),
    (2, 3, 4, 6, 5, 3, (3, 4), 1, 0, 2, 1),
    (2, 2, 2, 48, 8, 8, (2, 3), 3, 2, 0, 1),
]
if INTERPRETED:  # which takes seconds for a large filter
    del CASES[4]


@pytest.fixture(
    params=[
        pytest.param(x, marks=[pytest.mark.gpu] if x.device == "cuda" else [], id=str(x))
        for x in WAYS
    ]
)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """Each implementation that these ops have; ops inside the test run by it or raise."""
    found: Way = request.param
    exists = {"reference"} | {
        x.name
        for x in module.conv_op.implementations
        if x.built and found.dtype in x.dtypes
        if x.device == found.device or x.name == "triton"  # which is interpreted
    }
    if found.implementation not in exists:
        pytest.skip(f"no {found.implementation} implementation")
    with moe_kernels.implementation(found.implementation):
        yield found


def make_inputs(
    case: Any, device: str, dtype: torch.dtype, *, backward: bool = False
) -> tuple[Any, ...]:
    """Arguments of the op, forward or backward; weights of a size that keeps sums near one."""
    E, H, W, N, C, O, (R, S), stride, padding, D, side_stride = case
    P, Q = num_outputs(H, R, stride, padding), num_outputs(W, S, stride, padding)
    generator = torch.Generator().manual_seed(C + 31 * O)

    def make(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    if backward:
        pixels = num_outputs(H, 1, side_stride, 0), num_outputs(W, 1, side_stride, 0)
        tensors = (
            make(E, P, Q, N, O),
            make(E, C, R, S, O, scale=(O * R * S) ** -0.5),
            make(E, H, W, N, C),
            make(E, *pixels, N, D) if D else None,
            make(E, C, D, scale=0.5) if D else None,
            make(E, H, W, N, C),
        )
        return (*tensors, H, W, stride, padding, side_stride)
    beside = (P - 1) * side_stride + 1, Q * side_stride
    tensors = (
        make(E, H, W, N, C),
        make(E, O, R, S, C, scale=(C * R * S) ** -0.5),
        make(E, O, dtype=torch.float32),
        make(E, P, Q, N, O),
        make(E, *beside, N, D) if D else None,
        make(E, O, D, scale=0.5) if D else None,
    )
    return (*tensors, stride, padding, side_stride, True)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: Any, backward: bool, way: Way) -> None:
    inputs = make_inputs(case, way.device, way.dtype, backward=backward)
    ours, plain = (
        (module.input_grad_op, reference.grouped_conv_input_grad)
        if backward
        else (module.conv_op, reference.grouped_conv)
    )
    assert_accurate(ours, plain, inputs)
    # And without all that may be missing.
    bare = [x if i < 2 or not isinstance(x, Tensor) else None for i, x in enumerate(inputs)]
    if not backward:
        bare[2], bare[-1] = inputs[2], False
    assert_accurate(ours, plain, bare)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_formula_is_autograd(case: Any) -> None:
    x, weight, bias, residual, side, side_weight, *numbers = make_inputs(case, "cpu", torch.float64)
    stride, padding, side_stride, _ = numbers
    _, H, W, _, _ = x.shape
    x.requires_grad_()
    y = reference.grouped_conv(x, weight, bias, residual, None, None, *numbers)
    outer = torch.randn_like(y)
    grad = outer * (y > 0)
    skip, activation = torch.randn_like(x), torch.randn_like(x)
    ours = reference.grouped_conv_input_grad(
        *(grad, weight.permute(0, 4, 2, 3, 1), skip, None, None, activation),
        *(H, W, stride, padding, 1),
    )
    expected = (torch.autograd.grad(y, x, outer)[0] + skip) * (activation > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if side is not None:
        side.requires_grad_()
        y = reference.grouped_conv(
            *(x.detach(), weight, bias, None, side, side_weight),
            stride,
            padding,
            side_stride,
            False,
        )
        zeros = torch.zeros_like(side)
        _, side_H, side_W, _, D = side.shape
        # A layer of no weight reads the same value.
        ours = reference.grouped_conv_input_grad(
            *(zeros, zeros.new_zeros(len(zeros), D, 1, 1, D), None, outer, side_weight.mT, None),
            *(side_H, side_W, 1, 0, side_stride),
        )
        expected = torch.autograd.grad(y, side, outer)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_definition_is_torch() -> None:
    case = CASES[2]
    x, weight, bias, residual, _, _, *numbers = make_inputs(case, "cpu", torch.float64)
    y = reference.grouped_conv(x, weight, bias, residual, None, None, *numbers)
    for e in range(len(x)):
        for n in range(x.shape[3]):
            image = x[e, :, :, n].permute(2, 0, 1)
            expected = conv2d(image, weight[e].permute(0, 3, 1, 2), bias[e].double(), *numbers[:2])
            expected = (expected + residual[e, :, :, n].permute(2, 0, 1)).relu()
            torch.testing.assert_close(y[e, :, :, n].permute(2, 0, 1), expected)


Body = Callable[..., Tensor]


def _changed(place: int, change: Callable[[Any], Any]) -> Callable[[Body], Body]:
    return lambda body: (
        lambda *args: body(*(change(x) if i == place else x for i, x in enumerate(args)))
    )


def _edge_repeated(x: Tensor) -> Tensor:
    for axis in (1, 2):
        size = x.shape[axis]
        x = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, size - 1, 1)], dim=axis)
    return x


# Mistakes somebody will make, in arguments and results.
FORWARD_BUGS: dict[str, Callable[[Body], Body]] = {
    "taps transposed": _changed(1, lambda weight: weight.transpose(2, 3)),
    "taps reversed": _changed(1, lambda weight: weight.flip(2, 3)),
    "last channel dropped": _changed(
        1, lambda weight: torch.cat([weight[..., :-1], 0 * weight[..., -1:]], dim=4)
    ),
    "bias of the next expert": _changed(2, lambda bias: bias.roll(1, 0)),
    "no residual": _changed(3, lambda residual: None),
    "side input of the next pixel": _changed(4, lambda side: side.roll(1, 2)),
    "no ReLU": _changed(9, lambda relu: False),
    "residual after the ReLU": lambda body: lambda *args: (
        body(*args[:3], None, *args[4:]) + args[3]
    ),
    "padding repeats the edge": lambda body: lambda *args: body(
        _edge_repeated(args[0]), *args[1:7], 0, *args[8:]
    ),
    "an image not written": lambda body: lambda *args: torch.cat(
        [body(*args)[:, :, :, :-1], torch.nan * body(*args)[:, :, :, -1:]], dim=3
    ),
    "numbers in the narrow dtype": lambda body: lambda *args: body(
        args[0].half().to(args[0].dtype), *args[1:]
    ),
}  # fmt: skip
BACKWARD_BUGS: dict[str, Callable[[Body], Body]] = {
    "taps not reversed": _changed(1, lambda weight: weight.flip(2, 3)),
    "no skip": _changed(2, lambda skip: None),
    "no mask": _changed(5, lambda activation: None),
    "mask at zero open": _changed(5, lambda activation: activation.relu() + 1e-30),
    "skip after the mask": lambda body: lambda *args: body(*args[:2], None, *args[3:]) + args[2],
    "side on every pixel": _changed(10, lambda stride: 1),
    "experts exchanged": _changed(0, lambda grad: grad.roll(1, 0)),
}


@pytest.mark.parametrize("bug", FORWARD_BUGS)
def test_oracle_rejects(bug: str) -> None:
    inputs = make_inputs((2, 4, 4, 5, 8, 6, (3, 3), 1, 1, 4, 1), "cpu", torch.float32)
    plain = reference.grouped_conv
    assert not errors(plain, plain, inputs)
    assert errors(FORWARD_BUGS[bug](plain), plain, inputs)


@pytest.mark.parametrize("bug", BACKWARD_BUGS)
def test_oracle_rejects_in_the_gradient(bug: str) -> None:
    case = (2, 4, 4, 5, 8, 6, (3, 3), 2, 1, 4, 2)
    inputs = list(make_inputs(case, "cpu", torch.float32, backward=True))
    plain = reference.grouped_conv_input_grad
    if bug == "side on every pixel":
        inputs[3] = inputs[3].repeat_interleave(2, 1).repeat_interleave(2, 2)
        inputs[10] = 1
        wrong = torch.zeros_like(inputs[3])
        wrong[:, ::2, ::2] = inputs[3][:, ::2, ::2]
        assert errors(_changed(3, lambda side: wrong)(plain), plain, inputs)
        return
    assert not errors(plain, plain, inputs)
    assert errors(BACKWARD_BUGS[bug](plain), plain, inputs)


def test_by_hand(way: Way) -> None:
    def make(*values: float) -> Tensor:
        return torch.tensor(values, device=way.device, dtype=way.dtype)

    # One row of three pixels, and above and below it one of zeros: the filter (1, 2, 3) is one row
    # high, so the padding adds two rows more.
    x, weight = make(1, 2, 4).view(1, 1, 3, 1, 1), make(1, 2, 3).view(1, 1, 1, 3, 1)
    x = torch.cat([0 * x, x, 0 * x], dim=1)
    bias = torch.tensor([[-9.0]], device=way.device)
    y = grouped_conv(x, weight, 0 * bias, padding=1)
    # 2*1 + 3*2, 1*1 + 2*2 + 3*4, 1*2 + 2*4.
    assert y[0, :, :, 0, 0].tolist() == [[0.0] * 3, [0.0] * 3, [8.0, 17.0, 10.0], *[[0.0] * 3] * 2]
    y = grouped_conv(x, weight, bias, padding=1, relu=True)
    assert y[0, 2, :, 0, 0].tolist() == [0.0, 8.0, 1.0]
    grad = torch.zeros_like(y)
    grad[0, 2, 1] = 1
    grad_x = grouped_conv_input_grad(grad, weight, H=3, W=3, padding=1)
    assert grad_x[0, 1, :, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert grad_x.count_nonzero() == 3


def test_experts_may_share_their_input(way: Way) -> None:
    x, weight, bias, *_ = make_inputs(CASES[0], way.device, way.dtype)
    one = x[:1]
    y = grouped_conv(one, weight, bias, padding=1)
    assert torch.equal(y, grouped_conv(one.expand_as(x), weight, bias, padding=1))


@pytest.mark.skipif(lang.missing is not None, reason=f"{lang.missing}")
@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.real_gpu]), "cpu"]
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_tile(
    tma: bool, backward: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile of the tables on a layer that is larger than it, in its own dtype."""
    if device == "cpu" and not lang.interpreted:
        pytest.skip("kernels run on CPUs in the interpreter only")
    if device == "cuda" and tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tables = [tiling._TMA_TILES] if tma else [tiling._TILES, tiling._FLOAT32_TILES]
    tiles = {tile for table in tables for row in table.values() for tile in row}
    if device == "cpu":  # two of them say enough about the arithmetic, and take seconds
        tiles = set(sorted(tiles)[:2])
    case = (1, 2, 2, 2 * max(x.block_n for x in tiles), 80, 2 * max(x.block_o for x in tiles))
    inputs = make_inputs((*case, (3, 3), 1, 1, 0, 1), device, dtype, backward=backward)
    for tile in tiles:
        monkeypatch.setattr(tiling, "fitting_tiles", lambda call, tile=tile: [tile])
        ours, plain = (
            (module._input_grad_triton, reference.grouped_conv_input_grad)
            if backward
            else (module._conv_triton, reference.grouped_conv)
        )
        assert_accurate(ours, plain, inputs)


def test_tiles_fit_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    if lang.missing:
        pytest.skip(lang.missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(lang, "interpreted", False)

    def tiles(N: int, C: int, O: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
        x, weight, y = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in [(1, 4, 4, N, C), (1, O, 3, 3, C), (1, 4, 4, N, O)]
        )
        return tiling.fitting_tiles(tiling.Call(x, weight, *[None] * 5, y, 1, 1, 1))

    for N, C, O in [(128, 64, 64), (256, 64, 64), (32, 32, 32), (128, 512, 512), (64, 256, 200)]:
        found = tiles(N, C, O)
        assert any(x.tma for x in found)
        assert not found[-1].tma
        assert all(N % x.block_n == 0 for x in found if x.tma)
    # Rows of 16 bytes are what TMA can address; small tiles and float32 have no use for it.
    for sizes in [(128, 60, 64), (128, 64, 4), (48, 64, 64), (16, 64, 64), (128, 16, 64)]:
        assert not any(x.tma for x in tiles(*sizes))
    assert not any(x.tma for x in tiles(128, 64, 64, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert not any(x.tma for x in tiles(128, 64, 64))


def one_number() -> tiling.Call:
    """A call on one pixel of one image and channel."""
    one, nothing = (
        torch.ones(1, 1, 1, 1, 1),
        dict.fromkeys(("bias", "residual", "side", "side_weight", "activation")),
    )
    return tiling.Call(x=one, weight=one, **nothing, y=0 * one, stride=1, padding=0, side_stride=1)


def test_tile_that_does_not_launch_makes_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lang.missing:
        pytest.skip(lang.missing)
    call = one_number()
    first, second = (tiling.Tile(False, 16, 16, 16, 1, stages) for stages in (3, 2))
    launched = []

    def launch(call: Any, tile: Any) -> None:
        if tile is first:
            raise lang.triton.OutOfResources(300_000, 100_000, "shared memory")
        launched.append(tile)

    monkeypatch.setattr(tiling, "launch", launch)
    monkeypatch.setattr(tiling, "fitting_tiles", lambda call: [first, second])
    assert tiling.run(call) is call.y
    assert launched == [second]
    monkeypatch.setattr(tiling, "fitting_tiles", lambda call: [first])
    assert tiling.run(call) is NotImplemented


def test_fastest_right_tile_is_used_and_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = one_number()
    wrong, slow, fast, sure = (tiling.Tile(False, 16, 16, 16, 1, n) for n in range(4))
    monkeypatch.setattr(
        tiling, "launch", lambda call, tile: call.y.fill_(2.0 if tile is wrong else 1.0)
    )
    tiles = [wrong, slow, fast, sure]
    assert list(tiling._right(call, tiles).values()) == [slow, fast, sure]
    assert f"{wrong} is not used on cpu: it is wrong" in caplog.text
    asked = []

    def fastest(name: str, columns: dict[str, Any], *rest: Any) -> str:
        asked.append(list(columns))
        return list(columns)[1]

    class OnGpu:
        """A tensor, on what it says is a GPU."""

        device, dtype, shape = torch.device("cuda"), torch.float32, (1, 1, 1, 1, 1)

    monkeypatch.setattr(tiling, "fastest", fastest)
    monkeypatch.setattr(tiling, "fitting_tiles", lambda call: tiles)
    monkeypatch.setattr(tiling, "_compile", lambda call, tiles: None)  # test_compile_pool.py
    monkeypatch.setattr(tiling, "_fastest_tiles", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    on_gpu = call._replace(x=OnGpu())
    with_clock = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        assert tiling._ranked(on_gpu) == [fast]
        assert tiling._ranked(on_gpu) == [fast]
    finally:
        torch.use_deterministic_algorithms(with_clock)
    assert len(asked) == 1
    # No clock in deterministic mode: the order of the table.
    assert tiling._ranked(on_gpu) == tiles


def test_strided_and_empty(way: Way) -> None:
    x, weight, bias, *_ = make_inputs(CASES[0], way.device, way.dtype)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    y = grouped_conv(x, weight, bias, padding=1)
    assert torch.equal(grouped_conv(strided, weight, bias, padding=1), y)
    assert grouped_conv(x[:, :, :, :0], weight, bias, padding=1).shape == (2, 3, 3, 0, 16)
    weight_t = weight.transpose(1, 4)
    empty = grouped_conv_input_grad(y[:, :, :, :0], weight_t, H=3, W=3, padding=1)
    assert empty.shape == (2, 3, 3, 0, 16)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(lang.interpreted, reason="it looks at the op, not at the kernels")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.real_gpu
def test_opcheck(backward: bool, device: torch.device) -> None:
    for case in (CASES[2], CASES[3]):
        inputs = make_inputs(case, str(device), torch.float32, backward=backward)
        name = "grouped_conv_input_grad" if backward else "grouped_conv"
        torch.library.opcheck(getattr(torch.ops.moe_kernels, name).default, inputs)


def test_no_derivative() -> None:
    x, weight, bias, *_ = make_inputs(CASES[3], "cpu", torch.float32)
    y = grouped_conv(x.requires_grad_(), weight, bias, stride=2)
    with pytest.raises(RuntimeError, match="grouped_conv has no derivative"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3, 3, 16, 15)}, r"x: expected shape \[.*C=16\], found \[2, 3, 3, 16, 15\]"),
        ({"x": (3, 3, 3, 16, 16)}, "x: expected 1 or 2 experts, found 3"),
        ({"bias": (2, 15)}, r"bias: expected shape \[E=2, O=16\], found \[2, 15\]"),
        ({"residual": (2, 3, 2, 16, 16)}, r"residual: expected shape \[E=2, P=3, Q=3"),
        ({"side": (2, 3, 3, 16, 4)}, "side: expected its weight as well"),
        ({"side": (2, 4, 3, 16, 4), "side_weight": (2, 16, 4)}, "side: 4 x 3 pixels with stride 1"),
        ({"weight": (2, 16, 9, 9, 16)}, "x: expected at least 9 x 9 pixels with padding 1"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, Any], message: str) -> None:
    x, weight, bias, *_ = make_inputs(CASES[0], "cpu", torch.float32)
    arguments: dict[str, Tensor] = {"x": x, "weight": weight, "bias": bias}
    arguments |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        grouped_conv(**arguments, padding=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": (2, 3, 3, 16, 15)}, r"grad: expected shape \[E=2, P=3, Q=3, .*O=16\]"),
        ({"skip": (2, 3, 3, 15, 16)}, r"skip: expected shape \[E=2, H=3, W=3, N=16, C=16\]"),
        ({"activation": (2, 3, 2, 16, 16)}, r"activation: expected shape .* found \[2, 3, 2"),
        ({"side": (2, 2, 3, 16, 4), "side_weight_t": (2, 16, 4)}, "side: 3 x 3 pixels with stride"),
    ],
)
def test_wrong_shapes_are_named_in_the_gradient(change: dict[str, Any], message: str) -> None:
    grad, weight_t, *_ = make_inputs(CASES[0], "cpu", torch.float32, backward=True)
    arguments: dict[str, Tensor] = {"grad": grad, "weight_t": weight_t}
    arguments |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        grouped_conv_input_grad(**arguments, H=3, W=3, padding=1)


def test_integers_are_refused() -> None:
    x, weight, bias, *_ = make_inputs(CASES[0], "cpu", torch.float32)
    with pytest.raises(TypeError, match=r"x: expected a floating dtype, found torch\.int64"):
        grouped_conv(x.long(), weight, bias, padding=1)


def test_choice_is_by_layer() -> None:
    inputs = module.conv_op.example_inputs(torch.device("cpu"), torch.float32)
    keys = {module.conv_op._key(torch.device("cuda"), torch.bfloat16, x) for x in inputs}
    assert len(keys) == len(inputs)
