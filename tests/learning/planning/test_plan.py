"""The plan: complete, consistent, and right in what it advises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import stage, write_config, write_llava_config
from tiny import tiny_model_folder, tiny_sam
from typer.testing import CliRunner

from segcompass.apps.cli import app
from segcompass.io.assets import MissingAssetError
from segcompass.io.errors import CheckpointError, ConfigError
from segcompass.learning.config import RunConfig, load_config
from segcompass.learning.planning.budget import PHASES
from segcompass.learning.planning.plan import USABLE, Plan, plan
from segcompass.learning.planning.workload import workload_of
from segcompass.reasoning.from_scratch import build_model, build_tokenizer

JOINT = stage(batch=4, rollout={"group": 3, "max_new_tokens": 20})


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The smallest policy from scratch; no data is there, and none is read."""
    return load_config(write_config(tmp_path, tmp_path / "no-data", train_joint=JOINT))


def changed(config: RunConfig, **joint: Any) -> RunConfig:
    content = config.model_dump(mode="json", exclude_unset=True)
    content["train_joint"] |= joint
    return RunConfig.model_validate(content)


def gb(made: Plan, *names: str) -> float:
    return sum(p.bytes for p in made.memory if p.name in names)


def test_weights_are_those_of_the_model_that_is_trained(config: RunConfig) -> None:
    made = plan(config, 1, 1.0)
    scratch = config.policy.scratch
    tokenizer = build_tokenizer(["a"], scratch.vocabulary, slots=6)
    model = build_model(scratch, tokenizer, seed=0).to(torch.bfloat16)
    model.resize_token_embeddings(scratch.vocabulary)
    layers: Any = model.model.language_model
    upper = [*layers.layers[1:].parameters(), *layers.norm.parameters()]
    trained = sum(p.nbytes for p in upper)
    assert gb(made, "policy: trained weights") == trained
    every = sum(p.nbytes for p in model.parameters())
    assert gb(made, "policy: frozen weights") == every - trained
    assert gb(made, "policy: fp32 masters", "policy: Adam moments") == trained * (4 + 8) // 2
    assert gb(made, "reference policy") == trained
    sae = 2 * 48 * 32 + 48 + 32  # S = 48, D = 32
    assert gb(made, "sparse autoencoder") == 4 * sae
    encoder = sum(p.nbytes for p in tiny_sam().vision_encoder.parameters())
    assert gb(made, "segmenter: image encoder") == encoder


def test_the_peak_is_what_always_lies_there_and_the_hungriest_phase(config: RunConfig) -> None:
    made = plan(config, 1, 1.0).as_dict()
    assert json.loads(json.dumps(made)) == made
    sums = dict.fromkeys(("always", *PHASES), 0.0)
    for part in made["memory"]:
        sums[part["phase"]] += part["gb"]
    always = sums.pop("always")
    assert made["peak_gb"] == pytest.approx(always + max(sums.values()), abs=2e-5)
    assert all(value > 0 for value in sums.values())
    assert made["tflop_per_step"] == pytest.approx(sum(made["tflop"].values()), abs=1e-5)


def test_ranks_share_the_policy_and_the_questions(config: RunConfig) -> None:
    """What trains is kept in fp32 only; the head is on every rank."""
    one, four = plan(config, 1, 1.0), plan(config, 4, 1.0)
    trained = gb(one, "policy: trained weights") / 2
    assert gb(four, "policy: fp32 masters") == trained * 4 / 4
    assert gb(four, "policy: Adam moments") == gb(one, "policy: Adam moments") / 4
    assert gb(four, "policy: trained weights") == 0
    head = ("head and mask decoder", "head and mask decoder: Adam moments", "sparse autoencoder")
    assert gb(four, *head) == gb(one, *head)
    assert gb(four, "key-value cache") == gb(one, "key-value cache") / 4
    assert four.flops == one.flops
    three = plan(config, 3, 1.0)  # of four questions, one rank has two
    assert gb(three, "key-value cache") == gb(one, "key-value cache") / 2


def test_work_grows_with_questions_and_answers(config: RunConfig) -> None:
    base = plan(config, 1, 1.0).flops
    twice = plan(changed(config, batch=8), 1, 1.0).flops
    assert all(twice[name] == pytest.approx(2 * base[name]) for name in base)
    more = plan(changed(config, rollout={"group": 6, "max_new_tokens": 20}), 1, 1.0).flops
    once = {"vision tower", "image encoder"}  # of a question, whatever the number of answers
    assert all(more[n] == pytest.approx(base[n] * (1 if n in once else 2)) for n in base)


def test_what_is_left_out_costs_nothing(config: RunConfig, tmp_path: Path) -> None:
    base = plan(config, 1, 1.0)
    oracle = plan(changed(config, oracle_steps=JOINT["steps"]), 1, 1.0)
    assert {"sampling", "reference policy"} <= base.flops.keys()
    assert not {"sampling", "reference policy"} & oracle.flops.keys()
    assert gb(oracle, "key-value cache", "reference policy") == 0
    free = plan(changed(config, grpo={"kl": 0.0}), 1, 1.0)
    assert "sampling" in free.flops and "reference policy" not in free.flops
    frozen = plan(changed(config, train_upper_layers=False), 1, 1.0)
    assert gb(frozen, "policy: Adam moments", "policy activations") == 0
    assert frozen.flops["policy, backward"] < base.flops["policy, backward"]
    whole = plan(changed(config, train_lower_layers=True), 1, 1.0)
    assert gb(whole, "policy: Adam moments") > gb(base, "policy: Adam moments")
    assert whole.flops["policy, backward"] > base.flops["policy, backward"]
    content = config.model_dump(mode="json", exclude_unset=True)
    content["data"]["features"] = str(tmp_path / "store")
    stored = plan(RunConfig.model_validate(content), 1, 1.0)
    assert not {"vision tower", "image encoder"} & stored.flops.keys()
    assert gb(stored, "segmenter: image encoder", "image encoder pass") == 0


def test_checkpointing_and_lora(config: RunConfig) -> None:
    base = plan(config, 1, 1.0)
    again = plan(changed(config, gradient_checkpointing=True), 1, 1.0)
    assert again.flops["policy, backward"] > base.flops["policy, backward"]
    adapted = plan(changed(config, lora={"rank": 2}), 1, 1.0)
    assert gb(adapted, "reference policy") == 0
    assert gb(adapted, "policy: Adam moments") < gb(base, "policy: Adam moments")
    assert adapted.flops["policy, backward"] < base.flops["policy, backward"]
    assert gb(adapted, "policy: frozen weights") == gb(
        base, "policy: frozen weights", "policy: trained weights"
    )


def test_micro_batches_take_memory_in_proportion_and_no_more_work(config: RunConfig) -> None:
    """Of 12 answers: 12, 6 or 2 in one pass with gradient, 12 or 3 sampled together."""
    base = plan(config, 1, 1.0)
    assert base.workload.rows == 12
    for size in (6, 2, 100):
        small = plan(changed(config, micro_batch=size), 1, 1.0)
        share = min(size, 12) / 12
        for part in ("policy activations", "head activations", "mask decoder activations"):
            assert gb(small, part) == pytest.approx(share * gb(base, part), abs=2e-6)
        assert gb(small, "key-value cache") == gb(base, "key-value cache")
        assert small.flops == base.flops and small.hours == base.hours
        # Gradients of earlier parts are kept in fp32 while the next one makes its own.
        assert (gb(small, "gradients") > gb(base, "gradients")) == (size < 12)
    rollout = {**JOINT["rollout"], "batch": 3}
    fewer = plan(changed(config, rollout=rollout), 1, 1.0)
    for part in ("key-value cache", "tapped states", "policy activations"):
        assert gb(fewer, part) == pytest.approx(gb(base, part) / 4, abs=2e-6)
    assert fewer.hours > base.hours  # weights are read more often


def test_advice_that_is_followed_fits(config: RunConfig, tmp_path: Path) -> None:
    """Every single change that the plan says would do, made in the config, does."""
    path = tmp_path / "tiny.yaml"
    content = yaml.safe_load(path.read_text())
    content["policy"]["scratch"] |= {"layers": 8, "vocabulary": 512}
    content["train_joint"] |= {"batch": 16, "rollout": {"group": 8, "max_new_tokens": 200}}
    path.write_text(yaml.safe_dump(content))
    most = plan(load_config(path), 1, 1.0).peak_bytes / 1e9
    followed: set[str] = set()
    for share in (0.97, 0.8, 0.5):
        memory = most * share / USABLE
        short = plan(load_config(path), 1, memory)
        assert not short.fits and short.advice
        for advice in short.advice:
            single = re.fullmatch(r"(\S+=.*?)(?: \(.*\))? would fit: (\S+) GB", advice)
            if single:
                override = single[1].replace("FOLDER", str(tmp_path))
                then = plan(load_config(path, [override]), 1, memory)
                assert then.fits
                # Told to 0.1 GB, which is more than all of a tiny model.
                followed.add(override.split("=")[0])
    assert {"train_joint.gradient_checkpointing", "train_joint.micro_batch"} <= followed


def test_advice_when_nothing_fits_says_by_how_much(config: RunConfig) -> None:
    hopeless = plan(config, 1, 1e-6)
    assert not hopeless.fits
    assert any(advice.startswith("not even") for advice in hopeless.advice)
    roomy = plan(config, 1, 80.0)
    assert roomy.fits and roomy.advice == ()


def test_more_gpus_are_advised_where_they_help(config: RunConfig) -> None:
    big = changed(config, batch=64)
    needed = plan(big, 8, 1.0).peak_bytes / 1e9 / USABLE
    advice = plan(big, 1, needed * 1.001).advice
    (told,) = [re.match(r"(\d+) GPUs would fit", a) for a in advice if "GPUs would" in a]
    assert told is not None and plan(big, int(told[1]), needed * 1.001).fits


def test_rows_of_the_tables(config: RunConfig) -> None:
    made = plan(config, 2, 1.0)
    rows = made.memory_rows()
    assert {"part", "when", "GB"} == set(rows[0])
    assert [row["part"] for row in rows[-4:]] == [*(f"sum of {p}" for p in PHASES), "peak"]
    shares = [float(row["share"].rstrip("%")) for row in made.flops_rows()[:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(("gpus", "memory"), [(0, 80.0), (1, 0.0), (1, float("nan"))])
def test_impossible_hardware(gpus: int, memory: float, config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="1 GPU or more"):
        plan(config, gpus, memory)


def test_limits_that_training_refuses_are_not_planned_with(config: RunConfig) -> None:
    data = config.data.model_copy(update={"image_pixels": (1024, 4096)})
    with pytest.raises(ConfigError, match="scratch sees every picture at 64x64 px"):
        plan(config.model_copy(update={"data": data}), 1, 80.0)


def test_folders_are_planned_from_their_configs(tmp_path: Path) -> None:
    """LLaVA: a picture is 16 tokens, whatever its size; weights are not opened."""
    path = write_llava_config(tmp_path, tmp_path / "no-data")
    for weights in (tmp_path / "llava").glob("*.safetensors"):
        weights.unlink()
    work = workload_of(load_config(path), 1, 1.0)
    assert (work.image, work.slots, work.s) == (16, 6, 4)
    assert work.answer == 32 and work.prompt > 600 + 16  # instruction and picture at their limits


def test_a_damaged_image_processor_is_named(tmp_path: Path) -> None:
    path = write_llava_config(tmp_path, tmp_path / "no-data")
    (tmp_path / "llava/preprocessor_config.json").write_text('{"size": {')
    with pytest.raises(CheckpointError, match=r"llava/preprocessor_config\.json cannot be read"):
        workload_of(load_config(path), 1, 1.0)


def test_a_finished_model_to_start_from(tmp_path: Path, config: RunConfig) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    work = workload_of(changed(config, start=str(folder)), 1, 1.0)
    assert work.sae_weights == 2 * 64 * 32 + 64 + 32
    assert work.image == 64**2 // 16**2  # its processor's largest picture, 16 px a token
    with pytest.raises(MissingAssetError):
        plan(changed(config, start=str(tmp_path / "nothing")), 1, 1.0)
    (folder / "sae" / "cfg.json").unlink()
    with pytest.raises(CheckpointError, match="no complete model folder"):
        plan(changed(config, start=str(folder)), 1, 1.0)


def test_parts_that_cannot_be_read_or_do_not_fit(tmp_path: Path, config: RunConfig) -> None:
    content = config.model_dump(mode="json", exclude_unset=True)
    content["policy"]["source"] = str(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"nothing cannot be read.*presets"):
        plan(RunConfig.model_validate(content), 1, 1.0)
    content = config.model_dump(mode="json", exclude_unset=True)
    content["head"]["codebook_heads"] = 3
    with pytest.raises(ConfigError, match=r"do not fit together.*3 heads"):
        plan(RunConfig.model_validate(content), 1, 1.0)


def test_planning_disturbs_no_random_numbers(config: RunConfig) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    plan(config, 1, 1.0)
    assert torch.equal(torch.rand(1), expected)


def test_the_command(config: RunConfig, tmp_path: Path) -> None:
    command = ["train", "plan", str(tmp_path / "tiny.yaml"), "--gpus", "2", "--memory", "40"]
    told = CliRunner().invoke(app, [*command, "--json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout) == plan(config, 2, 40.0).as_dict()
    table = CliRunner().invoke(app, [*command, "--set", "train_joint.batch=2"]).stdout
    assert "policy: Adam moments" in table and "fits" in table and "hours, estimated" in table
    assert not (tmp_path / "run").exists()
