"""The settings of every stage of training, each with what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from segcompass.data.documents import DocumentsConfig
from segcompass.learning.engine.lora import LoraSettings
from segcompass.learning.engine.optimizer import OptimizerConfig
from segcompass.learning.grpo import GrpoConfig
from segcompass.learning.object_rewards import ObjectRewardConfig
from segcompass.learning.rewards import RewardConfig
from segcompass.learning.rollouts import RolloutConfig
from segcompass.learning.watching.symptoms import HealthConfig

Repeats = Annotated[
    int, Field(ge=1, description="how often an epoch asks each question that nothing matches")
]


class SegmenterStage(OptimizerConfig, frozen=True):
    """Promptable pretraining: points, boxes or coarse masks in, masks out."""

    prompts: int = Field(4, ge=1, description="prompted objects per picture")


class VisionStage(OptimizerConfig, frozen=True):
    """Dense pretraining of the vision tower on what stands where."""

    background_weight: float = Field(0.15, ge=0, description="of empty cells in the loss")


class LanguageStage(OptimizerConfig, frozen=True):
    """Questions and oracle answers, by cross-entropy over the answer."""

    train_vision: bool = Field(False, description="else image features are computed once")
    no_target_repeats: Repeats = 1
    group: int = Field(16, ge=1, description="batches that are sorted by length together")


class SaeStage(OptimizerConfig, frozen=True):
    """Reconstruct the states of the frozen policy under an L1 penalty (Eq. 7).

    ``batch`` counts tokens. Every remedy that Eq. 7 leaves open is a setting of its own.
    """

    latents: int = Field(2048, ge=1, description="S")
    l1: float = Field(3.0, ge=0, description="weight of the sparsity term at its full height")
    threshold: float = Field(0.0, ge=0, description="activations up to this count as zero")
    l1_warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which l1 rises")

    samples: int | None = Field(2_000, ge=1, description="sequences of the data set; null: all")
    answers: Literal["given", "generated"] = Field(
        "given", description="the data set's own (prompts alone without), or the policy's"
    )
    documents: DocumentsConfig | None = Field(None, description="interleaved documents to read")
    documents_share: float = Field(
        0.5, gt=0, le=1, description="of the policy passes, with documents; 1: no data set"
    )
    max_tokens: int = Field(2_048, ge=1, description="documents are cut after this many")
    sequences: int = Field(32, ge=1, description="that go through the policy together")
    held_out: int = Field(128, ge=1, description="sequences kept for the report, never trained on")

    mask_control: bool = Field(
        True, description="leave out the states of control tokens, such as chat and think marks"
    )
    buffer: int = Field(1 << 19, ge=2, description="tokens in memory, of which batches are drawn")
    shuffle: bool = Field(True, description="mix the tokens of different sequences")
    cache: Path | None = Field(None, description="folder of states in bf16, for later epochs, runs")
    cache_gb: float = Field(64.0, gt=0, description="most the cache folder may hold, of all ranks")
    statistics: int = Field(1 << 16, ge=1, description="tokens that mean and scale are taken from")

    scale_inputs: bool = Field(True, description="to norm sqrt(D); folded into the finished SAE")
    centre: bool = Field(True, description="by the mean, which stays in the finished SAE as b_dec")
    outliers: float | None = Field(
        10.0, gt=1, description="leave out states of more than so many median norms; null: none"
    )
    decoder_norm: float = Field(0.1, gt=0, description="of the decoder's rows at the start")
    tied_start: bool = Field(True, description="W_enc begins as the transposed W_dec")
    weigh_by_decoder: bool = Field(True, description="L1 of activations times decoder norms")
    unit_decoder: bool = Field(False, description="keep the decoder's rows at norm 1 instead")
    decay: float | None = Field(
        None,
        ge=0,
        le=1,
        description="hold the rate, and let it fall over this last share; "
        "null: the cosine of all stages",
    )
    dead_after: int = Field(1 << 19, ge=1, description="tokens without firing")
    revive: Literal["none", "resample", "auxiliary"] = Field(
        "none", description="dead latents: leave, restart on bad tokens, or push up by a loss term"
    )
    revive_every: int = Field(500, ge=1, description="steps between two resamplings")
    auxiliary: float = Field(1e-3, ge=0, description="weight of the term that pushes them up")
    budget_mb: int = Field(256, ge=1, description="of the [tokens, S] buffers of a step")
    matmul: Literal["highest", "high", "medium"] = Field(
        "highest", description="precision of fp32 products; high: TF32 where the GPU has it"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SaeStage:
        if self.weigh_by_decoder and self.unit_decoder:
            raise ValueError(
                "weigh_by_decoder and unit_decoder both keep the penalty from being escaped by a "
                "growing decoder; set one of them to false"
            )
        if self.buffer < 2 * self.batch:
            raise ValueError(
                f"the buffer of {self.buffer} tokens is less than two batches of {self.batch}; "
                "raise buffer or lower batch"
            )
        return self


class ScorerStage(OptimizerConfig, frozen=True):
    """Candidates of a finished model, marked, with the score that their IoU earns (Rea2Seg).

    Every score there is comes up equally often; ``batch`` counts candidates. On questions about
    other pictures it is then decided by how much a candidate must be rated above the source's
    answer to replace it, unless ``head.margin`` says so. They are the last ones of the data: apart
    from this stage, and from the joint one where ``train_joint.samples`` leaves them out. Warm-up
    may have seen them.
    """

    start: Path | None = Field(
        None, description="the model or preset that finds candidates; default: what joint wrote"
    )
    judge: str | None = Field(
        None,
        description="policy folder or hub id that the judge begins as; null: the source's policy",
    )
    samples: int | None = Field(2_000, ge=1, description="questions to collect from; null: all")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="share of these, the last of the data, that choose the margin"
    )
    together: int = Field(16, ge=1, description="questions that are answered at once")
    train_vision: bool = Field(True, description="also the tower, which never saw a mark")


class Multipliers(BaseModel, frozen=True, extra="forbid"):
    """Factors of the learning rate, by trained part."""

    policy: float = Field(1.0, ge=0)
    tokens: float = Field(1.0, ge=0, description="of the concentration tokens' own rows")
    codebook: float = Field(1.0, ge=0)
    head: float = Field(1.0, ge=0)
    decoder: float = Field(1.0, ge=0)


class LateWeights(BaseModel, frozen=True, extra="forbid"):
    """Weights of a second phase; CoPRS goes from (0.8, 0) for (dice, focal) to (2, 5)."""

    from_step: int = Field(ge=0, description="first step of the phase")
    dice_weight: float = Field(2.0, ge=0)
    heatmap_dice_weight: float = Field(2.0, ge=0)
    focal_weight: float = Field(5.0, ge=0)


class JointStage(OptimizerConfig, frozen=True):
    """Eq. 6: reinforcement and supervision together; ``batch`` counts questions.

    ``recipe: release`` stands for what the public release does otherwise, in all of a run's
    sections (`recipes.py`); what the file says goes before either.
    """

    recipe: Literal["paper", "release"] = "paper"
    start: Path | None = Field(
        None, description="a model folder to go on from, instead of the earlier stages' parts"
    )
    oracle_steps: int = Field(
        0, ge=0, description="first steps on batch·G of the data set's own answers, no rollouts"
    )
    rollout: RolloutConfig = RolloutConfig()
    micro_batch: int | None = Field(
        None, ge=1, description="answers of a rank in one pass with gradient; null: all"
    )
    rewards: RewardConfig = RewardConfig()
    object_rewards: ObjectRewardConfig = Field(
        ObjectRewardConfig(), description="where answers name objects, in place of `rewards`"
    )
    grpo: GrpoConfig = GrpoConfig()
    rl_weight: float = Field(1.0, ge=0, description="of the GRPO loss; 0 is supervision only")
    seg_weight: float = Field(1.0, ge=0, description="lambda_s; 0 is reinforcement only")
    conf_weight: float = Field(0.2, ge=0, description="lambda_c")
    dice_weight: float = Field(0.6, ge=0, description="lambda_d")
    heatmap_dice_weight: float = Field(0.0, ge=0, description="dice on the heatmaps; not in Eq. 6")
    focal_weight: float = Field(0.0, ge=0, description="focal loss on the masks; not in Eq. 6")
    mask_bce_weight: float = Field(0.0, ge=0, description="cross-entropy on the masks (LISA)")
    late: LateWeights | None = Field(None, description="in place of these weights, later (CoPRS)")
    place_weight: float = Field(
        0.0, ge=0, description="row and column of its target, read off a slot's query"
    )
    language_weight: float = Field(
        0.0, ge=0, description="cross-entropy of the data set's own answers, where they are taught"
    )
    rehearse: bool = Field(
        False, description="in steps with rollouts, teach the data set's own answers as well"
    )
    form_weight: float = Field(
        1.0, ge=0, description="cross-entropy of a forced form (rollout.forced_steps)"
    )
    order_weight: float = Field(0.0, ge=0, description="see learning/matching.py")
    drop_tokens: float = Field(
        0.0, ge=0, le=1, description="share of answers whose queries are made of concepts alone"
    )
    drop_concepts: float = Field(0.0, ge=0, le=1, description="share made of tokens alone")
    group: int = Field(16, ge=1, description="batches that are sorted by length together")
    samples: int | None = Field(None, ge=1, description="only the first so many samples")
    no_target_repeats: Repeats = 1
    train_upper_layers: bool = Field(True, description="the policy's layers after the SAE layer")
    train_lower_layers: bool = Field(
        False, description="those up to it too; what the SAE reads then drifts away from it"
    )
    lora: LoraSettings | None = Field(
        None, description="train adapters instead of the whole upper layers"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute inner states anew in the backward pass: less memory, more time"
    )
    health: HealthConfig = HealthConfig()
    panel_every: int | None = Field(None, ge=1, description="steps between two sample panels")
    multipliers: Multipliers = Multipliers()

    @model_validator(mode="after")
    def _one_path_is_left(self) -> JointStage:
        if self.drop_tokens + self.drop_concepts > 1:
            raise ValueError("drop_tokens and drop_concepts are shares of the same answers")
        return self

    @model_validator(mode="after")
    def _lower_layers_with_the_upper(self) -> JointStage:
        if self.train_lower_layers and (self.lora is not None or not self.train_upper_layers):
            raise ValueError(
                "train_lower_layers needs train_upper_layers; adapters are for upper layers only"
            )
        return self

    def weights(self, step: int) -> dict[str, float]:
        """Weight of every term in the total loss (Eq. 6) of a step."""
        phase = self.late if self.late and step >= self.late.from_step else self
        return {
            "policy": self.rl_weight,
            "confidence": self.conf_weight,
            "heatmap_bce": self.seg_weight,
            "heatmap_dice": self.seg_weight * phase.heatmap_dice_weight,
            "dice": self.seg_weight * phase.dice_weight,
            "focal": self.seg_weight * phase.focal_weight,
            "mask_bce": self.seg_weight * self.mask_bce_weight,
            "place": self.place_weight,
            "language": self.language_weight,
            "form": self.form_weight,
        }
