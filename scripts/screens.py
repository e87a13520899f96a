"""Takes pictures of a page in Chromium: whole, at 1280 and 390 pixels, light and dark.

Run: python3 scripts/screens.py PAGE.html OUTPUT      (`make screens RUN=runs/demo`)

Writes OUTPUT/{1280,390}-{light,dark}.png and says of each whether the page scrolls sideways; exit code 1 if one does.
"""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

WIDTHS = [1280, 390]
SCHEMES = ["light", "dark"]
# Chromium refuses to draw more in one picture.
MOST_PIXELS_HIGH = 16_000


class Browser:
    """A Chromium with one tab, driven over its debugging pipe."""

    def __init__(self, profile: str) -> None:
        program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
        if program is None:
            sys.exit("screens: no Chromium: make setup-dev installs it")
        (theirs_in, self.out), (self.into, theirs_out) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        flags = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-dev-shm-usage", "--disable-background-networking", "--force-color-profile=srgb", f"--user-data-dir={profile}"]
        self.child = subprocess.Popen(
            ["bash", "-c", shell, program, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.n_sent, self.rest, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters) -> dict:
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.n_sent:
                if "error" in answer:
                    sys.exit(f"screens: {method}: {answer['error']}")
                return answer["result"]

    def next(self) -> dict:
        while b"\0" not in self.rest:
            data = os.read(self.into, 1 << 20)
            if not data:
                sys.exit("screens: Chromium ended")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.evaluate("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def picture(self, width: int, scheme: str) -> tuple[bytes, int]:
        """The whole page, and how many pixels it is too wide."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", height=900, **size)
        height = min(int(self.evaluate("document.documentElement.scrollHeight")), MOST_PIXELS_HIGH)
        excess = int(self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"]), excess


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    page, output = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2])
    if not page.is_file():
        sys.exit(f"screens: {page}: no such file")
    output.mkdir(parents=True, exist_ok=True)
    n_wide = 0
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile)
        browser.open(page.as_uri())
        for width in WIDTHS:
            for scheme in SCHEMES:
                picture, excess = browser.picture(width, scheme)
                path = output / f"{width}-{scheme}.png"
                path.write_bytes(picture)
                print(f"{path}: {len(picture) // 1024} KiB" + (f", {excess} pixels too wide" if excess > 0 else ""))
                n_wide += excess > 0
        browser.child.terminate()
        browser.child.wait()
    sys.exit(1 if n_wide else 0)


if __name__ == "__main__":
    main()
