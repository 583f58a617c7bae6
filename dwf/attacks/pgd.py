"""FGSM, PGD, BIM and MIM in the L-infinity and L2 norms, with restarts, targets and EoT.

    fgsm:  adversarial = clip(images + epsilon * sign(g(images)), 0, 1)
    pgd:   a_0 = images or a random point of the ball
           a_{k+1} = clip(a_k + step_size * sign(g(a_k)); images, epsilon), then clip to [0, 1]
    bim:   pgd from the image
    mim:   pgd along m_{k+1} = decay * m_k + g(a_k) / mean(|g(a_k)|) instead of g(a_k)

g is the gradient of the summed loss; in L2, g / |g|_2 stands for its sign. The state a_k is float32
whatever precision the model uses: rounded to bfloat16 it would leave the ball.

Sources: Goodfellow et al., arXiv:1412.6572; Kurakin et al., arXiv:1607.02533; Madry et al.,
arXiv:1706.06083; Dong et al., arXiv:1710.06081, whose L1 norm of g is a mean here: in the same
direction; eqs. (4)-(5) of arXiv:2512.20821, whose FGSM does not clip to [0, 1] (an attacked image
has to be an image, so ours does) and whose PGD takes no random start.

Random numbers: the start of restart r takes stream r of `moe_kernels.uniform_noise`.
"""

from __future__ import annotations

from torch import Tensor

from dwf.attacks.ascent import Ascent, RandomStart, ascend, gradient_at_images
from dwf.attacks.losses import Loss, Model
from dwf.attacks.setup import Setup, packed
from dwf.attacks.target import AttackReport, AttackTarget


def fgsm(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    norm: str = "linf",
    random_start: RandomStart = False,
    loss: str | Loss = "ce",
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """The fast gradient sign method: PGD with one step of length epsilon.

    In L2 the step follows the gradient itself, not its sign. Arguments, result and errors are as in
    :func:`pgd`.
    """
    setup = packed(Setup, locals())
    how = Ascent(step_size=setup.epsilon, num_steps=1, random_start=random_start, loss=loss)
    return setup.held(ascend(setup, how))


def pgd(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    random_start: RandomStart,
    norm: str = "linf",
    momentum: float = 0.0,
    num_restarts: int = 1,
    loss: str | Loss = "ce",
    targets: Tensor | None = None,
    start: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """Maximize a loss inside a ball around each image by projected gradient ascent.

    Takes exactly ``num_steps`` gradients and returns the image after the last one. With restarts,
    an image is done at the first start that fools the model, and otherwise keeps the start of
    highest loss, so "robust under restarts" means robust under each of them. Works under
    ``no_grad`` and autocast. The model and all random states are as before, even if it raises.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits [B, K]; or an AttackTarget, made of one for
            several attacks.
        images: [B, C, H, W] float in [0, 1]; any strides.
        labels: [B], any integer dtype.
        epsilon: radius in pixel units of [0, 1] (8/255, not 8); float or [B], one per image.
        step_size: length of a step, same units and norm; float or [B].
        num_steps: int, or integers [B]: an image stops moving after its own number of steps.
        random_start: start from a uniform point of the ball instead of the image; or "normal": from
            the image with normal noise of standard deviation 0.001, in the ball (TRADES).
        norm: "linf" or "l2", of the ball and of a step.
        momentum: decay of the sum of gradients that steps follow, see :func:`mim`; 0 for none.
        loss: "ce", "dlr", "margin", or ``loss(logits, labels)`` to [B]. With targets "dlr" is the
            targeted one.
        targets: [B], classes that the images are to be taken for: the attack minimizes the loss
            toward them instead, and an image is done when the model gives its target.
        start: [B, C, H, W], to go on from in place of a random start; moved into the ball.
        eot_samples: passes averaged for each gradient and verdict of a randomized model.
        bn_mode: "eval", or "train" for batch statistics; running statistics never change.
        seed: key of the start noise, and of a random model's draws.
        sample_index: [B] integers, counter of the start noise; 0..B-1 by default. The same seed and
            index give the same noise in any batch, on any number of GPUs.
        allow_probabilities: accept a model whose outputs are probabilities.
        report: to be filled with what ran and how fast; on a GPU this waits for the result.
    Returns:
        [B, C, H, W] float32 in [0, 1], within epsilon of ``images``, detached.
    Raises:
        ImageTypeError, ImageError, PixelRangeError, LabelError, ModelOutputError: with the first
            bad index, what was found and what is expected. LabelError also for a target that is the
            image's own label.
        ConfigError: for an impossible epsilon, step size, norm, loss or count.
    """
    setup = packed(Setup, locals())
    return setup.held(ascend(setup, packed(Ascent, locals())))


def bim(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    norm: str = "linf",
    loss: str | Loss = "ce",
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """The basic iterative method: PGD that starts from the image.

    It draws no random numbers. Arguments, result and errors are as in :func:`pgd`.
    """
    setup = packed(Setup, locals())
    return setup.held(ascend(setup, packed(Ascent, locals())))


def mim(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    num_steps: int | Tensor,
    norm: str = "linf",
    decay: float = 1.0,
    loss: str | Loss = "ce",
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    sample_index: Tensor | None = None,
    allow_probabilities: bool = False,
    report: AttackReport | None = None,
) -> Tensor:
    """The momentum iterative method: steps from the image along a running sum of the gradients.

    Each gradient is divided by the mean of its absolute values and added to ``decay`` times the sum
    before it; with ``decay`` 0 this is :func:`bim`. Its images transfer to other models more often
    than PGD's. Other arguments, result and errors are as in :func:`pgd`.
    """
    setup = packed(Setup, locals())
    return setup.held(ascend(setup, packed(Ascent, {**locals(), "momentum": decay})))


def input_gradient(
    model: Model | AttackTarget,
    images: Tensor,
    labels: Tensor,
    *,
    loss: str | Loss = "ce",
    targets: Tensor | None = None,
    eot_samples: int = 1,
    bn_mode: str = "eval",
    seed: int = 0,
    allow_probabilities: bool = False,
) -> Tensor:
    """Gradient of the summed loss at the images, [B, C, H, W] float32, leaving no trace.

    Arguments and errors are as in :func:`pgd`.
    """
    return gradient_at_images(packed(Setup, locals()), loss)
