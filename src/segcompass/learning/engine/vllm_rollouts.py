"""Answers sampled by vLLM (extra ``vllm``), and read once by the policy itself.

vLLM gives tokens only. States, log-probabilities, masks and rewards come from one pass of the
policy over them, so rollouts are the same whoever wrote them. Each rank has an engine of its own,
on its own GPU; what training moves is handed over before every batch of answers. Pictures reach
vLLM as the policy's own image features: both see the same, whatever the processors do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segcompass.io.errors import ConfigError
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.lora import merged_state, trained_weights
from segcompass.learning.engine.token_rows import with_token_rows
from segcompass.learning.rollouts import RolloutConfig, Rollouts, sample_answers, score_answers
from segcompass.reasoning.backbones import VisualInput
from segcompass.reasoning.loading import save_policy
from segcompass.reasoning.policy import Policy
from segcompass.types import TokenKind


class Question(NamedTuple):
    """A prompt for an engine."""

    ids: list[int]  # the picture's place is one token
    features: Float[Tensor, "n D"]
    grid: Int[Tensor, "1 3"] | None  # where the family computes positions from it


class Limits(NamedTuple):
    """How an engine is to sample: from the whole distribution, at a temperature."""

    temperature: float
    tokens: int  # most of an answer
    end: int  # the token that ends an answer, and is part of it
    forbidden: tuple[int, ...]  # tokens without probability


class Engine(Protocol):
    """A program that writes answers."""

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take over weights, by their names in the Hugging Face model."""

    def write(self, questions: Sequence[Question], limits: Limits) -> list[list[int]]:
        """One sampled answer to each question, as token ids."""


class VllmSampler:
    """`sample_answers` by an engine. While the form is forced, transformers samples."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        visuals: Sequence[VisualInput],
        instructions: Sequence[str],
        config: RolloutConfig,
        features: Sequence[Float[Tensor, "n D"]] | None = None,
        *,
        force_form: bool = False,
    ) -> Rollouts:
        """See :func:`segcompass.learning.rollouts.sample_answers`."""
        if force_form:
            return sample_answers(
                policy, visuals, instructions, config, features, force_form=force_form
            )
        seen = policy.backbone.embed_images(list(visuals)) if features is None else features
        self.engine.load(trained_weights(policy))
        limits = Limits(
            config.temperature,
            config.max_new_tokens or policy.config.max_new_tokens,
            policy.prompt.eos_token_id,
            tuple(policy.backbone.placeholder_ids),
        )
        answers = self.engine.write(questions_of(policy, visuals, instructions, seen), limits)
        return score_answers(policy, visuals, instructions, answers, config, seen)


def questions_of(
    policy: Policy,
    visuals: Sequence[VisualInput],
    instructions: Sequence[str],
    features: Sequence[Float[Tensor, "n D"]],
) -> list[Question]:
    """Prompts as engines take them, without padding."""
    ids, kinds = policy.encode(visuals, instructions)
    found = []
    for row, (visual, seen) in enumerate(zip(visuals, features, strict=True)):
        written = ids[row][kinds[row] != TokenKind.PADDING].tolist()
        grid = policy.backbone.cached_image_arguments([seen], [visual]).get("image_grid_thw")
        found.append(Question(_one_place(written, policy.backbone.image_token_id), seen, grid))
    return found


def _one_place(ids: Sequence[int], image: int) -> list[int]:
    """Engines repeat a picture's token themselves."""
    runs = ((token, list(run)) for token, run in groupby(ids))
    return [t for token, run in runs for t in ([token] if token == image else run)]


class VllmEngine:
    """vLLM's offline engine in this process.

    Args:
        folder: The policy's Hugging Face folder; frozen weights stay as they are there.
        dtype: Of the weights.
        memory: Share of the GPU that vLLM may take.
        seed: Of the sampling.
        world: All ranks.

    Raises:
        ConfigError: if vLLM is not installed.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, memory: float, seed: int, world: World
    ) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights pass by reference
        self.vllm = _vllm()
        self.llm = self.vllm.LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            gpu_memory_utilization=memory,
            seed=seed + world.rank,
            tensor_parallel_size=1,
            distributed_executor_backend="external_launcher" if world.size > 1 else None,
            limit_mm_per_prompt={"image": 1},
            enable_mm_embeds=True,
            trust_remote_code=False,
        )

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Overwrite the weights, and forget what was computed with the last ones."""
        self.llm.apply_model(lambda model: model.load_weights(weights))
        self.llm.reset_prefix_cache()

    def write(self, questions: Sequence[Question], limits: Limits) -> list[list[int]]:
        """Sample with vLLM's continuous batching."""
        prompts = [
            {"prompt_token_ids": q.ids, "multi_modal_data": {"image": _image(q)}} for q in questions
        ]
        how = self.vllm.SamplingParams(
            temperature=limits.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=limits.tokens,
            stop_token_ids=[limits.end],
            logit_bias=dict.fromkeys(limits.forbidden, -100.0),
            detokenize=False,
        )
        outputs = self.llm.generate(prompts, how, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _image(question: Question) -> Any:
    """A picture's features as vLLM takes them for the family."""
    if question.grid is None:
        return question.features[None]
    return {"image_embeds": question.features, "image_grid_thw": question.grid}


def open_engine(policy: Policy, config: RolloutConfig, folder: Path, seed: int) -> VllmEngine:
    """An engine for the policy as it is now, whole; it is written to ``folder`` for that.

    Raises:
        ConfigError: if vLLM is not installed.
    """
    _vllm()  # before 15 GB are written
    world = World.current()
    if world.is_main:
        state = with_token_rows(policy, merged_state(policy, policy.model.state_dict()))
        save_policy(policy, folder, state=state)
    world.barrier()
    return VllmEngine(folder, policy.model.dtype, config.vllm_memory, seed, world)


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            "rollout.backend: vllm needs vLLM, which is not installed: pip install "
            "'segcompass[vllm]' (Linux with an NVIDIA GPU), or take backend: transformers"
        ) from error
    return vllm
