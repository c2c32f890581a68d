"""What the parts of a joint step cost: bytes and floating-point operations, as pure formulas.

One multiply-add counts as two operations. Products with weights and with keys and values are
counted; norms, activations, rotary positions and softmax are not (below 1 % at real sizes).
Letters as in `types.py`; n is the number of sequences, F the width of the feed-forward part, V
the vocabulary, s the bytes of a working weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.learning.engine.lora import LoraSettings
from segcompass.reasoning.backbones import Backbone
from segcompass.types import Slots

ADAM_BYTES = 8  # both moments of a weight, fp32
MASTER_BYTES = 4
LOG_PROB_CHUNK = 1024  # positions whose logits are alive at once, see `grpo.answer_log_probs`


@dataclass(frozen=True)
class PolicyShape:
    """Sizes of a policy; ``*_weights`` are numbers of parameters."""

    width: int  # D
    heads: int
    key_heads: int  # of keys and values
    head_width: int
    ffn: int  # F
    vocabulary: int  # V
    lower: int  # layers up to and with the SAE layer
    upper: int  # layers after it
    matrix_weights: int  # of one layer: all that multiplies a token's state
    lower_weights: int
    upper_weights: int  # with the final norm
    other_weights: int  # vision tower, embeddings, language head
    root_weights: int  # embeddings and language head
    eager: bool = False  # attention that writes its L × L probabilities

    @property
    def layers(self) -> int:
        return self.lower + self.upper

    @property
    def weights(self) -> int:
        """All parameters of the policy."""
        return self.lower_weights + self.upper_weights + self.other_weights


def shape_of(backbone: Backbone, sae_layer: int) -> PolicyShape:
    """Read the sizes off a policy; one on the meta device will do."""
    model: Any = backbone.model
    config = model.config.get_text_config()
    layers = list(backbone.layers)
    lower, upper = layers[: sae_layer + 1], layers[sae_layer + 1 :]
    counted = [size([m]) for m in (nn.ModuleList(lower), nn.ModuleList(upper), backbone.final_norm)]
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    heads = int(config.num_attention_heads)
    return PolicyShape(
        width=int(config.hidden_size),
        heads=heads,
        key_heads=int(config.num_key_value_heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        ffn=int(config.intermediate_size),
        vocabulary=int(embeddings[0].weight.shape[0]),
        lower=len(lower),
        upper=len(upper),
        matrix_weights=sum(
            m.weight.numel() for m in layers[0].modules() if isinstance(m, nn.Linear)
        ),
        lower_weights=counted[0],
        upper_weights=counted[1] + counted[2],
        other_weights=size([model]) - sum(counted),
        root_weights=size([m for m in embeddings if m is not None]),
        eager=getattr(config, "_attn_implementation", None) == "eager",
    )


def size(modules: Iterable[nn.Module], *, trainable: bool = False) -> int:
    """Parameters, each counted once however often it is shared."""
    found = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in found.values() if p.requires_grad or not trainable)


# Operations ------------------------------------------------------------------------------------


def layers_flops(shape: PolicyShape, layers: int, tokens: float, context: float) -> float:
    """``layers`` layers read ``tokens`` tokens, each attending over ``context`` positions.

    2 · matrix weights a token, and 2 · 2 · heads · head width for each position attended to. The
    whole square counts, as kernels without causal skipping compute it.
    """
    attention = 4 * shape.heads * shape.head_width * context
    return layers * tokens * (2 * shape.matrix_weights + attention)


def logits_flops(shape: PolicyShape, tokens: float) -> float:
    """The language head on ``tokens`` positions: 2 · D · V each."""
    return 2 * shape.width * shape.vocabulary * tokens


def backward_flops(shape: PolicyShape, tokens: float, context: float, *, lora: bool) -> float:
    """Through the upper layers: gradients of inputs and of weights cost a forward pass each.

    Under LoRA the matrices are frozen, their weights' gradients fall away and attention's two
    halves stay; the adapters themselves are below 2 % at rank 16.
    """
    forward = layers_flops(shape, shape.upper, tokens, context)
    matrices = shape.upper * tokens * 2 * shape.matrix_weights
    return 2 * forward - (matrices if lora else 0.0)


def rollout_flops(shape: PolicyShape, n: float, prompt: int, answer: int) -> float:
    """Sample n answers with a cache: the prompt at once, then one token after the other.

    Token t attends over prompt + t positions: prompt + answer / 2 on average.
    """
    prefill = layers_flops(shape, shape.layers, n * prompt, prompt)
    decode = layers_flops(shape, shape.layers, n * answer, prompt + (answer + 1) / 2)
    return prefill + decode + logits_flops(shape, n * (answer + 1))


def vision_flops(backbone: Backbone, tokens: int) -> float:
    """The vision tower on a picture of ``tokens`` image tokens.

    2 · weights · rows of every matrix, where rows are patches, and image tokens behind the merger
    or projector; attention over the window, or over the picture in layers that see all of it.
    """
    config: Any = backbone.model.config.vision_config
    merge = getattr(config, "spatial_merge_size", 1) ** 2
    patches = tokens * merge
    total = 0
    for name, module in backbone.vision.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            merged = "merger" in name or "linear" in name
            total += 2 * module.weight.numel() * (tokens if merged else patches)
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    everywhere = getattr(config, "fullatt_block_indexes", range(depth))
    window = (getattr(config, "window_size", 0) // config.patch_size) ** 2
    context = sum(patches if i in everywhere else min(window, patches) for i in range(depth))
    return float(total + 4 * config.hidden_size * patches * context)


def sae_flops(interface: ConceptSlots, tokens: float) -> float:
    """Encoding: 2 · D · S a token; finding and summing the active latents is small beside it."""
    return 2 * interface.sae.config.d_in * interface.sae.config.d_sae * tokens


def counted_flops(run: Callable[[], object]) -> float:
    """Operations of a pass without gradient on the meta device, counted by PyTorch."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def align_pass(interface: ConceptSlots, length: int) -> Slots:
    """Codebook encoder, fusion and slot mapper on one made-up sequence, on the meta device."""
    slots, width = interface.codebook.config.slots, interface.sae.config.d_in
    tokens = torch.empty(1, length, interface.codebook.config.width, requires_grad=True)
    vectors = interface.codebook.aggregate(tokens, torch.empty(1, length, dtype=torch.bool)).vectors
    queries = interface.fusion(torch.empty(1, slots, width, requires_grad=True), vectors)
    side = interface.decoder.grid
    made: Slots = interface.mapper(queries, torch.empty(1, interface.decoder.channels, side, side))
    return made


def decode_pass(interface: ConceptSlots, slots: int) -> Tensor:
    """Masks of some slots of one picture, on the meta device."""
    decoder, side = interface.decoder, interface.decoder.grid
    heatmaps = torch.empty(1, slots, side, side, requires_grad=True)
    masks: Tensor = decoder(torch.empty(1, decoder.channels, side, side), heatmaps)
    return masks


def encode_pass(encoder: ImageEncoder) -> Tensor:
    """Image keys of one picture, on the meta device."""
    keys: Tensor = encoder(torch.empty(1, 3, encoder.side, encoder.side))
    return keys


# Bytes -----------------------------------------------------------------------------------------


def layer_bytes(shape: PolicyShape, context: int, s: int) -> float:
    """What one trained layer keeps for its backward pass, per token.

    Two norms: an fp32 copy, the normed state before and after the gain: 2 · (4 + 2s) · D.
    Attention: queries, keys and values repeated to all heads, output, log-sum-exp, and the mask
    as numbers: 4s · heads · head width + 4 · heads + s · L. Eager attention keeps neither of the
    last two, but its probabilities in fp32, and again in a smaller working precision.
    Feed-forward: gate, its activation, up, their product: 4s · F.
    """
    norms = 2 * (4 + 2 * s) * shape.width
    attention = 4 * s * shape.heads * shape.head_width
    if shape.eager:
        attention += (4 if s == 4 else 4 + s) * shape.heads * context
    else:
        attention += 4 * shape.heads + s * context
    return norms + attention + 4 * s * shape.ffn


def activation_bytes(shape: PolicyShape, n: float, length: int, s: int, *, kept: bool) -> float:
    """Of the policy pass with gradient over n sequences of ``length`` tokens.

    Without checkpointing every upper layer keeps its share. With it each keeps its input (s · D)
    and one is made again at a time. The gradients inside one layer's backward pass come on top:
    s · (3F + 4D).
    """
    tokens = n * length
    one = tokens * layer_bytes(shape, length, s)
    working = tokens * s * (3 * shape.ffn + 4 * shape.width)
    ends = tokens * (4 + 3 * s) * shape.width  # embeddings, SAE states, final norm and its output
    layers = shape.upper * one if kept else one + shape.upper * tokens * s * shape.width
    return layers + working + ends


def log_prob_bytes(shape: PolicyShape, s: int) -> float:
    """Logits of one chunk: as made, in fp32, by temperature, and two fp32 gradients of them."""
    return LOG_PROB_CHUNK * shape.vocabulary * (2 * s + 4 * 4)


def cache_bytes(shape: PolicyShape, n: float, length: int, s: int) -> float:
    """Keys and values of n sequences: 2 · layers · key heads · head width · s a token."""
    return 2 * s * shape.layers * shape.key_heads * shape.head_width * n * length


def tapped_bytes(shape: PolicyShape, n: float, length: int, s: int) -> float:
    """States of the SAE layer and the last one while sampling; joining the steps doubles them."""
    return 4 * s * shape.width * n * length


def head_bytes(interface: ConceptSlots, length: int) -> float:
    """What codebook encoder and slot mapper keep for their backward pass, one sequence, fp32.

    A block keeps 8 states and twice its feed-forward: (32C + 8F) a token; the last block, whose
    tokens are only read, 4 states. The mapper keeps for every cell its keys before and after the
    projection, and for every slot three score maps and twice the confidence head's channels.
    """
    config, mapper = interface.codebook.config, interface.mapper
    token = (config.layers - 1) * (32 * config.width + 8 * config.ffn) + 16 * config.width
    maps = 3 * mapper.config.heads
    if mapper.config.confidence == "scores":
        maps += 2 * mapper.config.confidence_width
    cell = mapper.to_k.in_channels + mapper.to_k.out_channels + config.slots * maps
    return float(token * length + 4 * cell * interface.decoder.grid**2)


def kept_bytes(run: Callable[[], object], module: nn.Module) -> float:
    """What a pass on the meta device keeps for its backward pass; parameters do not count."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.device("meta"), torch.enable_grad(), hooks:
        run()
    return float(sum(storage.nbytes() for storage in found.values()))


def encoder_pass_bytes(encoder: ImageEncoder) -> float:
    """The image encoder on one picture, fp32: two copies of an attention map over all cells."""
    heads: int = encoder.vision_encoder.config.num_attention_heads
    return 2.0 * 4 * heads * encoder.grid**4


def lora_weights(backbone: Backbone, sae_layer: int, settings: LoraSettings) -> int:
    """Adapters of rank r on the upper layers: r · (inputs + outputs) of every target."""
    return sum(
        settings.rank * (module.in_features + module.out_features)
        for layer in list(backbone.layers)[sae_layer + 1 :]
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in settings.targets
    )
