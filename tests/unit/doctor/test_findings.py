"""What all ranks say together: one row where they agree, the node where one of them does not."""

import json

from megadistill.doctor.findings import Examined, Mark, Report, Row, require_same, rows_of, some
from megadistill.errors import UserError

GOOD, DOUBTFUL, BAD = Mark.GOOD, Mark.DOUBTFUL, Mark.BAD


def _rank(rank: int, host: str, *findings: tuple[str, Mark, str], of_node: bool = False) -> Examined:
    own = Examined(rank, host)
    for finding in findings:
        own.note(*finding, of_node=of_node)
    return own


def test_what_all_ranks_say_is_said_once_and_blames_no_node() -> None:
    ranks = [_rank(rank, f"n{rank}", ("recipe", BAD, "no such key"), ("data", GOOD, "8 shards")) for rank in range(3)]
    assert rows_of(ranks) == [Row("recipe", BAD, "no such key"), Row("data", GOOD, "8 shards")]


def test_what_failed_on_one_node_alone_is_its_fault() -> None:
    ranks = [_rank(0, "a", ("data", GOOD, "8 shards")), _rank(1, "b", ("data", BAD, "no manifest"))]
    assert rows_of(ranks) == [Row("data", BAD, "b: no manifest", ("b",))]
    # of two ranks of one node one failed: the node is not told apart from itself
    assert rows_of([ranks[0], _rank(1, "a", ("data", BAD, "no manifest"))])[0].nodes == ()


def test_a_matter_of_the_node_is_its_fault_even_where_all_have_it() -> None:
    ranks = [_rank(rank, f"n{rank}", ("JIT locks", BAD, "a lock"), of_node=True) for rank in range(2)]
    assert rows_of(ranks) == [Row("JIT locks", BAD, "a lock", ("n0", "n1"))]


def test_the_worst_mark_counts_and_doubt_blames_nobody() -> None:
    ranks = [_rank(0, "a", ("x", GOOD, "well")), _rank(1, "b", ("x", DOUBTFUL, "odd")), _rank(2, "c")]
    assert rows_of(ranks) == [Row("x", DOUBTFUL, "b: odd")]
    report = Report(tuple(rows_of(ranks)))
    assert report.ok
    assert report.bad_nodes == []


def test_a_refusal_becomes_a_finding_and_the_next_thing_is_looked_at() -> None:
    own = Examined(0, "a")

    def refuses() -> tuple[None, str]:
        raise UserError("wrong")

    def breaks() -> tuple[None, str]:
        raise OSError("disk")

    assert own.look("x", refuses) is None
    assert own.look("y", breaks, of_node=True) is None
    assert own.look("z", lambda: (3, "well")) == 3
    assert [(each.what, each.mark, each.said) for each in own.findings] == [
        ("x", BAD, "wrong"),
        ("y", BAD, "disk"),
        ("z", GOOD, "well"),
    ]


def test_a_rank_survives_the_wire() -> None:
    own = _rank(3, "a", ("x", BAD, "é"), of_node=True)
    own.facts["free"] = 7
    assert Examined.loads(own.dumps()) == own


def test_the_odd_one_out_is_named() -> None:
    row = require_same("versions", ["torch 2", "torch 2", "torch 1"], ["a", "b", "c"], same="all")
    assert row == Row("versions", BAD, "c: torch 1; elsewhere torch 2", ("c",))
    tie = require_same("versions", ["torch 1", "torch 2"], ["a", "b"], same="all")
    assert tie.nodes == ("b",)  # unlike where the user is
    assert require_same("versions", ["", ""], ["a", "b"], same="all") == Row("versions", GOOD, "all")


def test_a_report_is_json_with_its_bad_nodes() -> None:
    report = Report((Row("x", BAD, "y", ("b", "a")), Row("z", GOOD, "w")))
    values = json.loads(json.dumps(report.values()))
    assert (values["ok"], values["bad_nodes"]) == (False, ["a", "b"])
    assert values["rows"][0] == {"what": "x", "mark": "bad", "said": "y", "nodes": ["b", "a"]}
    assert some(f"n{i}" for i in range(7)) == "n0, n1, n2, n3 and 3 more"
