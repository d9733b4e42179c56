"""What TrajTok's segmenter is trained with: labels from masks, matching of slots, two losses (spec section 4)."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

IGNORED = -1  # the label of a patch that no trajectory owns
FOCAL_GAMMA = 2.0
DICE_SMOOTH = 1e-6


def labels_of(masks_BTHW: torch.Tensor, graph_BMT: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The trajectory of each patch, (B,T*side*side) int64 or IGNORED, and which of the M numbers are used, (B,M) bool.

    `graph` names the mask id that trajectory m has in frame t, 0 where it is absent. Trajectories are numbered by their
    first patch; behind them come those without a patch, and last the empty rows of the graph.
    """
    height, width = masks_BTHW.shape[-2:]
    places = torch.arange(side, device=masks_BTHW.device)
    small = masks_BTHW[..., places * height // side, :][..., places * width // side].long()
    b, num_rows, _ = graph_BMT.shape
    wanted = graph_BMT.long()[..., None, None]
    owned_BMN = ((small[:, None] == wanted) & (wanted != 0)).flatten(2)
    is_owned, first_row = owned_BMN.max(dim=1)
    first_row = torch.where(is_owned, first_row, num_rows)

    exists = (graph_BMT != 0).any(-1)
    num = owned_BMN.shape[-1]
    patches = torch.arange(num, device=masks_BTHW.device).expand(b, num)
    first_hit = torch.full((b, num_rows + 1), num, device=masks_BTHW.device)
    first_hit = first_hit.scatter_reduce(1, first_row, patches, "amin")[:, :num_rows]
    order = torch.where(exists, first_hit, num + 1).argsort(dim=1, stable=True)
    numbers = torch.full((b, num_rows + 1), IGNORED, device=masks_BTHW.device)
    numbers.scatter_(1, order, torch.arange(num_rows, device=masks_BTHW.device).expand(b, num_rows).contiguous())
    numbers[:, num_rows] = IGNORED
    return numbers.gather(1, first_row), exists.gather(1, order)


def matched_slots(logits_NK: torch.Tensor, labels_N: torch.Tensor, valid_M: torch.Tensor) -> torch.Tensor:
    """The slot (K,) that each trajectory is matched to, so that the overlaps (IoU of its patches and those that the
    slot wins) are largest together; numbers without a trajectory take the slots that are left.
    """
    num_slots = logits_NK.shape[1]
    won_NK = F.one_hot(logits_NK.argmax(-1), num_slots).double()
    is_labelled = labels_N != IGNORED
    is_kept = is_labelled & (labels_N < num_slots)
    true_NK = F.one_hot(labels_N.clamp(0, num_slots - 1), num_slots).double() * is_kept[:, None]
    shared = true_NK.T @ won_NK
    union = true_NK.sum(0)[:, None] + won_NK.sum(0)[None] - shared
    overlap = shared / union.clamp(min=1)
    overlap[: len(valid_M)] *= valid_M[:num_slots, None]
    overlap[len(valid_M) :] = 0
    _, columns = linear_sum_assignment(-overlap.cpu().numpy())
    return torch.from_numpy(columns).to(logits_NK.device)


def focal_loss(logits_BNK: torch.Tensor, labels_BN: torch.Tensor) -> torch.Tensor:
    """The mean over labelled patches of (1-p)^2 times the cross-entropy, p the share of the true slot."""
    is_labelled = labels_BN != IGNORED
    log_p = F.log_softmax(logits_BNK[is_labelled], dim=-1).gather(1, labels_BN[is_labelled][:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** FOCAL_GAMMA) * log_p).mean()


def dice_loss(logits_BNK: torch.Tensor, labels_BN: torch.Tensor) -> torch.Tensor:
    """One minus the mean, over the slots that have a labelled patch, of their Dice overlap in the whole batch."""
    is_labelled = labels_BN != IGNORED
    shares_NK = logits_BNK[is_labelled].softmax(-1)
    true_NK = F.one_hot(labels_BN[is_labelled], logits_BNK.shape[-1]).to(shares_NK.dtype)
    shared, total = (shares_NK * true_NK).sum(0), shares_NK.sum(0) + true_NK.sum(0)
    overlap = (2 * shared + DICE_SMOOTH) / (total + DICE_SMOOTH)
    return 1 - overlap[true_NK.any(0)].mean()
