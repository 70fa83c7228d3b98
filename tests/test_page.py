"""report.html: one file that says all, in a browser, on a phone, on paper, and to who cannot see it."""

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from report_documents import document, variant

pytest.importorskip("matplotlib", reason="the page's charts are drawn with matplotlib (extra `report`)")

from vlmport.validate.charts import Bar, Curve, Dot, bars, curves, dots
from vlmport.validate.page import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects what a reader sees and what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.text, self.images = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        fields = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in fields:
            self.ids.append(fields["id"])
        if tag == "a":
            self.links.append(fields["href"])
        if tag == "img":
            self.images.append(fields)
        self.loads += [fields[name] for name in ("src", "srcset", "data") if name in fields]
        self.loads += [fields["href"] for name in ("link", "image") if tag == name and "href" in fields]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    reader.words = " ".join(" ".join(reader.text).split())
    return reader


def picture(name):
    buffer = io.BytesIO()
    Image.new("RGB", (900, 30), "white").save(buffer, "PNG")
    return buffer.getvalue() if name == "1.png" else None


@pytest.fixture(scope="module")
def html():
    return page(document(variant("fp32", 1e-12), variant("int8", 1e-4), variant("int4", 1e-2, "FAIL")), picture)


def test_the_verdict_comes_first_and_gives_its_reason(html):
    words = read(html).words
    verdict = words[words.index("Verdict", words.index("What was judged")) : words.index("Each step swaps")]
    assert "int4 ✗ FAIL 1 of 3 answers are the reference's; 2 lost, 0 gained." in verdict
    assert "answers recovery is 0.667, 0.323 below the limit of 0.99" in verdict
    assert "Raise the precision of decoder.layers.2, decoder.layers.1, decoder.layers.0" in verdict
    assert "PyTorch float32 against bfloat16" in verdict


def test_it_is_one_file_without_scripts_that_loads_nothing(html):
    reader = read(html)
    assert "<script" not in html
    assert all(load.startswith("data:image/png;base64,") for load in reader.loads)
    assert not re.search(r"@import|url\((?!#)", html)
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert len(reader.ids) == len(set(reader.ids)), "an id is there twice"


def test_what_a_model_or_a_user_wrote_cannot_become_markup(html):
    reader = read(html)
    assert "receipts & <co>" in reader.words
    assert "a & < i> (ends here)" not in reader.words
    assert "How much <is> it?" in reader.words
    assert "<b>" not in html
    assert "<i>" not in html


def test_examples_show_picture_both_answers_and_the_first_other_word(html):
    reader = read(html)
    assert [image["alt"] for image in reader.images] == ["the picture of example i1"], "only what has a picture has one"
    assert "<mark>&lt;i&gt;</mark>" in html
    assert "<mark>peas</mark>" in html
    assert "int4 leaves at token 3" in reader.words
    assert "PyTorch leeks fp32, int8, int4 peas" in reader.words, "equal answers stand there once"


def test_parts_that_were_not_measured_are_left_out():
    bare = {**variant("fp32", 1e-6), "task": None, "statistics": None, "layers": [], "waterfall": None}
    given = {key: value for key, value in document(bare).items() if key not in ("noise", "sweep")}
    reader = read(page(given))
    assert "waterfall" not in reader.ids
    assert "0 of 1 limits held." not in reader.words
    assert {"verdict", "gates", "evidence"} <= set(reader.ids)


def test_numbers_that_json_cannot_write_are_told_as_such():
    broken = variant("int4", 1e-3, "FAIL")
    broken["rows"][0]["gates"][0]["value"] = None
    broken["statistics"]["kl"]["mean"] = broken["statistics"]["kl"]["ci_low"] = "nan"
    broken["layers"][1]["relative_l2"] = "inf"
    words = read(page(document(broken))).words
    assert "answers recovery was not measured" in words
    assert "Raise the precision of decoder.layers.1" in words


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_and_marks_can_be_told_from_the_ground(html, scheme):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for marks in a chart."""
    colours = dict(
        re.findall(r"--([\w-]+): (#[0-9a-f]{6})", html.split(":root")[1 + ("light", "dark", "print").index(scheme)])
    )
    text = {
        name: contrast(colours[name], colours["surface"])
        for name in ("ink", "muted", "link", "pass", "fail", "ambiguous")
    }
    text |= {f"{name} on a card": contrast(colours[name], colours["card"]) for name in ("ink", "muted", "pass", "fail")}
    marks = {f"s{number}": contrast(colours[f"s{number}"], colours["surface"]) for number in range(1, 9)}
    assert not {name: value for name, value in text.items() if value < 4.5}
    assert not {name: value for name, value in marks.items() if value < 3}


def contrast(one, other):
    def luminance(colour):
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_charts_are_svg_with_names_text_and_colours_of_the_page():
    order = ["a", "b"]
    drawn = [
        curves("Lines", [Curve("b", [0, 1], [1e-6, 1e-2])], order=order, x_label="x", y_label="y", ticks={0: "first"}),
        bars("Bars", {"a": [Bar("one", 0.5, 0.4, 0.6), Bar("none", float("nan"))]}, order=order, x_label="nats"),
        dots("Dots", [Dot("a", 1, 2), Dot("b", 2, 3, "fast")], order=order, x_label="MB", y_label="KL"),
    ]
    for svg, word in zip(drawn, ("first", "not measured", "fast"), strict=True):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") in ("Lines", "Bars", "Dots")
        assert any(word in (element.text or "") for element in root.iter()), "text is not text"
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour of its own"
    assert "var(--s2)" in drawn[0], "b has the second colour though it is drawn first"
    assert "var(--s1)" not in drawn[0]


def test_the_same_report_gives_the_same_bytes(html):
    again = page(document(variant("fp32", 1e-12), variant("int8", 1e-4), variant("int4", 1e-2, "FAIL")), picture)
    assert again == html


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1100])
def test_a_browser_shows_it_whole(html, tmp_path, width):
    """Headless Chromium lays the page out without an error, at a phone's width too, and nothing sticks out sideways."""
    probe = (
        "<script>addEventListener('load', () => { const e = document.documentElement;"
        " document.title = JSON.stringify({wide: e.scrollWidth - e.clientWidth,"
        " svgs: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 100).length,"
        " focusable: document.querySelectorAll('a, summary, [tabindex]').length}); });</script>"
    )
    # A window of Chromium is never narrower than 500 pixels, so the page stands in a frame of the asked width.
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace(
        "</body>", probe + "</body>"
    )
    (tmp_path / "page.html").write_text(open_page, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"<iframe id=f src=page.html style='width:{width}px;height:900px;border:0'></iframe><script>onload = () =>"
        " setTimeout(() => { document.title = f.contentDocument.title }, 300)</script>",
        encoding="utf-8",
    )
    found = browse(tmp_path, "frame.html", "--allow-file-access-from-files")
    title = re.search(r"<title>(.*?)</title>", found)
    assert title, found[:500]
    seen = {name: int(value) for name, value in re.findall(r'"(\w+)":(\d+)', title[1])}
    assert seen["wide"] == 0
    assert seen["svgs"] >= 4
    assert seen["focusable"] >= 10


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_prints_it(html, tmp_path):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    browse(tmp_path, "page.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000


def browse(folder, name, *flags):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", *flags, str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    blocked = [line for line in done.stderr.splitlines() if "Refused to" in line or "CONSOLE" in line]
    assert blocked == []
    return done.stdout
