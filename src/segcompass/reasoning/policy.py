"""The policy: writes a chain of thought and K concentration tokens, and shows its states (Eq. 1).

Hidden states are read by forward hooks in the pass that happens anyway: while generating, or in
the teacher-forced pass of training. A concentration token's state is taken where it is consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from segcompass.reasoning.attention import AttentionTap
from segcompass.reasoning.backbones import Backbone, VisualInput
from segcompass.reasoning.forced_form import ForcedForm
from segcompass.reasoning.prompts import EncodedPrompt, ParsedAnswer, Prompt, PromptConfig
from segcompass.reasoning.sequences import Sequences, append, pad_left
from segcompass.reasoning.state_tap import StateTap
from segcompass.reasoning.streaming import OnText, TextStream
from segcompass.types import ReasoningBatch, Status, TokenKind


class PolicyConfig(BaseModel, frozen=True, extra="forbid"):
    """How the policy is used."""

    prompt: PromptConfig = PromptConfig()
    sae_layer: int = Field(1, ge=0, description="the SAE reads the output of layers[sae_layer]")
    pad_to_square: bool = Field(False, description="centre pictures on a square (LLaVA)")
    stretch_to: int | None = Field(
        None, ge=28, description="scale pictures to a square of this side, in px (Seg-Zero)"
    )
    max_new_tokens: int = Field(160, ge=1, description="longest answer in tokens")


class Generation(NamedTuple):
    """Answers and the states they were written with."""

    states: ReasoningBatch  # of the tokens that the model read; the very last one is missing
    answers: list[ParsedAnswer]
    texts: list[str]
    sequences: Sequences  # prompts and answers; end-of-text counts as padding
    is_answer: Bool[Tensor, "B M"]  # the tokens of each answer, end-of-text included
    hidden: Float[Tensor, "B l D"]  # final states: position t wrote token t + 1
    image_attention: list[Float[Tensor, "K n"]] | None = None  # see reasoning/attention.py


class Policy(nn.Module):
    """A multimodal language model that answers in the project's form.

    Args:
        backbone: The model family's adapter around a Hugging Face model.
        tokenizer: Knows the concentration tokens.
        config: Prompt, SAE layer, limits.
    """

    def __init__(self, backbone: Backbone, tokenizer: Any, config: PolicyConfig) -> None:
        super().__init__()
        if config.sae_layer >= len(backbone.layers):
            raise ValueError(
                f"sae_layer {config.sae_layer} does not exist; "
                f"the policy has layers 0 to {len(backbone.layers) - 1}"
            )
        self.model: Any = backbone.model  # transformers' own annotations say too little
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = config
        # While the tokens' rows train, the module that holds them (learning/engine/token_rows.py).
        self.token_rows: Any = None
        self.prompt = Prompt(
            config.prompt, tokenizer, backbone.image_token_id, int(tokenizer.eos_token_id)
        )

    @property
    def width(self) -> int:
        """D, the width of the language model."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def slots(self) -> int:
        """K, the number of concentration tokens; none where answers are text."""
        return len(self.prompt.slot_ids)

    @property
    def sae_layer(self) -> nn.Module:
        """The layer whose output the SAE reads."""
        return self.backbone.layers[self.config.sae_layer]

    def encode(
        self,
        visuals: Sequence[VisualInput],
        instructions: Sequence[str],
        thoughts: Sequence[str] | None = None,
        conclusions: Sequence[str] | None = None,
    ) -> Sequences:
        """Left-padded prompts, followed by whole answers when ``thoughts`` are given.

        Args:
            visuals: One picture per row.
            instructions: One text per row.
            thoughts: Chains of thought, one per row.
            conclusions: What those answers conclude with, where their form is a text.

        Raises:
            ValueError: if the counts differ, an instruction is empty or too long, or a conclusion
                is not of the configured form.
        """
        told = len(instructions if thoughts is None else thoughts)
        concluded = told if conclusions is None else len(conclusions)
        if not len(visuals) == len(instructions) == told == concluded > 0:
            raise ValueError(
                f"got {len(visuals)} pictures, {len(instructions)} instructions and {told} "
                "answers; give one of each for every row, and at least one row"
            )
        rows: list[EncodedPrompt] = []
        for i, (visual, instruction) in enumerate(zip(visuals, instructions, strict=True)):
            row = self.prompt.encode(instruction, visual.grid[0] * visual.grid[1])
            if thoughts is not None:
                conclusion = "" if conclusions is None else conclusions[i]
                answer = self.prompt.encode_answer(thoughts[i], conclusion)
                row = EncodedPrompt(row.ids + answer.ids, row.kinds + answer.kinds)
            rows.append(row)
        return self.pad(rows)

    def pad(self, rows: Sequence[EncodedPrompt]) -> Sequences:
        """Stack sequences of unequal length, padding on the left."""
        ids, kinds = pad_left(rows, int(self.tokenizer.pad_token_id))
        return Sequences(ids.to(self.model.device), kinds.to(self.model.device))

    def forward(
        self,
        sequences: Sequences,
        visuals: Sequence[VisualInput],
        features: Sequence[Float[Tensor, "n D"]] | None = None,
    ) -> tuple[ReasoningBatch, Float[Tensor, "B L D"]]:
        """One teacher-forced pass over whole answers.

        Args:
            sequences: Prompts with answers, from :meth:`encode`.
            visuals: One per row.
            features: Precomputed image features (:meth:`Backbone.embed_images`), if at hand.

        Returns:
            The tapped states, and the last hidden states for the language head.
        """
        tap = StateTap()
        with tap.armed(self.sae_layer, self.backbone.final_norm):
            self.model.model(
                input_ids=sequences.ids,
                attention_mask=sequences.attention,
                use_cache=False,
                **self._image_arguments(visuals, features),
                **self.backbone.position_arguments(sequences.ids),
            )
        states = self._states(sequences, tap.sae[0], tap.final[0])
        # While generating, the end-of-text is consumed in some rows of a batch and not in others.
        states.token_kinds[:, -1][sequences.ids[:, -1] == self.prompt.eos_token_id] = int(
            TokenKind.PADDING
        )
        return states, tap.final[0]

    def _image_arguments(
        self, visuals: Sequence[VisualInput], features: Sequence[Tensor] | None
    ) -> dict[str, Any]:
        if features is None:
            return self.backbone.image_arguments(list(visuals))
        return self.backbone.cached_image_arguments(list(features), list(visuals))

    @contextmanager
    def spliced(self, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the block, what follows the SAE layer reads ``replace(states)`` instead."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (replace(output[0]), *output[1:])
            return replace(output)

        handle = self.sae_layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as a reader would see it, blanks included."""
        # Decoding between two fixed tokens keeps the leading blank that decoders strip.
        anchor = self.prompt.eos_token_id
        start = len(self.prompt.decode([anchor]))
        return [self.prompt.decode([anchor, token])[start:] for token in ids]

    def language_logits(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Next-token logits of chosen positions."""
        logits = self.model.get_output_embeddings()(hidden)
        assert isinstance(logits, Tensor)
        return logits

    @torch.no_grad()
    def generate(
        self,
        visuals: Sequence[VisualInput],
        instructions: Sequence[str],
        *,
        force_form: bool = False,
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
        features: Sequence[Float[Tensor, "n D"]] | None = None,
        on_text: OnText | None = None,
        attention: bool = False,
    ) -> Generation:
        """Answer a batch; greedy at temperature 0.

        Args:
            visuals: One picture per row.
            instructions: One text per row.
            force_form: Constrain the answer to its grammar, so that any checkpoint answers well.
            temperature: 0 for greedy decoding, else sampling without truncation.
            max_new_tokens: Longest answer; the policy's own limit by default.
            features: Precomputed image features, if at hand.
            on_text: Told after every token what each row says so far; what it raises ends the call.
            attention: Also tell what the concentration tokens look at, where that can be seen.

        Raises:
            ValueError: if an instruction is empty or too long, or an answer has no room.
        """
        prompts = self.encode(visuals, instructions)
        limit = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
        tap, looks = StateTap(), AttentionTap(prompts.ids.shape[1])
        watched = list(self.backbone.layers) if attention else []
        with tap.armed(self.sae_layer, self.backbone.final_norm), looks.armed(watched):
            output = self.model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.attention,
                generation_config=self._generation_config(temperature, limit),
                logits_processor=LogitsProcessorList(
                    [ForcedForm(self.prompt, prompts.ids.shape[1], limit)] if force_form else []
                ),
                streamer=None if on_text is None else TextStream(self.prompt, on_text),
                **self._image_arguments(visuals, features),
                **self.backbone.position_arguments(prompts.ids),
            )
        eos, written = self.prompt.eos_token_id, output[:, prompts.ids.shape[1] :].tolist()
        answers = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in written]
        made = self._generation(prompts, answers, torch.cat(tap.sae, 1), torch.cat(tap.final, 1))
        return made._replace(image_attention=looks.to_image(made.sequences.kinds))

    @torch.no_grad()
    def read(
        self,
        visuals: Sequence[VisualInput],
        instructions: Sequence[str],
        answers: Sequence[list[int]],
        features: Sequence[Float[Tensor, "n D"]] | None = None,
    ) -> Generation:
        """What :meth:`generate` returns when it writes these answers, from one pass over them.

        Args:
            visuals: One picture per row.
            instructions: One text per row.
            answers: Token ids, end-of-text included where an answer came to it; none is empty.
            features: Precomputed image features, if at hand.
        """
        prompts = self.encode(visuals, instructions)
        sequences, _ = self._behind(prompts, answers)
        states, final = self(sequences, visuals, features)
        return self._generation(prompts, answers, states.sae_states, final)

    def _generation_config(self, temperature: float, limit: int) -> GenerationConfig:
        untruncated = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=limit,
            do_sample=temperature > 0,
            **(untruncated if temperature > 0 else {}),
            # A picture's placeholder in an answer could not be read back by any later pass.
            suppress_tokens=self.backbone.placeholder_ids,
            pad_token_id=int(self.tokenizer.pad_token_id),
            eos_token_id=self.prompt.eos_token_id,
        )

    def _behind(
        self, prompts: Sequences, answers: Sequence[list[int]]
    ) -> tuple[Sequences, Bool[Tensor, "B M"]]:
        """Answers behind their prompts, padded on the right; and where they stand."""
        encoded = [EncodedPrompt(ids, self.prompt.answer_kinds(ids)) for ids in answers]
        return append(prompts, encoded, int(self.tokenizer.pad_token_id))

    def _generation(
        self,
        prompts: Sequences,
        answers: Sequence[list[int]],
        sae: Float[Tensor, "B l D"],
        final: Float[Tensor, "B l D"],
    ) -> Generation:
        """Parse answers, and line their tokens up with their states."""
        sequences, is_answer = self._behind(prompts, answers)
        # The very last token is never read while generating. A sharded model goes on reading, for
        # nothing, until all ranks have their answers.
        consumed = sequences.ids.shape[1] - 1
        sae, final = sae[:, :consumed], final[:, :consumed]
        parsed = [self.prompt.parse(ids) for ids in answers]
        eos = self.prompt.eos_token_id
        texts = [self.prompt.decode(ids[:-1] if ids[-1] == eos else ids) for ids in answers]
        read = Sequences(sequences.ids[:, :consumed], sequences.kinds[:, :consumed])
        ok = torch.tensor([a.status == Status.OK for a in parsed], device=read.ids.device)
        states = self._states(read, sae, final, ok)
        return Generation(states, parsed, texts, sequences, is_answer, final)

    def _states(
        self,
        sequences: Sequences,
        sae: Float[Tensor, "B L D"],
        final: Float[Tensor, "B L D"],
        well_formed: Bool[Tensor, "B"] | None = None,
    ) -> ReasoningBatch:
        is_slot = sequences.kinds == TokenKind.CONCENTRATION
        counted = is_slot.sum(1) == self.slots
        well_formed = counted if well_formed is None else well_formed & counted
        slots = final.new_zeros(len(final), self.slots, final.shape[-1])
        states = final[well_formed][is_slot[well_formed]]
        slots[well_formed] = states.view(int(well_formed.sum()), self.slots, final.shape[-1])
        return ReasoningBatch(sequences.ids, sequences.kinds.clone(), sae, slots, well_formed)
