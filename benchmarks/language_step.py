"""Whole steps of reinforcement on the language part alone, against TRL's GRPOTrainer.

    pip install trl
    python benchmarks/language_step.py [--json] [--length 512] [--group 4] [--steps 5]

A step is: sample G answers to one prompt, reward them, score them under the frozen reference, one
pass with gradient, clip, and move the upper half of the layers by AdamW. Both sides have language
models of the same sizes (fp32, random), prompts and answers of the same numbers of tokens, the
same reward, clip, KL penalty and frozen weights. Ours is JointStep on answers without masks; image
features, which only ours has, were computed once and stand for prompt tokens. Steps alternate, and
the median of each side counts. TRL's own logging, saving and checkpointing of layers are off.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joint_step
import torch
from measuring import machine, needs, report, row
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from segcompass.learning.engine.optimizer import MasterWeights
from segcompass.learning.rollouts import Rollouts
from segcompass.learning.teachers import MaskTeacher
from segcompass.learning.train_joint import JointStep, Questions, freeze
from segcompass.reasoning.backbones import QwenBackbone
from segcompass.reasoning.policy import Policy

RATE, CLIP, KL, DECAY = 1e-6, 0.2, 0.2, 0.01


def variety(answers: Sequence[Sequence[int]]) -> list[float]:
    """The reward of both sides: the share of an answer's tokens that are different ones."""
    return [len(set(ids)) / len(ids) for ids in answers]


class Endless(QwenBackbone):
    """Never ends an answer, as TRL's side is told with ``min_new_tokens``."""

    @property
    def placeholder_ids(self) -> list[int]:
        return [*super().placeholder_ids, int(self.model.config.get_text_config().eos_token_id)]


class Variety(MaskTeacher):
    """No answer has masks: random policies never keep to the form."""

    def rewards(self, rollouts: Rollouts, questions: Questions) -> dict[str, Tensor]:
        assert not rollouts.well_formed.any()
        assert rollouts.is_answer.sum(1).unique().tolist() == [self.stage.rollout.max_new_tokens]
        earned = torch.tensor(variety(rollouts.ids))
        return {"reward": earned, "reward_format": earned, "reward_mask": 0 * earned}


def our_step(options: argparse.Namespace, folder: Path) -> tuple[Callable[[int], None], int, int]:
    """A whole step as a function of its number, and the lengths of prompt and answer."""
    parts, config = joint_step.build_parts(options, folder, Endless)
    policy: Policy = parts[0]
    probe = joint_step.one_question(JointStep(*parts, config, config.train_joint))
    questions = probe.questions(probe.samples)
    asked = [s.instruction for s in questions.samples]
    prompt = policy.encode(questions.visuals, asked).ids.shape[1]
    rollout = {"group": options.group, "max_new_tokens": options.length - prompt}
    changes = {"rollout": rollout, "grpo": {"clip": CLIP, "kl": KL}}
    changes |= {"learning_rate": RATE, "weight_decay": DECAY, "steps": 1000, "betas": (0.9, 0.999)}
    stage = type(config.train_joint).model_validate({**config.train_joint.model_dump(), **changes})
    weights = MasterWeights({"policy": freeze(*parts, stage)["policy"]}, stage)
    step = joint_step.one_question(JointStep(*parts, config, stage))
    step.teacher = Variety(*parts, stage, None)

    def run(number: int) -> None:
        torch.manual_seed(number)
        (values,) = step(number)
        values["loss"].backward()  # type: ignore[no-untyped-call]
        weights.step(number)

    return run, prompt, options.length - prompt


def their_model(options: argparse.Namespace, folder: Path, eos: int, pad: int) -> nn.Module:
    """The same language model as a plain causal one, its lower half frozen."""
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=options.d_in,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)  # the reference is read from there
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    for part in (*model.model.layers[options.layers // 2 :], model.model.norm):
        part.requires_grad_(True)
    return model


class Alternate(TrainerCallback):  # type: ignore[misc]
    """Times TRL's steps, and takes and times one of ours after each."""

    def __init__(self, ours: Callable[[int], None]) -> None:
        self.ours, self.start = ours, 0.0
        self.seconds: dict[str, list[float]] = {"ours": [], "trl": []}

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.seconds["trl"].append(time.perf_counter() - self.start)
        self.start = time.perf_counter()
        with torch.enable_grad():
            self.ours(int(state.global_step))
        self.seconds["ours"].append(time.perf_counter() - self.start)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate the steps of both sides; returns the row."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as base, contextlib.redirect_stdout(sys.stderr):
        folder = Path(base)
        ours, prompt, answer = our_step(options, folder / "scenes")
        tokenizer = joint_step.build_policy(options).tokenizer
        text = " ".join(["red"] * prompt)
        assert len(tokenizer(text)["input_ids"]) == prompt
        model = their_model(options, folder / "lm", tokenizer.eos_token_id, tokenizer.pad_token_id)
        settings = GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=options.steps + 1,
            per_device_train_batch_size=options.group,
            num_generations=options.group,
            max_completion_length=answer,
            generation_kwargs={"min_new_tokens": answer},
            temperature=1.0,
            epsilon=CLIP,
            beta=KL,
            loss_type="grpo",
            learning_rate=RATE,
            weight_decay=DECAY,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        watch = Alternate(ours)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completion_ids, **_: variety(completion_ids),
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": [text] * 8}),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    medians = {name: statistics.median(found[1:]) for name, found in watch.seconds.items()}
    return row("language_step_vs_trl", "s/step", medians["ours"], medians["trl"])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The one row in the format of all benchmarks; the options are those of joint_step.py."""
    needs("trl")
    return {"name": "language_step", "machine": machine(), "rows": [compare(options)]}


if __name__ == "__main__":
    report(measure, joint_step.parse())
