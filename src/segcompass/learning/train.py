"""Run the stages of a config: segmenter -> warmup -> sae -> joint -> scorer, each resumable.

RUN/config.json        the resolved config
RUN/stages/STAGE/      log.jsonl, state.safetensors
RUN/segmenter, policy, sae    what the stages hand on, each in its ecosystem's format
RUN/supervised/        the model after the joint stage's oracle steps, if rollouts follow them
RUN/source/            the finished model, where a scorer is still to be trained
RUN/model/             the finished model folder
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from segcompass.concepts.sparse_autoencoder import SparseAutoencoder
from segcompass.data.scenes.writer import write_scenes
from segcompass.grounding.image_encoder import ImageEncoder
from segcompass.grounding.segmenters import as_sam, load_segmenter
from segcompass.interfaces.registry import find
from segcompass.io.checkpoints import replace_folder
from segcompass.io.errors import ConfigError
from segcompass.io.files import write_whole
from segcompass.io.progress import progress
from segcompass.learning.checks import training_samples
from segcompass.learning.config import RunConfig, load_config
from segcompass.learning.engine.distributed import World, local_ranks, start
from segcompass.learning.engine.launch import launch, wanted_ranks
from segcompass.learning.engine.lora import merged_state
from segcompass.learning.engine.sharding import full_state
from segcompass.learning.engine.states import saved_states, saved_step
from segcompass.learning.engine.token_rows import with_token_rows
from segcompass.learning.fit import check_pixels, check_policy, check_sae, check_start
from segcompass.learning.opening import check_data, check_settings, texts_of
from segcompass.learning.planning.features import limit_pixels
from segcompass.learning.train_joint import train_joint
from segcompass.learning.train_sae import train_sae
from segcompass.learning.train_scorer import source_of, train_scorer
from segcompass.learning.train_segmenter import train_segmenter
from segcompass.learning.train_warmup import train_language, train_vision
from segcompass.model_folder import (
    ModelConfig,
    Parts,
    build_interface,
    load_parts,
    save_model,
)
from segcompass.reasoning.loading import load_policy, new_policy, save_policy
from segcompass.reasoning.policy import Policy


def run(stage: str, config_path: Path, overrides: list[str], resume: bool) -> None:
    """Run one stage of a config, or ``all`` of them in order; on several processes if it says so.

    Args:
        stage: segmenter, warmup, sae, joint, scorer or all.
        config_path: A YAML config.
        overrides: ``a.b=value`` settings that go before the file's.
        resume: Continue from saved states; stages that are finished are skipped.

    What later stages could not begin with, or could not train on, ends the run before the first.

    Raises:
        ConfigError: if the config is wrong, or states of an earlier run would be overwritten.
        RanksError: if processes were started and did not come to their end.
        DataError: if the data is missing or broken.
    """
    config = load_config(config_path, overrides)
    if wanted_ranks(config.processes) > 1:
        settings = [part for override in overrides for part in ("--set", override)]
        command = ["train", stage, str(config_path), *settings, *(["--resume"] if resume else [])]
        launch([sys.executable, "-m", "segcompass", *command], config.processes)
        return
    if config.threads:
        torch.set_num_threads(max(1, config.threads // local_ranks()))
    if stage not in {*STAGES, "all"}:
        raise ConfigError(f"no stage is called {stage!r}; choose one of {', '.join(STAGES)}, all")
    names = stages_of(config) if stage == "all" else [stage]
    if not resume:
        _refuse_overwriting(config.run, names)
    ahead = [name for name in names if not is_done(name, config)]
    check_settings(config, ahead)
    with start() as world:
        if world.is_main:
            config.run.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True)
            write_whole(config.run / "config.json", text + "\n")
            write_data(config)
            check_data(config, ahead)
        world.barrier()
        for name in names:
            if not is_done(name, config):  # of all ranks alike: they see the same files
                STAGES[name](config)
            world.barrier()


def _refuse_overwriting(folder: Path, stages: list[str]) -> None:
    """Before anything is touched: no stage that would run may have been here already."""
    for stage in stages:
        for state in (s for f in folder.glob(f"stages/{stage}*") for s in saved_states(f)):
            raise ConfigError(
                f"{state} is from an earlier run; pass --resume to continue it, "
                "set another `run` folder, or delete it"
            )


def is_done(stage: str, config: RunConfig) -> bool:
    """Whether an earlier run took all steps of a stage, and wrote what the stage hands on."""
    result = {"warmup": "policy", "joint": _finished(config), "scorer": "model"}.get(stage, stage)
    loops = {"warmup": ("warmup-vision", "warmup-language")}.get(stage, (stage,))
    settings = {name: getattr(config, f"train_{name.removeprefix('warmup-')}") for name in loops}
    asked = {config.run / "stages" / name: loop.steps for name, loop in settings.items() if loop}
    taken = all(saved_step(folder) >= steps for folder, steps in asked.items())
    return bool(asked) and taken and (config.run / result).is_dir()


def _finished(config: RunConfig) -> str:
    """What the joint stage's model is called."""
    return "model" if config.train_scorer is None else "source"


def write_data(config: RunConfig) -> None:
    """Write the configured world of scenes, unless it is there already."""
    scenes = config.data.scenes
    if scenes is not None:
        counts = scenes.model_dump(exclude={"seed"})
        with progress("pictures") as update:
            write_scenes(config.data.root, counts, scenes.seed, progress=update)


def run_segmenter(config: RunConfig) -> Path:
    """Pretrain the segmenter if the config says how; else hand on the pretrained one."""
    torch.manual_seed(config.seed)
    sam = as_sam(load_segmenter(config.segmenter), config.segmenter)
    nn.Module.to(sam, World.current().device)
    if config.train_segmenter is not None:
        train_segmenter(sam, config, config.train_segmenter, config.run / "stages/segmenter")
    return _hand_on(config.run / "segmenter", sam.save_pretrained)


def run_warmup(config: RunConfig) -> Path:
    """Build or load the policy, and teach it to see and to answer."""
    policy = start_policy(config).to(World.current().device)
    if config.train_vision is not None:
        train_vision(policy, config, config.train_vision, config.run / "stages/warmup-vision")
    if config.train_language is not None:
        folder = config.run / "stages/warmup-language"
        train_language(policy, source_of(config), config.train_language, folder)
    return _hand_on(config.run / "policy", lambda folder: save_policy(policy, folder))


def run_sae(config: RunConfig) -> Path:
    """Train the SAE on the warm policy."""
    if config.train_sae is None:
        raise ConfigError("the config has no section train_sae; it says how the SAE is trained")
    policy = warm_policy(config).to(World.current().device)
    sae = train_sae(policy, config, config.train_sae, config.run / "stages/sae")
    metadata = sae_metadata(config)
    return _hand_on(config.run / "sae", lambda folder: sae.save(folder, metadata))


def run_joint(config: RunConfig) -> Path:
    """Train the head with the upper policy, and write the finished model."""
    model, policy, sam, interface, _ = start_model(source_of(config))
    stage, world = config.train_joint, World.current()
    modules: tuple[nn.Module, ...] = (policy, sam, interface)
    for module in modules:
        module.to(world.device)

    def keep(name: str) -> Path:
        state = policy.model.state_dict()
        if world.size > 1:
            state = full_state(policy, world, getattr(torch, config.policy.dtype))
        state = with_token_rows(policy, merged_state(policy, state))
        if world.is_main:
            save_model(config.run / name, model, policy, sam, interface, policy_state=state)
        world.barrier()
        return config.run / name

    def before(step: int) -> None:
        if 0 < step == stage.oracle_steps:
            keep("supervised")  # what reinforcement starts from, and is compared with

    encoder = ImageEncoder(as_sam(sam, f"the segmenter of {config.run}"))
    folder = config.run / "stages/joint"
    train_joint(policy, encoder, interface, config, stage, folder, before)
    return keep(_finished(config))


def run_scorer(config: RunConfig) -> Path:
    """Train a judge of the finished model's candidates."""
    if config.train_scorer is None:
        raise ConfigError("the config has no section train_scorer; it says how a scorer is trained")
    start = config.train_scorer.start or _made_by("joint", config.run / "source")
    return train_scorer(config, config.train_scorer, start)


STAGES: dict[str, Callable[[RunConfig], Path]] = {
    "segmenter": run_segmenter,
    "warmup": run_warmup,
    "sae": run_sae,
    "joint": run_joint,
    "scorer": run_scorer,
}


def stages_of(config: RunConfig) -> list[str]:
    """The stages of ``all``, in order: an SAE and a scorer are for the interfaces that have one."""
    scorer = config.train_scorer
    if scorer is not None and scorer.start is not None:
        return ["scorer"]
    needed = {"sae": find(source_of(config).interface).has_concepts, "scorer": scorer is not None}
    return [stage for stage in STAGES if needed.get(stage, True)]


def start_policy(config: RunConfig) -> Policy:
    """The policy that warm-up begins with."""
    source = config.policy
    check_policy(source)
    check_pixels(config)
    if source.source != "scratch":
        policy = load_policy(source.source, source.use, dtype=getattr(torch, source.dtype))
        limit_pixels(policy.backbone, config.data.image_pixels)
        return policy
    samples = training_samples(config.data, run=config.run)
    policy = new_policy(source.scratch, source.use, texts_of(samples), config.seed)
    policy.model.to(getattr(torch, source.dtype))
    return policy


def warm_policy(config: RunConfig) -> Policy:
    """The policy as warm-up left it; without a warm-up, the configured one."""
    folder = config.run / "policy"
    if not folder.is_dir():
        if config.policy.source == "scratch":
            _made_by("warmup", folder)
        return start_policy(config)
    check_policy(config.policy, folder)
    check_pixels(config, folder)
    return load_policy(folder, config.policy.use, dtype=getattr(torch, config.policy.dtype))


def start_model(config: RunConfig) -> Parts:
    """What the joint stage begins with: the earlier stages' parts, or a finished model."""
    torch.manual_seed(config.seed)
    if config.train_joint.start is not None:
        check_start(config)
        parts = load_parts(config.train_joint.start, dtype=config.policy.dtype)
        return parts._replace(config=parts.config.model_copy(update={"name": config.run.name}))
    policy = warm_policy(config)
    sam = load_segmenter(_made_by("segmenter", config.run / "segmenter"))
    sae = None
    if find(config.interface).has_concepts:
        folder = _made_by("sae", config.run / "sae")
        check_sae(folder, policy.width, config.policy.use.sae_layer)
        sae = SparseAutoencoder.load(folder)
    model = ModelConfig(
        name=config.run.name,
        interface=config.interface,
        head=config.head,
        policy=config.policy.use,
        threshold=find(config.interface).threshold,
    )
    torch.manual_seed(config.seed)
    return Parts(model, policy, sam, build_interface(model, policy, sam, sae), fingerprint="")


def sae_metadata(config: RunConfig) -> dict[str, str | int]:
    """What an SAELens reader wants to know about the SAE."""
    layer = config.policy.use.sae_layer
    return {
        "model_name": str(config.policy.source),
        "hook_name": f"model.language_model.layers.{layer}",
        "hook_layer": layer,
        "dataset_path": str(config.data.root),
    }


def _made_by(stage: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing; run `segcompass train {stage}` first")
    return folder


def _hand_on(folder: Path, save: Callable[[Path], object]) -> Path:
    """Write a stage's result in one move, on one rank."""
    world = World.current()
    if world.is_main:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        save(partial)
        replace_folder(partial, folder)
    world.barrier()
    return folder
