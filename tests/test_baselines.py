"""TRADES, MART, AWP, Free-AT, Fast-AT: against numbers by hand and the formulas written out."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_defenses import (
    ATTACK,
    EPSILON,
    FACTS,
    NUM_STEPS,
    STEP_SIZE,
    assert_same_gradients,
    lived_in,
    make_batch,
    make_crafter,
    recorded,
)
from small_runs import assert_same_run, rows, small_config, train_interrupted
from torch import nn

import dwf
import moe_kernels
from dwf import checkpoint
from dwf.checks import ConfigError
from dwf.config import Config, PhaseConfig, apply_overrides, from_dict
from dwf.defenses import adversarial_training, get, multi_step
from dwf.defenses.multi_step import (
    AwpOptions,
    MartOptions,
    TradesAwpOptions,
    TradesOptions,
    adversarial_objective,
    mart_loss,
    mart_objective,
    perturbed,
    trades_loss,
    trades_objective,
    weight_perturbation,
)
from dwf.defenses.single_step import FastAtOptions, FreeAtOptions
from dwf.presets import baselines, single
from dwf.training import train
from dwf.training.optimizer import learning_rate_factor

B, K, SEED = 6, FACTS.num_classes, 5
CRAFTER = make_crafter(replace(ATTACK, random_start=True), SEED)
MULTI_STEP = ("madry-at", "trades", "mart", "awp", "trades-awp")
DEFENSES = (*MULTI_STEP, "free-at", "fast-at")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    """Statistics are not those of birth, so that it matters which mode a pass uses."""
    return lived_in(adversarial_training.build(small(), FACTS))


@pytest.fixture
def batch():
    return make_batch(B)


def small(defense="madry-at", *overrides):
    return apply_overrides(single(small_config(), defense), overrides)


def step_of(defense, model, *overrides):
    (phase,) = get(defense).phases(model, small(defense, *overrides))
    assert phase.module is model
    return phase.step


def logits_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, generator=generator, dtype=torch.float64) * 2


def slow_loss(defense, clean, attacked, labels, beta):
    """The formulas, image by image and class by class, as Python numbers."""
    total = 0.0
    for b, y in enumerate(labels.tolist()):
        p = [math.exp(z) for z in clean[b].tolist()]
        q = [math.exp(z) for z in attacked[b].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl = sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p)))
        if defense == "trades":
            total += -math.log(p[y]) + beta * kl
        else:
            wrong = max(q[k] for k in range(len(q)) if k != y)
            total += -math.log(q[y]) - math.log(1.0001 - wrong) + beta * kl * (1 - p[y])
    return total / len(labels)


LOSSES = {"trades": trades_loss, "mart": mart_loss}


class TestLosses:
    CLEAN = torch.tensor([[0.5, 0.25, 0.25]]).log()
    ATTACKED = torch.tensor([[0.25, 0.25, 0.5]]).log()

    def test_by_hand(self):
        """KL = 1/2 log 2 + 0 + 1/4 log 1/2 = 1/4 log 2, with y = 0."""
        y = torch.tensor([0])
        kl = 0.25 * math.log(2)
        found = trades_loss(self.CLEAN, self.ATTACKED, y, beta=6.0)
        assert found.item() == pytest.approx(math.log(2) + 6 * kl, rel=1e-6)
        found = mart_loss(self.CLEAN, self.ATTACKED, y, beta=5.0)
        boosted = math.log(4) - math.log(1.0001 - 0.5)
        assert found.item() == pytest.approx(boosted + 5 * kl * 0.5, rel=1e-6)

    def test_the_strongest_wrong_class_is_not_the_right_one(self):
        """With y = 2, the most likely of all, the strongest wrong one has 1/4."""
        found = mart_loss(self.CLEAN, self.ATTACKED, torch.tensor([2]), beta=0.0)
        assert found.item() == pytest.approx(math.log(2) - math.log(1.0001 - 0.25), rel=1e-6)

    @pytest.mark.parametrize("defense", LOSSES)
    @pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
    def test_against_the_loop(self, defense, beta, batch):
        clean, attacked = logits_of(2), logits_of(3)
        found = LOSSES[defense](clean, attacked, batch.labels, beta=beta)
        expected = slow_loss(defense, clean, attacked, batch.labels, beta)
        assert found.item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("defense", LOSSES)
    def test_gradients_are_finite_differences(self, defense, batch):
        leaves = [logits_of(seed).requires_grad_() for seed in (2, 3)]

        def loss(clean, attacked):
            return LOSSES[defense](clean, attacked, batch.labels, beta=2.5)

        assert torch.autograd.gradcheck(loss, leaves)

    def test_trades_without_beta_is_cross_entropy(self, batch):
        clean, attacked = logits_of(2), logits_of(3)
        found = trades_loss(clean, attacked, batch.labels, beta=0.0)
        assert torch.equal(found, F.cross_entropy(clean, batch.labels))

    @pytest.mark.parametrize("defense", LOSSES)
    @pytest.mark.parametrize("label", [0, 1])
    def test_certain_networks(self, defense, label):
        """Score gaps of 300: probabilities of exactly 0 and 1, and still a gradient."""
        leaves = [torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = LOSSES[defense](*leaves, torch.tensor([label]), beta=5.0)
        loss.backward()
        assert loss.isfinite()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


def noise(kind):
    u = moe_kernels.uniform_noise(SEED, torch.arange(B), (1, 8, 8))
    if kind == "uniform":
        return (2 * u - 1) * EPSILON
    return 0.001 * math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 2e-7, 1 - 2e-7))


def slow_attack(model, batch, kind, loss, step_size=STEP_SIZE, num_steps=NUM_STEPS):
    model = copy.deepcopy(model).eval()
    x = batch.images
    adversarial = (x + noise(kind)).clamp(0, 1)
    for _ in range(num_steps):
        leaf = adversarial.clone().requires_grad_()
        loss(model, leaf).backward()
        moved = adversarial + step_size * leaf.grad.sign()
        adversarial = torch.min(torch.max(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    return adversarial


def slow_images(defense, model, batch):
    """The attacked images of a defense, from its definition."""

    def cross_entropy(network, leaf):
        return F.cross_entropy(network(leaf), batch.labels, reduction="sum")

    def divergence(network, leaf):
        p, q = network(batch.images).softmax(dim=1).detach(), network(leaf).softmax(dim=1)
        return (p * (p.log() - q.log())).sum()

    if defense in ("trades", "trades-awp"):
        return slow_attack(model, batch, "normal", divergence)
    if defense == "mart":
        return slow_attack(model, batch, "normal", cross_entropy)
    if defense == "fast-at":
        return slow_attack(model, batch, "uniform", cross_entropy, 10 / 255, 1)
    return slow_attack(model, batch, "uniform", cross_entropy)


@pytest.mark.usefixtures("reference")
class TestAttacks:
    @pytest.mark.parametrize("defense", [*MULTI_STEP, "fast-at"])
    def test_against_the_loop(self, defense, model, batch):
        expected = slow_images(defense, model, batch)
        seen = recorded(model.train())
        step_of(defense, model)(model, model, batch, CRAFTER)
        found = seen[-1]
        # the sign of a gradient that is zero but for rounding is anybody's guess
        assert ((found - expected).abs() > 1e-5).float().mean() < 0.01
        assert (found - batch.images).abs().max() <= EPSILON + 1e-6
        assert not torch.equal(found, batch.images)

    def test_crafter_logits_are_those_of_eval_mode(self, model, batch):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        found = CRAFTER.logits(model.train(), batch)
        assert model.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not found.requires_grad
        torch.testing.assert_close(found, model.eval()(batch.images).detach())


def test_trades_images_by_a_plan_in_parts(model):
    """A plan that takes a batch in parts gives each its own rows of clean logits."""
    batch = make_batch(140, seed=4)  # more than plans prefer at once
    crafter = replace(CRAFTER, plan_dtype=torch.float32)
    found = multi_step.trades_attack(crafter, model.eval(), batch)
    with moe_kernels.implementation("reference"):
        expected = multi_step.trades_attack(crafter, model, batch)
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.02


def slow_objective(defense, network, batch, adversarial):
    """Loss of the objective by separate passes, over plain softmax."""
    if defense in ("madry-at", "awp", "fast-at"):
        return F.cross_entropy(network(adversarial), batch.labels)
    p, q = network(batch.images).softmax(dim=1), network(adversarial).softmax(dim=1)
    kl = (p * (p / q).log()).sum(dim=1)
    index = torch.arange(len(p))
    if defense == "mart":
        others = q.clone()
        others[index, batch.labels] = 0
        boosted = -q[index, batch.labels].log() - (1.0001 - others.amax(dim=1)).log()
        return (boosted + 5 * kl * (1 - p[index, batch.labels])).mean()
    return -p[index, batch.labels].log().mean() + 6 * kl.mean()


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("defense", ["madry-at", "trades", "mart"])
def test_step(defense, model, batch):
    """Loss, gradients, running statistics and rows of a step."""
    expected = copy.deepcopy(model).train()
    step, seen = step_of(defense, model.train()), recorded(model)
    result = step(model, model, batch, CRAFTER)
    result.loss.backward()
    loss = slow_objective(defense, expected, batch, seen[-1])
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-5)
    assert_same_gradients(model, expected, atol=1e-4)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name), msg=name)
    num_clean = 0 if defense == "madry-at" else B
    assert (result.num_clean, len(result.logits)) == (num_clean, num_clean + B)
    assert torch.equal(result.labels, batch.labels.repeat(2)[-len(result.logits) :])


OBJECTIVES = {
    "awp": adversarial_objective,
    "trades-awp": lambda *arguments: trades_objective(*arguments, beta=6.0),
    "mart": lambda *arguments: mart_objective(*arguments, beta=5.0),
}


class TestAwp:
    """In float64, where the copy that the published code steps and subtracts does not round."""

    GAMMA = 0.3

    @pytest.fixture
    def model(self, model):
        return model.double().train()

    @pytest.fixture
    def batch(self, batch):
        return batch._replace(images=batch.images.double())

    @pytest.fixture
    def adversarial(self, batch):
        return (batch.images + 0.1 * make_batch(B, seed=7).images.sub(0.5).sign()).clamp(0, 1)

    def published(self, defense, model, batch, adversarial):
        """w + v as the paper computes it: the difference that one SGD step of a copy makes."""
        proxy = copy.deepcopy(model)
        (-slow_objective(defense, proxy, batch, adversarial)).backward()
        torch.optim.SGD(proxy.parameters(), lr=0.01).step()
        result = copy.deepcopy(model)
        with torch.no_grad():
            for name, w in result.named_parameters():
                if w.ndim > 1:
                    d = proxy.get_parameter(name) - w
                    w.add_(self.GAMMA * w.norm() / d.norm() * d)
        return result

    @pytest.mark.parametrize("defense", ["awp", "trades-awp"])
    def test_against_the_papers_procedure(self, defense, model, batch, adversarial):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        there = self.published(defense, model, batch, adversarial)
        loss = slow_objective(defense, there, batch, adversarial)
        loss.backward()

        objective = OBJECTIVES[defense]
        v = weight_perturbation(
            model, lambda network: objective(network, batch, adversarial).loss, self.GAMMA
        )
        assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
        result = objective(perturbed(model, model, v), batch, adversarial)
        result.loss.backward()
        # losses and logits are of float32, whatever the network
        torch.testing.assert_close(result.loss.double(), loss.double(), rtol=1e-5, atol=1e-6)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name
            theirs = there.get_parameter(name).grad
            torch.testing.assert_close(p.grad, theirs, rtol=1e-3, atol=1e-5, msg=name)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, there.get_buffer(name), msg=name)

    def test_length_and_direction(self, model, batch, adversarial):
        def loss(network):
            return adversarial_objective(network, batch, adversarial).loss

        v = weight_perturbation(model, loss, self.GAMMA)
        matrices = {name: w for name, w in model.named_parameters() if w.ndim > 1}
        assert v.keys() == matrices.keys()
        assert any(name.endswith("bias") for name, _ in model.named_parameters())
        loss(model).backward()
        for name, w in matrices.items():
            assert v[name].norm().item() == pytest.approx(self.GAMMA * w.norm().item(), rel=1e-9)
            assert F.cosine_similarity(v[name].flatten(), w.grad.flatten(), dim=0) > 1 - 1e-9
            assert not v[name].requires_grad

    def test_a_dead_gradient_moves_nothing(self, model):
        v = weight_perturbation(
            model, lambda network: 0 * network(torch.rand(4, 1, 8, 8).double()).sum(), 1.0
        )
        assert all(not x.any() for x in v.values())

    @pytest.mark.parametrize("defense", OBJECTIVES)
    def test_gradient_is_that_at_the_perturbed_weights(self, defense, batch, adversarial):
        """Central differences in float64: L(w + v + h u) - L(w + v - h u) over 2 h."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, K)).double()
        loss = {
            "awp": lambda n: F.cross_entropy(n(adversarial), batch.labels),
            "trades-awp": lambda n: trades_loss(
                n(batch.images), n(adversarial), batch.labels, beta=6.0
            ),
            "mart": lambda n: mart_loss(n(batch.images), n(adversarial), batch.labels, beta=5.0),
        }[defense]
        v = weight_perturbation(model, loss, self.GAMMA)
        loss(perturbed(model, model, v)).backward()
        moved = copy.deepcopy(model)
        h = 1e-6
        with torch.no_grad():
            for name, w in moved.named_parameters():
                w.add_(v.get(name, torch.zeros_like(w)))
        for name, w in moved.named_parameters():
            u = torch.randn_like(w)
            with torch.no_grad():
                w.add_(h * u)
                above = loss(moved)
                w.sub_(2 * h * u)
                below = loss(moved)
                w.add_(h * u)
            slope = ((above - below) / (2 * h)).item()
            found = (model.get_parameter(name).grad * u).sum().item()
            assert found == pytest.approx(slope, rel=1e-5, abs=1e-8), name

    @pytest.mark.parametrize(("defense", "like"), [("awp", "madry-at"), ("trades-awp", "trades")])
    def test_warm_up(self, defense, like, model, batch):
        """Before it ends AWP is what it is based on, afterwards not."""
        model, batch = model.float(), batch._replace(images=batch.images.float())
        losses = []
        for name, epoch in ((like, 0), (defense, 2), (defense, 3)):
            options = ["options.warmup_epochs=3"] if name == defense else []
            own, crafter = copy.deepcopy(model), replace(CRAFTER, epoch=epoch)
            losses.append(step_of(name, own, *options)(own, own, batch, crafter).loss.item())
        plain, before, after = losses
        assert plain == before
        assert after > before  # weights were moved uphill


@pytest.mark.usefixtures("reference")
def test_warm_up_counts_epochs_of_the_run(tmp_path, monkeypatch):
    """Four epochs of four steps, two of them warm-up: eight steps perturb the weights."""
    calls = []
    monkeypatch.setattr(
        multi_step,
        "weight_perturbation",
        lambda *arguments: calls.append(1) or weight_perturbation(*arguments),
    )
    config = small("awp", "options.warmup_epochs=2", "attack.num_steps=1", "validate_every=0")
    train(config, tmp_path / "run", quiet=True)
    assert len(calls) == 8


def slow_free(model, batches, replays, learning_rate):
    """Free-AT as written, with plain SGD; returns delta, and the images of each pass."""
    delta = torch.zeros_like(batches[0].images)
    seen = []
    for images, labels, *_ in batches:
        for _ in range(replays):
            x = (images + delta).clamp(0, 1).requires_grad_()
            seen.append(x.detach().clone())
            model.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            start = x.detach() - images
            delta = (start + EPSILON * x.grad.sign()).clamp(-EPSILON, EPSILON)
            delta = (images + delta).clamp(0, 1) - images
            with torch.no_grad():
                for p in model.parameters():
                    p -= learning_rate * p.grad
    return delta, seen


class TestFree:
    @pytest.mark.parametrize("replays", [1, 3])
    def test_against_the_loop(self, replays, model):
        """Two batches: delta is carried over replays and over batches; one backward for both."""
        batches = [make_batch(B, seed=1), make_batch(B, seed=2)]
        expected = copy.deepcopy(model).train()
        delta, images = slow_free(expected, batches, replays, 0.1)
        (phase,) = get("free-at").phases(
            model.train(), small("free-at", f"options.replays={replays}")
        )
        assert len(phase.updates) == replays
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), recorded(model)
        for batch in batches:
            for update in phase.updates:
                optimizer.zero_grad()
                result = update.step(model, model, batch, CRAFTER)
                assert (result.num_clean, len(result.logits)) == (0, B)
                result.loss.backward()
                optimizer.step()
        assert len(seen) == 2 * replays
        for ours, theirs in zip(seen, images, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(phase.state["delta"], delta, rtol=0, atol=1e-6)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, expected.get_parameter(name), msg=name)

    def test_budget(self, model):
        """However long it is carried, delta stays in the ball and the images in [0, 1]."""
        (phase,) = get("free-at").phases(model.train(), small("free-at"))
        seen = recorded(model)
        for seed in range(6):
            batch = make_batch(B, seed=seed)
            phase.updates[0].step(model, model, batch, CRAFTER).loss.backward()
            assert (seen[-1] - batch.images).abs().max() <= EPSILON + 1e-6
            assert seen[-1].min() >= 0
            assert seen[-1].max() <= 1
        assert phase.state["delta"].abs().max() == pytest.approx(EPSILON, rel=1e-5)

    def test_a_phase_of_its_own_starts_at_zero(self, model, batch):
        for _ in range(2):
            (phase,) = get("free-at").phases(model.train(), small("free-at"))
            seen = recorded(model)
            phase.updates[0].step(model, model, batch, CRAFTER).loss.backward()
            assert torch.equal(seen[0], batch.images)

    def test_one_process_only(self, tmp_path):
        with pytest.raises(ConfigError, match="free-at keeps tensors from batch to batch"):
            train(small("free-at", "pretrain.accumulation=2"), tmp_path / "run", quiet=True)

    def test_pixels_only(self, model):
        with pytest.raises(ConfigError, match="protocol 'paper-compat'"):
            get("free-at").phases(model, small("free-at", "attack.protocol=paper-compat"))


class TestRuns:
    @pytest.mark.slow
    @pytest.mark.parametrize("defense", DEFENSES)
    def test_learns(self, defense, tmp_path):
        settings = ["pretrain.num_epochs=12", "log_every=12", "attack.num_steps=2"]
        settings += ["model.width=4", "validate_every=0", "checkpoint_every=100"]
        options = {"free-at": ["options.replays=2"], "trades-awp": ["options.warmup_epochs=1"]}
        train(small(defense, *settings, *options.get(defense, [])), tmp_path / "run", quiet=True)
        losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
        assert len(losses) == 4
        assert losses[-1] < 0.95 * losses[0]
        model = dwf.load(tmp_path / "run")
        assert model(torch.rand(2, 1, 8, 8)).shape == (2, K)

    @pytest.mark.slow
    @pytest.mark.parametrize("defense", ["free-at", "trades-awp"])
    def test_resume(self, defense, tmp_path):
        """Crashed at three steps, of which trades-awp takes two before its warm-up ends."""
        options = {"free-at": ["options.replays=2"], "trades-awp": ["options.warmup_epochs=2"]}
        config = small(defense, "attack.num_steps=2", *options.get(defense, []))
        train(config, tmp_path / "whole", quiet=True)
        train_interrupted(config, tmp_path / "parts", 3, 7, 12)
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
        if defense == "free-at":
            tensors = checkpoint.load(tmp_path / "whole" / "checkpoints" / "step-00000014")[0]
            assert tensors["optimizer"]["kept/delta"].shape == (16, 1, 8, 8)
            assert tensors["optimizer"]["kept/delta"].any()


class TestSettings:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TradesOptions(beta=-1.0), r"options\.beta"),
            (lambda: MartOptions(beta=math.nan), r"options\.beta"),
            (lambda: AwpOptions(gamma=0.0), r"options\.gamma"),
            (lambda: AwpOptions(warmup_epochs=-1), r"options\.warmup_epochs"),
            (lambda: TradesAwpOptions(gamma=-0.1), r"options\.gamma"),
            (lambda: TradesAwpOptions(beta=-0.1), r"options\.beta"),
            (lambda: FreeAtOptions(replays=0), r"options\.replays"),
            (lambda: FastAtOptions(step_size=0.0), r"options\.step_size"),
            (lambda: small("trades", "options.bta=1"), r"did you mean options\.beta"),
            (lambda: small("madry-at", "options.beta=1"), "options has no parts|no such phase"),
            (lambda: Config("x", "mart", options=TradesOptions()), "MartOptions"),
        ],
    )
    def test_impossible(self, make, message):
        with pytest.raises(ConfigError, match=message):
            make()

    @pytest.mark.parametrize("defense", DEFENSES)
    def test_no_schedule(self, defense, model):
        config = replace(small(defense), pretrain=None, joint=PhaseConfig())
        with pytest.raises(ConfigError, match=f"schedule of {defense}"):
            get(defense).phases(model, config)

    @pytest.mark.parametrize("make", baselines.MAKERS)
    def test_presets_are_complete(self, make):
        config = make()
        assert from_dict(config.to_dict()) == config
        assert dwf.presets.find(config.preset) == config
        assert config.preset.startswith(config.defense.replace("-", "_"))
        assert config.joint is None
        assert config.attack.num_steps in ((10,), (7,))

    def test_the_papers_numbers(self):
        trades = baselines.trades_cifar10()
        assert (trades.attack.epsilon, trades.attack.step_size) == (0.031, 0.007)
        assert trades.pretrain.weight_decay == 2e-4
        assert trades.options == TradesOptions(6.0)
        mart = baselines.mart_cifar10()
        assert (mart.pretrain.learning_rate, mart.pretrain.weight_decay) == (0.01, 3.5e-3)
        assert baselines.awp_cifar10().options == AwpOptions(0.01, 0)
        assert baselines.trades_awp_cifar10().options == TradesAwpOptions(0.005, 10, 6.0)
        assert baselines.free_at_cifar10().options == FreeAtOptions(8)
        fast = baselines.fast_at_cifar10()
        assert fast.options == FastAtOptions(10 / 255)
        assert (fast.attack.epsilon, fast.attack.step_size) == (8 / 255, 2 / 255)

    @pytest.mark.parametrize(
        ("make", "factors"),
        [
            (baselines.madry_at_cifar10, {0: 1, 99: 1, 100: 0.1, 149: 0.1, 150: 0.01, 199: 0.01}),
            (baselines.trades_cifar10, {0: 1, 73: 1, 74: 0.1, 75: 0.1}),
            (baselines.mart_cifar10, {73: 1, 74: 0.1, 88: 0.1, 89: 0.01, 98: 0.01, 99: 0.001}),
            (baselines.trades_awp_cifar10, {98: 1, 99: 0.1, 148: 0.1, 149: 0.01}),
            (baselines.fast_at_cifar10, {0: 0, 3: 0.4, 7.5: 1, 12: 0.4, 15: 0}),
            (baselines.free_at_cifar10, {0: 0, 2: 0.4, 5: 1, 10: 0}),
        ],
    )
    def test_rates_by_epoch(self, make, factors):
        """Epochs from 0; the codes count from 1."""
        schedule = make().pretrain
        steps_per_epoch = 383
        for epoch, factor in factors.items():
            t = epoch * steps_per_epoch / (schedule.num_epochs * steps_per_epoch)
            assert learning_rate_factor(schedule, t) == pytest.approx(factor), epoch
