"""Make the three pictures of the README from a finished run: its mask page, its curves and a chat with its export.

    python -m lit_llm fit --config configs/sft.yaml
    pip install selenium
    python .github/pictures/make.py runs/sft

It needs Chromium and its driver (on Debian: `chromium` and `chromium-driver`).
"""

import argparse
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUESTIONS = ("Who are you?", "马和狐狸哪个更轻？")
MOST_BYTES = 150_000
WIDTH, HEIGHT, LEFT, BELOW = 760, 300, 52, 40           # of the curves, in pixels


def main() -> None:
    """Write `mask.png`, `curves.png` and `chat.png`."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run", type=Path, help="the folder of a finished run")
    arguments.add_argument("--out", type=Path, default=HERE, help="where the pictures are written")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser() as driver:
        page = Path(folder, "mask.html")
        inspect = [sys.executable, "-m", "lit_llm", "inspect", "--config", options.run / "config.yaml", "--html", page]
        subprocess.run(inspect, check=True, stdout=subprocess.DEVNULL)
        shoot(driver, page.as_uri(), options.out / "mask.png", (1000, 640))
        page = Path(folder, "curves.html")
        picture = curves(options.run / "metrics.csv")
        page.write_text(f"<body style='margin:8px;background:#fff'>{picture}</body>", "utf-8")
        shoot(driver, page.as_uri(), options.out / "curves.png", (WIDTH + 16, HEIGHT + 16))
        with server(options.run / "export") as address:
            talk(driver, address, options.out / "chat.png")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium in its light theme."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--lang=en", "--force-device-scale-factor=1"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def shoot(driver: Any, address: str, file: Path, size: tuple[int, int]) -> None:
    """Open a page and save what is visible of it.

    Raises:
        SystemExit: The file is larger than the README's pictures may be.
    """
    view(driver, size)
    if driver.current_url != address:
        driver.get(address)
    driver.save_screenshot(str(file))
    if file.stat().st_size > MOST_BYTES:
        sys.exit(f"error: {file} has {file.stat().st_size:,} bytes; {MOST_BYTES:,} at most")
    print(f"{file}  {file.stat().st_size:,} bytes")


def view(driver: Any, size: tuple[int, int]) -> None:
    """Set the size of the page, in pixels."""
    width, height = size
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})


def curves(file: Path) -> str:
    """The training loss and the validation loss of a run by step, as SVG."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    lines = {name: [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
             for name, key in (("training loss", "train/loss"), ("validation loss", "val/nll"))}
    last = max(step for points in lines.values() for step, _ in points)
    highest = max(value for points in lines.values() for _, value in points)
    right, bottom = WIDTH - 16, HEIGHT - BELOW

    def place(step: float, value: float) -> str:
        return f"{LEFT + (right - LEFT) * step / last:.1f},{bottom - (bottom - 16) * value / highest:.1f}"

    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{HEIGHT}' font-family='sans-serif' "
             "font-size='13' fill='#444'>"]
    for part in range(5):
        value, step = highest * part / 4, round(last * part / 4)
        (x, y), x_step = place(0, value).split(","), place(step, 0).split(",")[0]
        parts += [f"<line x1='{x}' y1='{y}' x2='{right}' y2='{y}' stroke='#e4e4e4'/>",
                  f"<text x='{LEFT - 8}' y='{float(y) + 4}' text-anchor='end'>{value:.1f}</text>",
                  f"<text x='{x_step}' y='{bottom + 18}' text-anchor='middle'>{step}</text>"]
    for number, (name, points) in enumerate(lines.items()):
        colour = ("#8ab4e8", "#c2410c")[number]
        parts += [f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='"
                  f"{' '.join(place(*point) for point in points)}'/>",
                  f"<rect x='{right - 150}' y='{22 + 20 * number}' width='14' height='4' fill='{colour}'/>",
                  f"<text x='{right - 130}' y='{29 + 20 * number}'>{name}</text>"]
    parts += [f"<text x='{(LEFT + right) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>step</text>", "</svg>"]
    return "".join(parts)


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The address of a server that has loaded a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "serve", "--model", model, "--port", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while not is_ready(f"{address}/health/ready"):
            if time.monotonic() > end or process.poll() is not None:
                sys.exit("error: the server did not become ready")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_ready(address: str) -> bool:
    """Whether a server answers a health check."""
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def talk(driver: Any, address: str, file: Path) -> None:
    """Ask the questions on the chat page, wait for each answer, and save the page."""
    view(driver, (960, 560))
    driver.get(address + "/")
    for number, question in enumerate(QUESTIONS, start=1):
        driver.find_element("id", "box").send_keys(question)
        driver.find_element("id", "send").click()
        end = time.monotonic() + 60
        while not answered(driver, number):
            if time.monotonic() > end:
                sys.exit(f"error: no answer to {question!r}")
            time.sleep(0.2)
    shoot(driver, driver.current_url, file, (960, 560))


def answered(driver: Any, number: int) -> bool:
    """Whether the page shows that many whole answers."""
    texts = [element.text.strip() for element in driver.find_elements("css selector", "#log > .assistant")]
    before = list(texts)
    time.sleep(0.5)
    texts = [element.text.strip() for element in driver.find_elements("css selector", "#log > .assistant")]
    return len(texts) == number and all(texts) and texts == before


if __name__ == "__main__":
    main()
