"""Steps as they are, captured and replayed; and what is left after a capture that failed."""

import contextlib
import gc
import logging
import weakref

import pytest
import torch
from torch import nn

from moe_kernels.graphs import Graphed, Graphs

CUDA = torch.device("cuda")


class FakeStream:
    def __init__(self, device):
        pass

    def wait_stream(self, other):
        pass


CALLERS = FakeStream(CUDA)


class FakeCuda:
    """Enough of torch.cuda to follow what is asked of it; a capture records and runs nothing."""

    def __init__(self, patch, fails=False):
        self.events, self.capturing, self.fails = [], False, fails
        for name, value in {
            "Stream": FakeStream,
            "current_stream": lambda device: CALLERS,
            "stream": self.stream,
            "CUDAGraph": lambda: self,
            "graph": self.graph,
            "synchronize": lambda device: self.events.append("synchronize"),
            "is_current_stream_capturing": lambda: self.capturing,
        }.items():
            patch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def stream(self, stream):
        self.events.append("callers stream" if stream is CALLERS else "side stream")
        yield

    @contextlib.contextmanager
    def graph(self, graph, *, stream, capture_error_mode=None):
        if capture_error_mode is None:
            self.events.append("empty capture")
            yield
            return
        assert capture_error_mode == "thread_local"
        self.capturing = True
        try:
            yield
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            self.capturing = False

    def replay(self):
        self.events.append("replay")

    def step(self):
        self.events.append("captured" if self.capturing else "ran")


class TestOnACpu:
    def test_runs_the_step(self):
        calls = []
        graphed = Graphed(torch.device("cpu"))
        for _ in range(3):
            graphed(lambda: calls.append(1))
        assert len(calls) == 3
        assert graphed.reason == "the device is cpu"

    def test_errors_are_the_steps(self):
        with pytest.raises(ZeroDivisionError):
            Graphed(torch.device("cpu"))(lambda: 1 // 0)


class TestCapture:
    def test_once_then_replays(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        graphed = Graphed(CUDA)
        graphed(cuda.step)
        assert cuda.events == ["side stream", "ran"]
        assert graphed.reason == "it ran less than twice"
        for _ in range(3):
            graphed(cuda.step)
        assert cuda.events[2:] == ["callers stream", "captured", "replay", "replay", "replay"]
        assert graphed.reason is None

    def test_that_fails_is_not_tried_again(self, monkeypatch, caplog):
        cuda = FakeCuda(monkeypatch, fails=True)
        graphed = Graphed(CUDA)
        with caplog.at_level(logging.WARNING, "moe_kernels"):
            for _ in range(4):
                graphed(cuda.step)
        assert cuda.events[:2] == ["side stream", "ran"]
        capture, again = cuda.events[2:6], cuda.events[6:]
        assert capture == ["callers stream", "captured", "synchronize", "empty capture"]
        assert again == ["ran", "ran", "ran"]
        assert graphed.reason == ("RuntimeError: operation not permitted when stream is capturing")
        assert len(caplog.records) == 1

    def test_inside_of_another_capture_it_is_part_of_that(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        graphed = Graphed(CUDA)
        cuda.capturing = True
        graphed(cuda.step)
        graphed(cuda.step)
        assert cuda.events == ["captured", "captured"]

    def test_an_error_of_the_first_run_is_the_steps(self, monkeypatch):
        FakeCuda(monkeypatch)
        with pytest.raises(ZeroDivisionError):
            Graphed(CUDA)(lambda: 1 // 0)


class TestGraphs:
    def test_on_a_cpu_the_step_works_on_the_callers_tensors(self):
        graphs, x = Graphs(), torch.zeros(2)
        graphs.run("key", lambda x, y: x.add_(y), (x, torch.ones(2)))
        assert x.tolist() == [1.0, 1.0]
        assert graphs.status == "no graph: no step ran on a GPU"

    def test_on_a_gpu_it_works_on_copies_that_stay(self, monkeypatch):
        cuda, seen = FakeCuda(monkeypatch), []

        class OnGpu(list):
            device = CUDA

            def clone(self):
                return OnGpu(self)

            def copy_(self, other):
                self[:] = other

        def step(x, y):
            cuda.step()
            seen.append(id(x))
            x[0] += y[0]

        graphs, x = Graphs(), OnGpu([1])
        graphs.run("a", step, (x, OnGpu([10])))
        assert x == [11]
        assert graphs.status == "no graph: it ran less than twice"
        graphs.run("a", step, (x, OnGpu([20])))
        graphs.run("a", step, (x, OnGpu([30])))
        assert graphs.status == "captured"
        assert cuda.events.count("replay") == 2
        assert len(seen) == 2
        assert len(set(seen)) == 1
        assert id(x) not in seen
        for key in "bcde":
            graphs.run(key, step, (x, OnGpu([0])))
        cuda.events.clear()
        graphs.run("a", step, (x, OnGpu([0])))  # forgotten for newer ones
        assert cuda.events == ["side stream", "ran"]
        graphs.forget()
        assert graphs.status == "no graph: no step ran on a GPU"

    def test_keeps_neither_the_step_nor_what_it_belongs_to(self):
        class Owner:
            def __init__(self):
                self.graphs = Graphs()

            def add(self, x):
                x.add_(1)

        owner = Owner()
        seen = weakref.ref(owner)
        gc.disable()
        try:
            for _ in range(3):
                owner.graphs.run("key", owner.add, (torch.zeros(2),))
            del owner
            assert seen() is None
        finally:
            gc.enable()


@pytest.mark.gpu
class TestOnAGpu:
    def test_the_last_few_keys_are_kept(self):
        graphs = Graphs()
        for size in (1, 2, 3, 4, 5, 1):
            for k in range(3):
                x = torch.full((size,), float(k), device=CUDA)
                graphs.run(size, lambda x, y: x.add_(y), (x, torch.ones(size, device=CUDA)))
                assert x.tolist() == [k + 1.0] * size
            assert graphs.status == "captured"
        assert len(graphs._kept) == Graphs._MAX_GRAPHS
        graphs.forget()
        assert graphs.status == "no graph: no step ran on a GPU"

    def test_replay_equals_the_step(self):
        with torch.random.fork_rng(devices=[0]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()).to(CUDA)
        network.eval()
        images = torch.rand(4, 3, 8, 8, device=CUDA)
        buffers = {name: b.clone() for name, b in network.named_buffers()}

        def step_on(x):
            def step():
                leaf = x.detach().requires_grad_()
                with torch.enable_grad():
                    (grad,) = torch.autograd.grad(network(leaf).square().sum(), leaf)
                x.add_(0.01 * grad.sign())

            return step

        graphed_images = images.clone()
        graphed = Graphed(CUDA)
        state = torch.cuda.get_rng_state()
        for _ in range(5):
            step_on(images)()
            graphed(step_on(graphed_images))
        assert graphed.reason is None
        assert torch.equal(graphed_images, images)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert all(torch.equal(b, buffers[name]) for name, b in network.named_buffers())

    def test_cuda_is_usable_after_a_capture_that_failed(self):
        x = torch.zeros(4, device=CUDA)

        def step():
            x.add_(1)
            float(x.sum())  # waits, which a capture may not

        graphed = Graphed(CUDA)
        for _ in range(3):
            graphed(step)
        assert graphed.reason is not None
        assert x.tolist() == [3.0] * 4
        assert torch.randn(4, device=CUDA).isfinite().all()  # its generator saw a capture begin
        other = Graphed(CUDA)
        for _ in range(3):
            other(lambda: x.add_(1))
        assert other.reason is None
        assert x.tolist() == [6.0] * 4
