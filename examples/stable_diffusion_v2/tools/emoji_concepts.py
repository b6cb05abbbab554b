"""Which emoji tools/prepare_emoji.py draws, which of them are for testing, and what their captions say."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass

from PIL import Image

TEST_SHARE = 0.1


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as in "1F9D1-200D-1F680" (no variation selectors) and its CLDR short name."""

    code: str
    label: str

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-") + ".png"

    @property
    def is_test(self) -> bool:
        return int(hashlib.sha1(self.code.encode()).hexdigest(), 16) % 1000 < TEST_SHARE * 1000


def plain_code(code: str) -> str:
    """Upper case, without the variation selector FE0F, which the sets use differently."""
    return re.sub("-?FE0F", "", code.upper()).lstrip("-")


SKIPPED_GROUPS = {"component", "flags"}
SKIPPED_SUBGROUPS = {
    "alphanum", "av-symbol", "family", "gender", "geometric", "keycap", "math", "punctuation",
}  # fmt: skip


def read_concepts(package: dict[str, bytes]) -> list[Concept]:
    """The emoji of emojibase-data that differ visibly in 64 pixels and in a short caption."""
    entries = json.loads(package["en/data.json"])
    messages = json.loads(package["en/messages.json"])
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["key"] for subgroup in messages["subgroups"]}
    codes = {plain_code(entry["hexcode"]) for entry in entries}
    concepts = []
    for entry in entries:
        concept = Concept(plain_code(entry["hexcode"]), entry["label"])
        skipped = (
            groups.get(entry.get("group"), "component") in SKIPPED_GROUPS
            or subgroups.get(entry.get("subgroup")) in SKIPPED_SUBGROUPS
            or _is_variant(concept.code, codes)
            or "thirty" in concept.label  # half hours on a clock
            or concept.label == "middle finger"
        )
        if not skipped:
            concepts.append(concept)
    return concepts


def _is_variant(code: str, codes: set[str]) -> bool:
    """True for the man's or woman's form of a person, and for emoji that only face right."""
    is_gendered = re.search("-200D-264[02]", code) is not None
    first, rest = code[:5], code[5:]
    has_neutral_form = first in ("1F468", "1F469") and rest != "" and "1F9D1" + rest in codes
    return is_gendered or has_neutral_form or "27A1" in code


# ---- captions ----

UNCOUNTABLE = (
    "bacon bread broccoli butter collision cooking dizzy fire fog garlic ice luggage money popcorn rice rock sake salt "
    "sheaf soap sushi tea thread water wood yarn"
)
NO_ARTICLE_BEFORE = (
    "back down eight eleven end five four left nine no non-potable one right seven six soon ten three top twelve two up"
)


def with_article(label: str) -> str:
    """`label` with "a" or "an" before it where English wants one.

    >>> with_article("umbrella with rain drops"), with_article("glasses"), with_article("bottle with popping cork")
    ('an umbrella with rain drops', 'glasses', 'a bottle with popping cork')
    """
    words = label.split()
    first = words[0].lower()
    head = re.split(" (?:with|in|of|on|over) ", label)[0].split()[-1].lower()
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "ps"))
    is_name = len(words) == 1 and label[0].isupper()
    if (
        first in NO_ARTICLE_BEFORE.split()
        or not first[0].isalpha()
        or head in UNCOUNTABLE.split()
        or is_plural
        or is_name
    ):
        return label
    sounds_like_vowel = first[0] in "aeiou" and not first.startswith(("uni", "eu", "ufo", "one"))
    return ("an " if sounds_like_vowel else "a ") + label


def caption(label: str, colour: str, style: str) -> str:
    """For example "a drawing of a frog, green, noto style"; a colour that the name already has is not repeated."""
    text = "a drawing of " + with_article(label.translate(str.maketrans({"’": "'", "“": "", "”": "", "ñ": "n"})))
    if colour not in text.split():
        text += f", {colour}"
    return text + (f", {style} style" if style else "")


HUES = ((12, "red"), (36, "orange"), (66, "yellow"), (165, "green"), (195, "cyan"), (255, "blue"), (290, "purple"),
        (345, "pink"), (361, "red"))  # fmt: skip  # upper bounds in degrees


def main_colour(drawing: Image.Image) -> str:
    """The commonest colour of the opaque pixels.

    Black, grey and white count only where less than a fifth of the pixels has another colour.
    """
    small = drawing.resize((32, 32), Image.BOX)
    hsv = small.convert("RGB").convert("HSV")
    names = Counter(
        _colour_name(hue * 360 / 255, saturation, value)
        for alpha, hue, saturation, value in zip(small.getchannel("A").tobytes(), *(c.tobytes() for c in hsv.split()))
        if alpha >= 128
    )
    coloured = Counter({name: n for name, n in names.items() if name not in ("black", "grey", "white")})
    pool = coloured if sum(coloured.values()) > 0.2 * sum(names.values()) else names
    return pool.most_common(1)[0][0]


def _colour_name(degrees: float, saturation: int, value: int) -> str:
    if value < 50:
        return "black"
    if saturation < 40:
        return "white" if value > 215 else "grey"
    name = next(name for bound, name in HUES if degrees < bound)
    return "brown" if name in ("orange", "red") and value < 170 and saturation > 60 else name
