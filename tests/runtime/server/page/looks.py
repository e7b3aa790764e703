"""What can be said of a page's looks and names without eyes: contrast as it is drawn, names as assistive technology
hears them. Owns no page.

assert thin(browser) == [] and nameless(browser) == []
"""

from typing import Any

from tests.runtime.server.page.browser import Browser

LEAST: float = 4.5  # WCAG 2.2, 1.4.3, level AA, of text that is not large
NAMED = {"button", "textbox", "combobox", "link", "progressbar", "dialog", "image", "region", "form", "search", "group"}
_CONTRAST = """
const [least] = arguments;
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const over = (colour, [r, g, b]) => {  // a colour of CSS, on another one
  canvas.fillStyle = `rgb(${r} ${g} ${b})`;
  canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data.slice(0, 3);
};
const light = (rgb) => [...rgb].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => over(getComputedStyle(element).backgroundColor,
  element.parentElement ? behind(element.parentElement) : [255, 255, 255]);
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) texts.push([walker.currentNode.parentElement, walker.currentNode.textContent.trim(), null]);
for (const field of document.querySelectorAll("[placeholder]")) texts.push([field, field.placeholder, "::placeholder"]);
for (const field of document.querySelectorAll("textarea, input:not([type=file]), select")) {
  texts.push([field, field.value, null]);
}
const found = [];
let seen = 0;
for (const [element, text, part] of texts) {
  if (!text || element.closest("script, style, noscript, .unseen, option, :disabled")) continue;
  if (!element.checkVisibility({ visibilityProperty: true }) || !element.getClientRects().length) continue;
  seen += 1;
  const back = behind(element);
  const [one, other] = [light(over(getComputedStyle(element, part).color, back)), light(back)];
  const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  if (ratio < least) found.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)}`);
}
return { seen, found };
"""


def thin(browser: Browser, least: float = LEAST) -> list[str]:
    """Texts that do not stand out by that ratio from what is behind them, as `ratio: text`."""
    found = browser.run(_CONTRAST, least)
    assert found["seen"] > 5
    return list(found["found"])


def nameless(browser: Browser) -> list[str]:
    """Roles of controls that have no name, and of regions: what a screen reader says of them."""
    nodes: list[Any] = [
        node for node in browser.devtools("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")
    ]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in nodes if "role" in node]
    assert any(role in NAMED and name for role, name in told)
    return [role for role, name in told if role in NAMED and not name]


def overflow(browser: Browser) -> int:
    """Pixels by which the page is wider than the window."""
    return int(browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))
