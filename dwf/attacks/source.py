"""Give an attack its gradients and verdicts.

The gradients of a `GradientSource` may come from a plan in bfloat16 or run under the caller's
autocast; which images are fooled is decided by the model itself in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

import moe_kernels
from dwf.attacks.autograd import Autograd
from dwf.attacks.door import about_to_call, ask
from dwf.attacks.losses import Loss, Model, TargetLoss, name_of
from dwf.attacks.target import AttackPlan, AttackReport
from dwf.checks import check_labels, check_logits
from moe_kernels import CannotPlan, oracle
from moe_kernels.graphs import Graphs

log = logging.getLogger("dwf")

T = TypeVar("T")


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two masks [B]: correct (all logits finite, highest at the label), and all logits finite."""
    finite = logits.isfinite().all(dim=1)
    return (logits.argmax(dim=1) == labels) & finite, finite


def voted(model: Model, images: Tensor, num_votes: int = 1) -> Tensor:
    """Mean logits [B, K] over ``num_votes`` passes; their argmax is the prediction."""
    logits: Tensor = ask(model, images)
    for _ in range(num_votes - 1):
        logits = logits + ask(model, images)
    return logits if num_votes == 1 else logits / num_votes


@contextlib.contextmanager
def float32_verdicts(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off inside the block, so that float32 models compute in float32."""
    with torch.autocast(device.type, enabled=False), oracle.without_tf32():
        yield


# One step of an attack, `step(source, *state, *given)`, changes the tensors of `state` in place. It
# is a frozen dataclass without tensors, so equal steps do the same.
Step = Callable[..., None]


@dataclass(repr=False)
class GradientSource:
    """Gradients of a summed loss with respect to images, logits and verdicts, counted.

    With ``eot_samples`` S each is the mean over S passes, all with fresh draws of the model's own
    randomness (expectation over transformation, Athalye et al., arXiv:1802.00420); a plan that has
    none needs one pass. The first pass checks what only a pass can show: that the model returns
    logits, and that labels name classes.

    Attributes:
        model: decides which images are fooled.
        loss: maps logits [B, K] and labels [B] to one loss for each image [B].
        eot_samples: passes averaged for each result.
        allow_probabilities: accept a model whose outputs are probabilities.
        plan: where gradients come from; autograd through the model if None.
        reason: why there is no plan.
        dtype: of autograd's activations on a GPU; None is the model's own.
        num_forwards, num_backwards: image-passes so far by kind; a gradient is one of each, for
            each image and sample.
        checked: whether the first pass was made.
    """

    model: Model
    loss: Loss
    eot_samples: int = 1
    allow_probabilities: bool = False
    plan: AttackPlan | None = None
    reason: str | None = None
    dtype: torch.dtype | None = None
    num_forwards: int = 0
    num_backwards: int = 0
    checked: bool = False

    def __post_init__(self) -> None:
        self._plan = self.plan or Autograd(self.model, self.dtype)
        self._num_samples = 1 if self._plan.deterministic else self.eot_samples
        self._graphs: Graphs | None = None  # of the newest loop
        self._token = object()  # equal to no other source's

    def __repr__(self) -> str:
        return f"GradientSource({self._plan.back_end}, {self.passes} image-passes)"

    @property
    def passes(self) -> int:
        """Gradients so far, one for each image and sample."""
        return self.num_backwards

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient [B, C, H, W] float32 of ``sum_b loss_b``, detached."""
        return self.gradient_and_logits(images, labels)[0]

    def gradient_and_logits(
        self, images: Tensor, labels: Tensor, loss: Loss | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gradient [B, C, H, W] and the logits [B, K], float32, means over samples.

        Args:
            loss: in place of the source's own. A TargetLoss has a row for each of these images.
        """
        loss = loss or self.loss
        if not _is_ours(loss):
            about_to_call()  # it may call the model
        rows = _rows(loss, labels)
        total: tuple[Tensor, Tensor] | None = None
        for _ in range(self._num_samples):
            grad, logits = self._asked(
                lambda plan: plan.gradient(images, rows, self._plan_loss(loss))
            )
            self._count_gradient(len(images))
            logits = logits.float()
            total = (grad, logits) if total is None else (total[0] + grad, total[1] + logits)
        assert total is not None
        if self._num_samples == 1:
            return total
        return total[0] / self._num_samples, total[1] / self._num_samples

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, K] float32 as the search sees them: those of the plan, if there is one."""
        with torch.no_grad():
            return self._mean_logits(lambda x: self._asked(lambda plan: plan(x)), images)

    def fooled(self, images: Tensor, labels: Tensor) -> Tensor:
        """[B] bool: the model itself, in float32, errs, or gives logits that are not finite.

        A random model is judged by its mean logits over ``eot_samples`` passes.
        """
        return ~judge(self.verdict_logits(images, labels), labels)[0]

    def verdict_logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, K] of the model itself, in float32; verdicts are made from these."""
        with torch.no_grad(), float32_verdicts(images.device):
            logits = self._mean_logits(lambda x: ask(self.model, x), images)
        if not self.checked:
            check_labels(labels, len(labels), logits.shape[1])
            self.checked = True
        return logits

    @contextlib.contextmanager
    def loop(
        self, step: Step, state: Sequence[Tensor], given: Sequence[Tensor] = ()
    ) -> Iterator[tuple[Callable[[], object], tuple[Tensor, ...]]]:
        """A step of an attack, to be taken many times: on a GPU one CUDA graph from the second on.

        A step asks the model by `gradient_and_logits` and `logits`, and never waits for the device.

        Args:
            step: equal steps share a graph, also those of another attack on the same model.
            state: tensors that a step changes in place.
            given: tensors that it reads, and that nobody changes inside the block.
        Yields:
            A function that takes the next step, and the tensors that it changes: on a GPU copies of
            ``state``. After the block the results are in ``state``.
        """
        device = state[0].device
        self._graphs = self._plan.graphs if device.type == "cuda" else None
        with torch.no_grad(), _without_cached_casts(device):
            if self._graphs is None:
                yield functools.partial(step, self, *state, *given), tuple(state)
                return

            def counted(*tensors: Tensor) -> tuple[int, int]:
                before = self.num_forwards, self.num_backwards
                step(self, *tensors)
                return self.num_forwards - before[0], self.num_backwards - before[1]

            # code that is not ours may do something else in the next attack
            name = step if _is_ours(step) else (step, self._token)
            key = name, self._num_samples, self.dtype, _modes(device)
            with self._graphs.loop(key, counted, state, given) as (run, own):
                yield functools.partial(self._count, run), own

    def _count(self, run: Callable[..., tuple[int, int]]) -> None:
        """Run a step; a graph makes its passes without counting them."""
        before = self.num_forwards, self.num_backwards
        # the first pass checks logits and labels, which a graph does not
        forwards, backwards = run(eager=not self.checked)
        self.num_forwards = before[0] + forwards
        self.num_backwards = before[1] + backwards

    @contextlib.contextmanager
    def reported(self, report: AttackReport | None, images: Tensor) -> Iterator[None]:
        """Fill a report, if one is wanted, with what happens inside the block."""
        if report is None:
            yield
            return
        _wait(images.device)
        before = self.num_forwards, self.num_backwards
        started = time.perf_counter()
        yield
        _wait(images.device)
        report.seconds = time.perf_counter() - started
        report.num_forwards = self.num_forwards - before[0]
        report.num_backwards = self.num_backwards - before[1]
        report.passes = report.num_backwards
        report.num_images = len(images)
        report.back_end = self._plan.back_end
        report.graph = Graphs().status if self._graphs is None else self._graphs.status
        report.reason = self.reason
        report.gflop_per_image = self._plan.gflop_per_image(images.shape[1:])

    def _asked(self, question: Callable[[AttackPlan], T]) -> T:
        """Ask the plan; where it cannot answer any more, the model by autograd from now on."""
        try:
            return question(self._plan)
        except CannotPlan as error:
            log.warning("%s is attacked by autograd: %s", type(self.model).__name__, error)
            if self._graphs is not None:
                self._graphs.forget()
            self.reason, self._plan = str(error), Autograd(self.model, self.dtype)
            self._num_samples = self.eot_samples
            return question(self._plan)

    def _mean_logits(self, function: Model, images: Tensor) -> Tensor:
        total: Tensor | None = None
        for _ in range(self._num_samples):
            logits = function(images)
            self.num_forwards += len(images)
            if not self.checked:
                allowed = self.allow_probabilities
                check_logits(logits, len(images), allow_probabilities=allowed)
            total = logits.float() if total is None else total + logits.float()
        assert total is not None
        return total if self._num_samples == 1 else total / self._num_samples

    def _count_gradient(self, num_images: int) -> None:
        self.num_forwards += num_images
        self.num_backwards += num_images

    def _plan_loss(self, loss: Loss) -> Loss | str:
        """The loss to give to the plan; at the first pass one that also checks the logits."""
        if not self.checked:
            return functools.partial(self._checking_loss, loss)
        if isinstance(loss, TargetLoss):
            return loss.function
        return "ce" if name_of(loss) == "ce" else loss

    def _checking_loss(self, loss: Loss, logits: Tensor, rows: Tensor) -> Tensor:
        check_logits(logits, len(rows), allow_probabilities=self.allow_probabilities)
        if not isinstance(loss, TargetLoss):
            check_labels(rows, len(rows), logits.shape[1])
        elif loss.are_classes:
            check_labels(rows.flatten(), rows.numel(), logits.shape[1], name="targets")
        self.checked = True
        return loss.function(logits, rows) if isinstance(loss, TargetLoss) else loss(logits, rows)


def with_company(open_: Tensor) -> Tensor:
    """The rows [B] to go on with, a mask: those still open, and on a GPU some that are not.

    Each new batch size costs a GPU kernels and a graph. So there the number of rows is one of
    1, 2, 3, 4, 6, 8, 12, 16, ..., as far as there are rows. Whoever goes on with rows that are not
    open has to ignore what becomes of them.
    """
    if not open_.is_cuda:
        return open_
    count = int(open_.sum())
    if count == 0:
        return open_
    power = 1 << (count - 1).bit_length()  # the next power of 2
    size = 3 * power // 4 if 4 * count <= 3 * power and power >= 4 else power
    fill = (~open_).cumsum(dim=0) <= size - count
    return open_ | fill


def _rows(loss: Loss, labels: Tensor) -> Tensor:
    """The second argument of the loss, [B, ...]: its own targets if it has some, else labels."""
    return loss.targets if isinstance(loss, TargetLoss) else labels


def _is_ours(thing: Any) -> bool:
    """Whether equal objects do the same, today and in the next attack: our code and numbers do."""
    if isinstance(thing, tuple):
        return all(map(_is_ours, thing))
    if callable(thing) and not getattr(thing, "__module__", "").startswith("dwf."):
        return False
    if not dataclasses.is_dataclass(thing):
        return True
    return all(_is_ours(getattr(thing, field.name)) for field in dataclasses.fields(thing))


def _modes(device: torch.device) -> Hashable:
    """Everything beside models and tensors that decides what a captured step computes."""
    if device.type != "cuda":
        return ()
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        moe_kernels.named_implementation(),
    )


def _without_cached_casts(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast, if any, without its cache: a graph may not keep another's tensors."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
