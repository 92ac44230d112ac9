"""Blocked and patchified tokenization as one would tell it: quadratic, one face and one id at a time."""

from itertools import pairwise

import numpy as np


def ordered(mesh, bins):
    """Put vertices in the order of BPT and faces in that of their sorted vertices, lowest first."""

    def key(x, y, z):
        return y * 4 // bins, x * 4 // bins, z * 4 // bins, y, x, z

    vertices = sorted(map(tuple, mesh.vertices.tolist()), key=lambda vertex: key(*vertex))
    place = {vertex: i for i, vertex in enumerate(vertices)}
    faces = []
    for corners in mesh.corners.tolist():
        face = [place[tuple(corner)] for corner in corners]
        first = face.index(min(face))
        faces.append(tuple(face[first:] + face[:first]))
    return vertices, sorted(faces, key=sorted)


def patches(faces):
    """Part faces into (centre, ring)."""
    left, found = list(faces), []
    while left:
        centre = max(left[0], key=lambda vertex: sum(vertex in face for face in left))
        sides = [side for face in left for side in turns(face) if side[0] == centre]  # (centre, u, v)
        times = [vertex for side in sides for vertex in side[1:]]
        ends = [vertex for vertex in times if times.count(vertex) == 1]
        ring = [min(ends or times)]
        along = any(side[1] == ring[0] for side in sides)
        while True:
            here, there = (1, 2) if along else (2, 1)
            next_sides = [side for side in sides if side[here] == ring[-1]]
            if not next_sides:
                break
            taken = min(next_sides, key=lambda side: side[there])
            ring.append(taken[there])
            sides.remove(taken)
            left = [face for face in left if taken not in turns(face)]
        found.append((centre, ring if along else ring[::-1]))
    return found


def turns(face):
    a, b, c = face
    return [(a, b, c), (b, c, a), (c, a, b)]


def encode(mesh, bins):
    vertices, faces = ordered(mesh, bins)
    size = bins // 8
    ids, before = [], None
    for centre, ring in patches(faces):
        for vertex in (centre, *ring):
            x, y, z = vertices[vertex]
            block = x // size * 64 + y // size * 8 + z // size
            offset = x % size * size**2 + y % size * size + z % size
            token = 512 + size**3 + block if vertex == centre and ids else block
            if token != before:  # after an opening block this is so even in the same one
                ids.append(token)
            before = token
            ids.append(512 + offset)
    return ids


def read(ids, bins):
    """Read patches, each a list of vertices, the last perhaps not whole."""
    size = bins // 8
    found, block = [[]], None
    for token in ids:
        if token < 512:
            block = token
        elif token >= 512 + size**3:
            block = token - 512 - size**3
            found.append([])
        else:
            offset = token - 512
            high = block // 64, block // 8 % 8, block % 8
            low = offset // size**2, offset // size % size, offset % size
            found[-1].append([h * size + part for h, part in zip(high, low, strict=True)])
    return found


def decode(ids, bins):
    found = []
    for patch in read(ids, bins):
        centre, ring = patch[:1], patch[1:]
        found.extend([*centre, a, b] for a, b in pairwise(ring))
    return np.array(found, dtype=int).reshape(-1, 3, 3)


def kinds(ids, bins):
    return [0 if token < 512 else 1 if token < 512 + (bins // 8) ** 3 else 2 for token in ids]


def allowed(prefix, bins):
    """The ids that may follow; the one past the last is END."""
    size = bins // 8
    blocks, offsets = set(range(512)), set(range(512, 512 + size**3))
    if not prefix:
        return blocks
    *_, before, last = [None, *kinds(prefix, bins)]
    patch = read(prefix, bins)[-1]
    if (before, last, len(patch)) == (2, 1, 1):  # the centre after an opening block
        return blocks
    found = {token for token in offsets if read([*prefix, token], bins)[-1][-1] not in patch[:1] + patch[-1:]}
    if last == 1:
        x, y, z = (coordinate // size for coordinate in patch[-1])
        found |= blocks - {64 * x + 8 * y + z}
        if len(patch) >= 3:
            found |= set(range(512 + size**3, 1024 + size**3 + 1))
    return found
