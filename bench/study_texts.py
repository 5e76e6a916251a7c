"""Makes the two texts of the study of Gemma 3 270M from LibreOffice's help, which Debian packages in many languages.

    apt-get download libreoffice-help-ko libreoffice-help-en-us
    for package in libreoffice-help-*.deb; do dpkg -x $package help; done
    python bench/study_texts.py help/usr/share/libreoffice/help texts

A document is what one page of the help says in Korean, and the same paragraphs of the English page. Paragraphs that nobody has
translated, and repeated ones, are left out of both. Further pairs of files, one document a line, can be added with ``--pair``; each
text is shuffled in the same order. Writes ``english.txt`` and ``korean.txt``, one document a line.
"""

from __future__ import annotations

import argparse
import html
import random
import re
from pathlib import Path

PARAGRAPH = re.compile(r'<(?:p|h[1-6]) id="((?:par|hd)_[^"]+)"[^>]*>(.*?)</(?:p|h[1-6])>', re.DOTALL)
HANGUL = re.compile("[가-힣]")
LEAST = 20  # characters of a paragraph
SHARE = 0.4  # of its characters that are Hangul, if it is translated


def paragraphs(page: Path) -> dict[str, str]:
    """Returns the paragraphs of a page of the help, without markup, by id."""
    found = PARAGRAPH.findall(page.read_text(encoding="utf-8"))
    return {name: " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split()) for name, text in found}


def translated(help_folder: Path) -> list[tuple[str, str]]:
    """Returns the documents: the English and the Korean text of each page that has a translated paragraph."""
    documents, seen = [], set[str]()
    korean = help_folder / "ko" / "text"
    for page in sorted(korean.rglob("*.html")):
        other = help_folder / "en-US" / "text" / page.relative_to(korean)
        if not other.exists():
            continue
        english, pairs = paragraphs(other), []
        for name, text in paragraphs(page).items():
            new = len(text) >= LEAST and len(HANGUL.findall(text)) >= SHARE * len(text) and text not in seen
            if new and english.get(name):
                seen.add(text)
                pairs.append((english[name], text))
        if pairs:
            documents.append((" ".join(pair[0] for pair in pairs), " ".join(pair[1] for pair in pairs)))
    return documents


def main() -> None:
    """Writes both texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("help_folder", type=Path, help="folder with en-US/ and ko/")
    parser.add_argument("output", type=Path)
    parser.add_argument("--pair", nargs=2, type=Path, action="append", default=[], metavar=("ENGLISH", "KOREAN"))
    arguments = parser.parse_args()
    documents = translated(arguments.help_folder)
    for english, korean in arguments.pair:
        lines = [path.read_text(encoding="utf-8").splitlines() for path in (english, korean)]
        documents += [(one.strip(), other.strip()) for one, other in zip(*lines, strict=True) if one.strip() and other.strip()]
    random.Random(0).shuffle(documents)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(("english", "korean")):
        text = "".join(document[place] + "\n" for document in documents)
        (arguments.output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(documents)} documents, {len(text)} characters")


if __name__ == "__main__":
    main()
