"""Chromium without a window, for the tests of the page."""

import shutil
import time

import pytest

webdriver = pytest.importorskip('selenium.webdriver')

WIDE, NARROW = (1280, 800), (390, 844)


def open_browser(size=WIDE):
    """A browser; skips where Chromium or its driver is missing."""
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if chromium is None or driver is None:
        pytest.skip('needs Chromium and its driver (Debian: chromium-driver)')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    width, height = size
    view = {'width': width, 'height': height, 'deviceScaleFactor': 1}
    view['mobile'] = width < 600
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', view)
    browser.set_script_timeout(60)
    return browser


def until(check, seconds=20, what=''):
    """Waits until a check gives something true, and returns it."""
    end = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < end, f'waited {seconds} s for {what or check}'
        time.sleep(0.03)
    return value
