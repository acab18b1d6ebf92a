"""The documents keep their promises: links and pictures exist, and quoted error messages are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("Docs/**/*.md")])
PICTURE_BYTES, ALL_PICTURES_BYTES = 250_000, 1_500_000
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown page gives its headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in LINK.findall(document.read_text("utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


def test_pictures_of_the_tutorials_are_small_and_all_used():
    text = "".join(document.read_text("utf-8") for document in DOCUMENTS)
    pictures = [path for path in (ROOT / "Docs" / "pictures").glob("*.png") if path.name != "demo_overview.png"]
    assert pictures and all(path.name in text for path in pictures)
    sizes = [path.stat().st_size for path in pictures]
    assert max(sizes) < PICTURE_BYTES and sum(sizes) < ALL_PICTURES_BYTES


def texts_of_the_code() -> str:
    """All string constants of the core and the modules; the gaps of formatted ones are left as {}."""
    found = []
    for folder in ("uae", "UAECommonLib", "UAELandmark", "UAERegistration"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_table_are_those_of_the_code():
    table = (ROOT / "README.md").read_text("utf-8").split("look for the words of the message")[1].split("\n## ")[0]
    messages = [
        text
        for row in table.splitlines()
        if row.startswith("|")
        for text in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    code = texts_of_the_code()
    filled = {
        "is not here (0 CUDA GPU found)": "is not here ({} CUDA GPU found)",
        "the extension PyTorch is missing": "the extension {} is missing",
    }
    assert len(messages) > 20
    assert [text for text in messages if filled.get(text, text) not in code] == []
