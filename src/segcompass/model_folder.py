"""Load and save whole models; the layout is described in `io.checkpoints`."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import Field, ValidationError

import segcompass
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.grounding.segmenters import Segmenter, decoder_of, encoder_of, load_segmenter
from segcompass.interfaces.base import Interface, Judge, Material
from segcompass.interfaces.registry import OfInterface, find
from segcompass.io import checkpoints
from segcompass.io.assets import MissingAssetError, bundled
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.pipeline import SegCompass
from segcompass.presets import PRESETS
from segcompass.published import Published, find_published, preset_names
from segcompass.reasoning.loading import load_policy, save_policy
from segcompass.reasoning.policy import Policy, PolicyConfig


class ModelConfig(OfInterface, frozen=True):
    """What a model folder needs to know beside its parts' own configs."""

    name: str = "unnamed"
    policy: PolicyConfig = PolicyConfig()
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
        encoder_of(parts.sam),
        parts.interface,
        threshold=parts.config.threshold,
        name=parts.config.name,
        fingerprint=parts.fingerprint,
    )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


class Parts(NamedTuple):
    """What a model folder holds, put together; ``interface`` contains the SAE, if it reads one."""

    config: ModelConfig
    policy: Policy
    sam: Segmenter
    interface: Interface
    fingerprint: str


def load_parts(name: str | Path, *, dtype: str | None = None, revision: str | None = None) -> Parts:
    """Load the parts of a model, the policy in ``dtype``; errors as of :func:`load_model`."""
    preset = find_published(name)
    if preset is not None:
        return _load_published(preset, dtype, revision)
    folder = find_model(name, revision)
    binding = checkpoints.read_binding(folder)
    config = _config(binding["config"], folder / checkpoints.BINDING)
    kind = torch.float32 if dtype is None else _dtype(dtype)
    policy = load_policy(folder / "policy", config.policy, dtype=kind)
    sam = load_segmenter(folder / "segmenter")
    sae = _load_sae(folder / "sae") if "sae" in binding["parts"] else None

    def judge(use: PolicyConfig) -> Policy:
        return load_policy(folder / "scorer", use, dtype=kind)

    second = judge if "scorer" in binding["parts"] else None
    interface = _put_together(folder, config, policy, sam, sae, second)
    if sorted(binding["parts"]) != sorted(parts_of(interface)):
        raise CheckpointError(
            f"{folder} holds {', '.join(binding['parts'])}, a model of the interface "
            f"{config.interface} has {', '.join(parts_of(interface))}; get a complete copy"
        )
    if "head" in binding["parts"]:
        checkpoints.load_module(interface.head, folder / checkpoints.PARTS["head"])
    return Parts(config, policy, sam, interface, checkpoints.fingerprint(binding))


def _load_published(preset: Published, dtype: str | None, revision: str | None) -> Parts:
    """The parts that a preset names; ``revision`` is the policy's."""
    policy_folder = find_model(preset.source(preset.policy), revision)
    segmenter_folder = find_model(preset.source(preset.segmenter))
    config = _config(preset.settings(policy_folder), preset.path)
    policy = load_policy(policy_folder, config.policy, dtype=_dtype(dtype or preset.dtype))
    sam = load_segmenter(segmenter_folder)
    interface = _put_together(preset.path, config, policy, sam)
    if own := [part for part in parts_of(interface) if part not in {"policy", "segmenter"}]:
        raise ConfigError(
            f"{preset.path}: {config.interface} has a {own[0]} of its own, which a preset cannot "
            "name; use text_readout, or give a model folder"
        )
    files = {
        part: checkpoints.folder_hashes(folder)
        for part, folder in (("policy", policy_folder), ("segmenter", segmenter_folder))
    }
    binding = {"config": config.model_dump(mode="json"), "files": files}
    return Parts(config, policy, sam, interface, checkpoints.fingerprint(binding))


def _config(raw: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(f"{path} does not fit this version: {error}") from error


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
        known = ", ".join(["nano", *preset_names()])
        sizes = f"; for its sizes: segcompass doctor --preset {name}" if name in PRESETS else ""
        raise MissingAssetError(
            f"{name} is not a folder; give a model folder, a hub id, or {known}{sizes}"
        )
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise MissingAssetError(
            f"{name} is neither a folder here nor reachable on the hub ({type(error).__name__}); "
            "check the name and the connection, or use the bundled model nano"
        ) from error


def build_interface(
    config: ModelConfig,
    policy: Policy,
    sam: Segmenter,
    sae: SparseAutoencoder | None = None,
    judge: Judge | None = None,
) -> Interface:
    """Put policy, segmenter and SAE together with a head of the configured sizes.

    Raises:
        ValueError: if they do not fit together.
    """
    material = Material(decoder_of(sam), policy.width, policy.slots, sae, policy, judge)
    interface = find(config.interface).build(config.head, material)
    form = policy.config.prompt.form
    if form != interface.form:
        raise ValueError(
            f"{interface.name} reads answers of the form {interface.form}, the prompt asks for "
            f"{form}; set policy.prompt.form"
        )
    return interface


def _put_together(source: Path, *parts: Any) -> Interface:
    try:
        return build_interface(*parts)
    except ValueError as error:
        raise CheckpointError(f"{source}: the parts do not fit together: {error}") from error


def parts_of(interface: Interface) -> list[str]:
    """The names of the parts that a model of this interface has."""
    has = {
        "sae": interface.sae is not None,
        "head": len(interface.head) > 0,
        "scorer": interface.judge is not None,
    }
    return [part for part in checkpoints.PARTS if has.get(part, True)]


def save_model(
    folder: Path,
    config: ModelConfig,
    policy: Policy,
    sam: Segmenter,
    interface: Interface,
    *,
    policy_state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model folder in one move."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    save_policy(policy, partial / "policy", state=policy_state)
    sam.save_pretrained(partial / "segmenter")
    parts = parts_of(interface)
    if interface.sae is not None:
        interface.sae.save(partial / "sae")
    if "head" in parts:
        checkpoints.save_module(interface.head, partial / checkpoints.PARTS["head"])
    if interface.judge is not None:
        save_policy(interface.judge, partial / "scorer")
    card = model_card(config, policy, sam, interface)
    (partial / "README.md").write_text(card, encoding="utf-8")
    versions = {
        "segcompass": segcompass.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    checkpoints.write_binding(partial, config.model_dump(mode="json"), versions, parts)
    partial.chmod(0o755)
    for file in partial.rglob("*"):  # safetensors writes private files
        file.chmod(0o755 if file.is_dir() else 0o644)
    checkpoints.replace_folder(partial, folder)


def model_card(config: ModelConfig, policy: Policy, sam: Segmenter, interface: Interface) -> str:
    """The model folder's README: what it is, its parts and sizes, and how to open them."""
    rows: dict[str, tuple[Any, str]] = {
        "policy/": (policy.model, f"{type(policy.model).__name__}, a plain Hugging Face folder"),
        "segmenter/": (sam, f"{type(sam).__name__}, a plain Hugging Face folder"),
    }
    if (sae := interface.sae) is not None:
        layer, latents = config.policy.sae_layer, sae.config.d_sae
        rows["sae/"] = (sae, f"SAELens files; layer {layer}, {latents} latents")
    if "head" in parts_of(interface):
        rows["head.safetensors"] = (interface.head, ", ".join(interface.head))
    if (judge := interface.judge) is not None:
        rows["scorer/"] = (judge.model, f"{type(judge.model).__name__}, judges candidates")
    table = "\n".join(
        f"| `{name}` | {sum(p.numel() for p in module.parameters()):,} | {what} |"
        for name, (module, what) in rows.items()
    )
    return (
        f"---\nlibrary_name: segcompass\npipeline_tag: image-segmentation\n---\n\n"
        f"# {config.name}\n\n"
        "A SegCompass model: a picture and an instruction become masks, with the way to them. "
        f"Its interface is `{config.interface}`.\n\n"
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
