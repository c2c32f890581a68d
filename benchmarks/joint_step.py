"""The joint step after its rollout, against the plain formulation, on the same rollouts.

    python benchmarks/joint_step.py [--json] [--length 512] [--group 4] [--repeats 5]

One question, G sampled answers, L tokens each with the prompt; a random Qwen2.5-VL policy whose
lower half, up to the SAE layer, is frozen on both sides. In the same run, on the same weights
(fp32) and the same rollouts, forward and backward of reinforcement and supervision together:

    ours    JointStep: one policy pass with gradient gives log-probabilities and states alike;
            sparse codes; logits for a chunk of the answers' tokens at a time
    plain   a policy pass with gradient for the log-probabilities and a second one for the states,
            each with every layer's states and the logits of all L tokens, as a call of the model
            gives them; whole softmaxes; dense [B, L, S] activations; the reference likewise

Both sides share matching and losses, and the frozen image features. Loss and all gradients are
compared first; beyond the tolerance the script fails. Time and memory are measured as in
measuring.py. The rollout is the same for both and reported apart. Where TRL is installed,
language_step.py adds whole steps of reinforcement alone against its GRPOTrainer.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from alignment import threshold_for
from measuring import machine, median_seconds, new_parser, report, row, transient_bytes
from torch import Tensor, nn
from transformers import SamModel

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.data.scenes.writer import write_scenes
from segcompass.grounding.image_encoder import ImageEncoder, sam_config
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.base import Alignment
from segcompass.interfaces.concept_slots import ConceptSlots, HeadConfig, read_by_sae
from segcompass.learning import train_joint
from segcompass.learning.config import RunConfig
from segcompass.learning.engine.loop import Losses
from segcompass.learning.grpo import advantages, grpo_loss
from segcompass.learning.rollouts import Rollouts, sample_answers
from segcompass.learning.teachers import MaskTeacher
from segcompass.learning.train_joint import JointStep, Questions, freeze
from segcompass.reasoning.backbones import QwenBackbone
from segcompass.reasoning.from_scratch import (
    ScratchConfig,
    build_image_processor,
    build_model,
    build_tokenizer,
)
from segcompass.reasoning.policy import Policy, PolicyConfig
from segcompass.reasoning.prompts import PromptConfig
from segcompass.types import ReasoningBatch, TokenKind

TOLERANCE = 1e-3  # of gradients, relative to the largest entry; advantages amplify rounding


class Paid(MaskTeacher):
    """Random weights mask alike, so each answer of a group is paid a little more."""

    def rewards(self, rollouts: Rollouts, questions: Questions) -> dict[str, Tensor]:
        found = super().rewards(rollouts, questions)
        return {**found, "reward": found["reward"] + torch.arange(len(rollouts.ids)).float()}


class PaidDensely(Paid):
    """The same with dense activations."""

    def align(
        self, states: ReasoningBatch, questions: Questions, gates: Tensor | None = None
    ) -> Alignment:
        """Eq. 4 and Fig. 3 over all latents."""
        interface, readable = self.interface, read_by_sae(states)
        sae, codebook = interface.sae, interface.codebook
        activations = F.threshold(sae.encode(states.sae_states), sae.config.threshold, 0.0)
        concepts = codebook.aggregate(activations @ codebook.codebook, readable)
        queries = interface.fusion(states.concentration_states, concepts.vectors, gates)
        return interface.ground(queries, questions.keys, questions.frames)


class FusedStep(JointStep):
    """Our step."""

    paid: type[MaskTeacher] = Paid

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        policy, encoder, interface, _, stage = parts
        self.teacher = self.paid(policy, encoder, interface, stage, None)


class PlainStep(FusedStep):
    """The same step, with every intermediate in full and one policy pass for each purpose."""

    paid = PaidDensely

    def __call__(self, step: int) -> Iterator[Losses]:
        group = self.stage.rollout.group
        questions = self.questions(self.samples).take([0] * group)
        rollouts = train_joint.sample_answers(self.policy, [], [], self.stage.rollout)
        new = self.log_probs(self.policy, rollouts, questions)
        states = self.states(rollouts, questions)
        rewards = self.teacher.rewards(rollouts._replace(states=states), questions)
        with torch.no_grad():
            before = self.log_probs(self.reference, rollouts, questions)
        gains = advantages(rewards["reward"].unflatten(0, (-1, group))).flatten()
        old, mask = rollouts.log_probs, rollouts.is_answer
        loss, kl, _ = grpo_loss(new, old, before, mask, gains, self.stage.grpo)
        terms = {"policy": loss, "kl": kl, **self.teacher.supervise(states, questions), **rewards}
        counts = {name: values.numel() for name, values in terms.items()}
        yield self.losses(terms, counts, states.sae_states, self.stage.weights(step))

    def whole_pass(self, policy: Policy, rollouts: Rollouts, questions: Questions) -> Any:
        """Everything that a call of the model gives: all layers' states, all tokens' logits."""
        ids, backbone = rollouts.sequences.ids, policy.backbone
        return policy.model(
            input_ids=ids,
            attention_mask=rollouts.sequences.attention,
            use_cache=False,
            output_hidden_states=True,
            **backbone.cached_image_arguments(questions.features, questions.visuals),
            **backbone.position_arguments(ids),
        )

    def log_probs(self, policy: Policy, rollouts: Rollouts, questions: Questions) -> Tensor:
        """Log-softmax over all logits, then the tokens that were said."""
        logits = self.whole_pass(policy, rollouts, questions).logits.float()
        logits = logits / self.stage.rollout.temperature
        logits[..., policy.backbone.placeholder_ids] = -torch.inf
        said = logits[:, :-1].log_softmax(-1).gather(2, rollouts.sequences.ids[:, 1:, None])
        return F.pad(said[..., 0], (1, 0)).where(rollouts.is_answer, 0.0)

    def states(self, rollouts: Rollouts, questions: Questions) -> ReasoningBatch:
        """States for SAE and slots, from a pass of their own."""
        assert rollouts.well_formed.all()
        layers = self.whole_pass(self.policy, rollouts, questions).hidden_states
        ids, kinds = rollouts.sequences
        slots = layers[-1][kinds == TokenKind.CONCENTRATION].unflatten(0, (len(ids), -1))
        read = layers[self.policy.config.sae_layer + 1]
        return ReasoningBatch(ids, kinds, read, slots, rollouts.well_formed)


class Case(NamedTuple):
    """Both sides around the same weights, and what they are given."""

    ours: FusedStep
    plain: PlainStep
    rollouts: Rollouts
    rollout_s: float
    active: float  # codes a token

    def step(self, side: JointStep) -> Callable[[], Tensor]:
        """Forward and backward; the gradients are left in ``.grad``."""

        def run() -> Tensor:
            with mock.patch.object(train_joint, "sample_answers", lambda *_, **__: self.rollouts):
                (values,) = side(0)
            values["loss"].backward()  # type: ignore[no-untyped-call]
            return values["loss"].detach()

        return run

    def trained(self) -> dict[str, nn.Parameter]:
        parts = {"policy": self.ours.policy, "interface": self.ours.interface}
        named = ((f"{n}.{m}", p) for n, part in parts.items() for m, p in part.named_parameters())
        return {name: p for name, p in named if p.requires_grad}

    def clear(self) -> None:
        for parameter in (*self.trained().values(), *self.ours.place.parameters()):
            parameter.grad = None
        for parameter in self.plain.place.parameters():
            parameter.grad = None


def build_policy(options: argparse.Namespace, family: type[QwenBackbone] = QwenBackbone) -> Policy:
    """A random policy with the sizes of the options, and a small vision tower."""
    side = round(16 * options.image_tokens**0.5)
    sizes = ScratchConfig(
        width=options.d_in,
        layers=options.layers,
        heads=options.heads,
        ffn=options.ffn,
        vision_width=64,
        vision_layers=1,
        image_side=side,
    )
    tokenizer = build_tokenizer(["the red mug at b3."], 512, options.slots)
    model = build_model(sizes, tokenizer, seed=0)
    model.resize_token_embeddings(options.vocabulary, mean_resizing=False)
    model.set_attn_implementation("sdpa")
    config = PolicyConfig(
        prompt=PromptConfig(slots=options.slots),
        sae_layer=options.layers // 2 - 1,
        pad_to_square=True,
    )
    return Policy(family(model, build_image_processor(sizes), True), tokenizer, config)


def build_parts(
    options: argparse.Namespace, folder: Path, family: type[QwenBackbone] = QwenBackbone
) -> tuple[tuple[Policy, ImageEncoder, ConceptSlots], RunConfig]:
    """A random model, what is frozen frozen, and a config that points at a few scenes."""
    policy = build_policy(options, family)
    segmenter = sam_config("nano")
    segmenter.initializer_range = 0.3  # far enough from 0 that gradients can be compared
    sam = SamModel(segmenter)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=options.d_in, d_sae=options.d_sae))
    with torch.no_grad():
        sae.W_enc.mul_(10.0)  # unit columns
    head, decoder = HeadConfig(codebook_width=options.width), MaskDecoder(sam)
    interface = ConceptSlots(head, sae, decoder, policy_width=options.d_in, slots=options.slots)
    write_scenes(folder, {"train": 4}, seed=0, workers=1, size=128)
    once = {"steps": 1, "learning_rate": 1e-6}
    rewards = {"threshold": 0.0}  # every mask counts
    joint = {**once, "batch": 1, "rollout": {"group": options.group}, "rewards": rewards}
    stages = {"train_sae": once, "train_joint": joint}
    config = RunConfig.model_validate({"run": folder, "data": {"root": folder}, **stages})
    parts = policy, ImageEncoder(sam), interface
    freeze(*parts, config.train_joint)
    return parts, config


Step = TypeVar("Step", bound=JointStep)


def one_question(step: Step) -> Step:
    """Leave a single question, which has a target."""
    step.samples = [next(s for s in step.samples if s.targets)]
    step.lengths = step.lengths[:1]
    return step


def build_case(options: argparse.Namespace, folder: Path) -> Case:
    """Both sides, the rollouts, and a threshold that leaves ``--active`` codes a token."""
    parts, config = build_parts(options, folder)
    ours = one_question(FusedStep(*parts, config, config.train_joint))
    plain = one_question(PlainStep(*parts, config, config.train_joint))
    rollouts, seconds = answer(ours, options)
    active = settle_threshold(ours, rollouts, options.active)
    return Case(ours, plain, rollouts, seconds, active)


def answer(step: JointStep, options: argparse.Namespace) -> tuple[Rollouts, float]:
    """Whole answers that fill L tokens, and the seconds they took."""
    group = [0] * options.group
    questions = step.questions(step.samples).take(group)
    asked = [s.instruction for s in questions.samples]
    prompt = step.policy.encode(questions.visuals, asked).ids.shape[1]
    config = step.stage.rollout.model_copy(update={"max_new_tokens": options.length - prompt})
    torch.manual_seed(0)
    start = time.perf_counter()
    rollouts = sample_answers(
        step.policy, questions.visuals, asked, config, questions.features, force_form=True
    )
    return rollouts, time.perf_counter() - start


@torch.no_grad()
def settle_threshold(step: JointStep, rollouts: Rollouts, active: int) -> float:
    """Keep about so many codes a token; returns how many there are."""
    sae = step.interface.sae
    states = rollouts.states.sae_states[read_by_sae(rollouts.states)]
    threshold = threshold_for(sae.encode(states), active * len(states))
    sae.config = sae.config.model_copy(update={"threshold": threshold})
    return sae.encode_sparse(states).values.numel() / len(states)


def check_equal(case: Case, tolerance: float = TOLERANCE) -> float:
    """Largest error of loss and gradients against the plain side, relative to the largest entry.

    Raises:
        SystemExit: the two sides disagree, or a parameter is reached on one side only.
    """
    results: list[dict[str, Tensor]] = []
    for side in (case.ours, case.plain):
        case.clear()
        loss = case.step(side)()
        gradients = {n: p.grad for n, p in case.trained().items() if p.grad is not None}
        results.append({"loss": loss, **gradients})
    case.clear()
    ours, plain = results
    if ours.keys() != plain.keys():
        sys.exit(f"gradients reach different weights: {sorted(ours.keys() ^ plain.keys())[:4]}")
    # Attention's key biases have no gradient but rounding, which is not to be compared.
    largest = max(float(wanted.abs().max()) for name, wanted in plain.items() if name != "loss")
    errors = {
        name: float(
            (ours[name] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-4 * largest)
        )
        for name, wanted in plain.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        sys.exit(f"{worst} differs from the plain one by {errors[worst]:.2g}; nothing is timed")
    return errors[worst]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures in the format of all benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        case = build_case(options, Path(folder) / "scenes")
        error = check_equal(case)
        sides = {"ours": case.step(case.ours), "plain": case.step(case.plain)}
        seconds = median_seconds(sides, case.clear, options.repeats)
        peak = {}
        for name, run in sides.items():
            case.clear()
            peak[name] = transient_bytes(run)
    rows = [
        row("time", "s", seconds["ours"], seconds["plain"]),
        row("memory", "bytes", peak["ours"], peak["plain"]),
    ]
    names = ("length", "group", "layers", "d_in", "d_sae", "width", "vocabulary", "repeats")
    settings = {name: getattr(options, name) for name in names}
    settings["answer"] = int(case.rollouts.is_answer.sum(1).max())
    settings |= {"active": case.active, "rollout_s": case.rollout_s, "relative_error": error}
    if importlib.util.find_spec("trl") is None or options.steps == 0:
        settings["trl"] = "not measured: --steps 0, or pip install trl"
    else:
        from language_step import compare

        rows.append(compare(options))
    return {"name": "joint_step", "machine": machine(), "settings": settings, "rows": rows}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; the defaults are the sizes that the project is measured at."""
    parser = new_parser(__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens L of prompt and answer")
    parser.add_argument("--image-tokens", type=int, default=324, help="of these; a square number")
    parser.add_argument("--group", type=int, default=4, help="answers G")
    parser.add_argument("--layers", type=int, default=8, help="of the policy; half of them frozen")
    parser.add_argument("--d-in", type=int, default=512, help="width D of the policy")
    parser.add_argument("--heads", type=int, default=8, help="attention heads of the policy")
    parser.add_argument("--ffn", type=int, default=1408, help="hidden width of its MLP")
    parser.add_argument("--vocabulary", type=int, default=32064, help="tokens, as LLaVA-1.5's")
    parser.add_argument("--d-sae", type=int, default=16384, help="latents S")
    parser.add_argument("--width", type=int, default=512, help="codebook width C, the release's")
    parser.add_argument("--active", type=int, default=64, help="active latents per token")
    parser.add_argument("--slots", type=int, default=6, help="concentration tokens K")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--steps", type=int, default=5, help="timed steps beside TRL; 0: none")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    report(measure, parse())
