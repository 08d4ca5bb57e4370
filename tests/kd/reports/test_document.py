"""Documents as Markdown and as pages: nothing in them is taken for markup, and pages need nothing besides themselves."""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest

from kd.reports.document import (
    Chart,
    Code,
    Curve,
    Document,
    Facts,
    Section,
    Share,
    Sound,
    Table,
    Text,
    number,
    share,
)
from kd.reports.markdown_text import to_markdown
from kd.reports.page import to_html

NASTY = "<script>alert(1)</script> & \"quoted\" 'x' | `tick` *star* _under_ @body@ $x$\nnext"
VOID = {"meta", "br", "img", "path", "link", "input"}


class Checker(HTMLParser):
    """Collects elements and text of a page; fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def document(*blocks: object, title: str = "a title") -> Document:
    return Document(title, "under it", (("metric", "0.5", "a note"),), (Section("first", blocks),))


def every_block(text: str) -> tuple:
    cells = (text, number(1.5), Share(0.25, text), Curve((0.0, 1.0)), Sound(b"mp3"))
    return (
        Text(text),
        Code(text),
        Facts(((text, text),)),
        Table((text, "n", "s", "c", "a"), (cells,), text),
        Table((text,), ((text,),), text, folded=True),
        Chart("<svg></svg>", text, text),
    )


def test_no_text_is_markup_on_a_page() -> None:
    plain, nasty = (checked(to_html(document(*every_block(text), title=text))) for text in ("harmless", NASTY))
    assert [tag for tag, _ in nasty.elements] == [tag for tag, _ in plain.elements]
    assert NASTY in nasty.text
    assert plain.count("section") == nasty.count("section") == 1


def test_no_text_is_markup_in_markdown() -> None:
    text = to_markdown(document(*every_block(NASTY), title=NASTY))
    table = [line for line in text.splitlines() if line.startswith("| ") and "script" in line]
    assert table
    for line in table:
        assert len(re.findall(r"(?<!\\)\|", line)) in (2, 3, 4)
    outside_code = re.sub("(?s)```.*?```", "", text)
    assert "<script" not in outside_code
    assert "`tick`" not in outside_code.replace("\\`", "")
    assert "next\n" in text.partition("```")[2]  # code stays as it is


def test_a_page_may_load_nothing_and_runs_only_its_own_script() -> None:
    page = to_html(document(Text("hello")))
    policy = next(found["content"] for tag, found in checked(page).elements if tag == "meta" and "content" in found)
    assert "default-src 'none'" in policy
    (script,) = re.findall("(?s)<script>(.*?)</script>", page)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_numbers_sort_by_value_and_missing_ones_are_dashes() -> None:
    table = Table(("n", "s"), ((number(1234.5, "{:,.0f}"), share(0.5)), (number(math.nan), share(math.nan))))
    page, text = to_html(document(table)), to_markdown(document(table))
    assert 'data-v="1234.5">1,234<' in page
    assert '<td class="n" data-v="">–</td>' in page
    assert "--v:50.0%" in page
    assert text.splitlines()[-3:] == ["| ----: | ----: |", "| 1,234 | 0.500 |", "|     – |     – |"]
    assert number(None).text == "–"


def test_markdown_leaves_out_what_only_a_page_can_show() -> None:
    table = Table(("name", "curve", "sound"), (("x", Curve((1.0,)), Sound(b"mp3")), ("y", Curve(()), Sound(None))))
    text = to_markdown(document(table, Chart("<svg/>", "caption"), Chart("<svg/>", "described", "it goes up")))
    assert "curve" not in text
    assert "svg" not in text
    assert "*described.* it goes up" in text
    page = checked(to_html(document(table)))
    assert page.count("audio") == 1
    assert page.count("svg") == 1
    assert to_markdown(document(Table(("curve",), ((Curve((1.0,)),),)))).endswith("## first\n")


@pytest.mark.parametrize("text", ["```", "````\nx"])
def test_code_with_fences_of_its_own_stays_inside(text: str) -> None:
    shown = to_markdown(document(Code(text)))
    fence = re.findall("(?m)^(`{4,})$", shown)
    assert fence[0] == fence[-1]
    assert len(fence[0]) > max(map(len, re.findall("`+", text)))


def test_what_steers_a_terminal_or_is_no_unicode_is_escaped() -> None:
    name = "a\x1b2J\x00\x9b\udcffü\n"
    document = Document(name, "", (), (Section(name, (Text(name),)),))
    for text in (to_markdown(document), to_html(document)):
        text.encode()
        assert not set("\x1b\x00\x9b") & set(text)
        assert "\\x1b2J\\x00\\x9b\\udcffü" in text
