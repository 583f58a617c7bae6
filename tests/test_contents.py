"""Parameters that changed since a plan took them over: seen however they were written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from plan_networks import ConvNext, resnet, seeded, unless_missing
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from moe_kernels import native
from moe_kernels.plan import Plan, choose
from moe_kernels.plan.contents import Contents, Group, held

pytestmark = pytest.mark.skipif(not native.has_cpu, reason="no compiled module")

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CHUNK = 1 << 18  # bytes, in csrc/cpu/content_hash.cpp


def content_hash(tensor: Tensor, num_threads: int = 1) -> int:
    """As `Contents` computes it, of a single tensor."""
    numbers = [torch.tensor([x]) for x in (tensor.data_ptr(), tensor.nbytes, 0)]
    native.module.content_hashes(*(x.data_ptr() for x in numbers), 1, num_threads)
    return int(numbers[2])


def some_bytes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", [1, 7, 255, 256, 300, CHUNK - 1, CHUNK, 2 * CHUNK + 9])
def test_each_bit_counts(count):
    data = some_bytes(count)
    before = content_hash(data)
    for place in {0, count // 3, count // 2, count - 1}:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert content_hash(data) != before
            data[place] ^= 1 << bit
    assert content_hash(data) == before


def test_hashes_of_many_changes_differ():
    """Of zeros of all lengths, of one changed byte at every place, of exchanged parts."""
    hashes = [content_hash(torch.zeros(n, dtype=torch.uint8)) for n in range(1, 600)]
    data = some_bytes(1024)
    for place in range(len(data)):
        changed = data.clone()
        changed[place] += 1
        hashes.append(content_hash(changed))
    hashes += [content_hash(data.roll(k)) for k in range(0, len(data), 8)]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.neg_(),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.copy_(x.roll(CHUNK // 4)),  # whole chunks change places
        lambda x: x[: len(x) // 2].mul_(2),
        lambda x: x.nextafter_(torch.tensor(9.0)),
    ],
    ids=["signs", "order", "chunks", "exponents", "last bits"],
)
def test_a_change_of_all_numbers_alike(change):
    """Where differences of neighbours could cancel."""
    data = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0))
    before = content_hash(data)
    change(data)
    assert content_hash(data) != before


def test_threads_change_no_hash():
    data = some_bytes(5 * CHUNK + 100)
    assert len({content_hash(data, num_threads) for num_threads in (1, 2, 3)}) == 1


def test_all_groups_are_new_at_first_and_then_none():
    contents = Contents()
    groups = [Group([torch.ones(3)], (0.1,)), Group([]), None]
    assert contents.changed(groups) == [0, 1, 2]
    assert contents.changed(groups) == [2]  # nothing is known of it
    groups[0] = groups[0]._replace(values=(0.2,))
    assert contents.changed(groups) == [0, 2]
    assert contents.changed(groups) == [0, 2]  # no hash was made of what changed visibly
    assert contents.changed(groups) == [2]
    contents.forget()
    assert contents.changed(groups) == [0, 1, 2]


def test_only_what_may_have_changed_is_hashed(monkeypatch):
    """A training, whose versions tell, pays nothing."""
    sizes = []
    hashes = native.module.content_hashes

    def counted(**arguments):
        sizes.append(arguments["count"])
        hashes(**arguments)

    monkeypatch.setattr(native.module, "content_hashes", counted)
    tensors = [torch.ones(3), torch.ones(4)]
    contents, groups = Contents(), [Group([x]) for x in tensors]
    contents.changed(groups)
    tensors[0].add_(1)
    assert contents.changed(groups) == [0]
    assert sizes == [2, 1]


def test_numbers_that_are_computed_are_not_held():
    linear = parametrizations.weight_norm(nn.Linear(2, 3))
    assert held(linear, ("weight", "bias")) is None
    assert held(linear, ("bias",)) == [linear.bias]
    assert held(nn.Linear(2, 3, bias=False), ("bias",)) == []


# Plans ------------------------------------------------------------------------------------------


def by_data(network: nn.Module) -> None:
    network.conv1.weight.data.mul_(1.5)


def by_numpy(network: nn.Module) -> None:
    network.conv1.weight.detach().numpy()[0, 0, 0, 0] += 1


def statistics(network: nn.Module) -> None:
    network.bn1.running_mean.data.add_(0.2)


def by_optimizer(network: nn.Module) -> None:
    network(IMAGES).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()


def by_state_dict(network: nn.Module) -> None:
    network.load_state_dict(resnet("resnet6", 32, seed=5).state_dict())


def by_another_parameter(network: nn.Module) -> None:
    network.linear.weight = nn.Parameter(network.linear.weight.detach() * 2)


def by_its_data(network: nn.Module) -> None:
    network.linear.weight.data = network.linear.weight.detach() * 2


def by_memory_format(network: nn.Module) -> None:
    network.conv1.weight.data.add_(1)
    network.to(memory_format=torch.channels_last)


def by_epsilon(network: nn.Module) -> None:
    network.bn1.eps = 0.5


CHANGES: list[Callable[[nn.Module], None]] = [
    by_data,
    by_numpy,
    statistics,
    by_optimizer,
    by_state_dict,
    by_another_parameter,
    by_its_data,
    by_memory_format,
    by_epsilon,
]


@pytest.mark.parametrize("again", [False, True], ids=["once", "after another"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_sees_each_change(change, again):
    network = resnet("resnet6", 32)
    plan = Plan([network], dtype=torch.float32)
    before = plan(IMAGES)
    if again:
        by_optimizer(network)
        plan.refresh()
        plan.refresh()
    change(network)
    plan.refresh()
    assert torch.equal(plan(IMAGES), Plan([network], dtype=torch.float32)(IMAGES))
    assert not torch.equal(plan(IMAGES), before)


def loads(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Filled by each refresh with the names of the layers that it takes over."""
    found: list[list[str]] = []
    (program,) = plan._programs.values()
    for member in program.members:
        load = member.back_end.load

        def recorded(layers, weights, load=load):
            found.append([layer.name for layer in layers])
            load(layers, weights)

        monkeypatch.setattr(member.back_end, "load", recorded)
    return found


@pytest.mark.parametrize("name", ["aten", "avx512", "avx2"])
def test_only_layers_that_changed_are_taken_over(name, monkeypatch):
    unless_missing(name, torch.float32)
    networks = [resnet("resnet6", 32, seed) for seed in range(2)]
    with choose.back_end(name):
        plan = Plan(networks, independent=True, dtype=torch.float32)
        plan(IMAGES)
        found = loads(plan, monkeypatch)
        plan.refresh()
        assert found == []
        networks[1].bn1.running_var.data.mul_(2)
        plan.refresh()
        assert found == [["conv1"]]


def test_each_kind_of_parameter_is_seen(monkeypatch):
    """Norms over channels, scales, linear layers: a change of each alone."""
    network = seeded(ConvNext)
    plan = Plan([network], dtype=torch.float32)
    plan(IMAGES)
    found = loads(plan, monkeypatch)
    for name, parameter in network.named_parameters():
        before = plan(IMAGES)
        parameter.data.flatten()[0] += 0.5
        plan.refresh()
        assert len(found.pop()) == 1, name
        assert not torch.equal(plan(IMAGES), before), name
    plan.refresh()
    assert found == []


def test_a_failed_refresh_is_repeated(monkeypatch):
    """Else the next one would find nothing new."""
    network = resnet("resnet6", 32)
    plan = Plan([network], dtype=torch.float32)
    plan(IMAGES)
    (program,) = plan._programs.values()
    by_data(network)
    with monkeypatch.context() as patch:
        patch.setattr(program.members[0].back_end, "load", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plan.refresh()
    plan.refresh()
    assert torch.equal(plan(IMAGES), Plan([network], dtype=torch.float32)(IMAGES))
