"""``dwf bench``: how much faster a training step becomes on this machine, measured side by side."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from torch import nn

from dwf import data, distributed, presets
from dwf.bench import Case, compare_step
from dwf.checks import ConfigError
from dwf.config import Config, apply_overrides
from dwf.defenses import ModelFacts, get
from dwf.foreign import load_foreign
from dwf.progress import LiveLine

# Shape and classes of data sets that need not be on this machine: images are random.
KNOWN = {
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}


def add_bench(verbs: Any) -> None:
    """Add ``dwf bench`` to the parser's verbs."""
    verb = verbs.add_parser(
        "bench", help="time a training step here: eager PyTorch, the best stock PyTorch, dwf"
    )
    verb.add_argument("preset", nargs="?", default="smoke", help="see `dwf presets`")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="model.width=32 ...")
    verb.add_argument("--model", help="a network of your own: module:name or file.py:name")
    verb.add_argument("--shape", help="with --model: C,H,W of its images; 3,32,32 by default")
    verb.add_argument("--batch-size", type=int)
    verb.add_argument("--steps", type=int, help="of PGD; the preset's most, or 10")
    verb.add_argument("--seconds", type=float, default=120.0, help="for all; 120 by default")
    verb.add_argument("--compile", action="store_true", help="torch.compile also on a CPU")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--quiet", action="store_true")
    verb.set_defaults(run=_bench)


def _bench(options: argparse.Namespace, argv: list[str]) -> int:
    config = apply_overrides(presets.find(options.preset), list(options.overrides))
    device = distributed.init(options.device)
    case, title = _case(options, config)
    live = LiveLine(quiet=options.quiet)
    found = compare_step(
        case, device, seconds=options.seconds, compiles=options.compile, say=live.say
    )
    if options.json:
        gains = {over: found.gain(over) for over in ("eager", "stock")}
        print(json.dumps({"title": title, **asdict(found), "gain": gains}, indent=1))
        return 0
    print(title)
    print("\n".join(found.lines()))
    if found.batch_size < case.batch_size:
        print(f"the batch was made smaller than {case.batch_size} to end in {options.seconds:g} s")
    return 0


def _case(options: argparse.Namespace, config: Config) -> tuple[Case, str]:
    network: nn.Module
    shape: tuple[int, ...]
    if options.model is None:
        if options.shape is not None:
            raise ConfigError("--shape goes with --model; a preset knows its own")
        network, shape = _of_preset(config)
        schedule = config.joint or config.pretrain
        batch_size = schedule.batch_size if schedule is not None else 128
        title = f"{get(config.defense).title}, {config.model.network} width {config.model.width}"
    else:
        network, shape = load_foreign(options.model), _shape(options.shape or "3,32,32")
        batch_size, title = 128, options.model
    for name in ("batch_size", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    case = Case(
        network=network,
        image_shape=shape,
        batch_size=options.batch_size or batch_size,
        epsilon=config.attack.epsilon,
        step_size=config.attack.step_size,
        num_steps=options.steps or (10 if options.model else max(config.attack.num_steps)),
    )
    return case, title


def _of_preset(config: Config) -> tuple[nn.Module, tuple[int, ...]]:
    shape: tuple[int, ...]
    if config.data.name in KNOWN:
        shape, num_classes = KNOWN[config.data.name]
    else:
        dataset = data.load(config.data.name, root=config.data.root, split="train")
        shape, num_classes = tuple(dataset.image_shape), dataset.num_classes
    channels = shape[0]
    facts = ModelFacts(shape, num_classes, (0.5,) * channels, (0.25,) * channels)
    return get(config.defense).build(config, facts), shape


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(x) for x in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"--shape: expected C,H,W as in 3,32,32, found {text!r}")
    return shape
