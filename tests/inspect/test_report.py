"""The report of a run: one page that opens in a browser without a network, and shows what the log holds."""

import math
import random
import sys
from dataclasses import replace

import pytest
import torch

from ctrlcompile import run_log
from ctrlcompile.controller import Controller
from ctrlcompile.inspect import report
from ctrlcompile.inspect.profile import Machine, Profile, Row, Step
from ctrlcompile.inspect.run import read
from ctrlcompile.passes.outline import Node
from ctrlcompile.proposals import Outcome

from ..controller.plant import Plant
from .browser import PROGRAM, Browser

STEPS = 120
NASTY = "</script><script>throw 'a name'</script>&amp;\"'"


OUTLINE = (
    Node("x", "input", "", "8 x 40", ()),
    Node("first", "ctrlprune::linear", NASTY, "8 x 72", ("x",)),
    Node("output", "output", "", "", ("first",)),
)


RESPECIALISED = {
    50: Outcome("dgrad", 0.4, "block-sparse", "dense", 0.123, 3.21, 0.0, None, False, None, f"no {NASTY}"),
    70: Outcome("forward", 0.31, "block-sparse", "coarse 16x16", 0.25, 12.34, 1.5, 0.0777, True, 0.04),
}


def profile_of(name: str) -> Profile:
    row = Row(name, "forward", 4, 96, 64, "float32", (8, 8), "C++", 1, 0.5, 2.0, 1.0, 2.0, 8e3, 4e3, 0.9, 0.25)
    machine = Machine("CPU (avx2)", 2, torch.__version__, {"float32": 1e11}, 1e10)
    return Profile((row, replace(row, role="wgrad")), Step(8.0, 5.0, 1.6, 1e6, 5e5), machine, 7)


@pytest.fixture
def folder(tmp_path, seed):
    """Of a run with two layers, one of them oddly named, the other larger than what is shown block by block."""
    plant = Plant([(72, 40), (96, 1304)], noise=1.0, seed=seed)
    first = next(iter(plant.gates.values()))
    plant.gates = {NASTY: first, **{name: gate for name, gate in plant.gates.items() if gate is not first}}
    controller = Controller(plant.gates, plant.meter, 0.4, STEPS)
    folder = tmp_path / "a run"
    controller.log = run_log.start(folder, controller)
    for step in range(STEPS):
        plant.train_step()
        controller.step(random.random() if step < STEPS - 1 else math.nan)
        controller.log.see(OUTLINE, {"first": first})
        if step in RESPECIALISED:
            controller.log.respecialized(step, first, RESPECIALISED[step])
    (folder / report.PROFILE).write_text(profile_of(NASTY).to_json())
    return folder


@pytest.fixture
def browser(tmp_path):
    """One that is closed in the end."""
    (tmp_path / "browser").mkdir()
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


PIXELS = """[...document.querySelectorAll('#layers canvas')].map((canvas) => {
  const { width, height } = canvas;
  const bytes = [...canvas.getContext('2d').getImageData(0, 0, width, height).data];
  return [height, width, bytes.filter((_, place) => place % 4 === 0)];
})"""


@pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt-get install chromium")
def test_the_page_opens_in_a_browser_without_errors_or_a_network_and_its_slider_shows_every_mask(folder, browser):
    run = read(folder)
    page = folder / "report.html"
    page.write_text(report.page(run), encoding="utf-8")
    browser.open(page.as_uri())
    browser.wait("document.getElementById('step').value !== ''")

    lines = run.curves() | {"kernels chosen anew": [became.seconds for became in run.respecialised]}
    drawn = browser.value(
        "[...document.querySelector('.js-plotly-plot').data].map((t) => [t.name, [...t.x], [...t.y]])"
    )
    assert math.isnan(lines["loss"].pop())
    lines["loss"].append(None)
    assert {name: y for name, _, y in drawn} == lines
    assert all(x == ([*RESPECIALISED] if name == "kernels chosen anew" else run.steps) for name, x, _ in drawn)
    marked = browser.value("[...document.querySelectorAll('.js-plotly-plot')[1].data[1].y]")
    assert marked == [NASTY, NASTY]
    assert browser.value("document.querySelectorAll('.js-plotly-plot .main-svg').length") > 2
    text = browser.value("document.body.innerText")
    for part in (
        "a run",
        f"Step {STEPS} of {STEPS}",
        "budget 0.4",
        "2.00x",
        NASTY,
        torch.__version__,
        sys.orig_argv[0],
    ):
        assert part in text

    steps = browser.value("JSON.parse(document.getElementById('masks').textContent).steps")
    assert len(steps) > 5
    assert [decision.step for decision in run.decisions if decision.changed] == steps
    masks = {name: run.masks(name, run.frames(report.FRAMES)) for name in run.gates}
    last = len(steps) - 1
    browser.value("document.getElementById('slider').focus()")
    seen = []
    for keys, place in (((), last), (("Home",), 0), (("ArrowRight",) * 3, 3), (("End", "ArrowLeft"), last - 1)):
        for key in keys:
            browser.press(key)
        assert browser.value("document.getElementById('step').value") == f"step {steps[place]}"
        first, second = browser.value(PIXELS)
        seen.append(first)
        small, large = (masks[name][place] for name in run.gates)
        assert first == [9, 5, [31 if active else 238 for active in small.flatten().tolist()]]
        shares = [pair.float().mean(1) for pair in large.split(2, dim=1)]  # patches of 1 x 2 blocks
        assert second[:2] == [12, 82]
        assert second[2] == pytest.approx((238 - 207 * torch.stack(shares, 1)).flatten().tolist(), abs=1)
        captions = browser.value("[...document.querySelectorAll('#layers figcaption')].map((c) => c.textContent)")
        assert captions[0].startswith(f"{NASTY}\n72 x 40 in blocks of 8 x 8, density {float(small.float().mean()):.3f}")
    assert seen[0] != seen[1], "the masks change"

    boxes = browser.value("[...document.querySelectorAll('.graph svg g')].map((box) => box.textContent)")
    density = run.densities()[NASTY][-1]
    assert len(boxes) == len(OUTLINE)
    assert f"ctrlprune::lineardensity {density:.3f}" in boxes[1]
    assert NASTY in boxes[1]

    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    logged = [event["params"]["entry"] for event in browser.events if event["method"] == "Log.entryAdded"]
    assert not [entry for entry in logged if entry["level"] == "error"]
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {address.split(":")[0] for address in requests} <= {"file", "data"}
    assert [address for address in requests if address.startswith("file")] == [page.as_uri()]


def test_a_torn_log_still_gives_the_page_of_what_is_there_and_the_page_says_so(folder):
    path = folder / run_log.FILE
    path.write_bytes(path.read_bytes()[:-20])
    made = report.page(read(folder))
    assert "1 line of the log could not be read" in made
    assert f"Step {STEPS} of" not in made
    assert "Masks" in made


def test_kernels_chosen_anew_are_listed_and_marked_and_without_any_there_is_no_such_list(folder):
    run = read(folder)
    made = report.page(run)
    row = made[made.index("<td>70</td>") :].split("</tr>")[0]
    for part in ("forward", "0.310", "block-sparse", "coarse 16x16", "25.0 %", "7.8 %", "12.3 s", "1.5 s", "in force"):
        assert part in row
    assert "<td>50</td>" in made
    assert "not built: no &lt;/script&gt;" in made
    assert made.count('"kernels chosen anew"') == 2, "among the curves and over the densities"
    assert "<script>throw" not in made
    without = report.page(replace(run, respecialised=()))
    assert "hosen anew" not in without


def test_a_profile_that_is_none_is_refused_with_its_path(folder):
    (folder / report.PROFILE).write_text('{"rows": []}')
    with pytest.raises(
        ValueError, match=r"profile\.json is no profile: .* `ctrlcompile profile TARGET --json` prints one"
    ):
        report.page(read(folder))


def test_a_profile_is_read_back_from_its_json():
    made = profile_of("fc1.weight")
    assert Profile.from_json(made.to_json()) == made
    for text in ("", "[]", '{"rows": [{}]}', '{"rows": [], "step": {}}'):
        with pytest.raises(ValueError, match="not what"):
            Profile.from_json(text)


def test_masks_of_a_long_run_are_thinned_out_to_its_first_and_last_and_some_between(folder):
    run = read(folder)
    changed = [place for place, decision in enumerate(run.decisions) if decision.changed]
    assert run.frames(len(changed)) == changed
    places = run.frames(5)
    assert len(set(places)) == 5
    assert (places[0], places[-1]) == (changed[0], changed[-1])
    assert places == sorted(places)
    assert set(places) <= set(changed)
    for name in run.gates:
        every = run.masks(name, range(len(run.decisions)))
        assert all(torch.equal(mask, every[place]) for place, mask in zip(places, run.masks(name, places), strict=True))
