"""Reports in a real browser: nothing is loaded, every picture is drawn, light and dark, desk and phone; meshes turn."""

import io

import numpy as np
import pytest
import soundfile
import trimesh
from PIL import Image

from vertebra.pipelines import figures
from vertebra.pipelines.demo.base import DOMAINS, run_demo
from vertebra.pipelines.mesh_figures import Panel
from vertebra.pipelines.mesh_viewer import viewer
from vertebra.pipelines.report import Report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with a part of every kind."""
    folder = tmp_path_factory.mktemp("report")
    soundfile.write(folder / "a.wav", np.zeros(800), 8000)
    torus = trimesh.creation.torus(1.0, 0.4)
    panels = [Panel(np.asarray(torus.vertices), None, "scan"), Panel(np.asarray(torus.vertices), torus.faces, "mesh")]
    made = Report("a report", "with a sentence").headline([(3, "things"), ("1 min", "of time")])
    made.chapter("First", "A chapter.").section("text").text("word " * 80).code("vertebra run a/b " + "c " * 90)
    made.table([[f"name {i}", *range(12)] for i in range(3)], ["name", *map(str, range(12))])
    made.section("figures").figure(figures.bars({"a": 0.7, "b": 0.3}), "Bars.")
    made.figure(figures.confusion(np.eye(3, dtype=int), ["a", "b", "c"]), "Confusion.")
    made.chapter("Second").section("mesh").html(viewer("torus", panels))
    made.section("sound").sounds([(folder / "a.wav", "Silence.")]).details("more", "long text")
    return made.write(folder / "report.html")


def shot(page, selector=None):
    png = page.locator(selector).first.screenshot() if selector else page.screenshot()
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "touch"), [(1280, False), (390, True)])
def test_every_picture_is_shown_and_nothing_fails(visit, report, width, touch, dark):
    seen = visit(report, width, dark=dark, touch=touch)
    assert seen.broken_images() == []
    assert seen.overflow() <= 0
    assert (shot(seen.page).mean() < 80) == dark
    shown = seen.page.locator("figure img:visible")
    assert shown.count() == 2
    assert all("night" in shown.nth(i).get_attribute("class") for i in range(2)) == dark
    assert seen.errors == []


def test_the_button_changes_colours_of_page_figures_and_meshes(visit, report):
    seen = visit(report)
    seen.page.locator("canvas").first.scroll_into_view_if_needed()
    seen.page.wait_for_timeout(300)
    light = shot(seen.page, "canvas")
    seen.page.click("#theme")
    seen.page.wait_for_timeout(300)
    assert seen.page.locator("#theme").inner_text() == "Light"
    assert shot(seen.page).mean() < 80
    assert shot(seen.page, "canvas").mean() < light.mean() - 60
    assert seen.page.locator("img.night:visible").count() == 2
    seen.page.click("#theme")
    assert shot(seen.page).mean() > 150
    assert seen.errors == []


@pytest.mark.parametrize("touch", [False, True])
def test_the_mesh_turns(visit, report, touch):
    seen = visit(report, 390 if touch else 1280, touch=touch)
    canvas = seen.page.locator("canvas").nth(1)
    canvas.scroll_into_view_if_needed()
    seen.page.wait_for_timeout(300)
    before = shot(seen.page, "canvas >> nth=1")
    assert before.std() > 20  # something is drawn
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    seen.page.mouse.move(x, y)
    seen.page.mouse.down()
    seen.page.mouse.move(x + 60, y + 30, steps=4)
    seen.page.mouse.up()
    seen.page.wait_for_timeout(300)
    turned = shot(seen.page, "canvas >> nth=1")
    assert np.abs(turned - before).mean() > 3
    seen.page.get_by_role("button", name="Reset view").click()
    seen.page.wait_for_timeout(300)
    assert np.abs(shot(seen.page, "canvas >> nth=1") - before).mean() < 0.5
    assert seen.errors == []


def test_the_menu_leads_to_its_chapters(visit, report):
    seen = visit(report, 1280, 500)
    seen.page.click("nav >> text=Second")
    seen.page.wait_for_timeout(800)  # it scrolls smoothly
    top = seen.page.locator("#chapter-2").bounding_box()["y"]
    assert -5 < top < 120


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_of_all_domains(visit, tmp_path):
    done = run_demo(list(DOMAINS), tmp_path)
    assert {stage.pipeline.partition("/")[0] for stage in done.stages} == set(DOMAINS)
    for width, dark in ((1280, False), (390, True)):
        seen = visit(done.report, width, dark=dark)
        assert seen.broken_images() == []
        assert seen.overflow() <= 0
        assert seen.page.locator("nav a").count() == len(DOMAINS) + 1
        assert seen.page.locator("canvas").count() >= 3
        seen.page.locator("canvas").first.scroll_into_view_if_needed()
        seen.page.wait_for_timeout(500)
        assert shot(seen.page, "canvas").std() > 8
        assert seen.errors == []
