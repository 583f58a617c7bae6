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
            "graph_pool_handle": lambda: "the pool",
            "is_current_stream_capturing": lambda: self.capturing,
        }.items():
            patch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def stream(self, stream):
        self.events.append("callers stream" if stream is CALLERS else "side stream")
        yield

    @contextlib.contextmanager
    def graph(self, graph, *, stream, pool=None, capture_error_mode=None):
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


class OnGpu(list):
    """A tensor on a GPU, as far as `Graphs` looks at it."""

    device, dtype = CUDA, torch.float32

    @property
    def shape(self):
        return (len(self),)

    def clone(self, memory_format):
        return OnGpu(self)

    def copy_(self, other):
        self[:] = other


def take(graphs, key, step, state, given=(), times=1):
    returned = []
    with graphs.loop(key, step, state, given) as (take_step, _):
        for _ in range(times):
            returned.append(take_step())
    return returned


class TestGraphs:
    def test_on_a_cpu_the_step_works_on_the_callers_tensors(self):
        graphs, x = Graphs(), torch.zeros(2)
        with graphs.loop("key", lambda x, y: x.add_(y), (x,), (torch.ones(2),)) as (take_step, own):
            assert own[0] is x
            take_step()
            take_step()
        assert x.tolist() == [2.0, 2.0]
        assert graphs.status == "no graph: no step ran on a GPU"

    def test_on_a_gpu_it_works_on_copies_that_stay(self, monkeypatch):
        cuda, seen = FakeCuda(monkeypatch), []

        def step(x, y):
            cuda.step()
            seen.append(id(x))
            x[0] += y[0]
            return len(seen)

        graphs, x = Graphs(), OnGpu([1])
        assert take(graphs, "a", step, (x,), (OnGpu([10]),)) == [1]
        assert x == [11]
        assert graphs.status == "no graph: it ran less than twice"
        # what a step returns is remembered by its graph
        assert take(graphs, "a", step, (x,), (OnGpu([20]),), times=3) == [2, 2, 2]
        assert graphs.status == "captured"
        assert cuda.events.count("replay") == 3
        assert len(seen) == 2
        assert len(set(seen)) == 1
        assert id(x) not in seen
        # another attack with an equal key captures nothing
        cuda.events.clear()
        take(graphs, "a", step, (x,), (OnGpu([30]),), times=2)
        assert cuda.events == ["replay", "replay"]
        # other sizes are another graph
        take(graphs, "a", step, (OnGpu([1, 2]),), (OnGpu([30]),))
        assert cuda.events[2:] == ["side stream", "ran"]

    def test_the_one_not_used_for_longest_goes(self, monkeypatch):
        cuda, graphs, x = FakeCuda(monkeypatch), Graphs(), OnGpu([0])
        for key in range(Graphs._MAX_GRAPHS):
            take(graphs, key, lambda x: cuda.step(), (x,), times=2)
        for key in (0, "new"):
            take(graphs, key, lambda x: cuda.step(), (x,), times=2)
        cuda.events.clear()
        take(graphs, 0, lambda x: cuda.step(), (x,))
        take(graphs, 1, lambda x: cuda.step(), (x,))
        assert cuda.events == ["replay", "side stream", "ran"]

    def test_the_first_call_may_be_eager_though_there_is_a_graph(self, monkeypatch):
        cuda, graphs, x = FakeCuda(monkeypatch), Graphs(), OnGpu([0])
        take(graphs, "a", lambda x: cuda.step(), (x,), times=2)
        cuda.events.clear()
        with graphs.loop("a", lambda x: cuda.step(), (x,)) as (take_step, _):
            take_step(eager=True)
            take_step()
        assert cuda.events == ["side stream", "ran", "replay"]

    def test_a_failure_is_remembered_until_something_moves(self, monkeypatch, caplog):
        cuda, graphs, x = FakeCuda(monkeypatch, fails=True), Graphs(), OnGpu([0])
        for key in ("a", "a", "b"):
            take(graphs, key, lambda x: cuda.step(), (x,), times=3)
        assert cuda.events.count("captured") == 1
        assert cuda.events.count("ran") == 9
        assert len(caplog.records) == 1
        assert graphs.status.startswith("no graph: RuntimeError: operation not permitted")
        graphs.forget()
        take(graphs, "a", lambda x: cuda.step(), (x,), times=2)
        assert cuda.events.count("captured") == 2

    def test_what_moves_inside_a_loop_ends_its_graph(self, monkeypatch):
        cuda, graphs, x = FakeCuda(monkeypatch), Graphs(), OnGpu([0])
        with graphs.loop("a", lambda x: cuda.step(), (x,)) as (take_step, _):
            take_step()
            take_step()
            graphs.forget()
        cuda.events.clear()
        take(graphs, "a", lambda x: cuda.step(), (x,))
        assert cuda.events == ["side stream", "ran"]

    def test_a_loop_inside_an_equal_one_has_its_own_tensors(self, monkeypatch):
        cuda, graphs = FakeCuda(monkeypatch), Graphs()
        with graphs.loop("a", lambda x: cuda.step(), (OnGpu([1]),)) as (_, outer):
            with graphs.loop("a", lambda x: cuda.step(), (OnGpu([2]),)) as (_, inner):
                assert (outer[0], inner[0]) == ([1], [2])

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
            take(owner.graphs, "key", owner.add, (torch.zeros(2),), times=3)
            del owner
            assert seen() is None
        finally:
            gc.enable()


@pytest.mark.gpu
class TestOnAGpu:
    def test_results_are_those_of_the_steps(self):
        graphs = Graphs()
        for size in (1, 2, 3, 4, 5, 1):
            x, one = torch.zeros(size, device=CUDA), torch.ones(size, device=CUDA)
            take(graphs, size, lambda x, y: x.add_(y).mul_(2), (x,), (one,), times=4)
            assert x.tolist() == [30.0] * size
            assert graphs.status == "captured"
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
