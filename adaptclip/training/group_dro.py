"""Group DRO: weights of groups that move towards the groups with the highest loss."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor


class GroupDRO:
    """The online algorithm of Sagawa et al. 2020 (arXiv:1911.08731, algorithm 1), on batches.

    The paper draws a group uniformly and an image of it, multiplies that group's weight q_g by exp(step · loss),
    normalises q, and descends on q_g · loss. Here the sampler shows every group equally often, and a batch moves the
    weights of all groups in it at once:

        q_g ← q_g · exp(step · (L_g + adjust / sqrt(n_g)))      for each group g in the batch, then q ← q / Σ q
        loss = Σ over the groups in the batch of q_g · L_g

    with L_g the mean loss of the batch's images of g, and n_g the training images of g (the adjustment is the paper's
    eq. 5). Images of no group keep their natural share u of the loss: u · (their mean loss) + (1 - u) · (the above).

    A batch is that of all processes together: sums over groups are reduced before the weights move, so that every
    process holds the same weights and the number of processes changes nothing. Accumulated micro-batches each move
    the weights.

    Attributes:
        log_weights: (G,) float64 log q; the state that a checkpoint holds.
    """

    def __init__(
        self, place: Tensor, *, step: float = 0.01, adjust: float = 0.0, accelerator: Accelerator | None = None
    ) -> None:
        """Starts with equal weights.

        Args:
            place: (N,) int64 group of each training image, 0 to G - 1 without gaps, or -1 for none.
            step: the paper's step size of q, above 0.
            adjust: the paper's C, 0 or more.
            accelerator: whose processes share a batch; None where there is one.
        """
        counts = torch.bincount(place[place >= 0])
        self._num_groups, self._step, self._accelerator = len(counts), step, accelerator
        # One more place, at the end, takes the images of no group.
        self._place = torch.where(place >= 0, place, len(counts))
        self._of_none = float((place < 0).double().mean())
        self._margin = adjust / counts.double().sqrt()
        self.log_weights = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64).log()

    def fresh(self) -> GroupDRO:
        """Returns another one of the same images and settings, whose weights are equal again."""
        other = copy.copy(self)
        other.log_weights = torch.full_like(self.log_weights, 1 / self._num_groups).log()
        return other

    @property
    def shares(self) -> Tensor:
        """(G,) float64 q, which sums to 1."""
        return self.log_weights.exp()

    def weigh(self, losses: Tensor, index: Tensor) -> Tensor:
        """Moves the groups' weights and returns those of the images.

        Args:
            losses: (B,) losses of this process's images, without gradients.
            index: (B,) positions among the N images.

        Returns:
            (B,) w such that the mean of w · loss over the images of all processes is the loss above.
        """
        place = self._place[index.cpu()].to(losses.device)
        member = F.one_hot(place, self._num_groups + 1).to(losses.dtype)  # (B, G + 1)
        sums: Tensor = torch.stack([losses @ member, member.sum(dim=0)])
        processes = 1
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            processes = self._accelerator.num_processes
            reduced = self._accelerator.reduce(sums, reduction="sum")
            assert isinstance(reduced, Tensor)
            sums = reduced
        total, count = sums.cpu().double()
        mean = (total / count.clamp(min=1))[:-1]
        moved = torch.where(count[:-1] > 0, self._step * (mean + self._margin), 0.0)
        self.log_weights = torch.log_softmax(self.log_weights + moved, dim=0)
        share = torch.cat([(1 - self._of_none) * self.shares, torch.tensor([self._of_none], dtype=torch.float64)])
        of_image = share / count.clamp(min=1) * (len(losses) * processes)
        return of_image.to(losses.dtype).to(losses.device)[place]
