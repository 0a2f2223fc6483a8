"""Density-peak clustering with k nearest neighbours (DPC-kNN): which of some points are centres, and which centre each point joins.

    D_ij = |x_i - x_j| / sqrt(width)        rho_i = exp(- mean of the k smallest D_ij^2 of row i), the point itself among them
    delta_i = the least D_ij to a denser point, of the densest one the largest of all D        centres: the largest rho * delta

Published code adds random noise to rho against ties. Here nothing is random: of equally dense points the first counts as denser, of equal
rho * delta the first wins, and a point between two centres joins the one with the larger rho * delta.
"""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(points: Tensor, centres: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """(centres, label) of points (N, D): the centres' numbers (c,) int64 by falling rho * delta, and for each point (N,) int64 the place
    in that list of the centre that it joins. Never more centres or neighbours than points; at least one of each."""
    N, width = points.shape
    k, c = min(max(neighbours, 1), N), min(max(centres, 1), N)
    points = points.double()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    distance = distance.nan_to_num(nan=torch.finfo(torch.float64).max, posinf=torch.finfo(torch.float64).max)
    nearest = distance.sort(dim=1).values[:, :k]
    # By logarithms: where points lie far apart, their densities differ though all of them are 0 in floating point.
    log_density = -nearest.square().mean(1)
    number = torch.arange(N, device=points.device)
    denser = (log_density[None, :] > log_density[:, None]) | (
        (log_density[None, :] == log_density[:, None]) & (number[None, :] < number[:, None])
    )
    delta = torch.where(denser, distance, float("inf")).min(1).values
    delta = torch.where(denser.any(1), delta, distance.max())
    peak = log_density + delta.log()
    chosen = peak.argsort(descending=True, stable=True)[:c]
    label = distance[:, chosen].argmin(1)
    label[chosen] = torch.arange(c, device=points.device)
    return chosen, label
