"""The interactive view: self-contained HTML whose data is that of the meshes, and a program that runs."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.pipelines.mesh_figures import Panel
from vertebra.pipelines.mesh_render import camera
from vertebra.pipelines.mesh_viewer import viewer
from vertebra.pipelines.report import Report

NASTY = "</script><script>alert('&\"')</script>"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
TETRAHEDRON = (
    np.array([(-0.5, -0.5, -0.5), (0.5, -0.5, 0.5), (-0.5, 0.5, 0.5), (0.5, 0.5, -0.5)]),
    np.array([(0, 1, 2), (0, 2, 3), (0, 3, 1), (1, 3, 2)]),
)
CLOUD = np.array([(-0.25, 0.0, 0.125, 0.0, 0.0, 2.0), (0.375, -0.5, 0.0, 1.0, 0.0, 0.0)])


class Page(HTMLParser):
    """Collects tags with their attributes, and what is written in each; refuses tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"br", "input", "meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def scripts(self):
        return [words for tag, words in self.words if tag == "script"]


def data(fragment):
    return json.loads(Page(fragment).scripts()[0])


def decoded(text, kind, width):
    return np.frombuffer(base64.b64decode(text, validate=True), kind).reshape(-1, width)


def both():
    return viewer("scan.ply", [Panel(CLOUD, None, "input", "4 mm"), Panel(*TETRAHEDRON, "output", colour="#FF8000")])


def test_the_data_is_that_of_the_meshes():
    found = data(both())
    cloud, mesh = found["meshes"]
    assert found["centre"] == [0, 0, 0]
    assert found["radius"] == pytest.approx(np.sqrt(0.75))
    assert found["view"] == [35, 25]
    np.testing.assert_array_equal(decoded(cloud["vertices"], "<f4", 3), CLOUD[:, :3])
    np.testing.assert_array_equal(decoded(cloud["normals"], "<f4", 3), CLOUD[:, 3:])
    np.testing.assert_array_equal(decoded(mesh["vertices"], "<f4", 3), TETRAHEDRON[0])
    np.testing.assert_array_equal(decoded(mesh["faces"], "<u4", 3), TETRAHEDRON[1])
    assert cloud["faces"] is mesh["normals"] is None
    np.testing.assert_allclose(mesh["colour"], [1, 128 / 255, 0])


def test_shapes_far_from_the_origin_keep_their_form():
    # In float32 a unit at 2**24 would be lost.
    found = data(viewer("far", [Panel(TETRAHEDRON[0] + 2.0**30, TETRAHEDRON[1]), Panel(CLOUD[:, :3] + 2.0**30)]))
    assert found["centre"] == [2.0**30] * 3
    np.testing.assert_array_equal(decoded(found["meshes"][0]["vertices"], "<f4", 3), TETRAHEDRON[0])
    np.testing.assert_array_equal(decoded(found["meshes"][1]["vertices"], "<f4", 3), CLOUD[:, :3])
    assert found["meshes"][1]["normals"] is None


def test_words_are_escaped():
    fragment = viewer(NASTY, [Panel(*TETRAHEDRON, NASTY, NASTY)])
    page = Page(fragment)
    assert len(page.of("script")) == 2
    assert [tag for tag, words in page.words if words == NASTY] == ["figcaption", "b", "p"]
    assert page.of("canvas")[0]["aria-label"] == f"{NASTY}, 4 vertices, 4 faces"
    assert next(a["aria-label"] for a in page.of("div") if a.get("role") == "group").startswith(f"{NASTY}. Drag")


def test_it_is_one_figure_that_loads_nothing_and_names_nothing_twice(tmp_path):
    fragment = both()
    page = Page(fragment)
    assert [tag for tag, _ in page.tags].count("figure") == 1
    assert fragment.startswith("<figure")
    assert fragment.endswith("</figure>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest|import\(|\bsrc=|\bhref=", fragment)
    assert not any("id" in attributes for _, attributes in page.tags)
    assert len(page.of("canvas")) == 2
    # Without a program that runs there is a sentence, and nothing that does not work.
    (sentence,) = [words for tag, words in page.words if "WebGL 2" in words and tag == "p"]
    assert sentence.endswith("which this browser does not offer here.")
    hidden = [attributes["class"] for _, attributes in page.tags if "hidden" in attributes]
    assert hidden == ["mesh-panes", "mesh-tools"]
    # All that can be done with a mouse can be done with keys.
    assert [a for a in page.of("div") if a.get("tabindex") == "0"]
    assert page.of("button") == [{"type": "button"}]
    assert page.of("input") == [{"type": "checkbox", "checked": None}]
    text = Report("r").html(fragment).text("between").html(fragment).write(tmp_path / "r.html").read_text()
    assert text.count(fragment) == 2
    assert len(Page(text).of("canvas")) == 4


def test_brackets_of_the_program_close():
    _, program = Page(both()).scripts()
    assert "__" not in program
    bare = re.sub(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|//[^\n]*|/\[[^/]*/g', "", program)
    pairs, stack = {")": "(", "]": "[", "}": "{"}, []
    for letter in bare:
        if letter in "([{":
            stack.append(letter)
        elif letter in pairs:
            assert stack.pop() == pairs[letter]
    assert stack == []


def test_size_is_sixteen_bytes_a_vertex_and_a_face():
    def length(count):
        vertices = np.random.default_rng(0).normal(size=(count, 3))
        return len(viewer("t", [Panel(vertices, np.arange(3 * count).reshape(-1, 3) % count)]))

    assert length(4000) - length(1000) == pytest.approx(3000 * 32, abs=20)


def test_what_cannot_be_shown():
    with pytest.raises(ConfigError, match=r"^viewer: must have something to show, got no panels; give at least one\.$"):
        viewer("t", [])
    with pytest.raises(ShapeError, match=r"^points: expected \(N, 3\), got \(1, 2\); give one row a point\.$"):
        viewer("t", [Panel([(0, 1)])])
    with pytest.raises(DataError, match=r"^faces: must name vertices from 0 to 3, got 0 to 4; the mesh is broken\.$"):
        viewer("t", [Panel(TETRAHEDRON[0], [(0, 1, 4)])])
    with pytest.raises(ConfigError, match=r"^colour: must be six hexadecimal digits such as '#7FB2DC', got 'red'\.$"):
        viewer("t", [Panel(*TETRAHEDRON, colour="red")])
    assert [m["vertices"] for m in data(viewer("t", [Panel([], []), Panel([])]))["meshes"]] == ["", ""]


# -------------------------------------------------------------------- the program, in node

# A page with just what the program uses; `calls` are those of WebGL, and `on(element, name)` sends an event.
DOM = """
const calls = [], frames = [];
const gl = new Proxy({}, { get: (_, name) => {
  if (name === "getProgramParameter") return () => true;
  if (name === "isContextLost") return () => false;
  if (name === "getUniformLocation") return (_, uniform) => uniform;
  if (/^[A-Z_0-9]+$/.test(name)) return name;
  return (...given) => { calls.push([name, ...given.map(v => ArrayBuffer.isView(v) ? [...v] : v)]); return {}; };
} });
function element(more) {
  const heard = {};
  return { hidden: true, width: 0, height: 0, clientWidth: 200, heard, setPointerCapture() {},
    addEventListener: (name, f) => { heard[name] = f; },
    getBoundingClientRect: () => ({ left: 0, top: 0, width: 200, height: 200 }), ...more };
}
const on = (target, name, event) => { target.heard[name]({ preventDefault() {}, button: 0, pointerId: 1, ...event });
  frames.splice(0).forEach(f => f()); };
const pictures = [];
const canvases = DATA.meshes.map(() => element({
  getContext: () => ({ drawImage: (...given) => pictures.push(given.slice(1)) }) }));
const parts = { ".mesh-panes": element(), ".mesh-tools": element(), input: element({ checked: true }),
  button: element(), ".mesh-absent": element({ hidden: false }),
  'script[type="application/json"]': { textContent: JSON.stringify(DATA) } };
globalThis.window = element({ devicePixelRatio: 2, matchMedia: () => element() });
globalThis.document = { createElement: () => element({ getContext: kind => WEBGL && kind === "webgl2" ? gl : null }),
  currentScript: { parentElement: { querySelector: name => parts[name], querySelectorAll: () => canvases } } };
globalThis.requestAnimationFrame = f => frames.push(f);
globalThis.getComputedStyle = () => ({ backgroundColor: "rgb(255, 51, 0)" });
globalThis.ResizeObserver = class { observe() {} };
"""


def play(fragment, steps, webgl=True):
    """Run the program of a fragment and then steps of JavaScript; return what the last of them is worth."""
    found, program = Page(fragment).scripts()
    start = f"const DATA = {found}, WEBGL = {json.dumps(webgl)};\n{DOM}"
    source = f"{start}\n{program}\nframes.splice(0).forEach(f => f());\n{steps}"
    return json.loads(subprocess.run(["node", "-"], input=source, capture_output=True, text=True, check=True).stdout)


@needs_node
def test_the_program_is_javascript(tmp_path):
    path = tmp_path / "viewer.js"
    path.write_text(Page(both()).scripts()[1])
    subprocess.run(["node", "--check", str(path)], check=True)


@needs_node
def test_the_program_draws_the_shapes():
    said = "({calls, pictures, hidden: ['.mesh-panes', '.mesh-tools', '.mesh-absent'].map(n => parts[n].hidden)})"
    found = play(both(), f"console.log(JSON.stringify({said}))")
    assert found["hidden"] == [False, False, True]
    assert found["pictures"] == [[0, 0, 400, 400, 0, 0, 400, 400]] * 2
    calls = found["calls"]
    drawn = [c[1:] for c in calls if c[0] == "drawArrays"]
    assert drawn == [["POINTS", 0, 2], ["TRIANGLES", 0, 12]]
    cloud, facing, corners, normals = (np.reshape(c[2], (-1, 3)) for c in calls if c[0] == "bufferData")
    radius = np.sqrt(0.75)
    np.testing.assert_allclose(cloud, CLOUD[:, :3] / radius, atol=1e-6)
    np.testing.assert_allclose(facing, [(0, 0, 1), (1, 0, 0)])
    triangles = TETRAHEDRON[0][TETRAHEDRON[1]]
    np.testing.assert_allclose(corners.reshape(-1, 3, 3), triangles / radius, atol=1e-6)
    expected = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(normals.reshape(-1, 3, 3), np.repeat(expected[:, None], 3, 1), atol=1e-6)
    for call in (c for c in calls if c[:2] == ["uniformMatrix3fv", "turn"]):
        assert call[2] is True
        np.testing.assert_allclose(np.reshape(call[3], (3, 3)), camera((35, 25)), atol=1e-12)
    assert [c[1:] for c in calls if c[0] == "clearColor"] == [[1, 0.2, 0, 1]] * 2


@needs_node
def test_all_panes_turn_zoom_and_move_together_and_go_back():
    steps = """
    const at = [], keep = () => { const last = name => calls.filter(c => c[1] === name).slice(-2).map(c => c.slice(2));
      at.push([last("turn").map(c => c[1]), last("zoom"), last("shift"), last("edges")]); };
    const drag = (id, x, y, more) => on(canvases[0], "pointermove", { pointerId: id, clientX: x, clientY: y, ...more });
    const press = (id, x, y) => on(canvases[0], "pointerdown", { pointerId: id, clientX: x, clientY: y });
    keep();
    press(1, 50, 50); drag(1, 70, 40); keep();
    drag(1, 90, 40, { shiftKey: true }); keep();
    on(canvases[0], "pointerup", {}); drag(1, 0, 0);
    on(parts.button, "click"); keep();
    on(canvases[1], "wheel", { deltaMode: 0, deltaY: -100, clientX: 150, clientY: 50 }); keep();
    on(parts[".mesh-panes"], "keydown", { key: "0" }); keep();
    press(1, 80, 100); press(2, 120, 100); drag(2, 160, 100); keep();
    on(canvases[0], "pointerup", { pointerId: 1 }); on(canvases[0], "pointercancel", { pointerId: 2 });
    on(parts[".mesh-panes"], "keydown", { key: "Home" });
    on(parts[".mesh-panes"], "keydown", { key: "ArrowLeft" }); keep();
    parts.input.checked = false; on(parts.input, "change"); keep();
    console.log(JSON.stringify(at));
    """
    found = play(both(), steps)
    turned = [[np.reshape(t, (3, 3)) for t in turns] for turns, *_ in found]
    for one, other in turned:
        np.testing.assert_array_equal(one, other)
    start, dragged, moved, reset, wheeled, zero, pinched, left, plain = found
    degrees = np.degrees(4 / 200)
    np.testing.assert_allclose(turned[1][0], camera((35 - 20 * degrees, 25 - 10 * degrees)), atol=1e-12)
    assert dragged[1:] == start[1:]
    assert moved[2] == [[0.2, 0]] * 2
    assert moved[:2] == dragged[:2]
    assert reset == zero == start
    grown = np.exp(0.15)
    np.testing.assert_allclose(wheeled[1], 0.94 * grown)
    # What was below the pointer, at (.5, .5), still is.
    np.testing.assert_allclose(wheeled[2], 0.5 - 0.5 * grown)
    # Two fingers, 40 and then 80 pixels apart; their middle moves from 100 to 120, a fifth of half a pane.
    np.testing.assert_allclose(pinched[1], 0.94 * 2)
    np.testing.assert_allclose(pinched[2], [[0.2 * 2 - 0.2, 0]] * 2, atol=1e-12)
    assert pinched[0] == start[0]
    np.testing.assert_allclose(turned[7][0], camera((45, 25)), atol=1e-12)
    assert (left[3], plain[3]) == ([[1], [1]], [[0], [0]])


@needs_node
def test_without_webgl_the_sentence_stays():
    said = "console.log(JSON.stringify(['.mesh-panes', '.mesh-tools', '.mesh-absent'].map(n => parts[n].hidden)))"
    assert play(both(), said, webgl=False) == [True, True, False]


@needs_node
def test_a_lost_context_is_drawn_anew():
    steps = """
    const before = calls.filter(c => c[0] === "bufferData").length;
    const canvas = window.vertebraMeshContext.canvas;
    on(canvas, "webglcontextlost"); on(canvas, "webglcontextrestored");
    console.log(JSON.stringify([before, calls.filter(c => c[0] === "bufferData").length, pictures.length]));
    """
    assert play(both(), steps) == [4, 8, 4]
