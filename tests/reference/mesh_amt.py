"""Adjacent mesh tokenization as one would tell it: quadratic, one face and one id at a time."""

import numpy as np


def encode(mesh, bins):
    faces = sorted(tuple(sorted(face)) for face in mesh.faces.tolist())
    sequence = []
    while faces:
        if not sequence or sequence[-1] == "&":
            sequence.extend(faces.pop(0))
            continue
        last = set(sequence[-2:])
        near = [min(set(face) - last) for face in faces if last < set(face)]
        if near:
            faces.remove(tuple(sorted([*last, min(near)])))
            sequence.append(min(near))
        else:
            sequence.append("&")
    ids = []
    for item in sequence:
        ids.extend([bins] if item == "&" else mesh.vertices[item].tolist())
    return ids


def decode(ids, bins):
    faces, strip, vertex = [], [], []
    for token in ids:
        if token == bins:
            strip = []
            continue
        vertex.append(token)
        if len(vertex) == 3:
            strip.append(vertex)
            vertex = []
            if len(strip) >= 3:
                faces.append(strip[-3:])
    return np.array(faces).reshape(-1, 3, 3)


def kinds(ids, bins):
    found, place = [], 0
    for token in ids:
        if token == bins:
            found.append(0)
            place = 0
        else:
            found.append(1 + place % 3 if place < 9 else 4 + place % 3)
            place += 1
    return found


def allowed(prefix, bins):
    """The ids that may follow: those after which the strip's faces so far have no vertex twice; ``bins + 1`` is END."""
    strip = []
    for token in prefix:
        strip = [] if token == bins else [*strip, token]
    whole = len(strip) % 3 == 0 and len(strip) >= 9
    found = {bins, bins + 1} if whole else set()
    for token in range(bins):
        vertices = np.array([*strip, token][: (len(strip) + 1) // 3 * 3]).reshape(-1, 3).tolist()[-3:]
        if len({tuple(vertex) for vertex in vertices}) == len(vertices):
            found.add(token)
    return found
