"""What an ill run looks like in its log: one rule per symptom, over windows of rows.

Figures of single steps are noisy, so a rule compares blocks of steps: *now* (the last half window)
with the *start* of the phase or with its best block. A change counts when it is large and several
of its standard errors wide. Rows with rewards are one phase, rows without (oracle steps) another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from segcompass.learning.watching.history import History, Level, Series, median

_CLEAR = 4.0  # standard errors of a change that is no accident, however often one looks
_SURE = 2.0  # standard errors of a gain that is there at all
_FALL, _FALL_SHARE = 0.05, 0.15  # of a reward: in its own unit, and of its best value
_FORM_LOST = 0.25  # share of all answers
_NO_FORM = 0.02
_SOLVED = 0.95  # share of the highest reward from which there is little left to gain
_FOLLOWS = 0.4  # correlation of rewards and masks that may be expected
_CORRELATED = 4  # windows over which it is taken
_LENGTHS = (0.4, 2.5)  # answers' length, relative to the start
_NORM_GROWTH = 10.0
_FAR = 5.0  # times ``kl_growth``, for nothing: severe


class HealthConfig(BaseModel, frozen=True, extra="forbid"):
    """How a run is watched; see docs/training.md for the symptoms."""

    action: Literal["off", "warn", "stop"] = Field(
        "warn", description="stop: severe symptoms save the state and end the run"
    )
    window: int = Field(50, ge=16, description="steps that are judged together")
    max_kl: float = Field(1.0, gt=0, description="nats per token that are too far")
    kl_growth: float = Field(
        0.05, gt=0, description="nats per token for which rewards have to show something"
    )


class Symptom(NamedTuple):
    """One thing that is wrong: what was seen, and what to do about it."""

    cause: str
    severe: bool
    found: str
    way_out: str
    figures: dict[str, float]


Rule = Callable[[History, HealthConfig], Symptom | None]


def reward_is_wrong(history: History, _: HealthConfig) -> Symptom | None:
    """A score outside [0, 1], or a reward that is not the weighted sum of its scores."""
    form, mask, total = (
        float(history.now(n)[-1]) for n in ("reward_format", "reward_mask", "reward")
    )
    slack = 1e-3
    figures = {"reward": total, "reward_format": form, "reward_mask": mask}
    way_out = "the code that makes rewards is broken; check learning/rewards.py and what calls it"
    if not all(-slack <= score <= 1 + slack for score in (form, mask) if math.isfinite(score)):
        found = f"a score is outside [0, 1]: reward_format {form:.3f}, reward_mask {mask:.3f}"
        return Symptom("reward_is_wrong", True, found, way_out, figures)
    if history.reward_weights is None or not math.isfinite(form + mask):
        return None
    expected = history.reward_weights[0] * form + history.reward_weights[1] * mask
    if abs(total - expected) <= slack:
        return None
    found = f"the reward is {total:.3f}, but its weighted scores add up to {expected:.3f}"
    return Symptom("reward_is_wrong", True, found, way_out, {**figures, "expected": expected})


def reward_falls(history: History, _: HealthConfig) -> Symptom | None:
    """Rewards are clearly lower than they were."""
    best, now = history.best("reward"), Level.of(history.now("reward"))
    fall = best.gain(now)
    if not fall.mean < -max(_FALL, _FALL_SHARE * abs(best.mean), _CLEAR * fall.error):
        return None
    kl = Level.of(history.now("kl")).mean
    return Symptom(
        "reward_falls",
        True,
        f"rewards fell from {best.mean:.3f} to {now.mean:.3f}, at a KL of {kl:.3g}",
        "what is rewarded is not what is learnt, or steps are too large: look at the panels, then "
        "lower learning_rate or raise grpo.kl and go on from an earlier state",
        {"best": best.mean, "now": now.mean, "kl": kl},
    )


def reward_stalls(history: History, config: HealthConfig) -> Symptom | None:
    """The policy has moved away from the reference, and rewards have nothing to show for it."""
    kl_now = median(history.now("kl"))
    behind = np.array([median(block) for block in history.blocks("kl")])
    near = np.flatnonzero(2 * behind + config.kl_growth <= kl_now)  # the KL has doubled, and more
    if not len(near):
        return None
    since = history.all("reward")[int(near[-1]) * history.block :]
    then, now = (Level.of(part) for part in (since[: len(since) // 3], since[-len(since) // 3 :]))
    gain, kl_then = then.gain(now), float(behind[near[-1]])
    silent = Level.of(history.now("groups_that_teach")).mean < _NO_FORM  # another rule's matter
    if gain.mean >= _SURE * gain.error or now.mean >= _SOLVED * history.top or silent:
        return None
    return Symptom(
        "reward_stalls",
        kl_now - kl_then > _FAR * config.kl_growth,
        f"the KL grew from {kl_then:.3g} to {kl_now:.3g}, and rewards gained nothing: "
        f"{then.mean:.3f} to {now.mean:.3f} in {len(since)} steps",
        "the reward may be broken or noise: compare reward_mask with iou in log.jsonl and look at "
        "the panels; else raise grpo.kl or lower learning_rate",
        {"then": then.mean, "now": now.mean, "kl_then": kl_then, "kl": kl_now},
    )


def reward_is_hacked(history: History, _: HealthConfig) -> Symptom | None:
    """Rewards rise while what they are to stand for gets worse."""
    rise = _change(history, "reward")
    if not rise.mean > max(_FALL / 2, _CLEAR * rise.error):
        return None
    evidence = ["reward_mask", "well_formed"]
    if _change(history, "well_formed").mean < _FALL:  # else iou is over other answers than before
        evidence.append("iou")
    for name in evidence:
        fall = _change(history, name)
        if fall.mean < -max(_FALL, _CLEAR * fall.error):
            first, last = Level.of(history.start(name)).mean, Level.of(history.now(name)).mean
            return Symptom(
                "reward_is_hacked",
                True,
                f"rewards rose by {rise.mean:.3f} while {name} fell from {first:.3f} to {last:.3f}",
                "the policy earns by something else than good masks: look at the panels, and mend "
                "the reward before going on",
                {"rise": rise.mean, f"{name}_then": first, name: last},
            )
    return None


def reward_ignores_masks(history: History, config: HealthConfig) -> Symptom | None:
    """What an answer earns for its masks has nothing, or the contrary, to do with their quality.

    Both are means over the same answers, so their ups and downs go together from step to step:
    a healthy run on scenes correlates by 0.8. The rewarded score is taken per well-formed answer,
    for the form is learnt first and would hide what becomes of the masks.
    """
    score = history.all("reward_mask") / np.maximum(history.all("well_formed"), 1e-6)
    span = min(history.rows, _CORRELATED * history.window)
    earned, found = score[-span:], history.all("iou")[-span:]
    both = np.isfinite(earned) & np.isfinite(found)
    if both.sum() < history.window // 2 or found[both].std() < 1e-3:
        return None
    together = _correlation(earned[both], found[both])
    chance = 1 / math.sqrt(both.sum())  # standard error of a correlation that is none
    against = together < -_CLEAR * chance
    if not against and together + 3 * chance >= _FOLLOWS:
        return None
    kl = median(history.now("kl")) - median(history.start("kl"))
    gain = Level.of(score[: history.block]).gain(Level.of(score[-history.block :]))
    pushed = kl > config.kl_growth and gain.mean < _CLEAR * gain.error
    what = "earn less" if against else "earn no more"
    return Symptom(
        "reward_ignores_masks",
        against or pushed,
        f"steps with better masks {what}: reward_mask and iou correlate by {together:.2f}, "
        f"while the KL grew by {kl:.3g}",
        "check learning/rewards.py and what calls it; if no mask is confident enough to count, "
        "begin with train_joint.oracle_steps",
        {"correlation": together, "kl_growth": kl},
    )


def _correlation(first: Series, second: Series) -> float:
    """Pearson's; 0 where one of the two does not move."""
    if min(first.std(), second.std()) < 1e-6:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def kl_out_of_bounds(history: History, config: HealthConfig) -> Symptom | None:
    """The policy is too far from the reference."""
    kl = median(history.now("kl")[-8:])  # k3 has outliers, which would carry a mean away
    if not kl > config.max_kl:
        return None
    return Symptom(
        "kl_out_of_bounds",
        True,
        f"the KL is {kl:.3g} nats per token, more than {config.max_kl:g}",
        "lower learning_rate or raise grpo.kl and go on from an earlier state; raise "
        "health.max_kl if that is wanted",
        {"kl": kl},
    )


def form_collapses(history: History, _: HealthConfig) -> Symptom | None:
    """Answers lose the form they had."""
    best, now = history.best("well_formed").mean, Level.of(history.now("well_formed")).mean
    if not (best - now > _FORM_LOST and now < 0.7 * best):
        return None
    return Symptom(
        "form_collapses",
        True,
        f"well-formed answers went from {best:.0%} to {now:.0%}",
        "lower learning_rate or raise grpo.kl or rewards.format, and go on from an earlier state; "
        "if answers are cut off, raise rollout.max_new_tokens",
        {"best": best, "now": now},
    )


def form_is_missing(history: History, _: HealthConfig) -> Symptom | None:
    """No answer has the form, so nothing can be learnt."""
    best, now = history.best("well_formed").mean, Level.of(history.now("well_formed")).mean
    if not max(best, now) < _NO_FORM:
        return None
    return Symptom(
        "form_is_missing",
        False,
        f"{now:.1%} of the answers are well-formed, so rewards are flat",
        "warm the policy up (train_language), or begin with train_joint.oracle_steps",
        {"now": now},
    )


def no_group_teaches(history: History, _: HealthConfig) -> Symptom | None:
    """All answers to a question earn the same, so advantages are zero."""
    share, reward = (Level.of(history.now(n)).mean for n in ("groups_that_teach", "reward"))
    missing = Level.of(history.now("well_formed")).mean < _NO_FORM
    if missing or not share < _NO_FORM or reward >= _SOLVED * history.top:
        return None
    return Symptom(
        "no_group_teaches",
        False,
        f"in {1 - share:.0%} of the groups all answers earn the same ({reward:.3f} on average)",
        "sample more widely (rollout.temperature, rollout.group) or ask harder questions; a "
        "reward that is constant is broken",
        {"groups_that_teach": share, "reward": reward},
    )


def length_runs_away(history: History, _: HealthConfig) -> Symptom | None:
    """Answers become very short or very long."""
    then, now = (Level.of(part("length")).mean for part in (history.start, history.now))
    low, high = _LENGTHS
    if not then > 0 or low <= now / then <= high:
        return None
    return Symptom(
        "length_runs_away",
        False,
        f"answers went from {then:.0f} to {now:.0f} tokens",
        "look at the panels: long ones often repeat themselves, short ones skip the reasoning; "
        "raise grpo.kl, or bound rollout.max_new_tokens",
        {"then": then, "now": now},
    )


def gradients_explode(history: History, _: HealthConfig) -> Symptom | None:
    """Gradients grow without end, and the loss does not fall."""
    then, now = (median(part("norm")) for part in (history.start, history.now))
    before = Level.of(history.all("loss")[-history.window : -history.block])
    gain = before.gain(Level.of(history.now("loss")))
    if not now > _NORM_GROWTH * max(then, 1e-8) or gain.mean < -_SURE * gain.error:
        return None
    return Symptom(
        "gradients_explode",
        True,
        f"the gradient norm went from {then:.3g} to {now:.3g} while the loss does not fall",
        "lower learning_rate or clip, and go on from an earlier state",
        {"then": then, "now": now, "loss": before.mean + gain.mean},
    )


AT_ONCE: tuple[Rule, ...] = (reward_is_wrong,)  # one row is enough
OF_REWARDS: tuple[Rule, ...] = (
    reward_is_hacked,
    reward_ignores_masks,
    reward_falls,
    reward_stalls,
    kl_out_of_bounds,
    form_collapses,
    form_is_missing,
    no_group_teaches,
    length_runs_away,
)
OF_ANY: tuple[Rule, ...] = (gradients_explode,)


def symptoms(
    history: History, config: HealthConfig, *, rewards: bool = True, windows: bool = True
) -> list[Symptom]:
    """Everything that is wrong after the last row.

    Args:
        history: Of this phase.
        config: Bounds.
        rewards: Whether rewards are judged.
        windows: Whether whole windows are judged, or only what one row can tell.
    """
    rules: list[Rule] = []
    judged = windows and history.rows >= history.window
    if rewards and "reward" in history.columns:
        rules += AT_ONCE
        rules += OF_REWARDS if judged else ()
    rules += OF_ANY if judged else ()
    found = (rule(history, config) for rule in rules)
    return [symptom for symptom in found if symptom is not None]


def _change(history: History, name: str) -> Level:
    """From the start of the phase until now."""
    return Level.of(history.start(name)).gain(Level.of(history.now(name)))
