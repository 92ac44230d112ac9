"""B-splines by the recursion of Cox and de Boor, and one ridge problem for all dimensions at once: slow, obvious."""

import torch


def basis(count, degree, phases):
    """Evaluate ``count`` functions at phases (T,): (T, count)."""
    knots = [0.0] * degree + [i / (count - degree) for i in range(count - degree + 1)] + [1.0] * degree

    def value(i, order, x):
        if order == 0:
            closed = x == 1 and knots[i] < knots[i + 1] == 1  # the last span holds its right end
            return float(knots[i] <= x < knots[i + 1] or closed)
        total = 0.0
        for weight, width, j in (
            (x - knots[i], knots[i + order] - knots[i], i),
            (knots[i + order + 1] - x, knots[i + order + 1] - knots[i + 1], i + 1),
        ):
            if width > 0:
                total += weight / width * value(j, order - 1, x)
        return total

    return torch.tensor([[value(i, degree, x) for i in range(count)] for x in phases], dtype=torch.float64)


def fit(chunks, count, degree, grippers=(), ridge=1e-5, start=None):
    """Solve for the control points (B, N, D) of chunks (B, T, D); with ``start`` (B, D) the first one is that."""
    batch, steps, dims = chunks.shape
    phases = torch.linspace(0, 1, steps, dtype=torch.float64).tolist()
    found = []
    for chunk, first in zip(chunks, [None] * batch if start is None else start, strict=True):
        blocks, targets = [], []
        for d in range(dims):
            block, target = basis(count, 0 if d in grippers else degree, phases), chunk[:, d]
            if first is not None and d not in grippers:
                block, target = block[:, 1:], target - block[:, 0] * first[d]
            blocks.append(block)
            targets.append(target)
        big = torch.block_diag(*blocks)
        points = torch.linalg.solve(big.T @ big + ridge * torch.eye(big.shape[1]), big.T @ torch.cat(targets))
        columns = list(points.split([block.shape[1] for block in blocks]))
        for d, column in enumerate(columns):
            if len(column) < count:
                columns[d] = torch.cat([first[d : d + 1], column])
        found.append(torch.stack(columns, 1))
    return torch.stack(found)


def curve(points, degree, steps, grippers=()):
    """Evaluate control points (B, N, D): (B, steps, D)."""
    phases = torch.linspace(0, 1, steps, dtype=torch.float64).tolist()
    return torch.stack(
        [
            points[:, :, d] @ basis(points.shape[1], 0 if d in grippers else degree, phases).T
            for d in range(points.shape[2])
        ],
        2,
    )
