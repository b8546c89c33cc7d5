"""k-means of the tokens of an image by cosine, on rows of length 1.

B images, N tokens, K clusters, D feature width. Centroids are plain means of unit rows, so they
are shorter than 1; only their direction decides who belongs to them.
"""

import torch
from torch import Tensor

from pipeline.carvers import _greedy, _ops, _similarity
from pipeline.carvers._image_pool import product

_MAX_STEPS = 100
_TOLERANCE = 1e-4  # of the Frobenius norm of what a step would move the centroids by
_FLOOR = 1e-6  # added to squared distances before a draw, so that equal tokens can be drawn
_FEWEST = 12  # clusters that the elbow is looked for from


def lloyd(unit_BND: Tensor, centroids_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """Assign tokens to centroids and move these to the mean of theirs, until they stand still.

    At most 100 times. A cluster that has lost all its tokens keeps its centroid.

    Args:
        unit_BND: rows of length 1 or 0.
        centroids_BKD: to start from.

    Returns:
        (B, N) clusters, ties to the first, and (B, K, D) the centroids they were moved to.
    """
    exact_BND = unit_BND.double()
    for _ in range(_MAX_STEPS):
        cosines_BNK = product(exact_BND, _similarity.unit(centroids_BKD).double().mT)
        # Rounded to float32, duplicates tie again whatever order the product was summed in.
        labels_BN = cosines_BNK.float().argmax(dim=2)
        means_BKD, sizes_BK = _ops.group_mean(unit_BND, labels_BN, centroids_BKD.shape[1])
        means_BKD = torch.where(sizes_BK[:, :, None] > 0, means_BKD, centroids_BKD)
        moved_B = torch.linalg.vector_norm((means_BKD - centroids_BKD).flatten(1), dim=1)
        # An image that stands still is left alone, so its result is the same in any batch.
        moving_B = moved_B >= _TOLERANCE
        if not bool(moving_B.any()):
            break
        centroids_BKD = torch.where(moving_B[:, None, None], means_BKD, centroids_BKD)
    return labels_BN, centroids_BKD


def spread_clusters(unit_BND: Tensor, num_clusters: int) -> Tensor:
    """Return (B, N) clusters, started from tokens far from one another; nothing is drawn.

    The first is the token nearest the mean of all, each next the one whose nearest start is
    farthest by cosine. Clusters may be empty where tokens are alike.
    """
    mean_B1D = unit_BND.mean(dim=1, keepdim=True)
    first_B = torch.linalg.vector_norm(unit_BND - mean_B1D, dim=2).argmin(dim=1)

    def nearest(distances_BN: Tensor, chosen_B: Tensor) -> Tensor:
        # Only rows that are needed: no (N, N) matrix, which a clip of many frames has no room for.
        chosen_B1D = _ops.take_rows(unit_BND, chosen_B[:, None])
        return torch.minimum(distances_BN, 1 - (unit_BND * chosen_B1D).sum(dim=2))

    far_BN = torch.full(unit_BND.shape[:2], 2.0, device=unit_BND.device)
    starts_BK = _greedy.pick(num_clusters, far_BN, lambda distances: distances, nearest, first_B)
    return lloyd(unit_BND, _ops.take_rows(unit_BND, starts_BK))[0]


def elbow_clusters(unit_ND: Tensor, max_clusters: int, generator: torch.Generator) -> Tensor:
    """Return (N,) clusters of one image, as many as the elbow of the distortion says.

    Tried are 12 to `max_clusters`. The elbow is the largest second difference; its index, counted
    from 0, plus 4, and 12 at least, is the number of clusters of a last, new k-means: the index
    forgets that counting began at 12, in the published code as well. Fewer than three numbers to
    try have no second difference, and take `max_clusters`.

    Args:
        unit_ND: rows of length 1 or 0.
        max_clusters: at most N.
        generator: on the CPU; moves on by every draw of every k-means.
    """
    num_clusters = max_clusters
    if max_clusters >= _FEWEST + 2:
        tried = range(_FEWEST, max_clusters + 1)
        distortions = torch.stack([_distortion(unit_ND, k, generator) for k in tried])
        elbow = int(distortions.diff(n=2).argmax()) + 4
        num_clusters = min(max(elbow, _FEWEST), max_clusters)
    return _drawn(unit_ND, num_clusters, generator)[0]


def _distortion(unit_ND: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    labels_N, centroids_KD = _drawn(unit_ND, num_clusters, generator)
    return (unit_ND - centroids_KD[labels_N]).square().sum()


def _drawn(unit_ND: Tensor, num_clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return labels and centroids of one k-means from starts drawn by k-means++."""
    start = int(torch.randint(0, len(unit_ND), (1,), generator=generator))
    starts = [start]
    nearest_N = torch.full_like(unit_ND[:, 0], torch.inf)
    for _ in range(num_clusters - 1):
        squares_N = (unit_ND - unit_ND[starts[-1]]).square().sum(dim=1)
        nearest_N = torch.minimum(nearest_N, squares_N)
        weights_N = nearest_N.cpu() + _FLOOR
        starts.append(int(torch.multinomial(weights_N, 1, generator=generator)))
    labels_1N, centroids_1KD = lloyd(unit_ND[None], unit_ND[starts][None])
    return labels_1N[0], centroids_1KD[0]
