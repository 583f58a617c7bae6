"""Facts, attacks, batches and models that tests of defenses share."""

import torch
from torch import Tensor, nn

from dwf.config import AttackConfig
from dwf.data import Batch
from dwf.defenses import Crafter, ModelFacts

SHAPE = (1, 8, 8)
FACTS = ModelFacts(SHAPE, 10, (0.4,), (0.3,))
EPSILON, STEP_SIZE, NUM_STEPS = 0.1, 0.04, 3
ATTACK = AttackConfig(
    fgsm_epsilon=(EPSILON,), num_steps=(NUM_STEPS,), epsilon=EPSILON, step_size=STEP_SIZE
)


def make_crafter(attack: AttackConfig = ATTACK, seed: int = 0) -> Crafter:
    return Crafter(attack, seed, FACTS.mean, FACTS.std)


CRAFTER = make_crafter()


def make_batch(
    num_images: int, num_classes: int = FACTS.num_classes, *, seed: int = 1, first: int = 0
) -> Batch:
    """Random images and labels; ``first`` is the sample index of the first."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_images, *SHAPE, generator=generator)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    return Batch(images, labels, torch.arange(first, first + num_images))


def lived_in(model: nn.Module, noise: float = 0.0) -> nn.Module:
    """The model in train mode, with statistics that are not those of birth.

    So it matters which mode a pass uses. ``noise`` moves its parameters first.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if noise:
            for p in model.parameters():
                p.add_(noise * torch.randn(p.shape, generator=generator))
        for _ in range(3):
            images = torch.rand(16, *SHAPE, generator=generator)
            for module in model.modules():  # not train(), which some models keep from their parts
                module.training = True
            model(images)
    return model


def recorded(module: nn.Module) -> list[Tensor]:
    """The images that a module is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


class Spy(nn.Module):
    """Passes images on, and remembers them and the mode of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[Tensor, bool]] = []

    def forward(self, images: Tensor, **options: bool) -> Tensor:
        self.seen.append((images.detach().clone(), self.model.training))
        return self.model(images, **options)


def assert_same_gradients(model, expected, names=None, *, rtol=1e-3, atol=1e-5) -> None:
    """Equal gradients of all parameters, or of those whose name ``names`` accepts."""
    for name, p in model.named_parameters():
        if names is None or names(name):
            theirs = expected.get_parameter(name).grad
            assert (p.grad is None) == (theirs is None), name
            if theirs is not None:
                torch.testing.assert_close(p.grad, theirs, rtol=rtol, atol=atol, msg=name)


def assert_same_statistics(model, expected, *, rtol=1e-5, atol=1e-6) -> None:
    """Equal buffers: running statistics moved alike."""
    for name, buffer in model.named_buffers():
        theirs = expected.get_buffer(name)
        torch.testing.assert_close(buffer, theirs, rtol=rtol, atol=atol, msg=name)
