"""Takes the screenshots of TensorBoard in docs/, with Chromium or Chrome.

    pip install -r requirements-docs.txt
    python docs/take_screenshots.py TRAIN_DIR EVAL_DIR [DECAY_DIR]

TRAIN_DIR is the folder of a training run. EVAL_DIR contains the evaluations of some of its
checkpoints. DECAY_DIR contains a run in which the learning rate decays; it is TRAIN_DIR by default.
"""

import argparse
import io
import json
import pathlib
import shutil
import tempfile
import time
import urllib.parse

from PIL import Image
from selenium import webdriver
from tensorboard import program
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

DOCS = pathlib.Path(__file__).parent
SCALE = 2  # device pixels per CSS pixel
COLORS = 256  # of the palette of a PNG file
SECONDS_TO_LOAD = 120

# What TensorBoard stores in the browser when someone changes its settings.
TIME_SERIES = {
    "ignoreOutliers": False,
    "scalarSmoothing": 0,
    "stepSelectorEnabled": False,
    "timeSeriesSettingsPaneOpened": False,
    "sideBarWidthInPercent": 18,
}
SETTINGS = {"_tb_global_settings": json.dumps(TIME_SERIES), "_ignoreYOutliers": "false"}

LAYERS = "g.node:is([data-name^=conv], [data-name^=local], [data-name=softmax_linear])"
CHARTS = "tf-scalar-card, tf-distribution-loader"

# The edges of the visible elements that match a selector, within shadow roots, too.
FIND_BOXES = """
const find = root => [...root.querySelectorAll('*')].flatMap(element => [
    ...(element.matches(arguments[0]) ? [element] : []),
    ...(element.shadowRoot ? find(element.shadowRoot) : [])]);
return find(document).map(element => element.getBoundingClientRect()).filter(box => box.width)
    .map(box => [box.left, box.top, box.right, box.bottom]);
"""


def main():
    """Takes all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train_dir")
    parser.add_argument("eval_dir")
    parser.add_argument("decay_dir", nargs="?")
    args = parser.parse_args()
    save(newest_image(args.train_dir, "input", scale=4), "pictures/distorted_images.png")
    save(newest_image(args.eval_dir, "confusion_matrix"), "confusion_matrix.png")

    with tempfile.TemporaryDirectory() as profile, open_browser(profile) as browser:
        both = serve(train=args.train_dir, eval=args.eval_dir)
        tags = "^cross_entropy$|^precision @ 1$|^input$"
        open_page(browser, both, "timeseries", tags, width=1120, height=980)
        save(settled(browser, "card-view"), "tensorboard.png")

        train = serve(train=args.train_dir)
        open_page(browser, train, "graphs", width=2000, height=2200)
        save(crop(browser, LAYERS), "pictures/graph.png")

        decay = serve(train=args.decay_dir or args.train_dir)
        for name, address, tab, tags, count in [
            ("loss", train, "scalars", "^total_loss(_raw)?$", 2),
            ("learning_rate", decay, "scalars", "^learning_rate$", 1),
            ("sparsity", train, "scalars", "^sparsity/local3$", 1),
            ("activations", train, "distributions", "^activations/local3$", 1),
        ]:
            open_page(browser, address, tab, tags)
            save(crop(browser, CHARTS, count), f"pictures/{name}.png")


def newest_image(folder, tag, scale=1):
    """Returns the last image of an image summary."""
    events = event_accumulator.EventAccumulator(folder).Reload()
    if tag in events.Tags()["images"]:  # an image of the script's own
        png = events.Images(tag)[-1].encoded_image_string
    else:  # the result of an operation
        _, _, png = tensor_util.make_ndarray(events.Tensors(tag)[-1].tensor_proto)
    image = Image.open(io.BytesIO(png))
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def serve(**folders):
    """Starts a TensorBoard that has read all events when this returns. Returns its address."""
    server = program.TensorBoard()
    spec = ",".join(f"{name}:{folder}" for name, folder in folders.items())
    options = {"logdir_spec": spec, "port": 0, "reload_interval": 0, "reload_task": "blocking"}
    server.configure(argv=[None, *(f"--{name}={value}" for name, value in options.items())])
    return server.launch()


def open_browser(profile):
    """Returns a headless browser, which closes at the end of a `with` statement."""
    options = webdriver.ChromeOptions()
    for flag in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync hide-scrollbars user-data-dir={profile} "
        f"force-device-scale-factor={SCALE}"
    ).split():
        options.add_argument(f"--{flag}")
    # Without these paths, Selenium looks for a browser and downloads a driver.
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options, service)


def open_page(browser, address, tab, tag_filter="", width=1000, height=1000):
    """Opens a tab of TensorBoard that shows the tags that match a regular expression."""
    browser.set_window_size(width, height)
    browser.get(address)
    for item in SETTINGS.items():
        browser.execute_script("localStorage.setItem(...arguments)", *item)
    browser.get("about:blank")  # so that the next line loads the page again
    # Time Series reads the first part, the other tabs the second one.
    query = urllib.parse.urlencode({"tagFilter": tag_filter}, quote_via=urllib.parse.quote)
    browser.get(f"{address}?{query}#{tab}&{query}&_smoothingWeight=0")


def settled(browser, selector):
    """Returns a screenshot when elements match a selector and nothing has changed for 5 seconds."""
    deadline = time.monotonic() + SECONDS_TO_LOAD
    last, unchanged = None, 0
    while unchanged < 5:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{browser.current_url} still changes or has no {selector}")
        time.sleep(1)
        screenshot = browser.get_screenshot_as_png()
        found = browser.execute_script(FIND_BOXES, selector)
        unchanged = unchanged + 1 if found and screenshot == last else 0
        last = screenshot
    return Image.open(io.BytesIO(last))


def crop(browser, selector, limit=None, margin=6):
    """Returns the part of the page that shows the first elements that match a selector."""
    screenshot = settled(browser, selector)
    boxes = browser.execute_script(FIND_BOXES, selector)[:limit]
    left, top, right, bottom = zip(*boxes, strict=True)
    edges = min(left) - margin, min(top) - margin, max(right) + margin, max(bottom) + margin
    return screenshot.crop([round(SCALE * edge) for edge in edges])


def save(image, name):
    """Writes a PNG file with a small palette to docs/."""
    path = DOCS / name
    path.parent.mkdir(exist_ok=True)
    image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
