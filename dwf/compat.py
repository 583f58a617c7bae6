"""Other tools' call signatures over our attacks, so that old scripts run unchanged.

    from dwf.compat import AutoAttack            # in place of: from autoattack import AutoAttack
    adversary = AutoAttack(model, norm="Linf", eps=8 / 255)
    x_adv = adversary.run_standard_evaluation(x_test, y_test, bs=250)

The arguments, attributes and defaults are those of AutoAttack and RobustBench; the attacks, the
checks and the float32 verdict are ours. The only place where their spellings live.

Sources: Croce and Hein, arXiv:2003.01690; Croce et al., arXiv:2010.09670.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from dwf import data
from dwf.attacks import apgd, attack_target
from dwf.attacks.losses import Model
from dwf.attacks.minimum_norm import fab
from dwf.attacks.source import float32_verdicts, judge, own_random_state, undisturbed
from dwf.attacks.square import square
from dwf.attacks.target import AttackTarget
from dwf.checks import (
    CheckpointError,
    ConfigError,
    check_choice,
    check_count,
    check_images,
    check_labels,
    check_logits,
)
from dwf.config import EvaluationConfig, from_dict
from dwf.defenses import load
from dwf.evaluation import evaluate
from dwf.evaluation.in_turn import hash_of_weights, of_one_model, seed_of
from dwf.evaluation.table import robustbench_json
from dwf.files import atomic_write_bytes, atomic_write_json, read_json

__all__ = ["AutoAttack", "benchmark", "load_model"]

log = logging.getLogger("dwf")
NORMS = {"Linf": "linf", "L2": "l2"}
# Images whose logits go into a state, to know the model again.
_FEW = 100
ATTACKS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")


@dataclass
class _Apgd:
    n_iter: int = 100
    n_restarts: int = 1
    eot_iter: int = 1


@dataclass
class _ApgdTargeted:
    n_iter: int = 100
    n_restarts: int = 1
    n_target_classes: int = 9


@dataclass
class _Fab:
    n_iter: int = 100
    n_restarts: int = 1
    n_target_classes: int = 9


@dataclass
class _Square:
    n_queries: int = 5000
    n_restarts: int = 1


class AutoAttack:
    """AutoAttack's class: same arguments, same attributes, same two ways to run.

    ``apgd``, ``apgd_targeted``, ``fab`` and ``square`` hold ``n_iter``, ``n_restarts``,
    ``n_target_classes``, ``n_queries`` and ``eot_iter``, to be changed before a run.

    Differs in what can make a number wrong: images outside [0, 1], labels without a class and
    outputs that are no logits are errors; NaN logits count as broken; the model, its gradients and
    all random states are as before; ``seed=None`` is 0 instead of the clock; an image's result does
    not depend on ``bs``; ``state_path`` keeps the adversarial images too.

    Raises:
        ConfigError: norm "L1", a TensorFlow model, an unknown version or attack.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str = "cuda",
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if is_tf_model:
            raise ConfigError("is_tf_model: TensorFlow models are not supported")
        check_choice(norm, list(NORMS), "norm")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: {str(device)!r}, but there is no GPU; pass device='cpu'")
        if attacks_to_run and version in ("standard", "plus", "rand"):
            raise ConfigError(
                f"attacks_to_run is for version='custom'; {version!r} has attacks of its own"
            )
        self.model = model
        self.norm = norm
        self.epsilon = eps
        self.seed = seed
        self.verbose = verbose
        self.attacks_to_run = list(attacks_to_run)
        self.version = version
        self.device = torch.device(device)
        self.log_path = None if log_path is None else Path(log_path)
        self.apgd = _Apgd()
        self.apgd_targeted = _ApgdTargeted()
        self.fab = _Fab()
        self.square = _Square()
        if version != "custom":
            self.set_version(version)

    def set_version(self, version: str = "standard") -> None:
        """Choose the attacks and their settings: "standard", "plus" or "rand"."""
        check_choice(version, ("standard", "plus", "rand"), "version")
        self.version = version
        self.attacks_to_run = {
            "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
            "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
            "rand": ["apgd-ce", "apgd-dlr"],
        }[version]
        self.apgd.n_restarts = self.fab.n_restarts = 5 if version == "plus" else 1
        self.apgd.eot_iter = 20 if version == "rand" else 1

    def get_logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def get_seed(self) -> int:
        return 0 if self.seed is None else self.seed

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | os.PathLike[str] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the attacks in turn, each on the images that still stand.

        Args:
            x_orig: [N, C, H, W] float in [0, 1].
            y_orig: [N] integer labels.
            state_path: a file to continue from if it exists, written after every attack.
        Returns:
            Adversarial images [N, C, H, W], and with ``return_labels`` what the model says of them.
        """
        self._check_attacks()
        with self._undisturbed(x_orig, y_orig, bs) as target:
            y_orig = y_orig.to(x_orig.device)
            key = self._key(x_orig, y_orig)
            few = self.get_logits(x_orig[:_FEW].to(self.device)).float().cpu()
            state = _State.read(state_path, key, few, x_orig.device)
            if state is None:
                standing = self._labels(x_orig, bs) == y_orig
                state = _State([], few, x_orig.detach().float().clone(), standing)
                self._log(f"initial accuracy: {_percent(standing)}")
            elif state.done:
                self._log(f"continues after {', '.join(state.done)}: {_percent(state.standing)}")
            started = time.perf_counter()
            for attack in self.attacks_to_run:
                if attack in state.done:
                    continue
                todo = torch.nonzero(state.standing)[:, 0]
                found, fooled = self._attack(attack, target, x_orig[todo], y_orig[todo], todo, bs)
                state.x_adv[todo[fooled]] = found[fooled]
                state.standing[todo[fooled]] = False
                state.done.append(attack)
                state.write(state_path, key)
                self._log(
                    f"robust accuracy after {attack.upper()}: {_percent(state.standing)} "
                    f"(total time {time.perf_counter() - started:.1f} s)"
                )
            self._log_result(x_orig, state)
            return (state.x_adv, self._labels(state.x_adv, bs)) if return_labels else state.x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Run each attack on all images: {attack: adversarial images}, with labels as a pair."""
        self._check_attacks()
        results: dict[str, Any] = {}
        with self._undisturbed(x_orig, y_orig, bs) as target:
            y_orig = y_orig.to(x_orig.device)
            index = torch.arange(len(x_orig), device=x_orig.device)
            for attack in self.attacks_to_run:
                found, fooled = self._attack(attack, target, x_orig, y_orig, index, bs)
                self._log(f"robust accuracy by {attack.upper()}: {_percent(~fooled)}")
                results[attack] = (found, self._labels(found, bs)) if return_labels else found
        return results

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Share of images that the model gets right."""
        with self._undisturbed(x_orig, y_orig, bs):
            right = self._labels(x_orig, bs) == y_orig.to(x_orig.device)
            return float(right.double().mean())

    def _check_attacks(self) -> None:
        if not self.attacks_to_run:
            raise ConfigError("attacks_to_run: empty, so every image would stand")
        for attack in self.attacks_to_run:
            check_choice(attack, ATTACKS, "attacks_to_run")

    @contextlib.contextmanager
    def _undisturbed(self, x_orig: Tensor, y_orig: Tensor, bs: int) -> Iterator[AttackTarget]:
        """Everything checked, and the model ready to be attacked, until the block ends."""
        check_images(x_orig, "x_orig")
        check_count(bs, "bs")
        with (
            undisturbed(self.model, self.device, seed=self.get_seed()),
            torch.no_grad(),
            float32_verdicts(self.device),
        ):
            few = x_orig[:bs].to(self.device)
            logits = check_logits(self.get_logits(few), len(few))
            check_labels(y_orig, len(x_orig), logits.shape[1], "y_orig")
            yield attack_target(self.model, few)

    def _attack(
        self,
        attack: str,
        target: AttackTarget,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        bs: int,
    ) -> tuple[Tensor, Tensor]:
        """(adversarial images, whether the model in float32 gets them wrong), batch by batch."""
        function, settings = self._settings(attack)
        found = x.detach().float().clone()
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for start in range(0, len(x), bs):
            rows = slice(start, start + bs)
            labels = y[rows].to(self.device)
            # a random model's draws are those of this batch, however the run got here
            draws = seed_of(self.get_seed(), ATTACKS.index(attack), int(index[start]))
            with own_random_state(self.device, draws):
                adversarial = function(
                    target,
                    x[rows].to(self.device),
                    labels,
                    epsilon=self.epsilon,
                    norm=NORMS[self.norm],
                    seed=self.get_seed(),
                    sample_index=index[rows].to(self.device),
                    **settings,
                )
                correct, _ = judge(self.get_logits(adversarial), labels)
            found[rows] = adversarial.to(found)
            fooled[rows] = ~correct.to(fooled.device)
        return found, fooled

    def _settings(self, attack: str) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        if attack in ("apgd-ce", "apgd-dlr"):
            return apgd, {
                "loss": attack.removeprefix("apgd-"),
                "num_steps": self.apgd.n_iter,
                "num_restarts": self.apgd.n_restarts,
                "eot_samples": self.apgd.eot_iter,
            }
        if attack == "apgd-t":
            return apgd, {
                "loss": "dlr-targeted",
                "num_steps": self.apgd_targeted.n_iter,
                "num_restarts": self.apgd_targeted.n_restarts,
                "num_target_classes": self.apgd_targeted.n_target_classes,
            }
        if attack == "square":
            return square, {
                "num_queries": self.square.n_queries,
                "num_restarts": self.square.n_restarts,
            }
        if attack == "fab":
            return fab, {"num_steps": self.fab.n_iter, "num_restarts": self.fab.n_restarts}
        return fab, {  # once for each class, also where the untargeted one has restarts
            "num_steps": self.fab.n_iter,
            "targeted": True,
            "num_target_classes": self.fab.n_target_classes,
        }

    def _labels(self, x: Tensor, bs: int) -> Tensor:
        """What the model says, [N] on the images' device; -1 where it says nothing finite."""
        answers = []
        for part in torch.split(x, bs):
            logits = self.get_logits(part.to(self.device))
            finite = logits.isfinite().all(dim=1)
            answers.append(logits.argmax(dim=1).masked_fill(~finite, -1).to(x.device))
        return torch.cat(answers) if answers else torch.zeros(0, dtype=torch.int64)

    def _key(self, x_orig: Tensor, y_orig: Tensor) -> str:
        """What a state file belongs to."""
        settings = [vars(x) for x in (self.apgd, self.apgd_targeted, self.fab, self.square)]
        facts = [self.norm, self.epsilon, self.get_seed(), self.attacks_to_run, settings]
        facts.append(hash_of_weights(self.model))
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tensor in (x_orig, y_orig):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _log_result(self, x_orig: Tensor, state: _State) -> None:
        if len(x_orig) == 0:
            return
        delta = (state.x_adv - x_orig).flatten(1)
        size = delta.abs().amax(dim=1) if self.norm == "Linf" else delta.norm(dim=1)
        self._log(
            f"max {self.norm} perturbation: {float(size.max()):.5f}, "
            f"nan in tensor: {int(state.x_adv.isnan().sum())}, "
            f"max: {float(state.x_adv.max()):.5f}, min: {float(state.x_adv.min()):.5f}"
        )
        self._log(f"robust accuracy: {_percent(state.standing)}")

    def _log(self, line: str) -> None:
        if self.verbose:
            print(line)
        if self.log_path is not None:
            with open(self.log_path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")


@dataclass
class _State:
    """How far a run has come, as a safetensors file."""

    done: list[str]
    logits: Tensor  # of the first clean images
    x_adv: Tensor
    standing: Tensor

    @staticmethod
    def read(
        path: str | os.PathLike[str] | None, key: str, logits: Tensor, device: torch.device
    ) -> _State | None:
        if path is None or not Path(path).exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name).to(device) for name in ("x_adv", "standing")}
                its_logits = file.get_tensor("logits")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a state of AutoAttack, {error}") from error
        if facts.get("key") != key or not of_one_model(its_logits, logits):
            raise CheckpointError(
                f"{path}: the state of another model, other images or settings; name another file"
            )
        return _State(json.loads(facts["done"]), its_logits, **tensors)

    def write(self, path: str | os.PathLike[str] | None, key: str) -> None:
        if path is None:
            return
        tensors = {
            "logits": self.logits,
            "x_adv": self.x_adv.cpu(),
            "standing": self.standing.cpu(),
        }
        facts = {"key": key, "done": json.dumps(self.done)}
        atomic_write_bytes(Path(path), to_safetensors(tensors, facts))


def _percent(standing: Tensor) -> str:
    return f"{100 * float(standing.double().mean()) if len(standing) else 0:.2f}%"


def load_model(
    model_name: str,
    model_dir: str | os.PathLike[str] = "runs",
    dataset: str = "cifar10",
    threat_model: str = "Linf",
) -> nn.Module:
    """A trained model from the run folder ``model_dir/model_name``: RobustBench's ``load_model``.

    Raises:
        CheckpointError: no such run. ConfigError: a run of another data set.
    """
    check_choice(threat_model, list(NORMS), "threat_model")
    folder = Path(model_dir) / model_name
    model = load(folder)
    trained_on = from_dict(read_json(folder / "config.json")).data.name
    if Path(trained_on).stem != Path(dataset).stem:
        raise ConfigError(f"dataset: {dataset!r}, but {folder} was trained on {trained_on!r}")
    return model


def benchmark(
    model: Model,
    n_examples: int = 10_000,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    eps: float | None = None,
) -> tuple[float, float]:
    """(clean accuracy, robust accuracy) by the standard suite: RobustBench's ``benchmark``.

    The table with its verdict goes to the log. ``eps`` is 8/255 in L-inf and 0.5 in L2 by default;
    ``to_disk`` writes ``model_info/<dataset>/<threat_model>/<model_name>.json``.

    Raises:
        ConfigError: ``to_disk`` without a name. DataError: no such data set in ``data_dir``.
    """
    check_choice(threat_model, list(NORMS), "threat_model")
    if to_disk and model_name is None:
        raise ConfigError("to_disk: name the model with model_name=")
    test_set = data.load(dataset, root=data_dir, split="test")
    radius = eps if eps is not None else 8 / 255 if threat_model == "Linf" else 0.5
    result = evaluate(
        model,
        test_set,
        EvaluationConfig(num_images=n_examples, batch_size=batch_size),
        suite="standard",
        epsilon=radius,
        norm=NORMS[threat_model],
        device=device,
    )
    log.info(str(result))
    if result.verdict != "VALID":
        log.warning(f"benchmark: the verdict is {result.verdict}")
    if to_disk:
        path = Path("model_info") / dataset / threat_model / f"{model_name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, robustbench_json(result, str(model_name)))
    return result.clean_accuracy, result.robust_accuracy
