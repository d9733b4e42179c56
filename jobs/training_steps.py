"""The steps of a training, each a pure function of the weights before it, its clips, its seed and its number."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..pipeline.storage import Folder
from ..schemas.clip import ClipFailure, ClipFrames, FrameBatch
from ..schemas.digest import digest_of
from ..schemas.errors import TokenizerError, TokenmillError
from ..schemas.training import LearningSection
from ..tokenizers.pyratok_losses import PyramidTraining
from .display import Display
from .interruption import draining, raise_if_interrupted
from .training_clips import ClipStream
from .training_output import add_metrics, write_checkpoint

VAE_WEIGHT = 10.0  # of the squared error, beside the other terms
GRACE_S = 60.0  # for a step and its checkpoint, once the job is asked to stop
CaptionsOf = Callable[[Sequence[ClipFrames]], list[str | None]]


@dataclass(kw_only=True)
class Learner:
    """What is trained, what changes it, and how many steps were done."""

    training: PyramidTraining
    section: LearningSection
    vae_steps: int = 0
    begin_levels: Callable[[], None] = lambda: None  # called once, after the steps of the VAE alone
    step: int = 0
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        learned = [one for one in self.training.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, weight_decay=self.section.weight_decay)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.training.parameters()).device

    def update(self, x_BCTHW: torch.Tensor, texts: Sequence[str | None]) -> dict[str, torch.Tensor]:
        """Do one step; the terms of its loss, and their weighted sum as ``loss``. TokenizerError where it diverges.

        The first `vae_steps` have the squared error of the VAE alone.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.section, self.vae_steps)
        drawn = torch.Generator().manual_seed(int(digest_of([self.section.seed, self.step])[:15], 16))
        if self.step < self.vae_steps:
            terms = {"squared_error": self.training.vae_loss(x_BCTHW)}
            loss = VAE_WEIGHT * terms["squared_error"]
        else:
            used = torch.rand(len(texts), generator=drawn).lt(self.section.caption_share).tolist()
            chosen = [text if is_used else None for text, is_used in zip(texts, used, strict=True)]
            terms = self.training(x_BCTHW, chosen, drawn)
            loss = self.training.total(terms)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.training.parameters(), self.section.clip_norm)
        if not torch.isfinite(norm):  # of a loss that is not finite neither
            raise TokenizerError(
                f"step {self.step}: the loss is {loss.item():g} and the length of its gradient {norm.item():g}: give a"
                f" smaller training.learning_rate or a longer warm-up, and another output"
            )
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def psnr(self, x_BCTHW: torch.Tensor, texts: Sequence[str | None]) -> float:
        """Of what the levels keep of uint8 frames, in dB, over all clips together; before there are any, of the VAE."""
        if self.step < self.vae_steps:
            return -10 * math.log10(max(self.training.vae_loss(x_BCTHW).item() / 4, 1e-10))
        model = self.training.model
        text = model.embed_texts(texts) if any(one is not None for one in texts) else None
        found = model.quantize(model.encode(x_BCTHW, model.taps, in_groups=False), text, self.training.text_scale)
        made_BCTHW = model.decode(model.restored(found.values_BCthw), None)
        return 10 * math.log10(4 / max(F.mse_loss(made_BCTHW, x_BCTHW.float() / 127.5 - 1).item(), 1e-10))

    def checkpoint(self) -> dict[str, Any]:
        """All that going on from here takes, as plain values and tensors."""
        model = self.training.model
        return {
            "step": self.step,
            "vae": asdict(model.sizes),
            "pyramid": asdict(model.pyramid_sizes),
            "statistics": None if model.statistics is None else asdict(model.statistics),
            "training": self.training.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def resume(self, kept: dict[str, Any]) -> None:
        """Be where `kept`, a checkpoint of the same sizes, was."""
        self.training.load_state_dict(kept["training"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step = kept["step"]


def learning_rate_at(step: int, section: LearningSection, vae_steps: int = 0) -> float:
    """The learning rate of a step, from 0: it rises in `warmup_steps`, then stays, or falls to 0 as a cosine does.

    That of the VAE alone rises and stays; that of the levels begins anew.
    """
    if step < vae_steps:
        return section.vae_learning_rate * min(1.0, (step + 1) / (section.warmup_steps + 1))
    step, steps = step - vae_steps, section.steps - vae_steps
    rate = section.learning_rate * min(1.0, (step + 1) / (section.warmup_steps + 1))
    if section.schedule == "constant" or step < section.warmup_steps:
        return rate
    done = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    return rate * 0.5 * (1 + math.cos(math.pi * done))


def frames_of(clips: Sequence[ClipFrames]) -> torch.Tensor:
    """uint8 (B,3,T,H,W)."""
    return torch.from_numpy(FrameBatch.stack(clips).frames_BTHWC).permute(0, 4, 1, 2, 3)


def take_steps(learner: Learner, stream: ClipStream, captions_of: CaptionsOf, folder: Folder, display: Display) -> None:
    """Go on to the last step, with a checkpoint now and then, and at the end.

    KeyboardInterrupt: the job was asked to stop, and the steps done until then are kept.
    """
    section, meter = learner.section, _Meter(learner.section.batch_size)
    batches = _batches(stream, section.batch_size, display)
    with draining(GRACE_S) as stop:
        while learner.step < section.steps:
            raise_if_interrupted()
            if learner.step == learner.vae_steps:
                learner.begin_levels()
            with _kept_on_errors(learner, folder), meter.waiting():
                clips = next(batches)
            captions, x_BCTHW = captions_of(clips), frames_of(clips).to(learner.device)
            step = learner.step
            is_shown = step % section.log_every == 0 or step == section.steps - 1
            psnr = learner.psnr(x_BCTHW, captions) if is_shown else 0.0
            terms = learner.update(x_BCTHW, captions)
            meter.num_steps += 1
            if is_shown:
                line = {"step": step, **{name: term.item() for name, term in terms.items()}, "psnr": psnr}
                line |= {"learning_rate": learning_rate_at(step, section, learner.vae_steps), **meter.take()}
                line = {name: value if name == "step" else float(f"{value:.6g}") for name, value in line.items()}
                add_metrics(folder, line)
                display.event("step", **line)
            display.progress("steps", learner.step, section.steps, {})
            if stop.is_set() or learner.step % section.checkpoint_every == 0 or learner.step == section.steps:
                write_checkpoint(folder, learner.checkpoint())
            if stop.is_set() and learner.step < section.steps:
                raise KeyboardInterrupt


def _batches(stream: ClipStream, batch_size: int, display: Display) -> Iterator[list[ClipFrames]]:
    """The clips of one step after the other; those that cannot be decoded are shown."""
    batch: list[ClipFrames] = []
    num_failed = 0
    for result in stream:
        if isinstance(result, ClipFailure):
            num_failed += 1
            display.event(result.status, clip=result.clip_id, step=result.step, reason=result.reason, so_far=num_failed)
            continue
        batch.append(result)
        if len(batch) == batch_size:
            yield batch
            batch = []


@contextlib.contextmanager
def _kept_on_errors(learner: Learner, folder: Folder) -> Iterator[None]:
    """A store that is out of reach costs no step: they are kept before the job ends."""
    try:
        yield
    except TokenmillError:
        if learner.step:
            write_checkpoint(folder, learner.checkpoint())
        raise


class _Meter:
    """Clips per second, and seconds in which nothing was there to learn from, since the last time."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self.num_steps = batch_size, 0
        self._start_s, self._wait_s = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside counts as waiting for frames."""
        start_s = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start_s

    def take(self) -> dict[str, float]:
        """The figures since the last time, and begin anew."""
        now_s = time.perf_counter()
        rate = self.num_steps * self._batch_size / max(now_s - self._start_s, 1e-9)
        taken = {"clips_per_s": rate, "wait_s": self._wait_s}
        self._start_s, self._wait_s, self.num_steps = now_s, 0.0, 0
        return taken
