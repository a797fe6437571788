"""Render the bundled question set, ``geography.jsonl``, from the hand-written tables beside it.

The facts stand in CSV tables: ``countries``, ``provinces``, and ``extras`` for questions that no
template fits. ``aliases`` lists what else is accepted for a name, ``wordings`` how each kind of
question may be put, and a row's ``ask`` column the questions made from it. Nothing is random: a
question's wording follows from its id, so that adding a row changes no other line. Rebuild with
``python -m data.build_geography``.
"""

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.errors import DataError

HERE = Path(__file__).parent
Row = dict[str, str]
Aliases = dict[str, list[str]]

# The article words these two itself.
FIXED_WORDING = {
    "geo-capital-goias": "What is the capital of {place}?",
    "geo-biome-mato-grosso": "Name the biomes found in {place}.",
}


@dataclass(frozen=True)
class Question:
    """Hold one line of ``geography.jsonl``; the fields are described in ``data/README.md``."""

    id: str
    text: str
    reference: str
    gold: list[str]
    context: str
    domain: str


def folded(text: str) -> str:
    """Lower ``text``, drop its accents and turn each run of punctuation into one space.

    >>> folded("  N’Djamena,  São-Tomé ")
    'n djamena sao tome'
    """
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", plain))


def mentions(text: str, gold: Iterable[str]) -> bool:
    """Tell whether ``text`` holds any of ``gold`` as whole words, both folded.

    >>> mentions("It is in São Paulo.", ["sao paulo"]), mentions("Nigeria", ["Niger"])
    (True, False)
    """
    padded = f" {folded(text)} "
    return any(f" {folded(answer)} " in padded for answer in gold)


def items(cell: str) -> list[str]:
    """Split a ``;``-separated cell."""
    return [item.strip() for item in cell.split(";") if item.strip()]


def listed(words: list[str]) -> str:
    """Join ``words`` as a sentence does.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def bare(name: str) -> str:
    """Drop a leading article."""
    return name.removeprefix("the ")


def accepted(shown: list[str], aliases: Aliases) -> list[str]:
    """Return the gold strings of the ``shown`` names: each without its article, and its aliases."""
    return list(dict.fromkeys(g for name in shown for g in [bare(name), *aliases.get(name, [])]))


def closed(sentence: str) -> str:
    """Give ``sentence`` a capital first letter and a full stop, unless it ends with one."""
    return sentence[:1].upper() + sentence[1:] + ("" if sentence.endswith(".") else ".")


def context(row: Row, opening: str) -> str:
    """Return the facts paragraph of a country or province, without what its row leaves blank."""
    languages, biomes = items(row["languages"]), items(row["biomes"])
    sentences = [opening]
    if row["currency"]:
        sentences.append(f"Its capital is {row['capital']} and its currency is {row['currency']}")
    else:
        sentences.append(f"Its capital is {row['capital']}")
    if languages:
        plural = len(languages) > 1
        if row["language_status"] == "main":
            subject = "The main languages are" if plural else "The main language is"
        else:
            subject = "Official languages include" if plural else "The official language is"
        sentences.append(f"{subject} {listed(languages)}")
    if row["river"]:
        subject = {
            "longest": "Its longest river is",
            "capital": "The capital stands on",
            "": "A major river is",
        }[row["river_kind"]]
        sentences.append(f"{subject} {row['river']}")
    if biomes:
        subject = "Its main biomes are" if len(biomes) > 1 else "Its predominant biome is"
        sentences.append(f"{subject} {listed(biomes)}")
    return " ".join([*map(closed, sentences), row["note"]]).strip()


def answer(row: Row, domain: str, place: str) -> tuple[str, list[str], str]:
    """Return the key of the wordings, the names asked for, and the reference sentence."""
    if domain == "capital":
        return domain, [row["capital"]], f"the capital of {place} is {row['capital']}"
    if domain == "currency":
        return domain, [row["currency"]], f"the currency of {place} is {row['currency']}"
    if domain == "continent":
        return domain, [row["continent"]], f"{place} is on the continent of {row['continent']}"
    if domain == "region":
        return domain, [row["region"]], f"{place} is in {row['region']}"
    if domain == "country":
        return domain, [row["country"]], f"{place} is in {row['country']}"
    if domain == "river":
        longest = row["river_kind"] == "longest"
        subject = f"the longest river in {place} is" if longest else f"{row['capital']} stands on"
        return f"river {row['river_kind']}", [row["river"]], f"{subject} {row['river']}"
    if domain == "biome":
        shown = items(row["biomes"])
        if len(shown) > 1:
            return "biome several", shown, f"the main biomes of {place} are {listed(shown)}"
        return "biome", shown, f"the predominant biome in {place} is {shown[0]}"
    if domain == "language":
        shown, status = items(row["languages"]), row["language_status"]
        if len(shown) > 1 and status == "official":
            return "language several", shown, f"official languages of {place} are {listed(shown)}"
        return f"language {status}", shown, f"the {status} language of {place} is {listed(shown)}"
    raise DataError(
        f"Unknown question {domain!r} in the ask column of {row['name']!r}. "
        "Expected a domain of data/README.md, or 'country'. Correct the row."
    )


def wording(identity: str, key: str, gold: list[str], **fields: str) -> str:
    """Choose a wording by the id's hash; pass over one in which a gold string would stand."""
    choices = [row["wording"] for row in table("wordings") if row["question"] == key]
    start = int(hashlib.sha256(identity.encode()).hexdigest(), 16) % len(choices)
    if identity in FIXED_WORDING:
        choices, start = [FIXED_WORDING[identity]], 0
    for choice in choices[start:] + choices[:start]:
        text = choice.format(**fields)
        if not mentions(text, gold):
            return text
    raise DataError(
        f"Every wording of {identity!r} holds one of its answers {gold}. "
        "Expected a question that does not give its answer away. Take it off the ask column."
    )


def questions_of(
    row: Row, aliases: Aliases, *, place: str, whole: str, city: str, opening: str
) -> Iterator[Question]:
    """Yield what the ``ask`` column names: ``whole`` holds ``place``, ``city`` is its capital."""
    slug = "-".join(folded(bare(row["name"])).split())
    for asked in row["ask"].split():
        domain = "region" if asked == "country" else asked
        identity = f"geo-{domain}-{slug}" + ("-country" if asked == "country" else "")
        key, shown, reference = answer(row, asked, place)
        gold = accepted(shown, aliases)
        text = wording(identity, key, gold, place=place, whole=whole, city=city)
        yield Question(identity, text, closed(reference), gold, context(row, opening), domain)


def country_questions(row: Row, aliases: Aliases) -> Iterator[Question]:
    """Yield the questions about one row of ``countries.csv``."""
    name, continent = row["name"], row["continent"]
    where = f", on the continent of {continent}" if continent else ""
    opening = f"{name} is a country in {row['region']}{where}"
    return questions_of(
        row, aliases, place=name, whole=continent, city=row["capital"], opening=opening
    )


def province_questions(row: Row, country: Row, aliases: Aliases) -> Iterator[Question]:
    """Yield the questions about one row of ``provinces.csv``, with its country's currency."""
    name, kind = row["name"], row["kind"]
    place = name if name.startswith("the ") or kind == "country" else f"the {kind} of {name}"
    where = f", in {country['continent']}" if country["continent"] else ""
    article = "an" if kind[0] in "aeiou" else "a"
    opening = f"{name} is {article} {kind} of {country['name']}{where}. It lies in {row['region']}"
    full = row | {
        "currency": country["currency"],
        "continent": country["continent"],
        "languages": row["language"],
        "language_status": "main",
    }
    # A bare "Augusta" or "Perth" could be another city of that name.
    city = f"{row['capital']} in {place}"
    return questions_of(
        full, aliases, place=place, whole=country["name"], city=city, opening=opening
    )


def extra_question(row: Row, aliases: Aliases) -> Question:
    """Return a row of ``extras.csv``; its gold ``@name`` means a name and all its aliases."""
    gold: list[str] = []
    for answer_string in row["gold"].split(";"):
        at_name = answer_string.startswith("@")
        gold += accepted([answer_string[1:]], aliases) if at_name else [answer_string]
    return Question(
        id=row["id"],
        text=row["text"],
        reference=row["reference"],
        gold=list(dict.fromkeys(gold)),
        context=row["context"],
        domain=row["domain"],
    )


def questions() -> list[Question]:
    """Return the whole set, sorted by id.

    Raises:
        DataError: a row asks for an unknown domain, or every wording gives its answer away.
    """
    aliases = {row["name"]: row["also"].split("|") for row in table("aliases")}
    countries = {row["name"]: row for row in table("countries")}
    found = [extra_question(row, aliases) for row in table("extras")]
    for row in countries.values():
        found += country_questions(row, aliases)
    for row in table("provinces"):
        found += province_questions(row, countries[row["country"]], aliases)
    return sorted(found, key=lambda question: question.id)


def table(name: str) -> list[Row]:
    """Read the CSV table ``name`` of this folder."""
    with (HERE / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rendered() -> str:
    """Return the text of ``geography.jsonl``: one JSON object a line."""
    lines = [json.dumps(asdict(question), ensure_ascii=False) for question in questions()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "geography.jsonl").write_text(rendered(), encoding="utf-8", newline="\n")
