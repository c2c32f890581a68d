"""What a joint step has to do, read off a config and off its model on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from transformers import AutoConfig, PretrainedConfig, SamConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from segcompass.concepts.sae_files import CONFIG_NAME
from segcompass.grounding.image_encoder import sam_config
from segcompass.interfaces.concept_slots import HeadConfig
from segcompass.interfaces.registry import OfInterface
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.io.files import read_object
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.lora import LoraSettings
from segcompass.learning.fit import check_pixels, picture_limits, start_config
from segcompass.learning.planning import costs
from segcompass.learning.planning.costs import PolicyShape, size
from segcompass.model_folder import find_model
from segcompass.presets import SEGMENTERS, Parts, assemble, preset_of, published_config
from segcompass.reasoning.from_scratch import build_model, build_tokenizer
from segcompass.reasoning.policy import PolicyConfig
from segcompass.reasoning.prompts import IMAGE_SLOT, INSTRUCTION_SLOT, PromptConfig

TARGETS = 2  # masks that a question wants, on average: RefCOCO 1, gRefCOCO from none to several
_LETTERS = 3  # of the template in one token; real tokenizers need fewer tokens than this


@dataclass(frozen=True)
class Workload:
    """Sizes and settings of a joint step; what ends in ``_bytes`` is for one sequence."""

    shape: PolicyShape
    s: int  # bytes of a working weight
    gpus: int
    batch: int  # questions of a step, all GPUs together
    group: int  # answers to each
    prompt: int  # tokens, image and template included
    image: int
    answer: int
    slots: int
    targets: int
    samples: bool  # answers are written by the policy; else they are the data set's own
    penalised: bool  # a reference policy reads them too
    sampled: int | None  # answers of a GPU that are sampled together; None: all
    micro: int | None  # answers of a GPU in one pass with gradient; None: all
    checkpointing: bool
    precomputed: bool
    lora: LoraSettings | None
    trained: int  # weights of the policy
    adapters: int  # weights of rank-1 adapters on all targets, for `with_lora`
    sae_weights: int
    encoder_weights: int
    head_weights: int  # with the mask decoder
    head_trained: int
    sae_flops: float  # of a token
    head_flops: float  # of a sequence
    decoder_flops: float  # of a slot
    vision_flops: float  # of a picture
    encoder_flops: float  # of a picture
    head_bytes: float
    decoder_bytes: float
    encoder_pass_bytes: float  # of a picture
    key_bytes: float  # of a picture

    @property
    def length(self) -> int:
        """L, prompt and answer."""
        return self.prompt + self.answer

    @property
    def questions(self) -> int:
        """Of a step; where the data set answers, each row is a question of its own."""
        return self.batch if self.samples else self.batch * self.group

    @property
    def all_rows(self) -> int:
        """Sequences of a step."""
        return self.batch * self.group

    @property
    def rows(self) -> int:
        """Sequences of a step on the GPU that has most of them."""
        each = math.ceil(self.questions / self.gpus)
        return each * (self.group if self.samples else 1)

    @property
    def sampled_rows(self) -> int:
        """Of them, those that are sampled together."""
        return min(self.rows, self.sampled or self.rows)

    @property
    def micro_rows(self) -> int:
        """Of them, those that go through a pass with gradient together."""
        return min(self.sampled_rows if self.samples else self.rows, self.micro or self.rows)

    @property
    def reference_copy(self) -> bool:
        """Whether the reference takes memory of its own."""
        return self.penalised and self.lora is None and self.trained > 0

    @property
    def picture_bytes(self) -> float:
        """Keys, with a copy of the well-formed rows', and features of all sequences."""
        return self.rows * (2 * self.key_bytes + self.s * self.image * self.shape.width)

    def with_lora(self, settings: LoraSettings) -> Workload:
        """The same with adapters of another rank, on the default targets."""
        return replace(self, lora=settings, trained=settings.rank * self.adapters)

    def with_answers(self, tokens: int) -> Workload:
        """The same with shorter answers; the head's memory follows the length."""
        share = (self.prompt + tokens) / self.length
        return replace(self, answer=tokens, head_bytes=self.head_bytes * share)


def workload_of(config: RunConfig, gpus: int, memory_gb: float) -> Workload:
    """Read everything off a config; see `plan.plan` for the errors."""
    if gpus < 1 or not memory_gb > 0:
        raise ConfigError(f"plan for 1 GPU or more of some memory, got {gpus} of {memory_gb:g} GB")
    stage, model = config.train_joint, model_of(config)
    if stage.start is None:
        check_pixels(config)
    use, parts = model.use, _assembled(model)
    # With all layers trained there is none that passes come through without gradients.
    shape = costs.shape_of(parts.backbone, -1 if stage.train_lower_layers else use.sae_layer)
    image = image_tokens(model, config.data.image_pixels)
    prompt = image + use.prompt.max_instruction_tokens + template_tokens(use.prompt)
    answer = stage.rollout.max_new_tokens or use.max_new_tokens
    samples, encodes = stage.oracle_steps < stage.steps, config.data.features is None
    interface, encoder = parts.interface, parts.encoder
    lora = stage.lora
    rank_one = LoraSettings(rank=1, targets=(lora or LoraSettings()).targets)
    adapters = costs.lora_weights(parts.backbone, use.sae_layer, rank_one)
    trained = shape.upper_weights if stage.train_upper_layers else 0
    return Workload(
        shape=shape,
        s=torch.empty((), dtype=getattr(torch, config.policy.dtype)).element_size(),
        gpus=gpus,
        batch=stage.batch,
        group=stage.rollout.group,
        prompt=prompt,
        image=image,
        answer=answer,
        slots=use.prompt.slots,
        targets=min(TARGETS, use.prompt.slots),
        samples=samples,
        penalised=samples and stage.rl_weight > 0 and stage.grpo.kl > 0,
        sampled=stage.rollout.batch,
        micro=stage.micro_batch,
        checkpointing=stage.gradient_checkpointing,
        precomputed=not encodes,
        lora=lora,
        trained=trained if lora is None else lora.rank * adapters,
        adapters=adapters,
        sae_weights=size([interface.sae]),
        encoder_weights=size([parts.sam.vision_encoder]),
        head_weights=size([interface]) - size([interface.sae]),
        head_trained=size([interface], trainable=True),
        sae_flops=costs.sae_flops(interface, 1),
        head_flops=costs.counted_flops(lambda: costs.align_pass(interface, prompt + answer)),
        decoder_flops=costs.counted_flops(lambda: costs.decode_pass(interface, 1)),
        vision_flops=costs.vision_flops(parts.backbone, image),
        encoder_flops=(costs.counted_flops(lambda: costs.encode_pass(encoder)) if encodes else 0.0),
        head_bytes=costs.head_bytes(interface, prompt + answer),
        decoder_bytes=costs.kept_bytes(
            lambda: costs.decode_pass(interface, TARGETS), interface.decoder
        ),
        encoder_pass_bytes=costs.encoder_pass_bytes(encoder),
        key_bytes=4.0 * encoder.channels * encoder.grid**2,
    )


class Model(NamedTuple):
    """What the joint stage starts from, as configs."""

    policy: PretrainedConfig
    use: PolicyConfig
    segmenter: SamConfig
    latents: int  # S
    head: HeadConfig
    pixels: int  # most of a picture, where the policy's family leaves the size open


def model_of(config: RunConfig) -> Model:
    """The configs of the model that the joint stage starts from.

    Raises:
        CheckpointError: if a folder's or hub id's config cannot be read.
        MissingAssetError: if the model to start from is not there.
    """
    source, use = config.policy.source, config.policy.use
    if config.train_joint.start is not None:
        return _finished(find_model(config.train_joint.start))
    segmenter = SEGMENTERS.get(config.segmenter, config.segmenter)
    named = segmenter in {"nano", *SEGMENTERS.values()}
    sam = sam_config(segmenter) if named else _read(SamConfig, segmenter)
    preset, scratch = preset_of(source), config.policy.scratch
    if preset is not None:
        policy = published_config(preset)
    else:
        policy = _scratch_config(config) if source == "scratch" else _read(AutoConfig, source)
    pixels = scratch.image_side**2 if source == "scratch" else _most_pixels(Path(source))
    head = _head(config)
    if config.train_sae is None:
        raise ConfigError("the config has no section train_sae; it says how large the SAE is")
    return Model(policy, use, sam, config.train_sae.latents, head, pixels)


def _finished(folder: Path) -> Model:
    """The configs in a model folder; its weights and their hashes are not looked at."""
    _, model = start_config(folder)
    try:
        latents = int(read_object(folder / "sae" / CONFIG_NAME)["d_sae"])
    except (ValueError, KeyError, TypeError) as error:  # DataError is a ValueError
        raise CheckpointError(f"{folder} is no complete model folder: {error}") from error
    policy, sam = _read(AutoConfig, folder / "policy"), _read(SamConfig, folder / "segmenter")
    pixels = _most_pixels(folder / "policy")
    return Model(policy, model.policy, sam, latents, _head(model), pixels)


def _head(config: OfInterface) -> HeadConfig:
    """The sizes of the head; only that of SegCompass itself can be planned."""
    if not isinstance(config.head, HeadConfig):
        raise ConfigError(
            f"only concept_slots can be planned, the config has {config.interface}; it needs less: "
            "plan with `--set interface=concept_slots`"
        )
    return config.head


def _assembled(model: Model) -> Parts:
    try:
        return assemble(model.policy, model.use, model.segmenter, model.latents, model.head)
    except ValueError as error:
        told = error.errors() if isinstance(error, ValidationError) else [{"msg": str(error)}]
        problems = "; ".join(str(problem["msg"]) for problem in told)
        raise ConfigError(f"the configured parts do not fit together: {problems}") from error


def _scratch_config(config: RunConfig) -> PretrainedConfig:
    """Sizes of a policy that is not there yet, with the largest vocabulary it may get."""
    scratch = config.policy.scratch
    tokenizer = build_tokenizer(("a",), scratch.vocabulary, config.policy.use.prompt.slots)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made: PretrainedConfig = build_model(scratch, tokenizer, seed=0).config
    made.get_text_config().vocab_size = scratch.vocabulary
    return made


def _read(kind: Any, source: str | Path) -> Any:
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"the config of {source} cannot be read ({type(error).__name__}: {error}); give a "
            "folder with config.json, or a hub id that is one of the presets or in the hub's cache"
        ) from error


def _most_pixels(folder: Path) -> int:
    limits = picture_limits(folder)
    return int(Qwen2VLImageProcessorPil.size["longest_edge"]) if limits is None else limits[1]


def image_tokens(model: Model, limits: tuple[int, int] | None) -> int:
    """The most tokens that a picture may become, with ``limits`` on its pixels if given."""
    vision: Any = model.policy.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is None:  # LLaVA: one size for all pictures
        return int(vision.image_size // vision.patch_size) ** 2
    pixels = model.pixels if limits is None else limits[1]
    return pixels // int(vision.patch_size * merge) ** 2


def template_tokens(prompt: PromptConfig) -> int:
    """Tokens of the template, estimated from its letters, and of the tokens it names."""
    fixed = prompt.template.replace(IMAGE_SLOT, "").replace(INSTRUCTION_SLOT, "")
    return math.ceil(len(fixed) / _LETTERS) + prompt.slots
