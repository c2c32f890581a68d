"""Load and save whole models; the layout is described in `io.checkpoints`."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, Field, ValidationError
from transformers import SamConfig, SamModel

import segcompass
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.grounding.image_encoder import ImageEncoder, sam_config
from segcompass.grounding.mask_decoder import MaskDecoder
from segcompass.interfaces.concept_slots import ConceptSlots, HeadConfig
from segcompass.io import checkpoints
from segcompass.io.assets import MissingAssetError, bundled
from segcompass.io.errors import CheckpointError
from segcompass.pipeline import SegCompass
from segcompass.reasoning.loading import load_policy, save_policy
from segcompass.reasoning.policy import Policy, PolicyConfig


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """What a model folder needs to know beside its parts' own configs."""

    name: str = "unnamed"
    policy: PolicyConfig = PolicyConfig()
    head: HeadConfig = HeadConfig()
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="confidence of a mask that counts"
    )


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> SegCompass:
    """Load a model by folder, by hub id, or the bundled one; see `SegCompass.from_pretrained`."""
    parts = load_parts(name, dtype=dtype, revision=revision)
    model = SegCompass(
        parts.policy,
        ImageEncoder(parts.sam),
        parts.interface,
        threshold=parts.config.threshold,
        name=parts.config.name,
        fingerprint=parts.fingerprint,
    )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


class Parts(NamedTuple):
    """What a model folder holds, put together; ``interface`` contains the SAE."""

    config: ModelConfig
    policy: Policy
    sam: SamModel
    interface: ConceptSlots
    fingerprint: str


def load_parts(name: str | Path, *, dtype: str | None = None, revision: str | None = None) -> Parts:
    """Load the parts of a model, the policy in ``dtype``; errors as of :func:`load_model`."""
    folder = find_model(name, revision)
    binding = checkpoints.read_binding(folder)
    try:
        config = ModelConfig.model_validate(binding["config"])
    except ValidationError as error:
        raise CheckpointError(
            f"{folder / checkpoints.BINDING} does not fit this version: {error}"
        ) from error
    kind = torch.float32 if dtype is None else _dtype(dtype)
    policy = load_policy(folder / "policy", config.policy, dtype=kind)
    sam = load_segmenter(folder / "segmenter")
    sae = _load_sae(folder / "sae")
    try:
        interface = build_interface(config, policy, sam, sae)
    except ValueError as error:
        raise CheckpointError(f"{folder}: the parts do not fit together: {error}") from error
    checkpoints.load_module(interface.head, folder / checkpoints.PARTS["head"])
    return Parts(config, policy, sam, interface, checkpoints.fingerprint(binding))


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model; a hub id is fetched, anything else has to be here.

    Raises:
        MissingAssetError: if it is neither a folder nor reachable on the hub.
    """
    if str(name) == "nano":
        return bundled("nano")
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise MissingAssetError(f"{name} is not a folder; give a model folder, a hub id, or nano")
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise MissingAssetError(
            f"{name} is neither a folder here nor reachable on the hub ({type(error).__name__}); "
            "check the name and the connection, or use the bundled model nano"
        ) from error


def build_interface(
    config: ModelConfig, policy: Policy, sam: SamModel, sae: SparseAutoencoder
) -> ConceptSlots:
    """Put policy, segmenter and SAE together with a head of the configured sizes."""
    return ConceptSlots(
        config.head, sae, MaskDecoder(sam), policy_width=policy.width, slots=policy.slots
    )


def load_segmenter(source: str | Path) -> SamModel:
    """A segmenter from a folder or hub id, or a new one by size name (nano, vit-b, …)."""
    if str(source) in {"nano", "vit-b", "vit-l", "vit-h"}:
        return SamModel(sam_config(str(source)))
    try:
        config = SamConfig.from_pretrained(source)
        loaded: Any = SamModel.from_pretrained(
            source, config=config, output_loading_info=True, use_safetensors=True
        )
        sam, report = loaded
    except Exception as error:
        raise CheckpointError(
            f"{source} is no usable segmenter folder ({type(error).__name__}: {error}); "
            "it needs config.json and safetensors weights of a SamModel"
        ) from error
    odd = {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    if odd:
        raise CheckpointError(
            f"{source}: the weights do not fit the config, first difference "
            f"{sorted(map(str, odd))[0]}; get a complete copy of the checkpoint"
        )
    assert isinstance(sam, SamModel)
    return sam


def save_model(
    folder: Path,
    config: ModelConfig,
    policy: Policy,
    sam: SamModel,
    sae: SparseAutoencoder,
    interface: ConceptSlots,
    *,
    policy_dtype: torch.dtype | None = None,
    policy_state: dict[str, torch.Tensor] | None = None,
    sae_metadata: dict[str, Any] | None = None,
) -> None:
    """Write a model folder in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    save_policy(policy, partial / "policy", policy_dtype, policy_state)
    sam.save_pretrained(partial / "segmenter")
    sae.save(partial / "sae", sae_metadata)
    checkpoints.save_module(interface.head, partial / checkpoints.PARTS["head"])
    card = model_card(config, policy, sam, sae, interface)
    (partial / "README.md").write_text(card, encoding="utf-8")
    versions = {
        "segcompass": segcompass.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    checkpoints.write_binding(partial, config.model_dump(mode="json"), versions)
    partial.chmod(0o755)
    for file in partial.rglob("*"):  # safetensors writes private files
        file.chmod(0o755 if file.is_dir() else 0o644)
    checkpoints.replace_folder(partial, folder)


def model_card(
    config: ModelConfig,
    policy: Policy,
    sam: SamModel,
    sae: SparseAutoencoder,
    interface: ConceptSlots,
) -> str:
    """The model folder's README: what it is, its parts and sizes, and how to open them."""
    rows = {
        "policy/": (policy.model, f"{type(policy.model).__name__}, a plain Hugging Face folder"),
        "segmenter/": (sam, "SamModel, a plain Hugging Face folder"),
        "sae/": (
            sae,
            f"SAELens files; layer {config.policy.sae_layer}, {sae.config.d_sae} latents",
        ),
        "head.safetensors": (interface.head, "query codebook, fusion, slot mapper"),
    }
    table = "\n".join(
        f"| `{name}` | {sum(p.numel() for p in module.parameters()):,} | {what} |"
        for name, (module, what) in rows.items()
    )
    return (
        f"---\nlibrary_name: segcompass\npipeline_tag: image-segmentation\n---\n\n"
        f"# {config.name}\n\n"
        "A SegCompass model: a picture and an instruction become masks, with the chain of thought, "
        "the sparse concepts and the heatmaps behind them.\n\n"
        f"| part | parameters | format |\n|---|---:|---|\n{table}\n\n"
        f"Slots: {policy.slots}. A mask counts from confidence {config.threshold}. "
        "`segcompass.json` binds the parts together; a folder with exchanged or damaged parts is "
        "refused.\n\n"
        "```python\nfrom segcompass import SegCompass\n\n"
        'model = SegCompass.from_pretrained("path/to/this/folder")\n'
        'result = model.predict("picture.jpg", "the red mug")\n```\n\n'
        "It knows what it was trained on and nothing else; look at the thought and the heatmaps "
        "before trusting a mask.\n"
    )


def _load_sae(folder: Path) -> SparseAutoencoder:
    try:
        return SparseAutoencoder.load(folder)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(known)}")
    return known[name]
