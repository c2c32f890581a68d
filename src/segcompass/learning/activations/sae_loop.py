"""The loop of the SAE stage: Eq. 7 with its remedies, step by step.

Beside weights and optimizer it keeps a clock: when each latent last fired. The clock is saved under
the step's number before the state is: whatever a kill leaves behind, the two belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from segcompass.concepts.sae_loss import FusedLoss, fused_loss
from segcompass.concepts.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.learning.activations.cache import Tokens
from segcompass.learning.activations.latents import (
    MODALITIES,
    LatentClock,
    modality_of,
    new_latents,
    push_up,
)
from segcompass.learning.activations.stream import Statistics, TokenStream
from segcompass.learning.engine.distributed import World
from segcompass.learning.engine.loop import Loop, Losses, Observer
from segcompass.learning.engine.optimizer import learning_rate
from segcompass.learning.engine.states import StateError
from segcompass.learning.stages import SaeStage

_CALM = 0.8  # share of the steps after which no latent is restarted any more


def input_scale(found: Statistics, stage: SaeStage) -> float:
    """Brings inputs to norm sqrt(D), so that learning rate and l1 mean the same for any policy."""
    if not stage.scale_inputs:
        return 1.0
    size = found.spread if stage.centre else found.norm
    return float(len(found.mean) ** 0.5 / max(size, torch.finfo(torch.float32).tiny))


def new_sae(found: Statistics, stage: SaeStage, seed: int, scale: float) -> SparseAutoencoder:
    """An SAE at its start, for inputs times ``scale``."""
    torch.manual_seed(seed)
    sizes = SparseAutoencoderConfig(
        d_in=len(found.mean),
        d_sae=stage.latents,
        threshold=stage.threshold,
        apply_b_dec_to_input=stage.centre,  # so that no latent is spent on the mean
    )
    sae = SparseAutoencoder(sizes, mean=found.mean * scale if stage.centre else None)
    with torch.no_grad():
        rows = F.normalize(sae.W_dec, dim=-1)
        readers = rows if stage.tied_start else F.normalize(torch.randn_like(rows), dim=-1)
        norm = stage.decoder_norm
        sae.W_dec.copy_(rows * (1.0 if stage.unit_decoder else norm))
        # What the SAE begins with is the same size either way: encoder times decoder is norm².
        sae.W_enc.copy_((readers * (norm**2 if stage.unit_decoder else norm)).t())
    return sae


def flat_rate(stage: SaeStage, step: int) -> float:
    """Linear rise, constant, and over the last ``decay`` of the steps linear to the final rate."""
    rise, fall = stage.warmup * stage.steps, (stage.decay or 0.0) * stage.steps
    low = 1 / stage.final_division
    up = (step + 1) / rise if rise else 1.0
    down = low + (1 - low) * (stage.steps - 1 - step) / fall if fall else 1.0
    return stage.learning_rate * min(1.0, up, down)


class SaeLoop(Loop):
    """Runs the stage.

    Args:
        folder: Of the stage.
        sae: In float32, for inputs of the stream times ``scale``.
        stage: Settings.
        seed: Of everything random.
        scale: Of the inputs.
        world: The ranks whose tokens make up a batch.
        observers: As of the loop.
    """

    def __init__(
        self,
        folder: Path,
        sae: SparseAutoencoder,
        stage: SaeStage,
        seed: int,
        scale: float,
        world: World,
        observers: Sequence[Observer] = (),
    ) -> None:
        parts = {"sae": sae}
        super().__init__(folder, "sae", parts, stage, seed, world=world, observers=observers)
        self.sae, self.stage, self.scale = sae, stage, scale
        self.clock = LatentClock(stage.latents, sae.b_dec.device)

    def resume(self) -> bool:
        """As the loop's own, with the clock of the same step."""
        resumed = super().resume()
        if resumed:
            self.clock.load(self._clock_path())
        return resumed

    def save(self) -> None:
        """As the loop's own, after the clock."""
        path = self._clock_path()
        error = None
        if self.world.is_main:
            try:
                self.clock.save(path)
            except (OSError, SafetensorError) as caught:
                error = StateError(f"{path} cannot be written ({caught}); make room, --resume")
        self.world.agree(error)
        super().save()
        if self.world.is_main:
            for old in self.folder.glob("latents-*.safetensors"):
                if old != path:
                    old.unlink()

    def prepare(self, stream: TokenStream) -> None:
        """Collect the states of the first steps under a bar of their own; it can take minutes."""
        with self._bar() as update:
            stream.fill(self.step, update)

    def _clock_path(self) -> Path:
        return self.folder / f"latents-{self.step}.safetensors"

    def losses(self, tokens: Tokens) -> Losses:
        """Eq. 7 on this rank's tokens, as their part of the whole batch."""
        stage = self.stage
        self._set_rate()
        z = tokens.states.to(self.sae.b_dec) * self.scale
        groups = modality_of(tokens.kinds.to(z.device))
        if stage.unit_decoder:
            self.normalise()
        rise = min(1.0, (self.step + 1) / max(1.0, stage.l1_warmup * stage.steps))
        result = fused_loss(
            self.sae,
            z,
            stage.l1 * rise,
            weigh_by_decoder=stage.weigh_by_decoder,
            groups=groups,
            n_groups=len(MODALITIES),
            budget=stage.budget_mb << 20,
        )
        figures = self._figures(result, z, groups)
        # The mean over ranks of these is the mean over all tokens.
        part = len(z) * self.world.size / stage.batch
        return {"loss": (result.total + self._revival(result, z)) * part, **figures}

    def _set_rate(self) -> None:
        """A rate that is constant until its last decline, where the stage wants one."""
        if self.stage.decay is None:
            return
        factor = flat_rate(self.stage, self.step) / learning_rate(self.stage, self.step)
        for optimizer in self.weights.optimizers:
            for group in optimizer.param_groups:
                group["factor"] = factor

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring the decoder's rows to norm 1."""
        self.sae.W_dec.copy_(F.normalize(self.sae.W_dec, dim=-1))

    def _figures(self, result: FusedLoss, z: Tensor, groups: Tensor) -> Losses:
        """What the log tells of the batch of all ranks; moves the clock."""
        tokens = torch.bincount(groups, minlength=len(MODALITIES))
        moments = torch.stack([result.errors.sum(), z.square().sum()])
        packed = [result.fired.flatten(), tokens, moments, z.sum(0)]
        sums = self.world.sum(torch.cat([part.double().flatten() for part in packed]))
        fired, tokens, moments, total = torch.split(sums, [part.numel() for part in packed])
        fired = fired.view_as(result.fired)
        self.clock.update(fired.long(), tokens.long())
        count = tokens.sum()
        variance = moments[1] - total.square().sum() / count
        return {
            "explained_variance": 1 - moments[0] / variance,
            "l0": fired.sum() / count,
            "dead": self.clock.dead(self.stage.dead_after).double().mean(),
        }

    def _revival(self, result: FusedLoss, z: Tensor) -> Tensor:
        """What is done about dead latents: a term of the loss, or new rows now and then."""
        stage, dead = self.stage, self.clock.dead(self.stage.dead_after)
        nothing = torch.zeros((), device=z.device)
        if stage.revive == "none" or not bool(dead.any()):
            return nothing
        if stage.revive == "auxiliary":
            return stage.auxiliary * push_up(self.sae, z, dead)
        if (self.step + 1) % stage.revive_every == 0 and self.step < _CALM * stage.steps:
            self._restart(z, result.errors, dead)
        return nothing

    @torch.no_grad()
    def _restart(self, z: Tensor, errors: Tensor, dead: Tensor) -> None:
        """Dead latents have no gradient in this step: their rows may change before it is taken."""
        usable = max(1, self.stage.batch // self.world.size)  # the same on every rank
        new = new_latents(
            self.sae,
            z[:usable],
            errors[:usable],
            dead,
            decoder_norm=1.0 if self.stage.unit_decoder else self.stage.decoder_norm,
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.step),
        )
        self.world.copy_from_main(new)
        at = new.latents
        self.sae.W_dec[at], self.sae.b_enc[at] = new.decoder, 0.0
        self.sae.W_enc[:, at] = new.encoder.t()
        for optimizer in self.weights.optimizers:
            for parameter in (self.sae.W_dec, self.sae.b_enc, self.sae.W_enc):
                for name, moment in optimizer.state.get(parameter, {}).items():
                    if name != "step":
                        (moment.t() if parameter is self.sae.W_enc else moment)[at] = 0.0
        self.clock.restart(at)
