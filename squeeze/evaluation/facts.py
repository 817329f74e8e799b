"""Made-up facts to hide in text and ask for: what the reference model was trained to retrieve.

A question followed by its answer spells exactly the sentence that stated the fact, so a model
answers by copying, and an ordinary language model needs no instruction to do it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_ADJECTIVES = (
    "amber ancient bitter bold brave bright broken calm cheerful clever cold crimson curious dark "
    "dusty eager early empty faithful famous fierce foreign gentle golden grand grey happy heavy "
    "hidden hollow humble iron ivory jolly keen late little lonely loud lucky merry mighty narrow "
    "noble odd old pale patient plain proud purple quiet rapid red rich rough royal rusty sacred "
    "scarlet secret sharp silent silver simple sleepy slow small solemn square steady stern "
    "strange strong sudden sweet swift tall tender thin tiny vast warm weary white wicked wild "
    "wise wooden yellow young"
)
_NOUNS = (
    "anchor apple arrow badger barrel basket beacon bear bell bird boat book bottle branch bridge "
    "button candle canal castle cat chain chair chapel cloud coach coat corner cottage cow crow "
    "crown cup curtain desk dog door drum eagle engine falcon farm feather field finger fire fish "
    "flag flower forest fountain fox frog garden gate ghost glass goat hammer harbour hat hawk "
    "hill horse house island jacket kettle key king kitchen ladder lake lamp lantern letter lion "
    "meadow mill mirror monkey moon mountain needle orchard otter owl oven palace paper pigeon "
    "pillow pipe pistol plough pond queen rabbit raven ribbon ring river road robin rope rose "
    "saddle sailor salt shadow sheep ship shoe spider spoon stable star stone stove sword table "
    "thimble tiger tower train tree trumpet tulip turtle valley village violin wagon wall watch "
    "whistle window wolf"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
MAX_FACTS = len(ADJECTIVES) * len(NOUNS) // 2  # Beyond this, drawing unused keys becomes slow.
DIGITS = "0123456789"
LETTERS_AND_DIGITS = "abcdefghijklmnopqrstuvwxyz" + DIGITS


@dataclass(frozen=True)
class Form:
    """One way to state a fact: the words up to the value, and the value with what follows it."""

    question: str
    answer: str

    def ask(self, key: str) -> str:
        """Return the question about ``key``."""
        return self.question.replace("{key}", key)

    def tell(self, value: str) -> str:
        """Return the answer that holds ``value``."""
        return self.answer.replace("{value}", value)


FORMS = (
    Form("\nThe secret number of the {key} is", " {value}.\n"),
    Form("\nRemember that the {key} was sold for", " {value} pounds.\n"),
    Form('\n"{key}":', ' "{value}",\n'),
    Form("\nNote: {key} ->", " {value}\n"),
)


def draw_key(generator: random.Random) -> str:
    """Draw what a fact is about: an adjective and a noun."""
    return f"{generator.choice(ADJECTIVES)} {generator.choice(NOUNS)}"


def draw_value(generator: random.Random) -> str:
    """Draw a value: 60% 4 to 7 digits, 20% two words, 20% 8 letters and digits."""
    kind = generator.random()
    if kind < 0.6:
        return "".join(generator.choice(DIGITS) for _ in range(generator.choice((4, 5, 6, 7))))
    if kind < 0.8:
        return draw_key(generator)
    return "".join(generator.choice(LETTERS_AND_DIGITS) for _ in range(8))


def draw_facts(generator: random.Random, count: int) -> list[tuple[str, str]]:
    """Draw ``count`` pairs of key and value, no key twice; ``count`` is at most ``MAX_FACTS``."""
    values: dict[str, str] = {}
    while len(values) < count:
        values.setdefault(draw_key(generator), draw_value(generator))
    return list(values.items())
