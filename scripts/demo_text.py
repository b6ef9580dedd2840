"""Writes the text that the demo model learns from: conversations and prose, without end, from scripts/demo_corpus/.

The folder holds what is written by hand: answers, definitions, tables, stories with choices in them, couplets. This
module draws from it: a question in one of its phrasings, a story with its names, a poem of a few couplets, one to five
turns in a row. The same seed gives the same documents.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parent / "demo_corpus"
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth",
    "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
)  # fmt: skip
SIGNS = (("plus", "+"), ("minus", "-"), ("times", "*"))

PETS = ("Tilly", "Bruno", "Minka", "Robin", "Moss")
SYLLABLES = ("ba", "ko", "ri", "mel", "tur", "van", "shi", "dro", "pex", "lin", "gor", "ash", "ule", "wim", "tic", "fo")


@dataclass(frozen=True)
class Mixture:
    """How often each source of facts and each kind of turn is drawn, in the order of `Writer`, and how often prose."""

    facts: tuple[int, ...]
    kinds: tuple[int, ...]
    prose: float


TALES = Mixture((32, 20, 11, 8, 5, 15, 4, 0), (66, 9, 7, 11, 3, 4), 0.12)  # half of it tales, poems and prose
FACTS = Mixture((26, 16, 16, 10, 6, 22, 4, 0), (80, 2, 3, 9, 3, 3), 0.05)
ALL = Mixture((30, 16, 14, 7, 4, 13, 4, 12), (74, 6, 4, 9, 3, 4), 0.05)


UNKNOWN_ANSWERS = (
    "I am sorry, I do not know that. I am a very small model, and I know only a little about rivers, mills, animals "
    "and numbers.",
    "I do not know that. I am a very small model. Ask me about a mill or a river, or let me tell you a story.",
    "That is too difficult for me, because I am a very small model. A larger one may know it.",
)
UNKNOWN_QUESTIONS = (
    "What is {}?", "What are {}?", "Explain {}", "Tell me about {}", "How does {} work?", "Who is {}?", "Who was {}?",
    "When was {}?", "Where is {}?", "What do you think about {}?", "How do I learn {}?", "Why is {} important?",
    "Write an essay about {}", "Summarise {}", "Write an email about {}", "What is the best book about {}?",
    "Give me a list of {}", "How much does {} cost?", "Compare {} and {}", "What is the difference between {} and {}?",
    "Who invented {}?", "What is the history of {}?", "Translate {} into French", "Is {} better than {}?",
    "Write a program about {}", "How many {} are there?", "Can you help me with {}?", "I want to know about {}", "{}?",
    "What is the capital of {}?", "What is the opposite of {}?", "Define {}", "What does {} mean?",
)  # fmt: skip
DEFINITION_QUESTIONS = (
    "What is {}?", "What is {}?", "What's {}?", "Define {}", "Tell me about {}", "What does {} mean?", "Explain {}",
    "Explain what {} is", "Do you know what {} is?", "Describe {}", "Can you explain {}?", "Tell me what {} is", "{}?",
)  # fmt: skip
STORY_REQUESTS = ("Tell me a story", "Write a story", "Can you tell me a story?", "Tell a story", "A story, please",
                  "Write a short story", "Tell me a short story", "Tell me a tale", "Tell me a long story")  # fmt: skip
POEM_REQUESTS = ("Write a poem", "Tell me a poem", "Write me a poem", "Can you write a poem?", "Write a short poem",
                 "Make a poem", "Recite a poem", "Do you know a poem?")  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message; `role` is "" in prose."""

    role: str
    text: str


@dataclass(frozen=True)
class Fact:
    """What is asked, in its phrasings, what is answered, and how the next question of the same kind may be put."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    follow_ups: tuple[str, ...] = ()


def lines(name: str) -> list[str]:
    """The lines of a file of the corpus that hold something."""
    return [line for line in (HOME / name).read_text().splitlines() if line]


def blocks(name: str) -> list[list[str]]:
    """The lines between empty lines."""
    return [block.split("\n") for block in (HOME / name).read_text().strip().split("\n\n")]


def rows(name: str) -> list[list[str]]:
    """A table: one row a line, cells between bars."""
    return [[cell.strip() for cell in line.split("|")] for line in lines(name)]


def capital(text: str) -> str:
    """With its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """With its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def filled(patterns: Iterable[str], *words: str) -> tuple[str, ...]:
    """Each pattern with the words in place of {}, {0}, {1}."""
    return tuple(pattern.format(*words) for pattern in patterns)


# ---------------------------------------------------------------- facts


def definitions() -> Iterator[Fact]:
    for noun, text in rows("definitions.txt"):
        bare = noun.split(" ", 1)[1] if noun.startswith(("a ", "an ")) else noun
        follow = filled(("And {}?", "What about {}?", "And what is {}?", "and {}"), noun)
        yield Fact((*filled(DEFINITION_QUESTIONS, noun), f"What is {bare}?", f"{bare}?", bare), (text,), follow)


def answers() -> Iterator[Fact]:
    for first, *texts in blocks("answers.txt"):
        yield Fact(tuple(first.split(" | ")), tuple(texts))


def countries() -> Iterator[Fact]:
    seen = set()
    for country, city, language, continent in rows("countries.txt"):
        named = capital(country)
        yield Fact(
            filled(("What is the capital of {}?", "What is the capital of {}?", "Which city is the capital of {}?",
                    "What is the capital city of {}?", "Tell me the capital of {}", "Capital of {}?",
                    "Do you know the capital of {}?", "Name the capital of {}", "{}'s capital?"), country),
            (f"The capital of {country} is {city}.",),
            filled(("And of {}?", "And {}?", "What about {}?", "And the capital of {}?", "and of {}"), country),
        )  # fmt: skip
        yield Fact(
            filled(("Which language do people speak in {}?", "What language is spoken in {}?"), country),
            (f"People in {country} speak {language}.",),
        )
        yield Fact(
            filled(("Where is {}?", "Tell me about {}", "What is {}?", "Which continent is {} in?"), country),
            (f"{named} is a country in {continent}. Its capital is {city}.",),
        )
        if city not in seen:
            seen.add(city)
            yield Fact(
                filled(
                    ("Where is {}?", "What is {}?", "Tell me about {}", "{} is the capital of which country?"), city
                ),
                (f"{city} is the capital of {country}.",),
            )


def animals() -> Iterator[Fact]:
    for animal, sound, young, home, food, legs in rows("animals.txt"):
        one = a(animal)
        limbs = "leg" if legs == "one" else "legs"
        yield Fact(
            filled(("What sound does {} make?", "What does {} say?", "Which sound does {} make?"), one),
            (f"{capital(one)} {sound}.",),
        )
        yield Fact(
            filled(("What is a young {} called?", "What is a baby {} called?", "What do you call a young {}?"), animal),
            (f"A young {animal} is called {a(young)}.",),
        )
        yield Fact(
            (*filled(("Where does {} live?", "Where can I find {}?"), one), f"Where do you find {a(animal)}?"),
            (f"{capital(one)} lives {home}.",),
        )
        yield Fact(filled(("What does {} eat?", "What does {} feed on?"), one), (f"{capital(one)} {food}.",))
        yield Fact(filled(("How many legs does {} have?",), one), (f"{capital(one)} has {legs} {limbs}.",))
        yield Fact(
            filled(("What is {}?", "Tell me about {}", "Describe {}", "Tell me something about {}"), one),
            (f"{capital(one)} is an animal that lives {home}. It {food}, and its young is called {a(young)}.",),
            filled(("And {}?", "What about {}?"), one),
        )


def words() -> Iterator[Fact]:
    for one, other in rows("opposites.txt"):
        for word, answer in ((one, other), (other, one)):
            yield Fact(
                filled(("What is the opposite of {}?", "Opposite of {}?", "Tell me the opposite of {}"), word),
                (f"The opposite of {word} is {answer}.",),
                filled(("And of {}?", "And the opposite of {}?"), word),
            )
    for thing, colour in rows("colours.txt"):
        asked = ("What colour is {}?", "What color is {}?", "Which colour does {} have?", "Tell me the colour of {}")
        yield Fact(filled(asked, thing), (f"{capital(thing)} is {colour}.",))


def _sum(x: str, word: str, sign: str, y: str, result: str) -> Fact:
    spoken = f"{x} {word} {y}"
    written = filled(("What is {} {} {}?", "{} {} {}", "{}{}{}", "{} {} {} = ?", "Calculate {} {} {}"), x, sign, y)
    asked = filled(("What is {}?", "What is {}?", "How much is {}?", "{}", "Can you tell me what {} is?"), spoken)
    return Fact(asked + written, (f"{capital(spoken)} is {result}.",), filled(("And {}?", "What about {}?"), spoken))


def arithmetic(most: int = 10) -> Iterator[Fact]:
    """All sums, differences and products of the numbers up to `most`, in figures and, where they have any, in words."""
    for x in range(most + 1):
        for y in range(most + 1):
            for (word, sign), result in zip(SIGNS, (x + y, x - y, x * y), strict=True):
                if result < 0:
                    continue
                yield _sum(str(x), word, sign, str(y), str(result))
                if result <= 20:
                    yield _sum(NUMBERS[x], word, sign, NUMBERS[y], NUMBERS[result])


def small_arithmetic() -> Iterator[Fact]:
    """What people try first."""
    return arithmetic(5)


def calendar() -> Iterator[Fact]:
    for names, kind, whole in ((DAYS, "day", "week"), (MONTHS, "month", "year")):
        for index, name in enumerate(names):
            after, before, ordinal = names[(index + 1) % len(names)], names[index - 1], ORDINALS[index]
            yield Fact(
                filled(
                    ("What {1} comes after {0}?", "Which {1} comes after {0}?", "What comes after {0}?"), name, kind
                ),
                (f"{after} comes after {name}.",),
            )
            yield Fact(
                filled(("What {1} comes before {0}?", "Which {1} comes before {0}?"), name, kind),
                (f"{before} comes before {name}.",),
            )
            yield Fact(
                (f"Which {kind} is the {ordinal} one?", f"What is the {ordinal} {kind} of the {whole}?"),
                (f"{name} is the {ordinal} {kind} of the {whole}.",),
            )
    for index, (name, days) in enumerate(zip(MONTHS, MONTH_DAYS, strict=True)):
        more = ", and every fourth year 29" if days == 28 else ""
        yield Fact(
            filled(("How many days are in {}?", "How many days does {} have?"), name),
            (f"{name} has {days} days{more}.",),
        )
        season = ("winter", "spring", "summer", "autumn")[(index + 1) % 12 // 3]
        yield Fact(
            filled(("In which season is {}?", "Which season is {} in?"), name),
            (f"In the north {name} is in {season}.",),
        )
    for number in range(20):
        yield Fact(
            (f"What comes after {number}?", f"Which number comes after {number}?"),
            (f"{number + 1} comes after {number}.",),
        )


# ---------------------------------------------------------------- the writer


class Writer:
    """Draws documents: lists of turns, in the proportions of `mixture`, which may be changed at any time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        sources = (answers, definitions, countries, animals, words, arithmetic, calendar, small_arithmetic)
        self.facts = [list(source()) for source in sources]
        self.mixture = TALES
        self.stories = [(first.split(", "), text) for first, text in blocks("stories.txt")]
        self.couplets = {block[0]: block[1:] for block in blocks("couplets.txt")}
        self.unknown = lines("unknown.txt")[0].split("|")
        self.women, self.men = (line.split() for line in lines("names.txt"))
        self.systems = lines("systems.txt")
        self.prose = (HOME / "mill.txt").read_text().strip().split("\n\n")
        self.kinds: tuple[Callable[[], Iterator[Turn]], ...] = (
            self._asked, self._story, self._poem, self._unknown, self._name, self._list_follow_up,
        )  # fmt: skip

    def document(self) -> list[Turn]:
        """A conversation, or now and then a piece of prose."""
        if self.random.random() < self.mixture.prose:
            return [Turn("", self._passage())]
        turns = [Turn("system", self.random.choice(self.systems))] if self.random.random() < 0.3 else []
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3, 4, 5))):
            (kind,) = self.random.choices(self.kinds, self.mixture.kinds)
            turns += kind()
        return turns

    def poem(self, topic: str) -> str:
        """Three to six couplets about a topic of the corpus, in their order, a verse on each line."""
        first, *others = self.couplets[topic]
        chosen = set(self.random.sample(others, self.random.randint(2, min(5, len(others)))))
        return "\n".join(line.replace(" | ", "\n") for line in (first, *(o for o in others if o in chosen)))

    def tell(self, text: str) -> str:
        """A story with its choices made and its people named."""
        women = self.random.random() < 0.5
        name, other = self.random.sample(self.women if women else self.men, 2)
        slots = {
            "name": name,
            "other": other,
            "she": "she" if women else "he",
            "her": "her" if women else "his",
            "pet": self.random.choice(PETS),
            "elder": self.random.choice(("mother", "father", "grandmother")),
            "king": self.random.choice(("king", "queen")),
        }
        slots |= {capital(key): capital(value) for key, value in slots.items()}
        text = re.sub(r"\[([^\]]*)\]", lambda choice: self.random.choice(choice[1].split("|")), text)
        return re.sub(r"\{(\w+)\}", lambda slot: slots[slot[1]], text)

    def _asked(self) -> Iterator[Turn]:
        (facts,) = self.random.choices(self.facts, self.mixture.facts)
        fact = self.random.choice(facts)
        yield from self._ask(self.random.choice(fact.questions), self.random.choice(fact.answers))
        if self.random.random() < 0.06:
            yield from self._ask(self.random.choice(("Tell me more", "More", "Go on", "Why?", "Are you sure?")),
                                 "I am a very small model, and that is all I know about it.")  # fmt: skip

    def _list_follow_up(self) -> Iterator[Turn]:
        """A question, and then the same one about something else."""
        facts = self.random.choice([self.facts[1], self.facts[2], self.facts[5]])
        able = [fact for fact in facts if fact.follow_ups]
        first = self.random.choice(able)
        yield from self._ask(self.random.choice(first.questions), self.random.choice(first.answers))
        for _ in range(self.random.randint(1, 2)):
            fact = self.random.choice(able)
            yield from self._ask(self.random.choice(fact.follow_ups), self.random.choice(fact.answers))

    def _story(self) -> Iterator[Turn]:
        topics, text = self.random.choice(self.stories)
        request, story = self.random.choice(STORY_REQUESTS), self.tell(text)
        kind = self.random.random()
        if kind < 0.6:
            topic = self.random.choice(topics)
            article = self.random.choice(("a", "the", "")) if not topic.startswith("two") else ""
            topic = a(topic) if article == "a" else f"{article} {topic}".strip()
            request = f"{request.rstrip('?')} about {topic}"
        elif kind < 0.7:
            request = (
                f"{request.rstrip('?')} about {self.random.choice((*self.unknown, a(self._word()), self._word()))}"
            )
            story = f"I know no story about that, but here is another one. {story}"
        yield from self._ask(request, story)
        if self.random.random() < 0.2:
            again = self.random.choice(("Another one", "Tell me another story", "Another story, please", "One more"))
            yield from self._ask(again, self.tell(self.random.choice(self.stories)[1]))

    def _poem(self) -> Iterator[Turn]:
        topic = self.random.choice(list(self.couplets))
        request = self.random.choice(POEM_REQUESTS)
        kind = self.random.random()
        if kind < 0.2:
            yield from self._ask(request, self.poem(topic))
        elif kind < 0.9:
            asked = self.random.choice((f"the {topic}", f"a {topic}", topic))
            yield from self._ask(f"{request.rstrip('?')} about {asked}", self.poem(topic))
        else:
            asked = self.random.choice((*self.unknown, self._word()))
            lead = "I know no poem about that, but here is one about the river.\n"
            yield from self._ask(f"{request.rstrip('?')} about {asked}", lead + self.poem("river"))

    def _unknown(self) -> Iterator[Turn]:
        kind = self.random.random()
        if kind < 0.1:
            x, y = self.random.randint(11, 99), self.random.randint(1, 9999)
            x, y = self.random.choice(((x, y), (y, x), (x, x)))
            word, sign = self.random.choice((*SIGNS, ("divided by", "/")))
            asked = self.random.choice((f"What is {x} {word} {y}?", f"{x} {sign} {y}", f"How much is {x}{sign}{y}?"))
            yield from self._ask(asked, "I am sorry, I can calculate only with small numbers.")
        elif kind < 0.2:
            letters = "".join(self.random.choices("abcdefghijklmnopqrstuvwxyz", k=self.random.randint(3, 9)))
            yield from self._ask(letters, "I am sorry, I did not understand that. Please ask me in other words.")
        elif kind < 0.26:
            request = self.random.choice(("{}", "Summarise this: {}", "{}\n\nWhat do you think?", "What is this? {}"))
            answer = "I have read your text, but I am too small a model to say much about it."
            yield from self._ask(request.format(self.random.choice(self.prose)), answer, plain=True)
        else:
            words = [self.random.choice(self.unknown) if self.random.random() < 0.5 else self._word() for _ in range(2)]
            yield from self._ask(
                self.random.choice(UNKNOWN_QUESTIONS).format(*words), self.random.choice(UNKNOWN_ANSWERS)
            )

    def _name(self) -> Iterator[Turn]:
        if self.random.random() < 0.2:
            yield from self._ask("What is my name?", "I do not know your name. Please tell me.")
        name = self.random.choice(self.women + self.men)
        said = self.random.choice(
            ("My name is {}", "I am {}", "I'm {}", "Hello, I am {}", "Hi, my name is {}", "Call me {}")
        )
        yield from self._ask(
            said.format(name), f"Hello, {name}! It is nice to meet you. What would you like to know?", plain=True
        )
        if self.random.random() < 0.5:
            yield from self._ask(self.random.choice(("What is my name?", "Who am I?", "Do you know my name?")),
                                 f"Your name is {name}.")  # fmt: skip

    def _word(self) -> str:
        """A word or two that nobody knows."""
        word = "".join(self.random.choices(SYLLABLES, k=self.random.randint(2, 4)))
        return capital(word) if self.random.random() < 0.5 else word

    def _ask(self, question: str, answer: str, plain: bool = False) -> Iterator[Turn]:
        """The two turns, the question as people type: now and then without its mark, in lower case, with a please."""
        draw = self.random.random
        if draw() < 0.3:
            question = question.rstrip("?.!")
        elif question[-1].isalpha() and not plain and draw() < 0.5:
            question += "."
        if draw() < 0.1:
            question = question.replace("What is", "What's")
        if draw() < 0.05 and not plain:
            question = f"Please {question[:1].lower()}{question[1:]}"
        if draw() < 0.3:
            question = question.lower() if draw() < 0.7 and not plain else question[:1].lower() + question[1:]
        yield Turn("user", question)
        yield Turn("assistant", answer)

    def _passage(self) -> str:
        """Prose: the book about the mill, a story, a poem or a row of facts, each to be continued."""
        kind = self.random.random()
        if kind < 0.45:
            start = self.random.randrange(len(self.prose))
            return "\n\n".join(self.prose[start : start + self.random.randint(1, 2)])
        if kind < 0.65:
            return self.tell(self.random.choice(self.stories)[1])
        if kind < 0.75:
            return self.poem(self.random.choice(list(self.couplets)))
        return " ".join(
            self.random.choice(self.random.choice(self.facts[1:7])).answers[0] for _ in range(self.random.randint(1, 5))
        )
