"""Labels, matching and losses are those of the published training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenmill.tokenizers.trajtok import build_segmenter
from tokenmill.tokenizers.trajtok_losses import (
    IGNORED,
    dice_loss,
    focal_loss,
    labels_of,
    matched_slots,
    segmentation_loss,
)
from tokenmill.tokenizers.trajtok_model import Segmentation

from .trajtok_kit import GOLDEN, TINY, clip_with_ids, normalized

pytestmark = pytest.mark.usefixtures("one_thread")


def test_labels_matching_and_losses_are_the_golden_ones() -> None:
    wanted = dict(np.load(GOLDEN / "loss_T4.npz"))
    num_slots, seed = int(wanted["K"]), int(wanted["seed"])
    _, ids = clip_with_ids(int(wanted["T"]), 112, seed, int(wanted["G"]))
    labels, valid = labels_of(ids[None], torch.from_numpy(wanted["graph"]), int(wanted["res"]))
    assert np.array_equal(labels[0], wanted["labels"])
    assert np.array_equal(valid[0], wanted["valid"])
    random = np.random.Generator(np.random.Philox(key=seed + 5))
    logits = torch.from_numpy(random.standard_normal((labels.shape[1], num_slots)).astype(np.float32))
    logits[torch.arange(len(logits)), (labels[0] * 5 + 3) % num_slots] += 2.0
    slots = matched_slots(logits, labels[0], valid[0])
    assert np.array_equal(slots, wanted["perm"])
    assert focal_loss(logits[None][..., slots], labels).item() == pytest.approx(float(wanted["focal"]), abs=1e-6)
    assert dice_loss(logits[None][..., slots], labels).item() == pytest.approx(float(wanted["dice"]), abs=1e-6)


def test_trajectories_are_numbered_by_their_first_patch() -> None:
    masks = torch.tensor([[[[3, 3], [0, 1]], [[2, 2], [2, 1]]]])
    graph = torch.tensor([[[1, 1], [0, 0], [3, 2], [4, 4], [1, 0]]])
    labels, valid = labels_of(masks, graph, 2)
    # Row 2 is hit first, then row 0, which also wins where row 4 says the same; row 3 is hit nowhere; row 1 is empty.
    assert labels.tolist() == [[0, 0, IGNORED, 1, 0, 0, 0, 1]]
    assert valid.tolist() == [[True, True, True, True, False]]


def test_patches_are_taken_from_the_upper_left_of_what_they_stand_for() -> None:
    masks = torch.arange(1, 10).reshape(1, 1, 3, 3)
    labels, _ = labels_of(masks, torch.arange(1, 10).reshape(1, 9, 1), 2)
    kept = [1, 2, 4, 5]  # rows and columns 0 and 1 of three
    numbers, _ = labels_of(torch.tensor(kept).reshape(1, 1, 2, 2), torch.arange(1, 10).reshape(1, 9, 1), 2)
    assert torch.equal(labels, numbers)


def test_a_perfect_segmentation_costs_nothing() -> None:
    labels = torch.tensor([[0, 0, 1, 2, IGNORED]])
    logits = torch.full((1, 5, 4), -30.0)
    logits[0, torch.arange(5), torch.tensor([3, 3, 0, 1, 2])] = 30.0
    slots = matched_slots(logits[0], labels[0], torch.tensor([True, True, True]))
    assert slots.tolist() == [3, 0, 1, 2]
    assert focal_loss(logits[..., slots], labels) == pytest.approx(0, abs=1e-6)
    assert dice_loss(logits[..., slots], labels) == pytest.approx(0, abs=1e-6)
    assert focal_loss(logits, labels) > 10
    assert dice_loss(logits, labels) > 0.9


def labels_by_hand(masks: np.ndarray, graph: np.ndarray, side: int) -> list[int]:
    """The labels of one clip as the rules say them, patch by patch."""
    num_frames, height, width = masks.shape
    rows = []
    for t in range(num_frames):
        for y in range(side):
            for x in range(side):
                found = masks[t, y * height // side, x * width // side]
                owners = [m for m, ids in enumerate(graph) if ids[t] != 0 and ids[t] == found]
                rows.append(owners[0] if owners else None)
    order = list(dict.fromkeys(row for row in rows if row is not None))
    return [IGNORED if row is None else order.index(row) for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_those_found_patch_by_patch(seed: int) -> None:
    random = np.random.default_rng(seed)
    masks = random.integers(0, 5, (2, 3, 7, 11), dtype=np.uint8)
    graph = random.integers(0, 7, (2, 6, 3))  # rows that share ids, ids that no pixel has
    graph[:, 4] = 0
    for side in (1, 4, 11):
        labels, valid = labels_of(torch.from_numpy(masks), torch.from_numpy(graph), side)
        for i in range(2):
            assert labels[i].tolist() == labels_by_hand(masks[i], graph[i], side)
            assert valid[i].tolist() == [True] * 5 + [False]


def test_a_clip_without_trajectories_has_no_labels_and_costs_nothing() -> None:
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    for num_rows in (0, 3):
        graph = torch.zeros(1, num_rows, 2, dtype=torch.long)
        labels, valid = labels_of(masks, graph, 4)
        assert labels.unique().tolist() == [IGNORED]
        assert not valid.any()
        logits = torch.randn(1, 32, 5, requires_grad=True)
        found = Segmentation(patches_BND=logits, queries_BKD=logits, logits_BNK=logits)
        loss = segmentation_loss(found, masks, graph)
        loss.backward()
        assert loss == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_slots_are_matched_by_all_that_they_win() -> None:
    # Slot 0 wins two patches of trajectory 0 and six that are not labelled, slot 1 one of it and nothing else.
    won = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 0])
    labels = torch.tensor([0, 0, 0, *[IGNORED] * 6])
    logits = torch.nn.functional.one_hot(won, 3).float()
    # 1/3 by slot 1; 2/9 by slot 0, which would have had 2/3 of labelled patches alone.
    assert matched_slots(logits, labels, torch.tensor([True, True])).tolist()[0] == 1


def test_trajectories_beyond_the_slots_are_ignored() -> None:
    masks = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    graph = torch.tensor([[[4], [3], [2], [1]]])
    logits = torch.randn(1, 4, 2)
    found = Segmentation(patches_BND=logits, queries_BKD=logits, logits_BNK=logits)
    loss = segmentation_loss(found, masks, graph)
    assert torch.equal(loss, segmentation_loss(found, masks, graph[:, :2]))
    labels, valid = labels_of(masks, graph[:, :2], 2)
    assert labels.tolist() == [[IGNORED, IGNORED, 0, 1]]
    matched = logits[..., matched_slots(logits[0], labels[0], valid[0])]
    torch.testing.assert_close(loss, focal_loss(matched, labels) + 2 * dice_loss(matched, labels))


@pytest.mark.parametrize("up", [None, 2])
def test_a_segmenter_learns_the_masks_of_a_clip(up: int | None) -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter(replace(TINY, up=up)).train()
    frames, ids = clip_with_ids(2, 56, 3, 4)
    graph = torch.arange(1, 5).reshape(1, 4, 1).expand(1, 4, 2)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = segmentation_loss(segmenter(normalized(frames)), ids[None], graph)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.isfinite().all() for parameter in segmenter.parameters() if parameter.grad is not None)
    assert losses[-1] < 0.7 * losses[0]
