"""If this breaks: the report runs code that a data set, a file name or a config contains, shows another value than the one under the
pointer, or cannot be read on a phone, in the dark, by keyboard or in Chinese. A real Chromium on the file, without a server.
"""

import json
import shutil

import pytest

from lit_llm.report import writing
from lit_llm.report.drawing import curves

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
EVIL = "</script><script>hit=1</script><img src=x onerror=hit=2>\"'><svg onload=hit=3> {body} \u202egnp"
LONG = "one_word_" * 60


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en", "--window-size=1000,800"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def hostile(make_run):
    """The folder of a run in which every text is somebody else's."""
    source = {"source": EVIL, "read": 9, "kept": 8, "dropped": {EVIL: [1, EVIL]}, "fixes": {EVIL: EVIL}, "notes": {EVIL: 2},
              "speakers": {EVIL: {"tokens": 5, "supervised": 2}, LONG: {"tokens": 5, "supervised": 2}}}
    rows = [{"step": step, "train/loss": 5 / step, "val/nll": 4 / step if step % 50 == 0 else "", EVIL: step, LONG: -step}
            for step in range(1, 301)]
    run = make_run("a <img src=x onerror=hit=4>", rows=rows, before={"val/nll": 3.0, EVIL: 1.0},
                   record={"state": "failed", "host": "x", "pid": 1, "reason": EVIL, "base": EVIL, "method": EVIL, "allow": [EVIL],
                           "versions": {EVIL: EVIL}, "hardware": {"device": EVIL}, "parameters": {EVIL: 1}},
                   config={"model": {"base": EVIL, EVIL: LONG}, "data": {"sources": [{"path": EVIL}]}},
                   data={"sources": [source], "train": {"tokens": 4, EVIL: 3}, "ledger": {EVIL: {"sequences": 1, "tokens": 2, "supervised": 1}}},
                   answers=[{"step": 1, "kind": EVIL, "prompt": EVIL + LONG, "expected": EVIL, "base": EVIL, "tuned": EVIL}],
                   samples=[{"step": 1, "prompt": EVIL + LONG, "expected": EVIL, "answer": EVIL, "finish_reason": EVIL}])
    (run / "evaluations.jsonl").write_text(json.dumps({"time": EVIL, "verb": EVIL, "checkpoint": EVIL, "other_data": EVIL}) + "\n")
    writing.write(run)
    return run


def open_page(browser, file, width=1000, height=800, **media):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": name.replace("_", "-"), "value": value} for name, value in media.items()]})
    browser.get(file.as_uri())


def shown(browser, selector):
    return [element.text for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def test_nothing_of_the_data_is_run(browser, hostile):
    """Texts are shown as they are; the policy lets no script in, not even one that is added later."""
    open_page(browser, hostile / writing.PAGE)
    assert browser.execute_script("return typeof hit") == "undefined"
    assert browser.execute_script("return document.querySelectorAll('img, iframe, link, object').length") == 0
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.find_element("css selector", "h1").text == "a <img src=x onerror=hit=4>"
    text = browser.find_element("css selector", "body").text
    assert text.count(EVIL.split("\u202e")[0].strip()) >= 12
    assert "\u202e" not in browser.page_source
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.execute_script("const s = document.createElement('script'); s.textContent = 'hit = 5'; document.body.append(s);"
                           "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"hit = 6\"><p style=\"color: red\" id=red>')")
    assert browser.execute_script("return typeof hit") == "undefined"
    assert browser.execute_script("return getComputedStyle(document.getElementById('red')).color") != "rgb(255, 0, 0)"


def test_the_value_under_the_pointer_the_finger_and_the_keyboard(browser, hostile):
    open_page(browser, hostile / writing.PAGE)
    box = browser.execute_script("const svg = document.querySelector('svg.chart'); svg.scrollIntoView({block: 'center'});"
                                 "const box = svg.getBoundingClientRect(); return [box.left, box.top, box.width, box.height]")
    output = browser.find_element("css selector", "figure output")
    (chart, *_) = curves.charts(json.loads((hostile / writing.REPORT).read_text()))
    across, _ = curves.Scale.of(chart)
    for step, event in ((100, "mouse"), (200, "touch"), (1, "mouse")):
        x, y = box[0] + across.at(step) / curves.WIDTH * box[2], box[1] + box[3] / 2
        if event == "mouse":
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
        else:
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert output.text == f"{step}: train/loss {float(f'{5 / step:.6g}'):.15g}"
    svg = browser.find_element("css selector", "svg.chart")
    for key, step in (("\ue010", 300), ("\ue012", 299), ("\ue012", 298), ("\ue014", 299), ("\ue011", 1), ("\ue012", 1)):   # End, arrows, Home
        svg.send_keys(key)
        assert output.text == f"{step}: train/loss {float(f'{5 / step:.6g}'):.15g}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_beside_the_screen(browser, hostile, scheme):
    open_page(browser, hostile / writing.PAGE, 360, 740, prefers_color_scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.find_element("css selector", "summary").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    colours = browser.execute_script("const style = getComputedStyle(document.body);"
                                     "return [style.color, style.backgroundColor].map((c) => c.match(/\\d+/g).slice(0, 3).map(Number))")
    ink, paper = (sum(colour) / 3 for colour in colours)
    assert (ink > 180 and paper < 60) if scheme == "dark" else (ink < 80 and paper > 240)


def test_both_languages(browser, hostile):
    """One is shown at a time, first that of the browser; the command to resume is in both."""
    open_page(browser, hostile / writing.PAGE)
    button = browser.find_element("css selector", "#switch")
    assert shown(browser, "h2")[:2] == ["Curves", "Metrics"]
    assert shown(browser, ".state") == ["failed"]
    button.click()
    assert shown(browser, "h2")[:2] == ["曲线", "指标"]
    assert shown(browser, ".state") == ["出错"]
    assert not shown(browser, ".en")
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": "x", "acceptLanguage": "zh-CN"})
    try:
        open_page(browser, hostile / writing.PAGE)
        assert shown(browser, "h2")[:2] == ["曲线", "指标"]
    finally:
        browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": "x", "acceptLanguage": "en"})


def test_a_long_run_is_below_a_megabyte(make_run):
    """Of 50 metrics over 1,000 steps, hundreds of sources and answers of 10,000 characters."""
    names = [f"metric/{number}" for number in range(50)]
    rows = [{"step": step, **{name: (step * 7919 % 1009) / 7 for name in names}} for step in range(1, 1001)]
    sources = [{"source": f"source {number}", "read": 3, "kept": 3, "speakers": {"user": {"tokens": 3, "supervised": 0}},
                "dropped": {f"reason {at} " + "x" * 300: [1, "there"] for at in range(9)}} for number in range(200)]
    run = make_run(rows=rows, data={"sources": sources}, answers=[{"step": 1, "tuned": "字" * 10_000}] * 200,
                   samples=[{"step": step, "prompt": f"{number}" + "字" * 10_000, "answer": "字" * 10_000} for step in range(50) for number in range(20)])
    writing.write(run)
    assert (run / writing.PAGE).stat().st_size < 1_000_000
