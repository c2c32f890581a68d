"""What a run looks at before its first stage: whatever would end it hours later ends it here."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from segcompass.data.documents import DocumentSet
from segcompass.interfaces.registry import find
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig
from segcompass.learning.corpus import has_thought
from segcompass.learning.fit import check_pixels, check_start, start_config
from segcompass.learning.train_scorer import source_of
from segcompass.reasoning.from_scratch import build_tokenizer
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import Prompt
from segcompass.types import Sample


def check_settings(config: RunConfig, stages: Collection[str]) -> None:
    """Refuse what later stages could not begin with; nothing large is read.

    Args:
        config: Of the run.
        stages: Those that are still to be run.

    Raises:
        ConfigError: if an optional package is missing, the answers' form is not the interface's,
            or the policy or the model to start from is not what the config asks for.
        CheckpointError, MissingAssetError: if that model is damaged, or not there.
        DataError: if the documents for the SAE are not there.
    """
    if "sae" in stages and config.train_sae is not None and config.train_sae.documents is not None:
        DocumentSet(config.train_sae.documents)
    _check_pictures(config, stages)
    if "joint" not in stages:
        return
    joint = config.train_joint
    if joint.lora is not None:
        _needs("train_joint.lora", "peft", "lora")
    if joint.rollout.backend == "vllm":
        _needs("train_joint.rollout.backend: vllm", "vllm", "vllm")
    source = source_of(config)
    if joint.start is not None:
        check_start(source)
        return
    read, asked = find(source.interface).form, config.policy.use.prompt.form
    if read != asked:
        raise ConfigError(
            f"{source.interface} reads answers of the form {read}, the prompt asks for {asked}; "
            f"set policy.use.prompt.form: {read}"
        )


def _check_pictures(config: RunConfig, stages: Collection[str]) -> None:
    """Whether the policy that the stages begin with has the config's limits on pictures."""
    warm = config.run / "policy"
    if "warmup" in stages:
        check_pixels(config)
    elif "sae" in stages or ("joint" in stages and config.train_joint.start is None):
        check_pixels(config, warm if warm.is_dir() else None)


def _needs(setting: str, package: str, extra: str) -> None:
    if sys.modules.get(package) is None and find_spec(package) is None:
        raise ConfigError(
            f"{setting} needs {package}, which is not installed: "
            f"pip install 'segcompass[{extra}]', or take the setting out"
        )


def check_data(config: RunConfig, stages: Collection[str]) -> None:
    """Look through the training samples, their instructions included.

    Raises:
        ConfigError: if a stage is to teach chains of thought that the data does not have.
        DataError: if samples cannot be trained on; see :func:`training_samples`.
        CheckpointError: if the policy's tokenizer cannot be read.
    """
    samples = training_samples(config.data, _prompt(config, stages), config.run)
    if "warmup" in stages and config.train_language is not None:
        _check_language(config, samples)
    if "joint" in stages:
        _check_given(config, samples[: config.train_joint.samples])


def _check_language(config: RunConfig, samples: Sequence[Sample]) -> None:
    """Warm-up leaves out what has no chain of thought; something must be left."""
    if not any(map(has_thought, samples)):
        raise ConfigError(
            f"train_language teaches chains of thought, and none of the {len(samples):,} samples "
            f"of {_sets(config)} has one; take train_language out, or train on data that has them"
        )


def _check_given(config: RunConfig, samples: Sequence[Sample]) -> None:
    """An answer without a thought must not be taught: the reward for the form rates it 0."""
    joint = config.train_joint
    teaches = joint.language_weight > 0 and (joint.oracle_steps > 0 or joint.rehearse)
    bare = [s for s in samples if not has_thought(s)]
    if teaches and bare:
        raise ConfigError(
            f"train_joint.language_weight is {joint.language_weight:g}, so the data set's own "
            f"answers are taught, but {len(bare):,} of {len(samples):,} samples of "
            f"{_sets(config)} have no chain of thought, first {bare[0].sample_id}; "
            "set train_joint.language_weight: 0, or train on data that has them"
        )


def _sets(config: RunConfig) -> str:
    return ", ".join(str(part.root) for part in config.data.sets)


def _prompt(config: RunConfig, stages: Collection[str]) -> Prompt | None:
    """What will tokenise the instructions; None where no stage asks, or its policy is not there."""
    source, use, warm = config.policy.source, config.policy.use, config.run / "policy"
    if not {"warmup", "sae", "joint"} & set(stages):
        return None
    if "warmup" not in stages:
        if set(stages) == {"joint"} and config.train_joint.start is not None:
            folder, model = start_config(config.train_joint.start)
            return _prompt_of(folder, model.policy)
        if warm.is_dir():
            return _prompt_of(warm, use)
    if source != "scratch":
        return _prompt_of(source, use)
    if "warmup" not in stages:
        return None
    texts = texts_of(training_samples(config.data, run=config.run))
    tokenizer = build_tokenizer(texts, config.policy.scratch.vocabulary, len(use.prompt.tokens))
    return _with_tokenizer(tokenizer, use)


def texts_of(samples: Iterable[Sample]) -> list[str]:
    """The texts whose words a policy from scratch knows."""
    return [text for s in samples for text in (s.instruction, s.thought or "")]


def _prompt_of(source: str | Path, use: PolicyConfig) -> Prompt:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # missing, damaged, or not to be fetched: named by the next line
        raise CheckpointError(
            f"{source} has no usable tokenizer ({type(error).__name__}: {error}); "
            "give a policy folder, or a hub id that can be reached"
        ) from error
    known = tokenizer.get_vocab()
    new = [token for token in use.prompt.tokens if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    return _with_tokenizer(tokenizer, use)


def _with_tokenizer(tokenizer: Any, use: PolicyConfig) -> Prompt:
    """A prompt that reads instructions; it is shown no picture, and writes no answer."""
    end = tokenizer.eos_token_id
    return Prompt(use.prompt, tokenizer, image_token_id=-1, eos_token_id=-1 if end is None else end)
