"""Models that combine networks by code of their own, attacked around the networks' plans."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from plan_networks import resnet
from torch import nn

import dwf
import moe_kernels
from dwf.attacks import attack_target
from dwf.models import (
    DualMixture,
    ExpertModel,
    MixedModel,
    Mixture,
    MlpGate,
    Normalize,
    RoutedMixture,
    Stretch,
    SynergyOfExperts,
    attack_views,
)
from dwf.models.inner_views import views_of
from dwf.models.pathways import PathwayMixture, PathwayResNet, build_router
from dwf.models.planned import AroundNetworks
from dwf.models.routed import linear_router
from dwf.models.soe import Surrogate
from dwf.models.sparse import SparseLayer
from dwf.models.sparse_network import SparseModel, make_sparse
from moe_kernels import CannotPlan, ComposedPlan

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)
NORMALIZE = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def routed(seed: int = 0) -> RoutedMixture:
    experts = [resnet("resnet6", 8, seed=seed + e) for e in range(3)]
    router = linear_router((3, 8, 8), 3, seed=seed)
    return RoutedMixture(experts, router, Normalize(*NORMALIZE)).eval()


def dual() -> DualMixture:
    return DualMixture(routed(), routed(10), alpha=0.3).eval()


def soe() -> SynergyOfExperts:
    experts = [resnet("resnet6", 8, seed=e) for e in range(3)]
    return SynergyOfExperts(experts, Normalize(*NORMALIZE)).eval()


def mixed() -> MixedModel:
    accurate, robust = (resnet("resnet6", 8, seed=e) for e in range(2))
    return MixedModel(accurate, robust, 0.6, stretch=Stretch(2.0, 1.5, 0.1)).eval()


def mixed_mixture() -> MixedModel:
    experts = [resnet("resnet6", 8, seed=e) for e in range(2)]
    soft = Mixture(experts, MlpGate((3, 8, 8), 2, hidden=4), Normalize(*NORMALIZE))
    stretch = Stretch(2.0, 1.5, 0.1)
    return MixedModel(resnet("resnet6", 8, seed=2), soft, stretch=stretch, accurate_scale=2).eval()


def sparse(place: str, net: str = "resnet10", **options) -> SparseModel:
    """Robust Experts; their gates are steep, so that images take different experts."""
    network = resnet(net, 16, seed=3)
    shown = make_sparse(network, place, num_experts=3, **options)
    model = SparseModel(Normalize(*NORMALIZE), network, shown).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SparseLayer):
                for parameter in layer.gate.parameters():
                    parameter.mul_(20)
    return model


def pathways() -> PathwayMixture:
    """ADVMoE; its router ends in a BatchNorm of rows, and images take different pathways."""
    network = PathwayResNet((1, 1), num_pathways=2, width=16, seed=1)
    router = nn.Sequential(build_router(2, width=8, seed=2), nn.BatchNorm1d(2, affine=False))
    model = PathwayMixture(network, router, Normalize(*NORMALIZE))
    with torch.no_grad():
        router.eval()(IMAGES)
        rows = router[0].eval()(IMAGES)
        router[1].running_mean.copy_(rows.mean(dim=0))
        router[1].running_var.copy_(rows.var(dim=0))
    model.eval()
    assert 0 < model.gate_weights(IMAGES)[:, 0].sum() < len(IMAGES)
    return model


MODELS = {
    "pathways": pathways,
    "sparse blocks": lambda: sparse("block"),
    "sparse blocks, two of three": lambda: sparse("block", top_k=2, stage=2),
    "sparse convolutions": lambda: sparse("conv", stage=3),
    "sparse residual block": lambda: sparse("residual", stage=1),
    "routed": routed,
    "dual": dual,
    "synergy": soe,
    "mixed": mixed,
    "mixed with a mixture": mixed_mixture,
    "stretched": lambda: mixed().expert(1).eval(),
    "surrogate": lambda: Surrogate(soe()).eval(),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def margin(logits, labels):
    """A loss that reads more than the label's logit."""
    return -(logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(1))


def by_autograd(model, loss="ce"):
    leaf = IMAGES.clone().requires_grad_()
    logits = model(leaf)
    losses = (
        F.cross_entropy(logits, LABELS, reduction="none") if loss == "ce" else loss(logits, LABELS)
    )
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return grad, logits.detach()


def assert_equal(plan, model, loss="ce"):
    for ours, theirs in zip(
        plan.gradient(IMAGES, LABELS, loss), by_autograd(model, loss), strict=True
    ):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    torch.testing.assert_close(plan(IMAGES), model(IMAGES).detach(), rtol=1e-4, atol=1e-4)


@models
@pytest.mark.parametrize("loss", ["ce", margin], ids=["ce", "own"])
def test_equals_autograd(make, loss):
    model = make()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    plan = model.attack_plan()
    assert isinstance(plan, ComposedPlan)
    plan.prepare(IMAGES)
    assert_equal(plan, model, loss)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())


@models
def test_new_weights(make):
    """A refresh takes over those of the parts; all others are shared."""
    model = make()
    plan = model.attack_plan()
    plan.prepare(IMAGES)
    # of one draw in 500 a rounding moves a ReLU over zero, and a gradient jumps
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert model.attack_plan() is plan
    assert_equal(plan, model)


def test_what_has_no_plan_computes_in_eval_mode():
    """The parts are those of the model, which may be in train mode; only its copy is not."""
    model = routed()
    model.experts[0] = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1), nn.LayerNorm(144), nn.Linear(144, 10)
    )
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    plan = model.attack_plan()
    for _ in range(2):
        with pytest.raises(CannotPlan, match="LayerNorm"):
            plan.prepare(IMAGES)
    logits = plan(IMAGES)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    torch.testing.assert_close(logits, model.eval()(IMAGES).detach())


class Shifted(RoutedMixture):
    """Keeps a tensor that is neither a parameter nor a buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shift = torch.zeros(10)

    def forward(self, images, return_aux=False):
        return super().forward(images, return_aux) + self.shift


def assigned(model):
    state = {k: 1.5 * x if x.is_floating_point() else x for k, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def moved(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = 0.7 * tensor if tensor.is_floating_point() else tensor.clone()


def shifted(model):
    model.shift = torch.arange(10.0)


def shifted_in_place(model):
    model.shift.add_(torch.arange(10.0))


@pytest.mark.parametrize("replace", [assigned, moved, shifted, shifted_in_place])
def test_tensors_that_are_replaced(replace):
    """A captured graph of the old ones is dropped as well."""
    experts = [resnet("resnet6", 8, seed=e) for e in range(2)]
    model = Shifted(experts, linear_router((3, 8, 8), 2, seed=1), Normalize(*NORMALIZE)).eval()
    plan = model.attack_plan()
    plan.prepare(IMAGES)
    age = plan.graphs.age
    assert plan.graphs.age == age
    replace(model)
    now = model.attack_plan()
    assert_equal(now, model)
    assert now is not plan or now.graphs.age > age or replace is shifted_in_place


def test_graphs_end_with_what_they_read():
    """With the programs of a part, which another model that shares them may have dropped."""
    model = soft()
    first, second = (
        attack_target(view.make(IMAGES), IMAGES).plan
        for view in attack_views(model)
        if view.name in ("frozen gate", "uniform gate")
    )
    graphs, age = first.graphs, first.graphs.age
    (part, *_) = (x for x in first._stand_ins if x in second._stand_ins)
    part._plan._refuse(next(iter(part._plan._programs.values())), RuntimeError("no such kernel"))
    assert first.graphs is graphs
    assert graphs.age == age + 1
    assert second.graphs.age == 1
    model.normalize.mean.data = model.normalize.mean.clone()
    assert first.graphs.age == age + 2


def test_another_part_is_another_plan():
    model = routed()
    plan = model.attack_plan()
    model.experts[1] = resnet("resnet6", 8, seed=7)
    other = model.attack_plan()
    assert other is not plan
    other.prepare(IMAGES)
    assert_equal(other, model)


def test_attacks_and_reports_use_it():
    model = routed()
    target = attack_target(model, IMAGES)
    assert target.plan.back_end.startswith("autograd around ")
    budget = {"epsilon": 0.1, "step_size": 0.02, "num_steps": 5, "random_start": False}
    ours = dwf.pgd(model, IMAGES, LABELS, **budget)
    with moe_kernels.implementation("reference"):
        theirs = dwf.pgd(model, IMAGES, LABELS, **budget)
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(x), LABELS)) for x in (IMAGES, ours, theirs)]
    assert losses[1] > losses[0]
    assert losses[1] == pytest.approx(losses[2], rel=1e-2)


def test_copies_and_pickles_leave_the_plan():
    model = routed()
    model.attack_plan().prepare(IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IMAGES), model(IMAGES), rtol=0, atol=0)
        assert "_plans" not in vars(other)


def test_parts_may_read_and_return_maps():
    """In a model of sparse layers: the stages without one, and the experts of the others."""
    model = sparse("block", stage=2)
    plan = model.attack_plan()
    plan.prepare(IMAGES)
    layers = model.layers.values()
    experts = [expert for layer in layers for expert in layer.experts]
    stages = [model.network.get_submodule(f"layer{i}") for i in (1, 3, 4)]
    assert {id(x) for x in model.plan_parts().networks} == {id(x) for x in (*stages, *experts)}
    assert plan.back_end.startswith("autograd around ")


def soft() -> Mixture:
    experts = [resnet("resnet6", 8, seed=e) for e in range(3)]
    return Mixture(experts, MlpGate((3, 8, 8), 3, hidden=4), Normalize(*NORMALIZE)).eval()


class Own(ExpertModel):
    """Somebody's own mixture of two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_names = ["first", "second"]
        self.parts = nn.ModuleList(resnet("resnet6", 8, seed=e) for e in range(2))

    def expert(self, index):
        return self.parts[index]

    def gate_weights(self, images):
        share = images.mean(dim=(1, 2, 3)).sigmoid()
        return torch.stack([share, 1 - share], dim=1)

    def forward(self, images):
        weights = self.gate_weights(images)
        return sum(weights[:, e, None] * part(images) for e, part in enumerate(self.parts))


MIXTURES = MODELS | {"soft": soft, "own": lambda: Own().eval()}
for name in ("stretched", "surrogate"):
    del MIXTURES[name]


class TestViews:
    """Autograd around the plans of the mixture's networks, made once for all views."""

    @pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)
    def test_equal_autograd(self, make, monkeypatch):
        made = []
        prepare = moe_kernels.plan.plan.build
        monkeypatch.setattr(
            moe_kernels.plan.plan, "build", lambda *args: made.append(args) or prepare(*args)
        )
        model = make()
        views = attack_views(model)
        num_around = 0
        for view in views:
            module = view.make(IMAGES)
            if not isinstance(module, AroundNetworks):
                assert "expert" in view.name or module.attack_plan(), view.name
                continue
            num_around += 1
            plan = attack_target(module, IMAGES).plan
            assert isinstance(plan, ComposedPlan), view.name
            ours, theirs = plan.gradient(IMAGES, LABELS), by_autograd(module)
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).norm() <= 1e-4 * b.norm(), view.name
        assert num_around >= len(views) - model.num_experts - 1
        assert len(made) <= len(model.networks())

    def test_new_weights_between_two(self):
        model = soft()
        view = next(x for x in attack_views(model) if x.name == "frozen gate")
        attack_target(view.make(IMAGES), IMAGES)
        with torch.no_grad():
            for parameter in model.experts[1].parameters():
                parameter.mul_(1.1)
        module = view.make(IMAGES)
        assert_equal(attack_target(module, IMAGES).plan, module)

    def test_memory_ends_with_a_view(self):
        """At once, without a collection of cycles: a captured step holds all activations."""
        view = next(x for x in attack_views(soft()) if x.name == "frozen gate")
        gc.collect()
        gc.disable()
        try:
            target = attack_target(view.make(IMAGES), IMAGES)
            plan = weakref.ref(target.plan)
            dwf.pgd(
                target, IMAGES, LABELS, epsilon=0.1, step_size=0.1, num_steps=1, random_start=False
            )
            del target
            assert plan() is None
        finally:
            gc.enable()

    def test_of_a_mixture_inside_a_model(self):
        whole = nn.Sequential(soft(), nn.Softmax(dim=1)).eval()
        view = next(x for x in views_of(whole) if x.name.endswith("uniform gate"))
        module = view.make(IMAGES)
        plan = attack_target(module, IMAGES).plan
        assert isinstance(plan, ComposedPlan)
        assert_equal(plan, module)

    def test_without_plans_of_the_networks(self):
        """What cannot be planned is attacked by autograd, as before."""
        view = next(x for x in attack_views(with_transformer()) if x.name == "uniform gate")
        target = attack_target(view.make(IMAGES), IMAGES)
        assert target.plan is None
        assert "flattens" in target.reason


class Noisy(RoutedMixture):
    def forward(self, images, return_aux=False):
        return super().forward(images + 0.01 * torch.rand_like(images), return_aux)


def hooked():
    model = routed()
    model.gate.register_forward_hook(lambda *_: None)
    return model


def with_transformer():
    model = routed()
    model.experts[0] = nn.Sequential(nn.Flatten(1), nn.LayerNorm(192), nn.Linear(192, 10))
    return model


DECLINED = {
    "gate has hooks": hooked,
    "draws random numbers": lambda: Noisy(
        [resnet("resnet6", 8)], linear_router((3, 8, 8), 1, seed=0)
    ),
    "flattens|LayerNorm": with_transformer,
}


@pytest.mark.parametrize("reason", DECLINED)
def test_declined_with_the_reason(reason):
    model = DECLINED[reason]().eval()
    with pytest.raises(CannotPlan, match=reason):
        model.attack_plan().prepare(IMAGES)
    assert dwf.fgsm(model, IMAGES, LABELS, epsilon=0.1).shape == IMAGES.shape
