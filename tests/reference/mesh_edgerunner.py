"""EdgeRunner's tokenization as one would tell it: recursive, and the border is found anew whenever it is asked for."""

import itertools

import numpy as np


def components(nodes, links):
    """Label nodes by their connected component."""
    label = {node: node for node in nodes}
    for a, b in links:
        old, new = label[a], label[b]
        for node in nodes:
            if label[node] == old:
                label[node] = new
    return label


class Walk:
    """Faces are lists of vertices that may be flipped; a corner is (face, vertex), a side (face, vertex across)."""

    def __init__(self, vertices, faces):
        self.xyz = [tuple(int(x) for x in vertex) for vertex in vertices]
        self.faces = [[int(v) for v in face] for face in faces]
        self.neighbour = self.pair_sides()
        self.visited = set()
        self.ids, self.order = [], []
        corners = [(f, v) for f, face in enumerate(self.faces) for v in face]
        links = [
            ((f, v), (g, v)) for (f, across), (g, _) in self.neighbour.items() for v in self.faces[f] if v != across
        ]
        self.fan = components(corners, links)
        self.known = set()  # fans with a visited face, or at a border
        for f, face in enumerate(self.faces):
            for across in face:
                if (f, across) not in self.neighbour:
                    self.known |= {self.fan[f, v] for v in face if v != across}

    def pair_sides(self):
        sides = {}
        for f, face in enumerate(self.faces):
            for across in face:
                sides.setdefault(frozenset(face) - {across}, []).append((f, across))
        pairs = {}
        for found in sides.values():
            if len(found) >= 2:
                pairs[found[0]], pairs[found[1]] = found[1], found[0]
        return pairs

    def run(self):
        def centre(f):
            x, y, z = np.sum([self.xyz[v] for v in self.faces[f]], axis=0)
            return y, z, x

        order = sorted(range(len(self.faces)), key=centre)
        body = components(order, [(f, g) for (f, _), (g, _) in self.neighbour.items()])
        bodies = list(dict.fromkeys(body[f] for f in order))
        for f in sorted(order, key=lambda f: bodies.index(body[f])):
            self.submesh(f, min(self.faces[f], key=lambda v: self.distance(f, v)))
        return self.ids

    def distance(self, f, across):
        if (f, across) not in self.neighbour:
            return -1
        _, other = self.neighbour[f, across]
        return sum((a - b) ** 2 for a, b in zip(self.xyz[across], self.xyz[other], strict=True))

    def submesh(self, f, tip):
        if f in self.visited:
            return
        at = self.faces[f].index(tip)
        start, end = self.faces[f][at - 2], self.faces[f][at - 1]
        self.ids += [2, *(3 + x for v in (tip, start, end) for x in self.xyz[v])]
        self.face(f, tip, start, end, {self.fan[f, start], self.fan[f, end]})

    def face(self, f, tip, start, end, new):
        """Visit a face entered by the edge from ``start`` to ``end``."""
        self.visited.add(f)
        self.order.append(f)
        self.known |= new
        met = self.fan[f, tip] in self.known
        self.known.add(self.fan[f, tip])
        left, right = self.neighbour.get((f, start)), self.neighbour.get((f, end))
        left = None if left is None or left[0] in self.visited else left
        right = None if right is None or right[0] in self.visited else right

        def go(op):
            g, v = left if op == 0 else right
            self.ids += [op, *(3 + x for x in self.xyz[v])]
            self.face(g, v, *((tip, end) if op == 0 else (start, tip)), set())

        if left and (not met or not right):
            go(0)
        elif right and not left:
            go(1)
        elif left and right:
            first = 0 if self.left_is_shorter(left[0], right[0], tip) else 1
            go(first)
            self.submesh(*(right if first == 0 else left))

    def left_is_shorter(self, left, right, tip):
        """Compare the lengths of the border's loops that pass the tip's corners in the faces ahead."""
        rest = [f for f in range(len(self.faces)) if f not in self.visited]
        inner = [(a, b) for a, b in self.neighbour.items() if a[0] in rest and b[0] in rest]
        corners = [(f, v) for f in rest for v in self.faces[f]]
        sector = components(
            corners, [((f, v), (g, v)) for (f, across), (g, _) in inner for v in self.faces[f] if v != across]
        )
        border = {(f, across) for f in rest for across in self.faces[f]} - {side for side, _ in inner}
        ends = [tuple(sector[f, v] for v in self.faces[f] if v != across) for f, across in border]
        loop = components({sector[c] for c in corners}, ends)
        a, b = loop[sector[left, tip]], loop[sector[right, tip]]
        lengths = [sum(loop[one] == x for one, _ in ends) for x in (a, b)]
        return a != b and lengths[0] < lengths[1]


def encode(vertices, faces):
    return Walk(vertices, faces).run()


def decode(ids):
    faces, tokens = [], iter(ids)
    for op in tokens:
        read = [token - 3 for token in itertools.islice(tokens, 9 if op == 2 else 3)]
        v = read[:3]
        if op == 2:
            faces.append([v, read[3:6], read[6:]])
        else:
            v0, v1, v2 = faces[-1]
            faces.append([v, v0, v2] if op == 0 else [v, v1, v0])
    return np.array(faces).reshape(-1, 3, 3)


def allowed(prefix, bins):
    """The ids that may follow, ``bins + 3`` for the end: those that leave the vertices of every face different."""
    tokens, face = list(prefix), []
    while tokens:
        op, tokens = tokens[0], tokens[1:]
        count = 9 if op == 2 else 3
        read, tokens = tokens[:count], tokens[count:]
        vertices = [read[i : i + 3] for i in range(0, len(read), 3)]
        edge = {2: [], 0: [face[0], face[2]], 1: [face[1], face[0]]}[op] if face else []
        if len(read) < count:
            begun = vertices.pop() if len(read) % 3 else []
            return {token for token in range(3, bins + 3) if [*begun, token] not in vertices + edge}
        face = vertices + edge
    return {0, 1, 2, bins + 3} if face else {2}
