"""`python -m moe_kernels.info`: what it says, and that the self-test finds a wrong kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_kernels import info, native, op
from moe_kernels.select import Implementation

CPU = torch.device("cpu")


@pytest.fixture
def wrong_kernel() -> Iterator[Implementation]:
    """An implementation of softmax_combine that is off by 1 %, planted for one test."""
    one = op.registry()["softmax_combine"]
    body = one._body.function

    def off(*args: Any) -> Any:
        return body(*args) * 1.01

    before = list(one.implementations)
    one.implementation("native", device="cpu", dtypes=[torch.float32])(off)
    one._chosen.clear()
    yield next(x for x in one.implementations if x.function is off)
    one.implementations[:] = before
    one._chosen.clear()


def test_facts_cover_every_op_device_and_dtype() -> None:
    facts = info.collect()
    found = {(x["op"], x["device"], x["dtype"]) for x in facts["ops"]}
    dtypes = ["float32", "float16", "bfloat16"]
    assert {(name, "cpu", dtype) for name in op.registry() for dtype in dtypes} <= found
    assert facts["selftest"] is None
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["native"]["cpu"] == native.has_cpu


def test_every_implementation_is_used_or_says_why_not() -> None:
    for row in info.collect()["ops"]:
        implementations = op.registry()[row["op"]].implementations
        here = [x.name for x in implementations if row["device"].startswith(x.runs_on)]
        names = {*here, "reference"}
        assert row["implementation"] in names
        told = {row["implementation"], *row["others"], "reference"}
        assert told == names
        assert all(row["others"].values())


@pytest.mark.skipif(not native.has_cpu, reason=f"no compiled module: {native.missing}")
def test_compiled_kernels_are_used_on_the_cpu_in_float32() -> None:
    if torch.cuda.is_available():
        pytest.skip("looks at the CPU alone")
    uses = {(x["op"], x["dtype"]): x["implementation"] for x in info.collect()["ops"]}
    compiled = [
        name
        for name, one in op.registry().items()
        if any((x.name, x.device) == ("native", "cpu") for x in one.implementations)
    ]
    assert compiled
    assert {uses[name, "float32"] for name in compiled} <= {"native", "triton"}
    assert {uses[name, "bfloat16"] for name in op.registry()} == {"reference"}


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json", "--selftest"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {
        *("versions", "gpus", "native", "build", "environment", "plans", "ops", "selftest"),
    }
    assert [x for x in facts["selftest"] if x["fault"]] == []


@pytest.mark.skipif(not native.has_cpu, reason=f"no compiled module: {native.missing}")
def test_selftest_says_a_line_per_op_as_it_goes() -> None:
    done: list[str] = []
    found = []
    for proof in info._proofs(CPU, done.append):
        found.append(proof.op)
        assert f" {proof.op} on cpu: " in done[-1]
    assert len(done) == len(set(found))


def test_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS_CACHE_DIR", "/nowhere")
    assert info.main(["--selftest"]) == 0
    text = capsys.readouterr().out
    assert "What each op uses:" in text
    assert "MOE_KERNELS_CACHE_DIR" in text
    assert "0 wrong" in text
    for name in op.registry():
        assert name in text


def test_each_implementation_is_told_once_per_device_and_dtype() -> None:
    text = info.render(info.collect())
    reasons = text.partition("Why not another:")[2].strip().splitlines()
    told = [
        (device, name, dtype.strip(","))
        for device, name, *words in map(str.split, reasons)
        for dtype in words
        if dtype.strip(",") in ("float32", "float16", "bfloat16")
    ]
    if not torch.cuda.is_available():
        assert len(told) == len(set(told))
        assert len({(device, name) for device, name, _ in told}) == len(reasons)


def test_selftest_without_anything_to_test_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "_proofs", lambda device, say: [])
    assert info.main(["--selftest"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "nothing was tested"
    assert info.main(["--selftest", "--json"]) == 1
    found = capsys.readouterr()
    assert (json.loads(found.out)["selftest"], found.err) == ([], "nothing was tested\n")
    assert info.main([]) == 0


def test_selftest_finds_a_wrong_kernel(
    wrong_kernel: Implementation,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert info.main(["--json", "--selftest"]) == 1
    facts = json.loads(capsys.readouterr().out)
    wrong = [x for x in facts["selftest"] if x["fault"]]
    assert {(x["op"], x["implementation"]) for x in wrong} == {("softmax_combine", "native")}
    assert "it is wrong" in wrong[0]["fault"]
    assert len([x for x in caplog.records if "softmax_combine: native" in x.getMessage()]) == 1
