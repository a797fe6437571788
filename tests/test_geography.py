"""Check the bundled geography set: its size, its rules for gold strings, and its rebuilding."""

import doctest
import json
import re
from collections import Counter
from dataclasses import asdict

import pytest

from conf.errors import DataError
from data import build_geography
from data.build_geography import HERE, Question, folded, mentions, questions, table, wording

DOMAINS = {"biome", "capital", "continent", "currency", "language", "region", "river"}
COMMITTED = (HERE / "geography.jsonl").read_text(encoding="utf-8")
QUESTIONS = [Question(**json.loads(line)) for line in COMMITTED.splitlines()]
BY_TEXT = {question.text: question for question in QUESTIONS}


def test_rebuilding_gives_the_committed_bytes() -> None:
    assert build_geography.rendered().encode() == (HERE / "geography.jsonl").read_bytes()


def test_every_domain_has_enough_questions() -> None:
    count = Counter(question.domain for question in QUESTIONS)
    assert set(count) == DOMAINS
    assert min(count.values()) >= 45
    assert 450 <= len(QUESTIONS) <= 520


def test_the_readme_gives_the_counts() -> None:
    page = (HERE / "README.md").read_text(encoding="utf-8")
    stated = {name: int(n) for name, n in re.findall(r"^\| `([\w.]+)` \| (\d+) \|", page, re.M)}
    tables = ("countries", "provinces", "extras", "aliases", "wordings")
    count = Counter(question.domain for question in QUESTIONS)
    assert stated == count | {f"{name}.csv": len(table(name)) for name in tables}
    assert f"holds {len(QUESTIONS)} short questions" in page


def test_ids_and_texts_are_unique() -> None:
    assert len({question.id for question in QUESTIONS}) == len(QUESTIONS)
    assert len({folded(question.text) for question in QUESTIONS}) == len(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_question_keeps_the_rules(question: Question) -> None:
    assert re.fullmatch(rf"geo-{question.domain}(-[a-z0-9]+)+", question.id)
    assert question.text.endswith(("?", "."))
    assert question.reference.endswith(".")
    assert question.gold
    assert all(folded(answer) for answer in question.gold)
    assert len(set(question.gold)) == len(question.gold)
    assert mentions(question.context, question.gold)
    assert mentions(question.reference, question.gold)
    assert not mentions(question.text, question.gold)
    assert 35 <= len(question.context.split()) <= 60
    fields = [question.text, question.reference, question.context]
    assert not any("  " in field or ".." in field or "{" in field for field in fields)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("What is the capital of the state of Goiás?", "Goiania", "Brasília"),
        (
            "Name the biomes found in the state of Mato Grosso.",
            "the Pantanal, a floodplain",
            "Caatinga",
        ),
        ("What was the region where the Vikings lived called?", "SCANDINAVIA", "Germania"),
        (
            "What is the predominant biome in northern Italy?",
            "Temperate Deciduous Forest",
            "tundra",
        ),
    ],
)
def test_questions_of_the_article_are_there(text: str, right: str, wrong: str) -> None:
    assert mentions(f"It is {right}.", BY_TEXT[text].gold)
    assert not mentions(f"It is {wrong}.", BY_TEXT[text].gold)


def test_a_capital_is_never_gold_twice() -> None:
    capitals = [folded(q.gold[0]) for q in QUESTIONS if q.domain == "capital"]
    assert len(set(capitals)) == len(capitals)


def test_wordings_vary_within_each_domain() -> None:
    starts = Counter((q.domain, q.text.split()[0]) for q in QUESTIONS)
    assert all(sum(domain == d for d, _ in starts) >= 2 for domain in DOMAINS)


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read = {name: table(name) for name in ("countries", "provinces", "extras")}
    fewer = {name: rows if name == "countries" else rows[::2] for name, rows in read.items()}
    monkeypatch.setattr(build_geography, "table", lambda name: fewer.get(name) or table(name))
    kept = {question.id: question for question in questions()}
    assert 0 < len(kept) < len(QUESTIONS)
    assert all(asdict(q) == asdict(kept[q.id]) for q in QUESTIONS if q.id in kept)


def test_a_wording_that_gives_the_answer_away_is_passed_over() -> None:
    for number in range(10):
        text = wording(f"geo-river-{number}", "river longest", ["river of Chad"], place="Chad")
        assert "river of" not in text


def test_a_question_that_cannot_hide_its_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"'geo-capital-mexico'.*Expected.*ask column"):
        wording("geo-capital-mexico", "capital", ["Mexico"], place="Mexico")


def test_an_unknown_question_is_refused() -> None:
    row = table("countries")[0] | {"ask": "anthem"}
    with pytest.raises(DataError, match=r"'anthem'.*'Algeria'.*Expected.*Correct the row"):
        list(build_geography.country_questions(row, {}))


def test_doctests_of_the_builder() -> None:
    assert doctest.testmod(build_geography).failed == 0
