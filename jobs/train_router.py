"""tokenmill train router: labels of a cache -> features -> steps of two heads, resumable -> router.safetensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from ..pipeline.storage import Folder
from ..schemas.digest import digest_of
from ..schemas.errors import CacheError, RecipeError, TokenizerError
from ..schemas.router_training import RouterLearningSection, RouterTrainingRecipe, parse_router_training
from ..tokenizers.router import (
    PolicyHead,
    RelevanceHead,
    RouterAbout,
    RouterFile,
    policy_loss,
    relevance_loss,
    save_router,
)
from .display import Display
from .interruption import draining, raise_if_interrupted
from .opening import open_cache
from .router_feature_makers import Part
from .router_features import IMPORT, Examples, RouterExamples, router_examples
from .training_output import (
    CHECKPOINT,
    add_metrics,
    alone_in,
    claim,
    cut_metrics,
    output_folder,
    read_checkpoint,
    write_checkpoint,
    write_whole,
)

ROUTER = "router.safetensors"
GRACE_S = 60.0  # for a step and its checkpoint, once the job is asked to stop
MEASURED = 4096  # held-out examples at once
PAPER_ACCURACY: dict[Part, float] = {"relevance": 0.834, "policy": 0.982}  # VideoRouter (arXiv:2605.05848), on its sets


def train_router(recipe: RouterTrainingRecipe, display: Display) -> None:
    """Train the recipe's heads from where its output folder is to the last step, and write router.safetensors.

    KeyboardInterrupt: the job was asked to stop before; its steps are kept.
    """
    torch.set_num_threads(recipe.training.threads)
    folder = output_folder(recipe)
    with alone_in(folder):
        claim(folder, recipe, parse_router_training)
        kept = read_checkpoint(folder)
        cache = open_cache(recipe.cache, recipe.snapshot)
        examples = router_examples(recipe, cache, folder, display, is_begun=kept is not None)
        del cache  # with its encoder
        stages = [_stage(part, one, recipe.training) for part, one in examples.parts.items()]
        if kept:
            _resume(stages, kept, examples, folder)
        steps = sum(stage.num_steps for stage in stages)
        if _done(stages) == steps and _is_written(folder, steps):
            display.event("finished", router=folder.uri(ROUTER), steps=steps)
            return
        cut_metrics(folder, _done(stages))
        for stage in stages:
            numbers = {"learned_from": len(stage.learned), "held_out": len(stage.measured), "by": stage.examples.split}
            display.event("training", head=stage.part, **numbers, step=stage.step, steps=stage.num_steps)
        _take_steps(stages, partial(_keep, folder, examples, stages), folder, display)
        figures = rounded({name: value for stage in stages for name, value in stage.figures().items()})
        add_metrics(folder, {"step": steps, **figures})
        display.event("held_out", **figures)
        extra = {"steps": steps, "recipe": digest_of(recipe.deciding), **figures}
        write_whole(folder, ROUTER, lambda path: _save(path, recipe, examples, stages, extra))
        display.event("trained", router=folder.uri(ROUTER), steps=steps)


def _is_written(folder: Folder, steps: int) -> bool:
    """Whether the router of that step is there, and not only its checkpoint."""
    if not folder.exists(ROUTER):
        return False
    try:
        return RouterFile.read(folder.path(ROUTER)).extra.get("steps") == str(steps)
    except TokenizerError:
        return False


@dataclass(kw_only=True)
class Stage:
    """The training of one head: what it learns from, and how many steps were done."""

    part: Part
    head: RelevanceHead | PolicyHead
    examples: Examples
    section: RouterLearningSection
    step: int = 0
    learned: np.ndarray = field(init=False)
    measured: np.ndarray = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.learned, self.measured = (self.examples.numbers(held_out=is_out) for is_out in (False, True))
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=self.learning_rate, weight_decay=self.section.weight_decay
        )

    @property
    def is_relevance(self) -> bool:
        """Whether the head says of frames if they matter, and not of queries what they ask for."""
        return self.part == "relevance"

    @property
    def learning_rate(self) -> float:
        """The learning rate of all steps."""
        return self.section.relevance_learning_rate if self.is_relevance else self.section.policy_learning_rate

    @property
    def steps_per_epoch(self) -> int:
        """So many steps see every example once."""
        return -(-len(self.learned) // self.section.batch_size)

    @property
    def num_steps(self) -> int:
        """All steps of this head."""
        epochs = self.section.relevance_epochs if self.is_relevance else self.section.policy_epochs
        return epochs * self.steps_per_epoch

    @cached_property
    def pos_weight(self) -> float:
        """How many times more frames do not matter than do, among those that are learned from."""
        positives = int(self.examples.targets_N[self.learned].sum())
        return (len(self.learned) - positives) / positives

    def batch(self) -> np.ndarray:
        """The numbers of the examples of the next step: in every epoch all, in an order of seed and epoch alone."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        first, size = place * self.section.batch_size, self.section.batch_size
        return self.learned[_shuffled(len(self.learned), self.section.seed, epoch)[first : first + size]]

    def update(self) -> float:
        """Do one step; its loss. TokenizerError where it diverges."""
        numbers = self.batch()
        targets_N = torch.from_numpy(self.examples.targets_N[numbers])
        logits = self.head(self.examples.features(numbers))
        loss = (
            relevance_loss(logits, targets_N, self.pos_weight) if self.is_relevance else policy_loss(logits, targets_N)
        )
        if not torch.isfinite(loss):
            raise TokenizerError(
                f"{self.part} head, step {self.step}: the loss is {loss.item():g}: give a smaller"
                f" training.{self.part}_learning_rate, and another output"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def figures(self) -> dict[str, float | None]:
        """How right the head is on what was held out, beside what the paper has on its own sets; None without any."""
        targets_N = self.examples.targets_N[self.measured]
        firsts = range(0, len(self.measured), MEASURED)
        parts = [self.head(self.examples.features(self.measured[first : first + MEASURED])) for first in firsts]
        scores_N = np.zeros(0)
        if parts:
            logits = torch.cat(parts)
            scores_N = (logits if self.is_relevance else logits[:, 1] - logits[:, 0]).double().numpy()
        accuracy = float(((scores_N > 0) == targets_N).mean()) if parts else None
        named = {f"{self.part}_accuracy": accuracy, f"paper_{self.part}_accuracy": PAPER_ACCURACY[self.part]}
        return named | ({"relevance_auroc": auroc(scores_N, targets_N)} if self.is_relevance else {})

    def checkpoint(self) -> dict[str, Any]:
        """All that going on from here takes."""
        return {"step": self.step, "head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def resume(self, kept: dict[str, Any]) -> None:
        """Be where `kept`, a checkpoint of the same sizes, was."""
        self.head.load_state_dict(kept["head"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step = kept["step"]


@lru_cache(maxsize=1)
def _shuffled(number: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `number` in the order of random bits, which every version of numpy draws alike."""
    return np.random.Philox(key=[seed, epoch]).random_raw(number).argsort(kind="stable")


def auroc(scores_N: np.ndarray, is_true_N: np.ndarray) -> float | None:
    """How often a true example has a higher score than a false one, equal ones counting half; None without both."""
    num_true = int(is_true_N.sum())
    num_pairs = num_true * (len(is_true_N) - num_true)
    if not num_pairs:
        return None
    return float((rankdata(scores_N)[is_true_N].sum() - num_true * (num_true + 1) / 2) / num_pairs)


def _stage(part: Part, examples: Examples, section: RouterLearningSection) -> Stage:
    """The training of a head at step 0; RecipeError where its examples are all alike."""
    torch.manual_seed(section.seed)
    kind = RelevanceHead if part == "relevance" else PolicyHead
    head = kind(examples.dim, section.hidden)
    stage = Stage(part=part, head=head, examples=examples, section=section)
    found = np.unique(examples.targets_N[stage.learned])
    if len(found) < 2:
        key, names = ("labels", (0, 1)) if stage.is_relevance else ("policies", ("global", "fragment"))
        raise RecipeError(
            f"{key}: all {len(stage.learned)} that are learned from are {names[int(found[0])]}; accepted: both"
            f" {names[0]} and {names[1]}: add some: {IMPORT}, or give a smaller training.held_out"
        )
    return stage


def _resume(stages: Sequence[Stage], kept: dict[str, Any], examples: RouterExamples, folder: Folder) -> None:
    """Bring the stages where the checkpoint was; CacheError where it is of other examples."""
    try:
        if kept["examples"] != examples.digest:
            raise ValueError("its features are not those that are here")
        for stage in stages:
            stage.resume(kept[stage.part])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CacheError(
            f"{folder.uri(CHECKPOINT)}: it does not fit ({said}): remove it to begin anew, or give output: another"
            f" folder"
        ) from None
    for stage in stages:
        if stage.step > stage.num_steps:
            found, begun = stage.num_steps // stage.steps_per_epoch, -(-stage.step // stage.steps_per_epoch)
            raise RecipeError(f"training.{stage.part}_epochs: found {found}; accepted: {begun}, begun already, or more")


def _done(stages: Sequence[Stage]) -> int:
    return sum(stage.step for stage in stages)


def _keep(folder: Folder, examples: RouterExamples, stages: Sequence[Stage]) -> None:
    write_checkpoint(folder, {"examples": examples.digest, **{stage.part: stage.checkpoint() for stage in stages}})


def _take_steps(stages: Sequence[Stage], keep: Callable[[], None], folder: Folder, display: Display) -> None:
    """Go on to the last step of each head, one head after the other, with a checkpoint now and then, and at the end.

    KeyboardInterrupt: the job was asked to stop, and the steps done until then are kept.
    """
    total = sum(stage.num_steps for stage in stages)
    with draining(GRACE_S) as stop:
        for stage in stages:
            while stage.step < stage.num_steps:
                raise_if_interrupted()
                done, step = _done(stages), stage.step
                loss = stage.update()
                is_last = stage.step == stage.num_steps
                if step % stage.section.log_every == 0 or is_last:
                    line = {"head": stage.part, "epoch": step // stage.steps_per_epoch, "loss": loss}
                    line = {"step": done, **rounded({**line, "learning_rate": stage.learning_rate})}
                    add_metrics(folder, line)
                    display.event("step", **line)
                display.progress("steps", done + 1, total, {})
                if stop.is_set() or stage.step % stage.section.checkpoint_every == 0 or is_last:
                    keep()
                if stop.is_set() and done + 1 < total:
                    raise KeyboardInterrupt


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same with six digits of every float."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()}


def _save(
    path: str,
    recipe: RouterTrainingRecipe,
    examples: RouterExamples,
    stages: Sequence[Stage],
    extra: Mapping[str, Any],
) -> None:
    heads: dict[Part, Any] = {stage.part: stage.head for stage in stages}
    dims = {part: one.dim for part, one in examples.parts.items()}
    about = RouterAbout(
        features="early" if recipe.early_layers else "pair",
        of=examples.of,
        layers=recipe.early_layers.layers if recipe.early_layers else None,
        relevance_dim=dims.get("relevance"),
        policy_dim=dims.get("policy"),
        hidden=recipe.training.hidden,
    )
    said = {name: str(value) for name, value in extra.items() if value is not None}
    save_router(path, about, heads.get("relevance"), heads.get("policy"), said)
