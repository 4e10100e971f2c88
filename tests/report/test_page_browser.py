"""The page in a real browser: it draws, it plays, works by keyboard, and asks nothing of any network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from image_run import PROMPTS, STEPS, UPDATES, write_image_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from unveil.report.page import write_page

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail("the browser tests need Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


class Page:
    """The opened page of one run."""

    def __init__(self, chrome: webdriver.Chrome, address: str) -> None:
        self.chrome = chrome
        self.address = address
        self.open()

    def open(self, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for log in ("browser", "performance"):
            self.chrome.get_log(log)
        self.chrome.get(self.address)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def js(self, script: str) -> Any:
        return self.chrome.execute_script(f"return {script}")

    def go_to(self, step: int) -> None:
        self.chrome.execute_script("arguments[0].value = arguments[1]", self.one("#step"), step)
        self.js("document.getElementById('step').dispatchEvent(new Event('input'))")

    def choose(self, selector: str, value: str) -> None:
        Select(self.one(selector)).select_by_value(value)

    def classes(self, index: int = 0) -> list[set[str]]:
        tokens = self.all(".tokens")[index].find_elements(By.TAG_NAME, "li")
        return [set((token.get_attribute("class") or "").split()) for token in tokens]


@pytest.fixture(scope="module")
def address(shared_run: Path) -> str:
    return write_page(shared_run).as_uri()


@pytest.fixture
def page(chrome: webdriver.Chrome, address: str) -> Page:
    return Page(chrome, address)


@pytest.fixture
def scripted(page: Page) -> Page:
    """The page at the hand-written trajectory of conftest.py, alone."""
    page.choose("#problem", "hostile")
    page.one("#compare").click()
    page.choose(".panel select[aria-label^=decoder]", "rcr")
    return page


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_draws_without_errors_network_or_sideways_scrolling(page: Page, width: int, scheme: str) -> None:
    page.open(width, scheme)
    assert page.chrome.get_log("browser") == []
    assert len(page.all(".uplot canvas")) == 12
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    outside = page.js(
        "[...document.querySelectorAll('main *')].filter((node) => node.offsetParent && "
        "node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML)"
    )
    assert outside == []
    dark = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 60")
    assert dark == (scheme == "dark")
    assert page.js("performance.getEntriesByType('resource').length") == 0
    sent = [json.loads(entry["message"])["message"] for entry in page.chrome.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.address]


def test_policy_stops_requests_and_foreign_scripts(page: Page) -> None:
    fetch = "fetch('http://127.0.0.1:9/').then(() => done('sent'), (error) => done(String(error)))"
    assert page.chrome.execute_async_script(f"const done = arguments[0]; {fetch}").startswith("TypeError")
    page.js("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 2'}))")
    assert page.js("window.hacked === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in page.chrome.get_log("browser"))


def test_header_says_what_the_run_did(page: Page) -> None:
    assert page.one("h1").text == "mdpo countdown-mdpo-0"
    assert "finished" in page.one("#facts").text
    assert "With lcr, held-out accuracy goes from 43.3% (base) to 64.9% (tuned)" in page.one("#summary").text
    assert "1 h 12 min" in page.one("#cost").text
    cells = [cell.text.split("\n")[0] for cell in page.all("#table td")]
    assert cells == ["43.3%", "48.2%", "64.9%", "67.8%", "+21.6 points", "+19.6 points"]
    assert "more than 80% of the groups had no variance" in page.one("#group-warning").text


def test_step_changes_guess_and_verdict(scripted: Page) -> None:
    slider = scripted.one("#step")
    assert slider.get_attribute("max") == "3"
    seen = []
    for step in (1, 2, 3):
        scripted.go_to(step)
        mark = scripted.one(".guess .mark").get_attribute("aria-label")
        seen.append((scripted.one("#step-text").text, scripted.one(".guess-text").text[:5], mark))
    assert [(text, mark) for text, _, mark in seen] == [
        ("step 1 of 3", "wrong"),
        ("step 2 of 3", "right"),
        ("step 3 of 3", "wrong"),
    ]
    assert seen[1][1] == "1 2 3"
    assert scripted.one(".verdict.over").text == "Over-denoised: right at step 2, wrong at the end."
    marks = [mark.text for mark in scripted.all(".strip .mark")]
    assert marks == ["✗", "✓", "✗"]
    assert "step 3 of 3, A wrong" in (slider.get_attribute("aria-valuetext") or "")


def test_marks_of_places_follow_the_steps(scripted: Page) -> None:
    assert scripted.classes() == [{"token", "masked"}, {"token", "revealed"}, {"token", "masked"}]
    scripted.one("#forward").click()
    assert scripted.classes() == [{"token", "revealed"}, {"token", "masked", "taken"}, {"token", "masked"}]
    assert [old.text for old in scripted.all(".tokens del")] == ["7"]
    spoken = scripted.all(".tokens li")[1].get_attribute("aria-label")
    assert spoken == "place 2: taken back, was 7, confidence 0.25"
    scripted.one("#forward").click()
    assert scripted.classes() == [{"token"}, {"token", "revealed"}, {"token", "revealed"}]
    assert scripted.all(".tokens del") == []


def test_guesses_in_masked_boxes_can_be_hidden(scripted: Page) -> None:
    assert scripted.all(".tokens li")[0].text == "1"
    scripted.one("#show-guesses").click()
    assert scripted.all(".tokens li")[0].text == ""


def test_confidence_of_a_standing_token_is_kept_and_colours_it(page: Page) -> None:
    scale = page.js("getComputedStyle(document.querySelector('#ramp')).backgroundImage")
    assert scale.startswith("linear-gradient")
    page.choose("#problem", "c-004")
    for step in range(1, 9):
        page.go_to(step)
        shown = ".panel:first-child .tokens li:not(.masked)"
        boxes = page.js(f"[...document.querySelectorAll('{shown}')].map((box) => box.title)")
        assert len(boxes) == 11 * step // 8
        assert all("confidence 0." in box for box in boxes)


def test_keys_move_by_one_step_and_stop_at_the_ends(page: Page) -> None:
    text = page.one("#step-text")
    body = page.one("body")
    left, right = Keys.ARROW_LEFT, Keys.ARROW_RIGHT
    for key, expected in [(right, 2), (right, 3), (left, 2), (left, 1)]:
        body.send_keys(key)
        assert text.text == f"step {expected} of 8"
    slider = page.one("#step")
    slider.send_keys(Keys.ARROW_LEFT)
    assert text.text == "step 1 of 8"
    slider.send_keys(Keys.ARROW_RIGHT)
    assert text.text == "step 2 of 8"
    slider.send_keys(Keys.END)
    slider.send_keys(Keys.ARROW_RIGHT)
    assert text.text == "step 8 of 8"
    page.one("#problem").send_keys(Keys.ARROW_RIGHT)
    page.one("#sample-to").send_keys(Keys.ARROW_LEFT)
    assert text.text == "step 8 of 8", "keys inside a choice belong to it"


def test_play_runs_to_the_end_and_stops(page: Page) -> None:
    page.go_to(6)
    page.one("#play").click()
    assert page.one("#play").text == "Pause"
    WebDriverWait(page.chrome, 10, 0.1).until(lambda _: page.one("#play").text == "Play")
    assert page.one("#step-text").text == "step 8 of 8"


def test_two_trajectories_side_by_side(page: Page) -> None:
    panels = page.all(".panel")
    chosen = [Select(select).first_selected_option.text for select in page.all(".panel select")]
    assert chosen == ["0 (base)", "lcr", "400", "rcr"]
    assert abs(panels[0].rect["y"] - panels[1].rect["y"]) < 2
    page.choose(".panel:last-child select[aria-label^=update]", "0")
    page.choose(".panel:last-child select[aria-label^=decoder]", "lcr")
    assert len({strip.get_attribute("innerHTML") for strip in page.all(".strip")}) == 1
    page.choose("#problem", "hostile")
    assert page.one(".panel:first-child .empty").text == "No trajectory for this choice."
    page.one("#compare").click()
    assert len(page.all(".panel")) == 1


def test_hostile_strings_are_shown_as_text(scripted: Page, hostile: str) -> None:
    scripted.go_to(3)
    assert scripted.all(".tokens li")[2].text == hostile
    assert scripted.one("#question span").text == hostile
    assert hostile in [cell.text for cell in scripted.all(".samples tbody th")]
    assert scripted.all("img") == []
    assert scripted.js("window.hacked === undefined")


def test_samples_of_two_updates(page: Page, shared_run: Path) -> None:
    lines = [json.loads(line) for line in (shared_run / "samples.jsonl").read_text().splitlines()]
    solved = [line for line in lines if line["decoder"] == "lcr" and line["correct"]]
    right = {step: {line["problem"] for line in solved if line["step"] == step} for step in (0, 200)}
    page.choose("#sample-to", "200")
    count = f"{len(right[0])} of 7 right at update 0, {len(right[200])} of 6 at update 200"
    assert count in page.one("#samples .hint").text
    page.choose("#sample-filter", "gained")
    shown = {row.get_attribute("title") for row in page.all(".samples tbody th")}
    assert shown == right[200] - right[0]


def test_unknown_measure_can_be_plotted(page: Page) -> None:
    page.choose("#measure", "tokens_per_second")
    assert "tokens_per_second" in page.all("#charts .u-legend")[-1].text
    spoken = page.all("#charts [role=img]")[-1].get_attribute("aria-label") or ""
    assert spoken.startswith("Any measure. tokens_per_second: ")


def test_map_of_guess_accuracy_is_read_by_keyboard(page: Page, shared_run: Path) -> None:
    lines = [json.loads(line) for line in (shared_run / "metrics.jsonl").read_text().splitlines()]
    last = [line["guess_accuracy"] for line in lines if line["kind"] == "train"][-3:]
    page.one(".map canvas").send_keys(Keys.ARROW_DOWN)
    mean = sum(row[6] for row in last) / 3
    assert page.one(".map [aria-live]").text == f"updates 398–400, step 7: {mean:.1%}"


def test_every_control_has_a_name(page: Page) -> None:
    nameless = page.js(
        "[...document.querySelectorAll('select, input, button, canvas[tabindex]')].filter((node) => "
        "!(node.ariaLabel || node.labels?.length || node.textContent.trim())).map((node) => node.outerHTML)"
    )
    assert nameless == []


def test_run_that_has_just_started_has_a_page(chrome: webdriver.Chrome, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"system": "mdpo", "status": "running"}')
    page = Page(chrome, write_page(tmp_path).as_uri())
    assert chrome.get_log("browser") == []
    assert "No held-out evaluation yet." in page.one("#summary").text
    assert len(page.all(".empty")) == 5


# ---- images


@pytest.fixture(scope="module")
def image_address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(write_image_run(tmp_path_factory.mktemp("runs") / "bars")).as_uri()


@pytest.fixture
def image_page(chrome: webdriver.Chrome, image_address: str) -> Page:
    return Page(chrome, image_address)


@pytest.mark.parametrize("width", [1280, 420])
def test_a_run_on_images_draws_without_errors_or_sideways_scrolling(image_page: Page, width: int) -> None:
    image_page.open(width, "dark")
    assert image_page.chrome.get_log("browser") == []
    assert image_page.js("document.documentElement.scrollWidth") <= width
    assert image_page.js("[...document.images].every((image) => image.complete && image.naturalWidth === 8)")
    assert not image_page.one("#guesses").is_displayed() and not image_page.one(".legend .token").is_displayed()
    for place in ("#alerts", "#hacking"):
        assert "the optimised reward (held-out) rises from 0.461 to 0.949" in image_page.one(place).text
    assert "Also: diversity falls since update 0" in image_page.one("#hacking").text


def test_the_grid_shows_every_prompt_over_training(image_page: Page) -> None:
    heads = [head.text.splitlines() for head in image_page.all(".grid thead th")[1:]]
    assert heads[0] == ["base", "0 of 8"] and heads[-1] == ["40", "8 of 8"] and len(heads) == len(UPDATES)
    rows = image_page.all(".grid tbody tr")
    assert len(rows) == len(PROMPTS)
    last = rows[-1].find_elements(By.TAG_NAME, "img")
    assert [image.get_attribute("class") for image in last] == ["no"] * 5 + ["yes"] * 4
    assert last[-1].get_attribute("alt") == "7, update 40: right, score 0.5"
    order = [str(section.get_attribute("id")) for section in image_page.all("main section")]
    assert order.index("samples") < order.index("denoising"), "samples come first"


def test_the_chain_of_an_image_is_walked_step_by_step(image_page: Page) -> None:
    def shown() -> list[str]:
        return [str(image.get_attribute("alt")) for image in image_page.all(".panel:first-child .frame img")]

    assert shown() == [f"state of A at step {STEPS}", f"expected image of A at step {STEPS}"], "it begins at the end"
    image_page.one("#viewer").find_element(By.ID, "back").click()
    assert shown()[0] == f"state of A at step {STEPS - 1}"
    assert "drawn with noise" in image_page.one(".panel .hint").text
    image_page.all(".panel:first-child .film button")[1].click()
    assert shown()[1] == "expected image of A at step 2" and image_page.one("#step-text").text == f"step 2 of {STEPS}"
    sources = {str(image.get_attribute("src")) for image in image_page.all(".panel:first-child .film img")}
    assert len(sources) == 2 * STEPS, "states and expected images of all steps"


def test_what_is_measured_along_the_steps_has_a_chart_each(image_page: Page) -> None:
    titles = [title.text for title in image_page.all("#along-charts h3")]
    assert titles == ["Distance of the ratio from 1", "Clipped above"]
    assert len(image_page.all("#along-charts .uplot")) == 2
    watched = [title.text for title in image_page.all("#watched-charts h3")]
    assert watched == ["Distance", "Diversity"]


def test_what_is_optimised_and_what_is_judged_share_a_chart(image_page: Page) -> None:
    (chart,) = image_page.all("#against [role=img]")
    spoken = chart.get_attribute("aria-label") or ""
    assert "optimised reward, rollouts: " in spoken and "optimised reward, held-out: 0.461" in spoken
    assert "judge's accuracy, held-out: " in spoken
    image_page.one("#watched summary").click()
    assert "distance up by 15%, frechet up by 50%, diversity down by 30%" in image_page.one(".rule").text


def test_a_sample_can_be_enlarged_and_is_described(image_page: Page) -> None:
    assert not image_page.one("#large").is_displayed()
    image_page.all(".grid .enlarge")[-1].click()
    assert image_page.one("#large p").text == "7, update 40: right, score 0.5"
    assert image_page.js("document.querySelector('#large img').width") >= 300
    image_page.one("#large button").click()
    assert not image_page.one("#large").is_displayed()
