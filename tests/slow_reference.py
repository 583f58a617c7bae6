"""The attacks of Divided We Fall as its paper writes them, for eval-mode models; slow and plain."""

import torch
import torch.nn.functional as F


def input_gradient(model, images, labels):
    leaf = images.clone().requires_grad_()
    F.cross_entropy(model(leaf), labels, reduction="sum").backward()
    return leaf.grad


def fgsm(model, images, labels, epsilon):
    """clamp(x + epsilon sign(g), 0, 1)"""
    return (images + epsilon * input_gradient(model, images, labels).sign()).clamp(0, 1)


def pgd(model, images, labels, epsilon, step_size, num_steps):
    """num_steps times a = clamp(clip(a + step_size sign(g(a)); x, epsilon), 0, 1), from a = x"""
    adversarial = images
    for _ in range(num_steps):
        moved = adversarial + step_size * input_gradient(model, adversarial, labels).sign()
        moved = torch.min(torch.max(moved, images - epsilon), images + epsilon)
        adversarial = moved.clamp(0, 1)
    return adversarial
