"""Views of mixtures against loops by hand; what they find where a gate hides it, against truth."""

import math

import pytest
import torch
from small_models import Linear, Mapped, disordered, everything, make_images, make_labels
from torch import nn

import dwf
import moe_kernels
from dwf.attacks import input_gradient, with_backward_pass_of
from dwf.checks import ImageError, ModelOutputError
from dwf.models import (
    DualMixture,
    ExpertModel,
    LinearGate,
    Mixture,
    PathwayMixture,
    PathwayResNet,
    PixelModel,
    RandomSwitch,
    RoutedMixture,
    SparseModel,
    SwitchedMixture,
    SynergyOfExperts,
    attack_views,
    build_network,
)
from dwf.models.experts import softened
from dwf.models.routed import one_hot_choice
from dwf.models.sparse_network import make_sparse

B, E, K, SHAPE = 6, 3, 5, (3, 8, 8)
IMAGES, LABELS = make_images(B), make_labels(B)
SIDES = [
    "expert 0",
    "expert 1",
    "expert 2",
    "uniform gate",
    "frozen gate",
    "one-hot gate, winner",
    "one-hot gate, runner-up",
    "gate only",
    "straight-through",
    "re-weighted members",
]
SOFT = [
    *(f"soft inside, T {temperature}" for temperature in ("2", "1", "0.5", "0.25")),
    "toward weakest expert",
    "toward next expert",
]
OWN = {"synergy": ["confidence"], "pathways": ["gradient to all pathways"]}
ALIGNED = {
    "toward weakest expert",
    "toward next expert",
    "frozen gate",
    "one-hot gate, winner",
    "one-hot gate, runner-up",
    "re-weighted members",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def experts(num_experts=E):
    return [Linear(seed=e) for e in range(num_experts)]


def gate(num_experts=E):
    return Linear(num_classes=num_experts, seed=7)


class Plain(ExpertModel):
    """Somebody's own mixture, of which only what has to be there is there."""

    def __init__(self):
        super().__init__()
        self.expert_names = [f"expert {e}" for e in range(E)]
        self.parts = nn.ModuleList(experts())
        self.router = gate()

    def expert(self, index):
        return self.parts[index]

    def gate_weights(self, images):
        return self.router(images).softmax(dim=1)

    def forward(self, images):
        weights = self.gate_weights(images)
        return sum(weights[:, e, None] * self.parts[e](images) for e in range(E))


def synergy():
    made = SynergyOfExperts(
        build_network("resnet6", num_classes=K, width=2, in_channels=3, seed=e) for e in range(E)
    )
    return shaken(made)


def sparse(top_k):
    network = build_network("resnet6", num_classes=K, width=2, in_channels=3, seed=0)
    subpath = make_sparse(network, "block", num_experts=E, top_k=top_k, seed=0)
    return shaken(SparseModel(nn.Identity(), network, subpath))


def pathways():
    network = PathwayResNet((1,), num_pathways=E, num_classes=K, width=4)
    return shaken(PathwayMixture(network, gate()))


def switched():
    learned = LinearGate(SHAPE, E)
    nn.init.normal_(learned.linear.weight, generator=torch.Generator().manual_seed(0))
    return SwitchedMixture(experts(), RandomSwitch(learned))


def shaken(model):
    """Weights and statistics that are not those of birth; biases apart, so that experts differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


MODELS = {
    "mixture": lambda: Mixture(experts(), gate()),
    "switched": switched,
    "routed": lambda: RoutedMixture(experts(), gate()),
    "dual": lambda: DualMixture(
        RoutedMixture(experts(1), gate(1)), RoutedMixture(experts(2), gate(2)), alpha=0.4
    ),
    "synergy": synergy,
    "sparse": lambda: sparse(1),
    "sparse of two": lambda: sparse(2),
    "pathways": pathways,
    "somebody's own": Plain,
}


def view(model, name):
    return next(x for x in attack_views(model) if x.name == name)


def made(model, name, images=IMAGES):
    return view(model, name).make(images)


def gradient_of(function, images=IMAGES, cost=None):
    """Gradient of <cost, function(images)>, with random cost by default."""
    if cost is None:
        cost = torch.randn(len(images), K, generator=torch.Generator().manual_seed(3))
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad((function(leaf) * cost).sum(), leaf)
    return found


def parts(model, images=IMAGES):
    """Expert logits as [E][B] rows, and the gate's weights, hard and soft, as [B][E]."""
    alone = [model.expert(e)(images).detach() for e in range(model.num_experts)]
    weights = [model.gate_weights(images), model.soft_gate_weights(images)]
    return alone, *(w.detach().tolist() for w in weights)


class TestSoftened:
    def test_by_hand(self):
        """Mean 2, standard deviation sqrt(2): (-sqrt 2, 0, sqrt 2) / ... = -1.2247, 0, 1.2247."""
        scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
        z = math.sqrt(1.5)
        norm = math.exp(-z) + 1 + math.exp(z)
        expected = [[math.exp(-z) / norm, 1 / norm, math.exp(z) / norm], [1 / 3] * 3]
        torch.testing.assert_close(softened(scores), torch.tensor(expected))

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
    def test_no_scale_saturates_it(self, scale):
        scores = torch.tensor([[1.0, 2.0, 4.0]])
        leaf = (scale * scores).requires_grad_()
        weights = softened(leaf)
        torch.testing.assert_close(weights, softened(scores))
        (slope,) = torch.autograd.grad(weights[0, 0], leaf)
        assert (scale * slope).abs().max() > 0.01


@pytest.mark.parametrize("name", list(MODELS))
class TestEveryMixture:
    @pytest.fixture(autouse=True)
    def reference(self):
        """Experts by autograd: to make a plan for each takes longer than to attack it."""
        with moe_kernels.implementation("reference"):
            yield

    def test_names(self, name):
        model = MODELS[name]()
        views = attack_views(model)
        found = [x.name for x in views]
        if name == "switched":
            assert found.pop(0) == "unpermuted gate"
        if name in ("dual", "pathways"):  # whose experts have names of their own
            assert found[:E] == [f"expert {e} ({model.expert_names[e]})" for e in range(E)]
            found[:E] = SIDES[:E]
        inside = name in ("dual", "sparse", "sparse of two", "pathways")
        soft = ["soft inside"] * inside + SOFT
        assert found == SIDES + OWN.get(name, []) + soft
        assert [x.name for x in views if x.soft] == soft
        assert {x.name for x in views if x.row_aligned} == ALIGNED

    def test_each_has_logits_and_a_gradient(self, name):
        model = MODELS[name]().eval()
        for x in attack_views(model):
            module = x.make(IMAGES)
            assert not any(part.training for part in module.modules()), x.name
            assert module(IMAGES).shape == (B, K), x.name
            assert module(IMAGES).isfinite().all(), x.name
            gradient = gradient_of(module)
            assert gradient.isfinite().all(), x.name
            assert (gradient.flatten(1).abs().amax(dim=1) > 0).all(), x.name

    def test_leaves_no_trace(self, name):
        """Not even of a model in no mode anybody would guess, asked under inference mode."""
        model = disordered(MODELS[name]())
        before = everything(model)
        settings = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 1, "random_start": True}
        for x in attack_views(model):
            with torch.inference_mode():
                module = x.make(IMAGES)
            assert everything(model) == before, x.name
            found = dwf.pgd(module, IMAGES, LABELS, **settings)
            assert everything(model) == before, x.name
            assert not torch.equal(found, IMAGES)

    def test_does_not_depend_on_the_mode_it_was_made_in(self, name):
        if name == "switched":
            return  # in train mode its gate is another
        model = MODELS[name]()
        trained = [x.make(IMAGES) for x in attack_views(model.train())]
        judged = [x.make(IMAGES) for x in attack_views(model.eval())]
        for one, other in zip(trained, judged, strict=True):
            assert torch.equal(one(IMAGES), other(IMAGES))

    def test_rows_are_guarded(self, name):
        for x in attack_views(MODELS[name]().eval()):
            for rows in (IMAGES[:-1], torch.cat([IMAGES, IMAGES])):
                if x.row_aligned:
                    words = f"{len(rows)} rows, but this module was made for {B}"
                    with pytest.raises(ImageError, match=words):
                        x.make(IMAGES)(rows)
                else:
                    assert len(x.make(IMAGES)(rows)) == len(rows)

    def test_empty_batch(self, name):
        settings = {"epsilon": 0.1, "step_size": 0.1, "num_steps": 1, "random_start": False}
        for x in attack_views(MODELS[name]().eval()):
            found = dwf.pgd(x.make(IMAGES[:0]), IMAGES[:0], LABELS[:0], **settings)
            assert found.shape == (0, *SHAPE)

    def test_mixing_by_hand(self, name):
        model = MODELS[name]().eval().without_chance()
        alone, weights, soft = parts(model)
        for b in range(B):
            # its own choice first, then by preference: of two mixtures' choices, the larger share
            key = [weights[b][e] + soft[b][e] for e in range(E)]
            winner, runner_up = sorted(range(E), key=lambda e: -key[e])[:2]
            expected = {
                "uniform gate": sum(alone[e][b] for e in range(E)) / E,
                "frozen gate": sum(weights[b][e] * alone[e][b] for e in range(E)),
                "straight-through": sum(weights[b][e] * alone[e][b] for e in range(E)),
                "gate only": sum(soft[b][e] * alone[e][b] for e in range(E)),
                "one-hot gate, winner": alone[winner][b],
                "one-hot gate, runner-up": alone[runner_up][b],
                **{x.name: alone[e][b] for e, x in enumerate(attack_views(model)[:E])},
            }
            for side, logits in expected.items():
                found = made(model, side)(IMAGES)[b]
                torch.testing.assert_close(found, logits, msg=side)
            assert weights[b][winner] == max(weights[b])

    def test_soft_weights_have_the_gates_order(self, name):
        model = MODELS[name]().eval().without_chance()
        weights, soft = model.gate_weights(IMAGES), model.soft_gate_weights(IMAGES)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(B))
        assert (soft > 0).all()
        if name != "dual":
            assert torch.equal(soft.argmax(dim=1), weights.argmax(dim=1))
            chosen = weights > 0
            lowest = soft.where(chosen, torch.inf).amin(dim=1)
            highest = soft.where(~chosen, -torch.inf).amax(dim=1)
            assert (lowest >= highest).all()


class TestGradients:
    def model(self, scale=30.0):
        """A soft gate so sure that its own gradient is next to nothing."""
        model = Mixture(experts(), gate())
        with torch.no_grad():
            model.gate.weight.mul_(scale)
            model.gate.bias.mul_(scale)
        return model

    def test_frozen_has_none_of_the_gate(self):
        model = self.model()
        weights = model.gate_weights(IMAGES).detach()

        def by_hand(images):
            return sum(weights[:, e, None] * model.experts[e](images) for e in range(E))

        found = gradient_of(made(model, "frozen gate"))
        torch.testing.assert_close(found, gradient_of(by_hand))
        moved = (IMAGES + 0.2).clamp(0, 1)
        module = made(model, "frozen gate")
        torch.testing.assert_close(module(moved), by_hand(moved))

    @pytest.mark.parametrize("kind", ["mixture", "routed", "synergy", "sparse", "pathways"])
    def test_gate_only_and_straight_through(self, kind):
        """sum_e <cost, l_e> ds_e, without and with sum_e w_e <cost, dl_e>."""
        model = MODELS[kind]().eval()
        cost = torch.randn(B, K, generator=torch.Generator().manual_seed(3))
        alone, weights, _ = parts(model)
        gain = torch.stack([(logits * cost).sum(dim=1) for logits in alone], dim=1)  # [B, E]
        leaf = IMAGES.clone().requires_grad_()
        (routes,) = torch.autograd.grad((model.soft_gate_weights(leaf) * gain).sum(), leaf)
        members = sum(
            gradient_of(model.expert(e), cost=cost * torch.tensor(weights)[:, e, None])
            for e in range(E)
        )
        close = {"rtol": 1e-3, "atol": 1e-5}
        found = gradient_of(made(model, "gate only"), cost=cost)
        torch.testing.assert_close(found, routes, **close)
        found = gradient_of(made(model, "straight-through"), cost=cost)
        torch.testing.assert_close(found, routes + members, **close)

    def test_a_sure_gate_moves_again(self):
        model = self.model(1e4)
        assert torch.equal(
            gradient_of(lambda x: model.gate_weights(x) @ torch.ones(E, K)), torch.zeros(B, *SHAPE)
        )
        assert gradient_of(made(model, "gate only")).abs().amax(dim=(1, 2, 3)).min() > 1e-3

    def test_a_gate_without_gradient_is_no_error(self):
        class Detached(Plain):
            def gate_weights(self, images):
                return super().gate_weights(images).detach()

        images = IMAGES.clone()
        found = input_gradient(made(Detached(), "gate only"), images, LABELS)  # warns of nothing
        assert torch.equal(found, torch.zeros_like(images))

    def test_reweighted_members(self):
        """v by its formula, image by image; no gradient of v."""
        model = self.model(3.0).eval()
        module = made(model, "re-weighted members")
        attacked = (IMAGES + 0.1 * make_images(B, seed=5)).clamp(0, 1)
        _, _, soft = parts(model)
        classes = model(IMAGES).argmax(dim=1).tolist()
        alone, _, _ = parts(model, attacked)
        v = []
        for b in range(B):
            c, mean = classes[b], sum(soft[b][e] * alone[e][b] for e in range(E))
            k = max((k for k in range(K) if k != c), key=lambda k: mean[k].item())
            m = [(alone[e][b][c] - alone[e][b][k]).item() for e in range(E)]
            t = sum(abs(x) for x in m) / E
            f = [math.exp(x / t) / (1 + math.exp(x / t)) ** 2 for x in m]
            own = [soft[b][e] * f[e] for e in range(E)]
            v.append([x / sum(own) for x in own])
        v = torch.tensor(v)
        torch.testing.assert_close(module.module.member_weights(torch.stack(alone)), v)
        assert v.std(dim=1).min() > 0.01

        def by_hand(images):
            return sum(v[:, e, None] * model.experts[e](images) for e in range(E))

        torch.testing.assert_close(module(attacked), by_hand(attacked))
        torch.testing.assert_close(gradient_of(module, attacked), gradient_of(by_hand, attacked))

    def test_the_expert_at_its_boundary_counts_most(self):
        model = Mixture([Linear(), Linear(), Linear()], gate())
        module = made(model, "re-weighted members").module
        logits = torch.zeros(E, B, K)
        logits[0, :, :] = 9 * torch.nn.functional.one_hot(module._classes, K)  # far from it
        logits[1, :, :] = 1e-3 * torch.nn.functional.one_hot(module._classes, K)
        logits[2, :, :] = -9 * torch.nn.functional.one_hot(module._classes, K)  # long over it
        v, prior = module.member_weights(logits), model.soft_gate_weights(IMAGES)
        assert ((v / prior).argmax(dim=1) == 1).all()


def test_an_image_does_not_depend_on_the_others():
    """Whatever batch a view is made for: equal bits."""
    for model in (Mixture(experts(), gate()), RoutedMixture(experts(), gate())):
        settings = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 4, "random_start": True}
        order = torch.tensor([4, 0, 3])
        for x in attack_views(model):
            whole = dwf.pgd(x.make(IMAGES), IMAGES, LABELS, **settings)
            part = dwf.pgd(
                x.make(IMAGES[order]), IMAGES[order], LABELS[order], sample_index=order, **settings
            )
            assert torch.equal(part, whole[order]), x.name


def test_a_single_expert_has_one_view():
    assert [x.name for x in attack_views(Mixture(experts(1), gate(1)))] == ["expert 0"]


def test_an_expert_may_be_planned():
    network = build_network("resnet6", num_classes=K, width=8, in_channels=3, seed=0)
    model = Mixture([network, network], gate(2)).eval()
    module = made(model, "expert 1")
    assert isinstance(module, PixelModel)
    torch.testing.assert_close(
        module.attack_plan(torch.float32)(IMAGES), model.expert(1)(IMAGES), rtol=1e-3, atol=1e-3
    )


def test_views_of_a_random_gate_have_no_chance():
    model = switched().eval()
    draws = torch.stack([model(IMAGES) for _ in range(8)])
    assert not torch.equal(draws.amax(dim=0), draws.amin(dim=0))
    state = torch.get_rng_state()
    for x in attack_views(model):
        module = x.make(IMAGES)
        assert torch.equal(module(IMAGES), module(IMAGES)), x.name
        assert torch.equal(module(IMAGES), x.make(IMAGES)(IMAGES)), x.name
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made(model, "unpermuted gate")(IMAGES), model.unpermuted()(IMAGES))
    torch.testing.assert_close(made(model, "uniform gate")(IMAGES), model.uniform()(IMAGES))


def test_somebodys_own_random_gate_is_asked_in_silence():
    class Random(Plain):
        def gate_weights(self, images):
            return torch.rand(len(images), E).softmax(dim=1)

    state = torch.get_rng_state()
    for x in attack_views(Random()):
        x.make(IMAGES)
        assert torch.equal(torch.get_rng_state(), state), x.name


class FirstPixel(nn.Module):
    """Sends an image to expert 1 if its first pixel is bright."""

    def forward(self, images):
        score = 400 * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-score, score], dim=1)


class Reader(nn.Module):
    """Class 1 if the pixels, weighted, are bright."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        score = (images[:, 0, 0] - 0.5) @ self.weight
        return torch.stack([-score, score], dim=1)


class DetachedGate(Mixture):
    """A sure gate, computed under no_grad whoever asks."""

    def gate_weights(self, images):
        with torch.no_grad():
            return super().gate_weights(images)

    def soft_gate_weights(self, images):
        return self.gate_weights(images)

    def forward(self, images):
        alone = torch.stack([expert(images) for expert in self.experts], dim=1)
        return (self.gate_weights(images).unsqueeze(2) * alone).sum(dim=1)


class HardGate(DetachedGate):
    """Chooses one expert, without a gradient; ``soft_gate_weights`` are the gate's."""

    def gate_weights(self, images):
        return one_hot_choice(super().gate_weights(images))

    def soft_gate_weights(self, images):
        return Mixture.soft_gate_weights(self, images)


class TestWhatAGateHides:
    """Images of three pixels: the first routes, expert 0 mostly reads the second, expert 1 all.

    Expert 0 is robust: no second pixel is within 0.15 of gray. What a box of radius epsilon
    holds is known: scores are linear and the route is a threshold.
    """

    EPSILON = 0.12
    PIXELS = torch.rand(400, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    PIXELS[..., 0] = 0.3 + 0.4 * PIXELS[..., 0]  # many a route can be flipped
    PIXELS[..., 1] = 0.7 * PIXELS[..., 1] + 0.3 * (PIXELS[..., 1] > 0.5)
    WEIGHTS = ([-0.5, 9.0, 0.0], [4.0, 2.0, 5.0])

    def model(self, kind):
        return kind([Reader(w) for w in self.WEIGHTS], FirstPixel())

    def attacked(self, model, target, labels, **options):
        found = dwf.pgd(
            target,
            self.PIXELS,
            labels,
            epsilon=self.EPSILON,
            step_size=0.02,
            num_steps=15,
            **{"random_start": True, **options},
        )
        assert (found - self.PIXELS).abs().max() <= self.EPSILON + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        return found, model(found).argmax(dim=1) != labels

    def failures(self, kind):
        """(baseline, {view: images it breaks}, labels); the unmodified model judges."""
        model = self.model(kind).eval()
        labels = model(self.PIXELS).argmax(dim=1)
        _, baseline = self.attacked(model, model, labels)
        broken = {
            x.name: self.attacked(model, x.make(self.PIXELS), labels)[1]
            for x in attack_views(model)
        }
        return baseline, broken, labels

    def truth(self, labels):
        """Which images a hard gate can lose: a route that is reached, and an expert wrong there."""
        broken = torch.zeros(len(labels), dtype=torch.bool)
        sign = 1 - 2 * labels  # the direction that hurts
        for route, weight in enumerate(self.WEIGHTS):
            low = (self.PIXELS[:, 0, 0] - self.EPSILON).clamp(0, 1)
            high = (self.PIXELS[:, 0, 0] + self.EPSILON).clamp(0, 1)
            if route == 0:
                high[:, 0] = high[:, 0].clamp(max=0.5)
            else:
                low[:, 0] = low[:, 0].clamp(min=0.5)
            reached = low[:, 0] <= high[:, 0]
            worst = torch.where((sign[:, None] * torch.tensor(weight)) > 0, high, low)
            score = (worst - 0.5) @ torch.tensor(weight)
            broken |= reached & (sign * score > -1e-4)
        return broken

    def test_hard_gate(self):
        """Of 187 images that fall, the model's own gradient finds 127."""
        baseline, broken, labels = self.failures(HardGate)
        union = baseline | torch.stack(list(broken.values())).any(dim=0)
        truth = self.truth(labels)
        assert not (union & ~truth).any()
        assert baseline.sum() < 0.75 * truth.sum()
        assert (broken["straight-through"] | baseline).sum() > 0.9 * truth.sum()
        assert (broken["expert 1"] & ~baseline).sum() > 20
        assert union.sum() > 0.97 * truth.sum()

    def test_detached_gate(self):
        """Without any gradient of the gate, what an expert does with the routing pixel helps."""
        baseline, broken, _ = self.failures(DetachedGate)
        assert (broken["expert 1"] & ~baseline).sum() > 20
        assert (broken["one-hot gate, runner-up"] & ~baseline).sum() > 20
        union = baseline | torch.stack(list(broken.values())).any(dim=0)
        assert union.sum() > baseline.sum() + 40

    def test_relay(self):
        """Routes flipped by the gate alone are a start for a run through the model."""
        model = self.model(HardGate).eval()
        labels = model(self.PIXELS).argmax(dim=1)
        _, baseline = self.attacked(model, model, labels)
        flipped, _ = self.attacked(model, made(model, "gate only", self.PIXELS), labels)
        relayed = flipped.clone()
        for _ in range(15):
            step = input_gradient(model, relayed, labels).sign()
            relayed = (relayed + 0.02 * step).clamp(
                self.PIXELS - self.EPSILON, self.PIXELS + self.EPSILON
            )
            relayed = relayed.clamp(0, 1)
        broken = model(relayed).argmax(dim=1) != labels
        assert (broken & ~baseline).sum() > 20
        assert not (broken & ~self.truth(labels)).any()


class TestBackwardPassOfAnother:
    def quantize(self, images):
        return torch.round(4 * images) / 4

    def test_value_of_one_gradient_of_the_other(self):
        value, gradient = Linear(seed=1), Linear(seed=2)
        module = with_backward_pass_of(value, gradient)
        assert torch.equal(module(IMAGES), value(IMAGES))
        torch.testing.assert_close(gradient_of(module), gradient_of(gradient), rtol=0, atol=0)

    def test_in_front_of_a_network(self):
        """Gradient of the network at the quantized image, as if quantization were the identity."""
        network = Linear()
        module = nn.Sequential(with_backward_pass_of(self.quantize, nn.Identity()), network)
        assert torch.equal(module(IMAGES), network(self.quantize(IMAGES)))
        curved = Mapped(network, lambda logits: logits.square())
        module = nn.Sequential(with_backward_pass_of(self.quantize, nn.Identity()), curved)
        expected = gradient_of(curved, self.quantize(IMAGES))
        torch.testing.assert_close(gradient_of(module), expected)

    def test_breaks_what_has_no_gradient(self):
        images, network = make_images(64, seed=2), Linear()
        hidden = Mapped(nn.Identity(), lambda x: network(self.quantize(x)))
        labels = hidden(images).argmax(dim=1)
        settings = {"epsilon": 0.15, "step_size": 0.03, "num_steps": 10, "random_start": False}
        module = nn.Sequential(with_backward_pass_of(self.quantize, nn.Identity()), network)
        plain = dwf.pgd(hidden, images, labels, **settings)
        assert torch.equal(plain, images)  # a zero gradient moves nothing
        found = dwf.pgd(module, images, labels, **settings)
        assert (hidden(found).argmax(dim=1) != labels).float().mean() > 0.9

    def test_what_has_no_autograd_at_all(self):
        def through_numpy(images):
            return torch.from_numpy(images.detach().numpy().round())

        module = with_backward_pass_of(through_numpy, nn.Identity())
        assert torch.equal(module(IMAGES), IMAGES.round())
        leaf = IMAGES.clone().requires_grad_()
        module(leaf).sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(IMAGES))

    def test_shapes_have_to_agree(self):
        module = with_backward_pass_of(Linear(), Linear(num_classes=1))
        with pytest.raises(ModelOutputError, match=r"backward_model: \[6, 1\].*\[6, 5\]"):
            module(IMAGES)
