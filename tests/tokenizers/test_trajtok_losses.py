"""Labels, matching and losses are those of the published training."""

import numpy as np
import pytest
import torch

from tokenmill.tokenizers.trajtok_losses import IGNORED, dice_loss, focal_loss, labels_of, matched_slots

from .trajtok_kit import GOLDEN, clip_with_ids


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
