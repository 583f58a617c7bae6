"""Implementations that crash or hang do so in a child, once; the process goes on without them."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_kernels import isolation, op, select

CPU = torch.device("cpu")
PLANTED = """
import os, time
import torch
from moe_kernels.op import Op

PARENT = {pid}

double = Op(
    "{name}(Tensor images) -> Tensor",
    body=lambda images: 2 * images,
    fake=torch.empty_like,
    examples=[((3, 4),)],
)

@double.implementation("native", device="cpu", isolated=True{more})
def planted(images):
    if os.getpid() != PARENT:
        open({log!r}, "a").write("child\\n")
        {in_child}
    return {result}
"""

Plant = Callable[..., op.Op]
_numbers = itertools.count()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """One line per call of a planted implementation in a child."""
    return tmp_path / "log.txt"


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: Path) -> Iterator[Plant]:
    """Write a module with an op and an isolated implementation, and import it."""
    monkeypatch.setattr(op, "_registry", dict(op._registry))
    memory = select.Choices(tmp_path / "choices.json")
    monkeypatch.setattr(select, "choices", lambda: memory)
    monkeypatch.syspath_prepend(tmp_path)
    imported: list[ModuleType] = []

    def make(in_child: str = "pass", result: str = "2 * images", more: str = "") -> op.Op:
        name = f"test_planted_{next(_numbers)}"
        facts = {"in_child": in_child, "result": result, "more": more}
        text = PLANTED.format(name=name, pid=os.getpid(), log=str(log), **facts)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        imported.append(importlib.import_module(name))
        found: op.Op = imported[-1].double
        return found

    yield make
    for module in imported:
        del sys.modules[module.__name__]


def assert_dropped(double: op.Op, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(5)
    for _ in range(3):
        assert torch.equal(double(images), 2 * images)
    assert double.selected(CPU, torch.float32) == "reference"
    assert len(caplog.records) == 1
    assert f"{double.name}: native is not used on cpu for torch.float32: " in caplog.text
    assert reason in caplog.text


@pytest.mark.slow
def test_right(plant: Plant, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = plant()
    assert double.selected(CPU, torch.float32) == "native"
    assert log.read_text() == "child\n"
    # Another process remembers; here is the same one without its own memory.
    monkeypatch.setattr(isolation, "_ask_child", lambda *_: pytest.fail("asked again"))
    double._faults.clear()
    double._chosen.clear()
    assert double.selected(CPU, torch.float32) == "native"


@pytest.mark.slow
def test_crash(
    plant: Plant, log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double = plant(in_child="os.abort()")
    assert_dropped(double, "it ends a child process by signal 6", caplog)
    assert log.read_text() == "child\n"
    monkeypatch.setattr(isolation, "_ask_child", lambda *_: pytest.fail("asked again"))
    double._faults.clear()
    double._chosen.clear()
    assert double.selected(CPU, torch.float32) == "reference"


@pytest.mark.slow
def test_hang_costs_this_process_its_kernel_and_the_next_one_asks_again(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(isolation, "_TIME_LIMIT_S", 4.0)
    double = plant(in_child="time.sleep(1000)")
    assert_dropped(double, "in a child process it did not end within 4 s", caplog)
    memory = select.choices()
    assert not memory.path.exists()
    # Another process, on a machine that is no longer busy.
    monkeypatch.setattr(select, "choices", lambda: select.Choices(memory.path))
    monkeypatch.setattr(isolation, "_ask_child", lambda *_: ("right", True))
    double._faults.clear()
    double._chosen.clear()
    assert double.selected(CPU, torch.float32) == "native"


@pytest.mark.slow
def test_wrong(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    double = plant(result="2.1 * images")
    assert_dropped(double, "in a child process: it is wrong: output 0", caplog)


@pytest.mark.slow
def test_wrong_on_its_own_examples_alone(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    double = plant(result="(2 + (len(images) == 7)) * images", more=", examples=[((7, 2),)]")
    assert_dropped(double, "it is wrong: output 0: 14 of 14 elements are off", caplog)


@pytest.mark.slow
def test_a_child_that_cannot_check_is_asked_again(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double = plant()
    (Path(double.implementations[0].function.__code__.co_filename)).write_text("no python")
    assert_dropped(double, "a child process could not check it: SyntaxError", caplog)
    monkeypatch.setattr(isolation, "_ask_child", lambda *_: ("right", True))
    double._faults.clear()
    double._chosen.clear()
    assert double.selected(CPU, torch.float32) == "native"


def test_capability_is_an_obstacle(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = select.Implementation(
        name="native",
        device="cuda",
        dtypes=(torch.float32,),
        built=True,
        function=torch.clone,
        capability=(9, 0),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "_compiled_for", lambda device: True)
    for found, reason in [
        ((9, 0), None),
        ((8, 0), "it runs on GPUs of compute capability 9.0 alone, this one has 8.0"),
        ((10, 0), "it runs on GPUs of compute capability 9.0 alone, this one has 10.0"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, x=found: x)
        assert hopper.obstacle(torch.device("cuda:0"), torch.float32) == reason


def test_a_verdict_is_about_one_implementation_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def child(arguments: object) -> tuple[str, bool]:
        asked.append(arguments)
        return "right", True

    monkeypatch.setattr(isolation, "_ask_child", child)
    memory = select.Choices(tmp_path / "choices.json")
    calls = [
        ("a", "native", torch.float32),
        ("b", "native", torch.float32),
        ("a", "triton", torch.float32),
        ("a", "native", torch.float16),
    ]
    for name, implementation, dtype in 2 * calls:
        fault = isolation.fault_in_child(
            op=name,
            implementation=implementation,
            function=child,
            device=CPU,
            dtype=dtype,
            memory=memory,
        )
        assert fault is None
    assert len(asked) == len(calls)


def test_neither_a_timeout_nor_a_process_that_cannot_start_is_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error in (
        subprocess.TimeoutExpired("python", 60),
        OSError("Cannot allocate memory"),
    ):

        def fail(*arguments: object, error: Exception = error, **how: object) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", fail)
        fault, final = isolation._ask_child(["a module"])
        assert fault != "right"
        assert not final


def test_other_code_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the source of the implementation and the compiled module."""
    source, compiled = tmp_path / "op.py", tmp_path / "native.so"
    monkeypatch.setattr(isolation.native, "has_cpu", True)
    monkeypatch.setattr(isolation.native, "module", SimpleNamespace(__file__=str(compiled)))
    found = set()
    for texts in (("a", "b"), ("a", "c"), ("d", "c")):
        source.write_text(texts[0])
        compiled.write_text(texts[1])
        found.add(isolation._fingerprint.__wrapped__(str(source)))
    assert len(found) == 3
