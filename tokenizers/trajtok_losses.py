"""What TrajTok's segmenter is trained with (arXiv:2602.22779): labels from masks, matching of slots, two losses."""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from .trajtok_model import Segmentation

IGNORED = -1  # the label of a patch that no trajectory owns
FOCAL_GAMMA = 2.0
DICE_SMOOTH, DICE_WEIGHT = 1e-6, 2.0


def segmentation_loss(found: Segmentation, masks_BTHW: torch.Tensor, graph_BMT: torch.Tensor) -> torch.Tensor:
    """What a segmenter learns by: focal + 2 dice over patches, and the same over the finer grid where there is one.

    Masks and graph are those of ClipMasks, stacked; graphs of clips with fewer trajectories have rows of 0 below.
    Only the first K trajectories count, K the number of slots. Slots are matched for each clip and each grid.
    """
    num_slots = found.logits_BNK.shape[-1]
    grids = [found.logits_BNK] if found.fine_logits_BNK is None else [found.logits_BNK, found.fine_logits_BNK]
    losses = []
    for logits_BNK in grids:
        side = math.isqrt(logits_BNK.shape[1] // masks_BTHW.shape[1])
        labels_BN, valid_BM = labels_of(masks_BTHW, graph_BMT[:, :num_slots], side)
        clips = zip(logits_BNK, labels_BN, valid_BM, strict=True)
        matched = torch.stack([logits[:, matched_slots(logits, *known)] for logits, *known in clips]).float()
        losses.append(focal_loss(matched, labels_BN) + DICE_WEIGHT * dice_loss(matched, labels_BN))
    return torch.stack(losses).sum()


def labels_of(masks_BTHW: torch.Tensor, graph_BMT: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The trajectory of each patch, (B,T*side*side) int64 or IGNORED, and which of the M numbers are used, (B,M) bool.

    `graph` names the mask id that trajectory m has in frame t, 0 where it is absent; of several with the same id the
    first has it. Trajectories are numbered by their first patch; behind them come those without a patch, and last the
    empty rows of the graph.
    """
    height, width = masks_BTHW.shape[-2:]
    places = torch.arange(side, device=masks_BTHW.device)
    ids_BTN = masks_BTHW[..., places * height // side, :][..., places * width // side].flatten(2).long()
    graph_BMT = graph_BMT.long()
    b, num_rows, num_frames = graph_BMT.shape
    num_ids = 1 + max(int(ids_BTN.max()), int(graph_BMT.max()) if num_rows else 0)
    rows = torch.arange(num_rows, device=graph_BMT.device).expand(b, num_frames, num_rows)
    row_of_id = torch.full((b, num_frames, num_ids), num_rows, device=graph_BMT.device)
    row_of_id = row_of_id.scatter_reduce(2, graph_BMT.mT, rows, "amin")
    row_of_id[..., 0] = num_rows
    row_BN = row_of_id.gather(2, ids_BTN).flatten(1)

    num = row_BN.shape[1]
    exists = (graph_BMT != 0).any(-1)
    first_hit = torch.full((b, num_rows + 1), num, device=row_BN.device)
    first_hit = first_hit.scatter_reduce(1, row_BN, torch.arange(num, device=row_BN.device).expand(b, num), "amin")
    order = torch.where(exists, first_hit[:, :num_rows], num + 1).argsort(dim=1, stable=True)
    numbers = torch.full((b, num_rows + 1), IGNORED, device=row_BN.device)
    numbers.scatter_(1, order, rows[:, 0])
    return numbers.gather(1, row_BN), exists.gather(1, order)


def matched_slots(logits_NK: torch.Tensor, labels_N: torch.Tensor, valid_M: torch.Tensor) -> torch.Tensor:
    """The slot (K,) that each trajectory is matched to, so that the overlaps (IoU of its patches and those that the
    slot wins, labelled or not) are largest together; numbers without a trajectory take the slots that are left.
    """
    num_slots = logits_NK.shape[1]
    won_N = logits_NK.argmax(-1)
    is_known = (labels_N != IGNORED) & (labels_N < num_slots)
    pairs = labels_N[is_known] * num_slots + won_N[is_known]
    shared = pairs.bincount(minlength=num_slots**2).unflatten(0, (num_slots, num_slots)).double()
    union = shared.sum(1)[:, None] + won_N.bincount(minlength=num_slots) - shared
    overlap = shared / union.clamp(min=1)
    overlap[: len(valid_M)] *= valid_M[:num_slots, None]
    overlap[len(valid_M) :] = 0
    _, columns = linear_sum_assignment(-overlap.cpu().numpy())
    return torch.from_numpy(columns).to(logits_NK.device)


def focal_loss(logits_BNK: torch.Tensor, labels_BN: torch.Tensor) -> torch.Tensor:
    """The mean over labelled patches of (1-p)^2 times the cross-entropy, p the share of the true slot; 0 of none."""
    is_labelled = labels_BN != IGNORED
    log_p = F.log_softmax(logits_BNK[is_labelled], dim=-1).gather(1, labels_BN[is_labelled][:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** FOCAL_GAMMA) * log_p).sum() / max(1, len(log_p))


def dice_loss(logits_BNK: torch.Tensor, labels_BN: torch.Tensor) -> torch.Tensor:
    """One minus the mean, over the trajectories that have a labelled patch, of their Dice overlap in the whole batch;
    0 where no patch is labelled.
    """
    is_labelled = labels_BN != IGNORED
    shares_NK, labels_N = logits_BNK[is_labelled].softmax(-1), labels_BN[is_labelled]
    of_true = shares_NK.gather(1, labels_N[:, None]).squeeze(1)
    num_slots = logits_BNK.shape[-1]
    shared = torch.zeros(num_slots, dtype=of_true.dtype, device=of_true.device).index_add(0, labels_N, of_true)
    num_true = labels_N.bincount(minlength=num_slots)
    overlap = (2 * shared + DICE_SMOOTH) / (shares_NK.sum(0) + num_true + DICE_SMOOTH)
    present = num_true > 0
    return (1 - overlap[present]).sum() / present.sum().clamp(min=1)
