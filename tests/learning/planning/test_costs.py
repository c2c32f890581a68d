"""The planner's formulas against what real models of small sizes take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    LAYERS,
    WIDTH,
    policy_config,
    tiny_head,
    tiny_sae,
    tiny_sam,
    write_policy,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.concept_slots import ConceptSlots
from segcompass.learning.engine.lora import LoraSettings, add_lora
from segcompass.learning.engine.optimizer import MasterWeights, OptimizerConfig
from segcompass.learning.planning import costs
from segcompass.learning.planning.costs import PolicyShape, shape_of
from segcompass.presets import assemble
from segcompass.reasoning.loading import load_policy
from segcompass.reasoning.policy import Policy

SAE_LAYER, ROWS, LENGTH = 1, 3, 150
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def load(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Policy, PolicyShape]]:
    """A policy whose layers after the SAE layer train, and its sizes."""

    def make(
        attention: str = "eager", dtype: torch.dtype = torch.float32, **text: Any
    ) -> tuple[Policy, PolicyShape]:
        folder = write_policy(tmp_path_factory.mktemp(family) / "p", family, **text)
        policy = load_policy(folder, policy_config(family, sae_layer=SAE_LAYER), dtype=dtype)
        policy.model.set_attn_implementation(attention)
        policy.requires_grad_(False)
        policy.backbone.layers[SAE_LAYER + 1 :].requires_grad_(True)
        policy.backbone.final_norm.requires_grad_(True)
        return policy, shape_of(policy.backbone, SAE_LAYER)

    return make


def read(policy: Policy) -> Tensor:
    """Last states of some rows of text; the first is padded, so there is an attention mask."""
    ids = torch.randint(0, 300, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    language = policy.model.model.language_model
    states: Tensor = language(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return states


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def kept(run: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps, parameters apart."""
    found: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = run()
    del alive
    return sum(found.values())


def bytes_of(policy: Policy, wanted: Callable[[str], bool]) -> int:
    return sum(p.nbytes for n, p in policy.model.named_parameters() if wanted(n))


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_by_name(tied: bool, load: Callable[..., Any]) -> None:
    policy, shape = load(dtype=torch.bfloat16, tie_word_embeddings=tied)
    if tied:
        policy.model.get_output_embeddings().weight = policy.model.get_input_embeddings().weight
        shape = shape_of(policy.backbone, SAE_LAYER)
    lower = [f"language_model.layers.{i}." for i in range(SAE_LAYER + 1)]
    upper = [f"language_model.layers.{i}." for i in range(SAE_LAYER + 1, LAYERS)]
    upper.append("language_model.norm.")
    assert 2 * shape.lower_weights == bytes_of(policy, lambda n: any(x in n for x in lower))
    assert 2 * shape.upper_weights == bytes_of(policy, lambda n: any(x in n for x in upper))
    assert 2 * shape.weights == bytes_of(policy, lambda _: True)
    ends = bytes_of(policy, lambda n: "embed_tokens" in n or "lm_head" in n)
    assert 2 * shape.root_weights == ends
    assert (shape.lower, shape.upper) == (SAE_LAYER + 1, LAYERS - SAE_LAYER - 1)


def test_the_meta_device_tells_the_same_as_a_loaded_policy(load: Callable[..., Any]) -> None:
    policy, shape = load("sdpa")
    config = policy.model.config
    parts = assemble(config, policy.config, tiny_sam().config, 64, tiny_head())
    assert next(parts.backbone.model.parameters()).is_meta
    assert shape_of(parts.backbone, SAE_LAYER) == shape


def test_operations_of_the_policy_pass(load: Callable[..., Any]) -> None:
    """Exact, as PyTorch counts products; attention is eager, whose products it knows on CPUs."""
    policy, shape = load(num_hidden_layers=4)
    states: list[Tensor] = []
    forward = counted(lambda: states.append(read(policy)))
    assert forward == costs.layers_flops(shape, shape.layers, ROWS * LENGTH, LENGTH)
    backward = counted(lambda: states[0].sum().backward())  # type: ignore[no-untyped-call]
    assert backward == costs.backward_flops(shape, ROWS * LENGTH, LENGTH, lora=False)
    assert backward == forward  # two of four layers, twice
    read_out = counted(lambda: policy.language_logits(states[0][0].detach()))
    assert read_out == costs.logits_flops(shape, LENGTH)


def test_operations_under_lora(load: Callable[..., Any]) -> None:
    """Within 10 %: adapters are small, and the first trained layer's input needs no gradient."""
    policy, shape = load(num_hidden_layers=8, **WIDE)
    policy.requires_grad_(False)
    add_lora(policy, LoraSettings(rank=1))
    states = read(policy)
    backward = counted(lambda: states.sum().backward())  # type: ignore[no-untyped-call]
    expected = costs.backward_flops(shape, ROWS * LENGTH, LENGTH, lora=True)
    assert backward == pytest.approx(expected, rel=0.1)
    assert expected < 0.7 * costs.backward_flops(shape, ROWS * LENGTH, LENGTH, lora=False)


def test_operations_of_sampling(load: Callable[..., Any]) -> None:
    """Within 3 %: the first new token's logits come with the prompt, the last is never read."""
    policy, shape = load()
    prompt, answer = 40, 30
    ids = torch.randint(0, 300, (ROWS, prompt))
    length = {"min_new_tokens": answer, "max_new_tokens": answer}

    def sample() -> None:
        written = policy.model.generate(input_ids=ids, do_sample=False, pad_token_id=0, **length)
        assert written.shape == (ROWS, prompt + answer)

    assert counted(sample) == pytest.approx(
        costs.rollout_flops(shape, ROWS, prompt, answer), rel=0.03
    )


def test_operations_of_the_vision_tower(load: Callable[..., Any], family: str) -> None:
    policy, _ = load()
    policy.model.set_attn_implementation("eager")
    visual = policy.backbone.prepare(np.zeros((64, 64, 3), dtype=np.uint8))
    found = counted(lambda: policy.backbone.embed_images([visual]))
    tokens = visual.grid[0] * visual.grid[1]
    assert found == pytest.approx(costs.vision_flops(policy.backbone, tokens), rel=0.05)


def test_operations_of_sae_head_and_decoder() -> None:
    interface = small_interface()
    z = torch.randn(50, WIDTH)
    assert counted(lambda: interface.sae.encode(z)) == costs.sae_flops(interface, 50)
    real, slots = small_interface(), 2
    keys, heat = torch.randn(1, 32, 8, 8), torch.randn(1, slots, 8, 8)
    meta = small_interface().to("meta")
    found = costs.counted_flops(lambda: costs.decode_pass(meta, slots))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert found == counted(lambda: real.decoder(keys, heat))


def small_interface() -> ConceptSlots:
    config = tiny_head().model_copy(update={"codebook_layers": 2})
    decoder = MaskDecoder(tiny_sam())
    return ConceptSlots(config, tiny_sae(), decoder, policy_width=WIDTH, slots=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_the_trained_layers_keep(
    attention: str, dtype: torch.dtype, load: Callable[..., Any]
) -> None:
    """Within 10 %, of what autograd keeps in six layers."""
    policy, shape = load(attention, dtype, num_hidden_layers=8)
    found = kept(lambda: read(policy), policy)
    expected = costs.layer_bytes(shape, LENGTH, dtype.itemsize) * shape.upper * ROWS * LENGTH
    assert found == pytest.approx(expected, rel=0.1)


def test_what_checkpointed_layers_keep(load: Callable[..., Any]) -> None:
    """Their inputs, and what is at both ends: within 10 % of the formula less the one layer."""
    policy, shape = load("sdpa", torch.bfloat16, num_hidden_layers=8)
    for layer in policy.backbone.layers:
        layer.forward = _again(layer.forward)
    found = kept(lambda: read(policy), policy)
    tokens = ROWS * LENGTH
    all_of_it = costs.activation_bytes(shape, ROWS, LENGTH, 2, kept=False)
    once = tokens * costs.layer_bytes(shape, LENGTH, 2)
    working = tokens * 2 * (3 * shape.ffn + 4 * shape.width)
    assert found == pytest.approx(all_of_it - once - working, rel=0.1)
    assert found < 0.3 * costs.activation_bytes(shape, ROWS, LENGTH, 2, kept=True)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def test_the_cache(load: Callable[..., Any]) -> None:
    policy, shape = load(dtype=torch.bfloat16)
    ids = torch.randint(0, 300, (ROWS, LENGTH))
    with torch.no_grad():
        cache = policy.model.model.language_model(input_ids=ids, use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found == costs.cache_bytes(shape, ROWS, LENGTH, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_and_moments(dtype: torch.dtype, load: Callable[..., Any]) -> None:
    policy, shape = load(dtype=dtype)
    upper = nn.ModuleList([*policy.backbone.layers[SAE_LAYER + 1 :], policy.backbone.final_norm])
    config = OptimizerConfig(steps=1, learning_rate=0.1)
    weights = MasterWeights({"policy": upper}, config)
    read(policy).float().sum().backward()  # type: ignore[no-untyped-call]
    weights.step(0)
    state = weights.optimizer.state.values()
    moments = sum(v.nbytes for s in state for k, v in s.items() if k != "step")
    assert moments == costs.ADAM_BYTES * shape.upper_weights
    masters = sum(t.nbytes for t in weights.master.values())
    assert masters == costs.MASTER_BYTES * shape.upper_weights  # in fp32 they are the weights


def test_what_the_head_keeps() -> None:
    """Within 15 %; the decoder's figure comes from autograd itself, on the meta device."""
    interface = small_interface()
    tokens = torch.randn(1, 300, 16, requires_grad=True)
    valid = torch.ones(1, 300, dtype=torch.bool)
    queries = torch.randn(1, 6, WIDTH, requires_grad=True)
    keys = torch.randn(1, 32, 8, 8)

    def align() -> object:
        vectors = interface.codebook.aggregate(tokens, valid).vectors
        return interface.mapper(interface.fusion(queries, vectors), keys)

    found = kept(align, interface)
    assert found == pytest.approx(costs.head_bytes(interface, 300), rel=0.15)
    heat = torch.randn(1, 2, 8, 8, requires_grad=True)
    real = kept(lambda: interface.decoder(keys, heat), interface.decoder)
    meta = small_interface().to("meta")
    planned = costs.kept_bytes(lambda: costs.decode_pass(meta, 2), meta.decoder)
    assert planned == pytest.approx(real, rel=0.15)


def test_adapters(load: Callable[..., Any]) -> None:
    policy, _ = load()
    policy.requires_grad_(False)
    settings = LoraSettings(rank=3, targets=("q_proj", "down_proj"))
    expected = costs.lora_weights(policy.backbone, SAE_LAYER, settings)
    add_lora(policy, settings)
    assert expected == sum(p.numel() for p in policy.parameters() if p.requires_grad)
