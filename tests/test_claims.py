"""Claims: the ledger is complete and quoted verbatim, and verdicts follow from rows."""

import json
import os
import re
from html import unescape
from pathlib import Path

import pytest

from condgen.claims import (
    KINDS, VERDICTS, Claim, chosen_claims, claims_html, claims_text, combine, compare,
    decide, decide_ours, differences, interval_verdict, missing_quotes, quotation_html,
    read_claims, selected_values)
from condgen.recipes import resolve
from condgen.results import confidence_interval, row

CLAIMS = {claim.id: claim for claim in read_claims()}
TESTS = [(claim.id, test) for claim in CLAIMS.values()
         for test in (*claim.tests, *claim.ours)]
ENTRY = {"id": "TOY-1", "paper": "toy", "place": "§1", "quote": "A beats B.",
         "claim": "A is better.", "kind": "measured", "reason": "no data"}


def write(folder: Path, *entries: dict) -> Path:
    path = folder / "claims.json"
    papers = {"toy": {"title": "Toy", "text": "toy.txt"}}
    path.write_text(json.dumps({"papers": papers, "claims": entries}), "utf-8")
    return path


def test_every_numbered_claim_is_in_the_ledger():
    numbers = {"CAGLOW": 43, "KHAN": 36, "SLIDES": 41, "VIGAN": 24, "CRG": 35}
    wanted = [f"{paper}-{i:02d}" for paper, n in numbers.items()
              for i in range(1, n + 1)]
    assert [*CLAIMS] == wanted


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_has_a_verdict_or_a_reason(name):
    claim = CLAIMS[name]
    verdict, outcomes = decide(claim)
    assert verdict in VERDICTS and claim.kind in KINDS
    if verdict == "not tested" and not claim.ours:
        assert claim.reason or outcomes


@pytest.mark.parametrize("test", [t for _, t in TESTS],
                         ids=[f"{name}-{i}" for i, (name, _) in enumerate(TESTS)])
def test_swapping_the_sides_reverses_a_verdict(test):
    assert compare(test).verdict != "not tested"
    test = {**test, "margin": test.get("margin", 0) * (test["relation"] == "within")}
    outcome = compare(test)
    if test["relation"] == "within":
        return
    other = {"<": ">", ">": "<"}[test["relation"]]
    swapped = compare({**test, "relation": other}).verdict
    opposite = {"holds": "does not hold", "does not hold": "holds",
                "undecided": "undecided"}
    assert swapped == opposite[outcome.verdict]


def test_a_single_seed_leaves_a_claim_undecided():
    values = [0.30, 0.31, 0.32]
    found = differences(values, [0.1, 0.1, 0.1])
    assert interval_verdict(*confidence_interval(found), ">") == "holds"
    assert interval_verdict(*confidence_interval(found[:1]), ">") == "undecided"
    wide = differences([0.30, 0.05], [0.1, 0.1])
    assert interval_verdict(*confidence_interval(wide), ">") == "undecided"


def test_seeds_are_compared_in_pairs():
    assert differences([3.0, 5.0], [1.0, 2.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="2 and 3 seeds"):
        differences([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_selector_fits_exactly_one_row():
    rows = [row("A", "accuracy", [0.5], at={"k": 1}), row("A", "accuracy", [0.6],
                                                          at={"k": 2})]
    one = {"model": "A", "variant": "", "metric": "accuracy", "at": {"k": 1}}
    assert selected_values(rows, one) == [0.5]
    with pytest.raises(ValueError, match="0 rows fit"):
        selected_values(rows, {**one, "at": {"k": 3}})
    with pytest.raises(ValueError, match="2 rows fit"):
        selected_values([rows[0], rows[0]], one)


def test_largest_takes_the_largest_magnitude_per_seed():
    rows = [row("A", "code_correlation", values, at={"code": k, "with": "slant"})
            for k, values in ((1, [0.1, -0.9]), (2, [-0.4, 0.2]))]
    at = {"model": "A", "variant": "", "metric": "code_correlation",
          "at": {"with": "slant"}, "largest": "code"}
    assert selected_values(rows, at) == [0.4, 0.9]


def test_one_failing_part_refutes_a_claim():
    assert combine(["holds", "does not hold", "undecided"]) == "does not hold"
    assert combine(["holds", "undecided"]) == "undecided"
    assert combine(["holds"]) == "holds"


@pytest.mark.parametrize("change, message", [
    ({"place": ""}, "no place"), ({"quote": ""}, "no quote"),
    ({"quote": "word " * 26}, "26 words"), ({"kind": "measurd"}, "measured"),
    ({"reason": ""}, "neither a test nor a reason"), ({"kind": "exact"}, "check"),
    ({"tests": [{"relation": "="}]}, "relation '='"),
    ({"reasons": "x"}, "did you mean 'reason'"), ({"paper": "other"}, "paper 'other'")])
def test_an_incomplete_claim_is_refused(tmp_path, change, message):
    assert read_claims(write(tmp_path, ENTRY))
    with pytest.raises(ValueError, match=message):
        read_claims(write(tmp_path, {**ENTRY, **change}))


def test_an_id_stands_once(tmp_path):
    with pytest.raises(ValueError, match="TOY-1 stands twice"):
        read_claims(write(tmp_path, ENTRY, ENTRY))


def test_a_changed_word_in_a_quotation_is_found(tmp_path):
    (tmp_path / "toy.txt").write_text("We show that A\nbeats B. Al-\nways.", "utf-8")
    assert missing_quotes(tmp_path, write(tmp_path, ENTRY)) == []
    changed = {**ENTRY, "quote": "A defeats B."}
    assert missing_quotes(tmp_path, write(tmp_path, changed)) == ["TOY-1"]
    joined = {**ENTRY, "quote": "B. Always."}
    assert missing_quotes(tmp_path, write(tmp_path, joined)) == []


@pytest.mark.skipif("CONDGEN_PAPERS" not in os.environ,
                    reason="CONDGEN_PAPERS names no folder with the papers' texts")
def test_every_quotation_stands_in_its_paper():
    assert missing_quotes(os.environ["CONDGEN_PAPERS"]) == []


def test_exact_claims_name_checks_that_return_a_truth_value():
    for claim in CLAIMS.values():
        if claim.kind == "exact":
            assert isinstance(resolve(claim.check)(), bool), claim.id


def test_claims_are_chosen_by_paper_and_by_id():
    assert {c.paper for c in chosen_claims("slides")} == {"slides"}
    assert [c.id for c in chosen_claims("CAGLOW-33")] == ["CAGLOW-33"]
    with pytest.raises(ValueError, match="did you mean 'slides'"):
        chosen_claims("slide")


def test_tables_show_quotation_and_verdict():
    claim = CLAIMS["CAGLOW-11"]
    text, page = claims_text("CAGLOW-11"), claims_html("CAGLOW-11")
    assert decide_ours(claim)[0] == ""
    for shown in (text, page):
        assert "exactly false" in shown and "CAGLOW-11" in shown


def test_evidence_names_what_was_compared(monkeypatch):
    at = {"count": 2, "reading": "step"}
    rows = [row("A", "interference", [0.2, 0.3, 0.25], "ours", at),
            row("B", "interference", [0.61, 0.7, 0.65], at={**at, "count": 3}),
            row("A", "bytes", [9_944_112.0], "ours")]
    monkeypatch.setattr("condgen.claims.stored", lambda name: rows)
    left, right = ({k: r[k] for k in ("model", "variant", "metric", "at")}
                   for r in rows[:2])
    test = {"experiment": "toy/models", "relation": "<", "left": left, "right": right}
    assert compare(test).text == (
        "interference at reading step (toy/models): A (ours) at count 2: 0.25 < "
        "B at count 3: 0.6533: yes (95 % interval of the difference "
        "-0.418 … -0.389, 3 seeds)")
    assert ": no (" in compare({**test, "relation": ">", "margin": 0.1}).text
    assert "B at count 3: 0.6533 + 0.1" in compare(
        {**test, "relation": ">", "margin": 0.1}).text
    size = {"model": "A", "variant": "ours", "metric": "bytes", "at": {}}
    assert compare({**test, "left": size, "right": 0.5}).text == (
        "bytes (toy/models): A (ours) 9,944,000 < 0.5: undecided "
        "(no interval, 1 seed)")


@pytest.mark.parametrize("name", CLAIMS)
def test_a_page_shows_no_source_of_formulas(name, monkeypatch):
    monkeypatch.setattr("condgen.claims.resolve", lambda check: bool)
    page = claims_html(name)
    plain = re.sub(r'<span class="math[^>]*>.*?</span>', "", page)
    assert not re.search(r"\\[a-z]|\$|\b[A-Za-z]_[\w{]", plain)
    assert page.count("data-verdict=") == 1 + page.count("<details>")
    claim = CLAIMS[name]
    if claim.reason and not (claim.tests or claim.ours):
        assert "<summary>why not</summary>" in page
    if claim.tests:
        assert '<td colspan="4"><details><summary>evidence</summary><ul>' in page


def test_a_quotation_stays_verbatim_and_a_cut_one_is_marked():
    assert quotation_html("we find a bound for") == "“we find a bound for” […]"
    assert quotation_html("A < B.") == "“A &lt; B.”"
    assert "“Effect of <em>z</em>”" == quotation_html("Effect of *z*")
    for claim in CLAIMS.values():
        shown = re.sub(r"<[^>]+>|\\\(|\\\)|\*", "", quotation_html(claim.quote))
        words = unescape(shown).removesuffix(" […]").strip("“”")
        assert words == re.sub(r"[$*]", "", claim.quote)


def test_every_tested_claim_stands_in_a_chapter():
    chapters = [p.read_text("utf-8") for p in Path("nbs").rglob("*.ipynb")
                if p.name != "900_claims.ipynb"]
    shown = " ".join(text for text in chapters if "claims_table" in text)
    tested = [c.id for c in CLAIMS.values() if c.tests or c.ours]
    assert [name for name in tested if name not in shown] == []


def test_a_claim_without_comparison_needs_a_reason():
    with pytest.raises(ValueError, match="neither"):
        Claim(**{**ENTRY, "reason": ""})
