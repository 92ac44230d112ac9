"""An interactive view of meshes and clouds of points: a fragment of HTML that any page can hold.

It loads nothing: data, styles and the WebGL 2 program are in it. The pages' panes draw with one context of WebGL, of
which browsers allow only about sixteen, and copy what it drew. Light and edges are those of ``mesh_render``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from vertebra.errors import ConfigError
from vertebra.pipelines.mesh_figures import Panel
from vertebra.pipelines.mesh_render import (
    AMBIENT,
    FILL,
    FILL_LIGHT,
    INK,
    KEY,
    KEY_LIGHT,
    THREE_QUARTER,
    UPWARD,
    Floats,
    Frame,
    check_mesh,
    check_points,
    rgb,
)

_PANE_WIDTH = 27  # rem at most: more than a screen's height would not be seen at once
_HINT = "Drag to turn, wheel or pinch to zoom, Shift and drag to move. Keys: arrows, + and -, 0 to reset."
_ABSENT = "The interactive view needs JavaScript and WebGL 2, which this browser does not offer here."


def viewer(title: str, panels: Sequence[Panel], view: tuple[float, float] = THREE_QUARTER) -> str:
    """Return HTML that shows meshes and points side by side, turned, zoomed and moved together.

    Coordinates are written as float32 from the middle of all panels, and faces as uint32: about 16 bytes of text a
    vertex, and as many a face. Title, labels and notes are escaped.

    Args:
        title: Above the panes.
        panels: From left to right, all at one scale; with labels.
        view: Azimuth and elevation of the camera at first, in degrees.

    Raises:
        ConfigError: There is no panel, or a colour is not as ``Panel`` says.
        ShapeError: An array has another shape than ``Panel`` says.
        DataError: A number is not finite, or a face names a vertex that does not exist.
    """
    if not panels:
        raise ConfigError("viewer: must have something to show, got no panels; give at least one.")
    frame = Frame.around([panel.places for panel in panels])
    data = json.dumps(
        {
            "centre": frame.centre.tolist(),
            "radius": frame.radius,
            "view": [float(angle) for angle in view],
            "meshes": [_data(panel, frame) for panel in panels],
        }
    )
    panes = "\n".join(map(_pane, panels))
    limit = f"max-width: {_PANE_WIDTH * len(panels)}rem"
    return f"""<figure class="mesh-viewer">
<style>{_STYLE}</style>
<figcaption>{escape(title)}</figcaption>
<p class="mesh-absent">{_ABSENT}</p>
<div class="mesh-panes" tabindex="0" role="group" style="{limit}" aria-label="{escape(title)}. {_HINT}" hidden>
{panes}
</div>
<div class="mesh-tools" hidden><button type="button">Reset view</button>
<label><input type="checkbox" checked> Edges</label> <small>{_HINT}</small></div>
<script type="application/json">{data}</script>
<script>{_SCRIPT}</script>
</figure>"""


def _pane(panel: Panel) -> str:
    words = [escape(text) for text in (panel.counts, panel.note) if text]
    name = escape(", ".join(text for text in (panel.label, panel.counts) if text))
    label = f"<b>{escape(panel.label)}</b><br>" if panel.label else ""
    canvas = f'<canvas role="img" aria-label="{name}"></canvas>'
    return f'<div class="mesh-pane">{canvas}<p>{label}{"<br>".join(words)}</p></div>'


def _data(panel: Panel, frame: Frame) -> dict[str, Any]:
    faces: str | None = None
    normals: Floats | None = None
    if panel.faces is None:
        places, normals = check_points(panel.vertices)
    else:
        places, corners = check_mesh(panel.vertices, panel.faces)
        faces = _base64(corners, "<u4")
    return {
        "vertices": _base64(places - frame.centre, "<f4"),
        "faces": faces,
        "normals": None if normals is None else _base64(normals, "<f4"),
        "colour": rgb(panel.colour).tolist(),
        "edges": panel.wire,
    }


def _base64(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode("ascii")


def _vector(values: np.ndarray) -> str:
    return f"vec3({', '.join(f'{v:.6f}' for v in values)})"


# The page's own colours are kept: light-dark() follows its color-scheme.
_STYLE = """
.mesh-viewer { margin: 1rem 0; }
.mesh-viewer figcaption { font-weight: 600; color: inherit; }
.mesh-viewer [hidden] { display: none; }
.mesh-panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); gap: .6rem;
  margin: .5rem 0; }
.mesh-pane canvas { display: block; box-sizing: border-box; width: 100%; aspect-ratio: 1; cursor: grab;
  touch-action: none; border: 1px solid rgb(128 128 128 / .35); border-radius: 6px; background-color: #fff;
  background-color: light-dark(#fff, #20242b); }
.mesh-pane canvas:active { cursor: grabbing; }
.mesh-pane p { margin: .3rem 0 0; font-size: .85em; line-height: 1.35; overflow-wrap: anywhere; }
.mesh-tools { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; font-size: .9em; }
.mesh-tools small { opacity: .75; }
"""

_LIGHT = f"""
float light(vec3 n) {{
  return {AMBIENT} + {UPWARD} * n.y + {KEY} * max(dot(n, {_vector(KEY_LIGHT)}), 0.0)
    + {FILL} * max(dot(n, {_vector(FILL_LIGHT)}), 0.0);
}}"""

_VERTEX = """#version 300 es
uniform mat3 turn;
uniform vec2 shift;
uniform float zoom, size;
layout(location = 0) in vec3 place;
layout(location = 1) in vec3 normal;
out vec3 corner;
flat out vec3 facing;
out float nearness;
void main() {
  vec3 seen = turn * place;
  gl_Position = vec4(seen.xy * zoom + shift, -0.98 * seen.z, 1.0);
  gl_PointSize = size;
  facing = turn * normal;
  nearness = seen.z;
  int which = gl_VertexID % 3;
  corner = vec3(which == 0, which == 1, which == 2);
}"""

# `corner` are barycentric coordinates: divided by their slope they are pixels from each edge, and the sum of their
# slopes is 1 / the radius of the circle inside. Lines fade where that is small, as in mesh_render.
_MESH = (
    """#version 300 es
precision highp float;
uniform vec3 colour;
uniform float edges, ratio;
in vec3 corner;
flat in vec3 facing;
out vec4 pixel;"""
    + _LIGHT
    + """
void main() {
  vec3 n = facing.z < 0.0 ? -facing : facing;
  vec3 across = dFdx(corner), down = dFdy(corner);
  vec3 slope = max(sqrt(across * across + down * down), 1e-9);
  vec3 away = corner / slope;
  float inner = 1.0 / (slope.x + slope.y + slope.z) / ratio;
  float line = clamp(0.75 * ratio + 0.5 - min(away.x, min(away.y, away.z)), 0.0, 1.0);
  float ink = 0.72 * edges * line * smoothstep(0.9, 3.9, inner);
  pixel = vec4(mix(colour * light(n), __INK__, ink), 1.0);
}"""
).replace("__INK__", _vector(INK))

_POINTS = (
    """#version 300 es
precision highp float;
uniform vec3 colour, paper;
flat in vec3 facing;
in float nearness;
out vec4 pixel;"""
    + _LIGHT
    + """
void main() {
  vec2 p = 2.0 * gl_PointCoord - 1.0;
  float r = dot(p, p);
  if (r > 1.0) discard;
  vec3 ball = vec3(p.x, -p.y, sqrt(1.0 - r));
  float far = clamp(0.5 - 0.5 * nearness, 0.0, 1.0);
  bool known = dot(facing, facing) > 0.0;
  vec3 n = known ? normalize(0.35 * ball + (facing.z < 0.0 ? -facing : facing)) : ball;
  float pale = known ? max(facing.z < 0.0 ? 0.6 : 0.0, 0.3 * far) : 0.55 * far;
  pixel = vec4(mix(colour * light(n), paper, pale), 1.0);
}"""
)

_PROGRAM = """
(function (figure) {
  "use strict";
  const SHADERS = __SHADERS__;
  const part = name => figure.querySelector(name);
  const panes = part(".mesh-panes"), tools = part(".mesh-tools"), edges = part("input");
  const canvases = [...figure.querySelectorAll("canvas")];
  const data = JSON.parse(part('script[type="application/json"]').textContent);

  // The page's one context; null where there is no WebGL 2.
  if (window.vertebraMeshContext === undefined) window.vertebraMeshContext = makeContext();
  const context = window.vertebraMeshContext;
  if (!context) return;
  const gl = context.gl;

  function makeContext() {
    const canvas = document.createElement("canvas");
    const gl = canvas.getContext("webgl2", { antialias: true, alpha: false });
    if (!gl) return null;
    const made = { canvas, gl, age: 0, mesh: null, points: null, redraws: [] };
    const build = () => {
      made.age += 1;
      made.mesh = link(gl, SHADERS.mesh);
      made.points = link(gl, SHADERS.points);
    };
    canvas.addEventListener("webglcontextlost", event => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => { build(); made.redraws.forEach(redraw => redraw()); });
    build();
    return made;
  }

  function link(gl, fragment) {
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, SHADERS.vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost())
      throw new Error("mesh viewer: " + gl.getProgramInfoLog(program));
    return { program, at: name => gl.getUniformLocation(program, name) };
  }

  // ---------------------------------------------------------------- data
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
  const scaled = text => new Float32Array(bytes(text)).map(value => value / data.radius);

  const meshes = data.meshes.map(mesh => {
    const vertices = scaled(mesh.vertices);
    if (!mesh.faces) {
      const normals = mesh.normals && new Float32Array(bytes(mesh.normals));
      for (let i = 0; normals && i < normals.length; i += 3) unit(normals, i, 1);
      return { ...mesh, places: vertices, normals, count: vertices.length / 3, age: 0 };
    }
    // Flat faces share no corner.
    const faces = new Uint32Array(bytes(mesh.faces));
    const places = new Float32Array(3 * faces.length), normals = new Float32Array(3 * faces.length);
    faces.forEach((vertex, i) => places.set(vertices.subarray(3 * vertex, 3 * vertex + 3), 3 * i));
    for (let i = 0; i < places.length; i += 9) {
      const [ax, ay, az, bx, by, bz, cx, cy, cz] = places.subarray(i, i + 9);
      const [ux, uy, uz, vx, vy, vz] = [bx - ax, by - ay, bz - az, cx - ax, cy - ay, cz - az];
      normals.set([uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx], i);
      unit(normals, i, 3);
    }
    return { ...mesh, places, normals, count: faces.length, age: 0 };
  });

  function unit(vectors, i, times) {
    const length = Math.hypot(vectors[i], vectors[i + 1], vectors[i + 2]) || 1;
    const vector = [vectors[i] / length, vectors[i + 1] / length, vectors[i + 2] / length];
    for (let j = 0; j < times; j++) vectors.set(vector, i + 3 * j);
  }

  function upload(mesh) {
    mesh.age = context.age;
    mesh.array = gl.createVertexArray();
    gl.bindVertexArray(mesh.array);
    [mesh.places, mesh.normals].forEach((values, location) => {
      if (!values) return;
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(location);
      gl.vertexAttribPointer(location, 3, gl.FLOAT, false, 0, 0);
    });
  }

  // ---------------------------------------------------------------- drawing
  const camera = {};
  function reset() {
    const [azimuth, elevation] = data.view.map(angle => angle * Math.PI / 180);
    Object.assign(camera, { azimuth, elevation, zoom: 1, x: 0, y: 0 });
    redraw();
  }

  let waiting = false;
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; canvases.forEach(draw); });
  }

  function draw(canvas, index) {
    const side = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)), mesh = meshes[index];
    if (!side || gl.isContextLost()) return;
    if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
    if (context.canvas.width < side || context.canvas.height < side)
      context.canvas.width = context.canvas.height = side;
    const paper = getComputedStyle(canvas).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(value => value / 255);
    gl.viewport(0, 0, side, side);
    gl.clearColor(...paper, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    const { program, at } = mesh.faces ? context.mesh : context.points;
    if (mesh.age !== context.age) upload(mesh);
    gl.useProgram(program);
    gl.bindVertexArray(mesh.array);
    const [sine, cosine] = [Math.sin(camera.azimuth), Math.cos(camera.azimuth)];
    const [up, level] = [Math.sin(camera.elevation), Math.cos(camera.elevation)];
    const turn = [cosine, 0, -sine, -sine * up, level, -cosine * up, sine * level, up, cosine * level];
    gl.uniformMatrix3fv(at("turn"), true, turn);
    gl.uniform2f(at("shift"), camera.x, camera.y);
    gl.uniform1f(at("zoom"), 0.94 * camera.zoom);
    gl.uniform3fv(at("colour"), mesh.colour);
    gl.uniform3fv(at("paper"), paper);
    const ratio = side / canvas.clientWidth;
    gl.uniform1f(at("ratio"), ratio);
    gl.uniform1f(at("edges"), edges.checked && mesh.edges ? 1 : 0);
    const radius = Math.min(2.6, Math.max(0.9, 0.42 * canvas.clientWidth / Math.sqrt(mesh.count || 1)));
    gl.uniform1f(at("size"), 2 * radius * ratio * Math.sqrt(camera.zoom));
    gl.drawArrays(mesh.faces ? gl.TRIANGLES : gl.POINTS, 0, mesh.count);
    const flat = canvas.getContext("2d");
    flat.drawImage(context.canvas, 0, context.canvas.height - side, side, side, 0, 0, side, side);
  }

  // ---------------------------------------------------------------- hands
  const within = (low, value, high) => Math.min(high, Math.max(low, value));
  function orbit(right, down) {
    camera.azimuth -= right;
    camera.elevation = within(-Math.PI / 2, camera.elevation + down, Math.PI / 2);
    redraw();
  }
  // Zoom about a place (x, y) of the pane, -1 to 1 and up: what is there stays there.
  function zoom(factor, x, y) {
    const before = camera.zoom;
    camera.zoom = within(0.3, before * factor, 60);
    const change = camera.zoom / before;
    camera.x = x + (camera.x - x) * change;
    camera.y = y + (camera.y - y) * change;
    redraw();
  }
  function move(right, down) { camera.x += right; camera.y -= down; redraw(); }
  const place = (box, x, y) => [2 * (x - box.left) / box.width - 1, 1 - 2 * (y - box.top) / box.height];

  const held = new Map();
  const middle = () => {
    const all = [...held.values()], [x, y] = [0, 1].map(i => all.reduce((sum, at) => sum + at[i], 0) / all.length);
    return { x, y, spread: all.reduce((sum, at) => sum + Math.hypot(at[0] - x, at[1] - y), 0) / all.length };
  };
  for (const canvas of canvases) {
    canvas.addEventListener("pointerdown", event => {
      if (event.pointerType === "mouse" && event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      held.set(event.pointerId, [event.clientX, event.clientY]);
    });
    canvas.addEventListener("pointermove", event => {
      if (!held.has(event.pointerId)) return;
      const before = middle(), box = canvas.getBoundingClientRect();
      held.set(event.pointerId, [event.clientX, event.clientY]);
      const after = middle(), right = after.x - before.x, down = after.y - before.y;
      if (held.size > 1 || event.shiftKey) move(2 * right / box.width, 2 * down / box.height);
      else orbit(4 * right / box.width, 4 * down / box.height);
      if (held.size > 1 && before.spread) zoom(after.spread / before.spread, ...place(box, after.x, after.y));
    });
    for (const end of ["pointerup", "pointercancel"])
      canvas.addEventListener(end, event => held.delete(event.pointerId));
    canvas.addEventListener("wheel", event => {
      // A page that is being scrolled does not stop when a pane comes under the pointer.
      if (performance.now() - scrolled < 250) return;
      event.preventDefault();
      const lines = event.deltaMode === 0 ? 1 : 16;
      const at = place(canvas.getBoundingClientRect(), event.clientX, event.clientY);
      zoom(Math.exp(-0.0015 * lines * event.deltaY), ...at);
    }, { passive: false });
  }
  let scrolled = -1e9;
  window.addEventListener("scroll", () => { scrolled = performance.now(); }, { passive: true });

  const step = Math.PI / 18;
  const keys = {
    ArrowLeft: () => orbit(-step, 0), ArrowRight: () => orbit(step, 0),
    ArrowUp: () => orbit(0, -step), ArrowDown: () => orbit(0, step),
    "+": () => zoom(1.2, 0, 0), "=": () => zoom(1.2, 0, 0), "-": () => zoom(1 / 1.2, 0, 0), "0": reset, Home: reset,
  };
  panes.addEventListener("keydown", event => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  part("button").addEventListener("click", reset);
  edges.addEventListener("change", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("theme", redraw);
  const observer = new ResizeObserver(redraw);
  canvases.forEach(canvas => observer.observe(canvas));
  context.redraws.push(redraw);

  part(".mesh-absent").hidden = true;
  panes.hidden = tools.hidden = false;
  reset();
})(document.currentScript.parentElement);
"""

_SCRIPT = _PROGRAM.replace("__SHADERS__", json.dumps({"vertex": _VERTEX, "mesh": _MESH, "points": _POINTS}))
