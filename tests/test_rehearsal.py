"""Plant faults that CUDA would refuse, or punish later: the rehearsed GPU has to catch each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
SETTINGS = """
[tool.pytest.ini_options]
testpaths = ["tests"]
markers = ["gpu: on a GPU", "slow: takes long", "real_gpu: on no other"]
"""
# Tests that pass, which show that the device is one; then the faults.
PLANTED = """
import pytest
import rehearsal
import torch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def default_stream():
    yield
    torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails leaves its own


def captured(step, **options):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream, **options):
        made = step()
    return graph, made


def test_fine_device():
    x = torch.arange(6.0).view(2, 3).to(CUDA)
    assert x.device == CUDA and x.is_cuda and torch.cuda.is_available()
    assert (x @ x.T).cpu().tolist() == [[5.0, 14.0], [14.0, 50.0]]
    assert torch.zeros(2, device="cuda").device == CUDA
    leaf = x.requires_grad_()
    leaf.square().sum().backward()
    assert torch.equal(leaf.grad, 2 * x)


def test_fine_replay():
    x = torch.ones(3, device=CUDA)
    graph, y = captured(lambda: x.mul_(2) + 1)
    assert x.tolist() == [1.0] * 3  # a capture runs nothing
    for k in (2.0, 4.0):
        graph.replay()
        assert x.tolist() == [k] * 3 and y.tolist() == [k + 1] * 3


def test_fine_random_numbers_of_a_replay_are_new():
    torch.cuda.manual_seed(3)
    eager = [torch.rand(4, device=CUDA).tolist() for _ in range(2)]
    torch.cuda.manual_seed(3)
    graph, x = captured(lambda: torch.rand(4, device=CUDA))
    found = []
    for _ in range(2):
        graph.replay()
        found.append(x.tolist())
    assert found == eager


def test_fine_pools():
    pool = torch.cuda.graph_pool_handle()
    x = torch.ones(3, device=CUDA)
    first, y = captured(lambda: x + 1, pool=pool, capture_error_mode="thread_local")
    second, z = captured(lambda: y + 1, pool=first.pool())
    assert first.pool() == second.pool() == pool
    first.replay()
    second.replay()
    assert z.tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="capture error mode"):
        captured(lambda: x + 1, capture_error_mode="none")


def test_fine_counts():
    x = torch.ones(3, device=CUDA)
    with rehearsal.counted() as events:
        graph, _ = captured(lambda: x.add_(1))
        graph.replay()
        graph.replay()
        x.mul_(2)
        x.view(3, 1)
    assert (events.captures, events.replays, events.launches) == (1, 2, 1)
    assert (events.syncs, events.copies) == (1, 0)  # torch waits before a capture
    assert list(events.kernels) == ["aten.mul_.Tensor"]


def test_fine_copies_in_a_loop():
    x = torch.ones(3, device=CUDA)
    with rehearsal.counted() as events:
        for k in range(5):
            x.add_(torch.tensor(1.0 * k).to(CUDA))
    assert events.copies == events.syncs == 5
    (line,) = events.where("copies")
    assert line.startswith("test_planted:") and "to the device" in line


@pytest.mark.parametrize("k", range(7))
def test_fine_what_waits(k):
    x = torch.arange(3.0, device=CUDA)
    waits = [
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.tolist(),
        lambda: torch.equal(x, x),
        lambda: torch.cuda.synchronize(),
    ]
    with rehearsal.counted() as events:
        waits[k]()
    assert events.syncs == 1
    with pytest.raises(RuntimeError, match="capturing|previous error"):
        captured(waits[k])


def test_fine_a_number_by_a_mask_waits_not():
    x = torch.arange(3.0, device=CUDA)
    with rehearsal.counted() as events:
        x[x > 1] = 0.0
    assert events.syncs == 0
    assert x.tolist() == [0.0, 1.0, 0.0]


def test_fault_devices():
    torch.ones(3, device=CUDA) + torch.ones(3)


def test_fault_item():
    x = torch.ones(3, device=CUDA)
    captured(lambda: x.mul_(x.sum().item()))


def test_fault_invalid_capture():
    x = torch.ones(3, device=CUDA)

    def step():
        try:
            x.sum().item()
        except RuntimeError:
            pass
        x.add_(1)

    captured(step)


def test_fault_copy():
    x = torch.ones(3, device=CUDA)
    captured(lambda: x.add_(torch.ones(3).to(CUDA)))


def test_fault_mask():
    x = torch.ones(3, device=CUDA)
    captured(lambda: x[x > 0])


def test_fault_seed():
    captured(lambda: torch.cuda.manual_seed(0))


def test_fault_stream():
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()


def test_fault_generator():
    torch.rand(3, device=CUDA, generator=torch.Generator())


def test_fault_memory():
    x, y = torch.ones(3, device=CUDA), torch.ones(3, device=CUDA)
    graph, _ = captured(lambda: x.add_(y))
    graph.replay()
    del y
    graph.replay()


def test_fault_unreplayed():
    x = torch.ones(3, device=CUDA)
    _, y = captured(lambda: x + 1)
    assert y.isfinite().all()


def test_fault_pool():
    x, pool = torch.ones(3, device=CUDA), torch.cuda.graph_pool_handle()
    first, y = captured(lambda: x + 1, pool=pool)
    second, z = captured(lambda: x + 2, pool=pool)
    second.replay()
    first.replay()  # what it made and dropped may lie where the second graph's result is
    assert z.isfinite().all()


def test_fault_numpy():
    torch.ones(3, device=CUDA).numpy()


def test_fault_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        torch.ones(3, device=CUDA).cumsum(0)
    finally:
        torch.use_deterministic_algorithms(False)
"""
FAULTS = {
    "devices": "at least two devices, cuda:0 and cpu",
    "item": "during capture (aten._local_scalar_dense.default at test_planted:",
    "invalid_capture": "previous error during capture",
    "copy": "during capture (copy to the device [3] at test_planted:",
    "mask": "during capture (aten.index.Tensor by a mask at test_planted:",
    "seed": "during CUDA graph capture",
    "stream": "non-default stream",
    "generator": "Expected a 'cuda' device type for generator",
    "memory": "memory that nobody holds any more",
    "unreplayed": "assert",
    "pool": "assert",
    "numpy": "can't convert cuda:0 device type tensor to numpy",
    "deterministic": "does not have a deterministic implementation",
}


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest on the planted tests, with this project's conftest."""
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text(SETTINGS)
    (folder / "tests" / "test_planted.py").write_text(PLANTED)
    shutil.copy(TESTS / "conftest.py", folder / "tests")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "DWF_"))}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))), "COLUMNS": "500"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=inherited | paths | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By test, PASSED or FAILED and the message."""
    folder = tmp_path_factory.mktemp("planted")
    done = run(folder, "--rehearse-gpu", "--tb=line", "-p", "no:xdist")
    found = re.findall(r"^(PASSED|FAILED) \S+::test_(\S+)(.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return {name: f"{outcome}{message}" for outcome, name, message in found}


def test_a_device_like_any_other(reports: dict[str, str]) -> None:
    fine = {name: x for name, x in reports.items() if name.startswith("fine_")}
    assert len(fine) >= 13
    assert set(fine.values()) == {"PASSED"}, fine


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(reports: dict[str, str], fault: str) -> None:
    assert reports[f"fault_{fault}"].startswith("FAILED")
    assert FAULTS[fault] in reports[f"fault_{fault}"]


def test_without_the_option_they_are_skipped(tmp_path: Path) -> None:
    assert re.search(r"^\d+ skipped", run(tmp_path, "-p", "no:xdist").stdout, re.MULTILINE)


def test_workers_rehearse_as_well(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    done = run(tmp_path, "--rehearse-gpu", "-k", "fine", "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_torch_that_lacks_something_is_one_line(tmp_path: Path) -> None:
    """The option is refused, not the import of conftest."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.utils.backend_registration as b\n"
        "del b._setup_privateuseone_for_python_backend\n"
    )
    paths = os.pathsep.join(map(str, (tmp_path, TESTS, TESTS.parent)))
    done = run(tmp_path, "--rehearse-gpu", "-p", "no:xdist", PYTHONPATH=paths)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [x for x in done.stderr.splitlines() if x.strip()]
    assert "lacks a private part" in line
    assert "_setup_privateuseone_for_python_backend" in line
