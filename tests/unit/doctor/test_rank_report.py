"""Results of all ranks together: one text where they agree, the node where one of them differs."""

import json
import pickle

from megadistill.doctor.rank_report import RankReport, Report, Row, Status, require_same, some, spread, summarize
from megadistill.errors import UserError

OK, WARN, FAIL = Status.OK, Status.WARN, Status.FAIL


def _rank(rank: int, host: str, *results: tuple[str, Status, str], of_node: bool = False) -> RankReport:
    own = RankReport(rank, host)
    for result in results:
        own.add(*result, of_node=of_node)
    return own


def test_a_result_of_all_ranks_is_listed_once_and_blames_no_node() -> None:
    ranks = [_rank(rank, f"n{rank}", ("recipe", FAIL, "no such key"), ("data", OK, "8 shards")) for rank in range(3)]
    assert summarize(ranks) == [Row("recipe", FAIL, "no such key"), Row("data", OK, "8 shards")]


def test_what_failed_on_one_node_alone_is_its_fault() -> None:
    ranks = [_rank(0, "a", ("data", OK, "8 shards")), _rank(1, "b", ("data", FAIL, "no manifest"))]
    assert summarize(ranks) == [Row("data", FAIL, "b: no manifest", ("b",))]
    # of two ranks of one node one failed: the node is not at fault
    assert summarize([ranks[0], _rank(1, "a", ("data", FAIL, "no manifest"))])[0].nodes == ()


def test_a_matter_of_the_node_is_its_fault_even_where_all_have_it() -> None:
    ranks = [_rank(rank, f"n{rank}", ("JIT locks", FAIL, "a lock"), of_node=True) for rank in range(2)]
    assert summarize(ranks) == [Row("JIT locks", FAIL, "a lock", ("n0", "n1"))]


def test_the_worst_status_counts_and_a_warning_blames_nobody() -> None:
    ranks = [_rank(0, "a", ("x", OK, "well")), _rank(1, "b", ("x", WARN, "odd")), _rank(2, "c")]
    assert summarize(ranks) == [Row("x", WARN, "b: odd")]
    report = Report(tuple(summarize(ranks)))
    assert report.ok
    assert report.bad_nodes == []


def test_a_refusal_becomes_a_result_and_the_next_check_is_made() -> None:
    own = RankReport(0, "a")

    def refuses() -> tuple[None, str]:
        raise UserError("wrong")

    def breaks() -> tuple[None, str]:
        raise OSError("disk")

    assert own.check("x", refuses) is None
    assert own.check("y", breaks, of_node=True) is None
    assert own.check("z", lambda: (3, "well")) == 3
    assert [(each.check, each.status, each.detail) for each in own.results] == [
        ("x", FAIL, "wrong"),
        ("y", FAIL, "disk"),
        ("z", OK, "well"),
    ]


def test_a_report_survives_serialization() -> None:
    own = _rank(3, "a", ("x", FAIL, "é"), of_node=True)
    own.facts["free"] = 7
    assert pickle.loads(pickle.dumps(own)) == own


def test_the_odd_one_out_is_named() -> None:
    row = require_same(
        "versions", ["torch 2", "torch 2", "torch 1"], [_rank(0, "a"), _rank(1, "b"), _rank(2, "c")], same="all"
    )
    assert row == Row("versions", FAIL, "c: torch 1; elsewhere torch 2", ("c",))
    tie = require_same("versions", ["torch 1", "torch 2"], [_rank(0, "a"), _rank(1, "b")], same="all")
    assert tie.nodes == ("b",)  # unlike where the user is
    assert require_same("versions", ["", ""], [_rank(0, "a"), _rank(1, "b")], same="all") == Row("versions", OK, "all")


def test_a_report_is_json_with_its_bad_nodes() -> None:
    report = Report((Row("x", FAIL, "y", ("b", "a")), Row("z", OK, "w")))
    values = json.loads(json.dumps(report.to_json()))
    assert (values["ok"], values["bad_nodes"]) == (False, ["a", "b"])
    assert values["rows"][0] == {"check": "x", "status": "fail", "detail": "y", "nodes": ["b", "a"]}
    assert some(f"n{i}" for i in range(7)) == "n0, n1, n2, n3 and 3 more"


def test_a_spread_is_written_as_people_write_numbers() -> None:
    assert spread([1362.3], "MB/s") == "1,362 MB/s"
    assert spread([0.697, 1362.3, 23.4], "ms") == "0.697 to 1,362 ms, median 23.4"
