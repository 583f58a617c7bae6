"""The configuration of a run: its settings, and how text and JSON become settings."""

from dwf.config.settings import (
    OPTIONS,
    PAPER_FGSM_EPSILON,
    PAPER_PGD_STEPS,
    AttackConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Options,
    PhaseConfig,
    derive_seed,
)
from dwf.config.text import apply_overrides, from_dict, parse_setting

__all__ = [
    "OPTIONS",
    "PAPER_FGSM_EPSILON",
    "PAPER_PGD_STEPS",
    "AttackConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Options",
    "PhaseConfig",
    "apply_overrides",
    "derive_seed",
    "from_dict",
    "parse_setting",
]
