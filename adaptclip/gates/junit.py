"""Verdicts as JUnit XML, which continuous-integration services show test by test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from adaptclip.gates.verdicts import Verdict, overall_verdict


def to_junit(judged: Mapping[str, Sequence[Verdict]]) -> str:
    """Returns JUnit XML with one test suite per run and one test case per rule.

    A failed rule is a `failure`. An inconclusive one is an `error`, because a skipped test would count as good; so is
    a run without rules.

    Properties of a suite are the digests of its images and gates.

    Args:
        judged: name of the run -> its verdicts.
    """
    root = ElementTree.Element("testsuites", name="adaptclip gate")
    for run, verdicts in judged.items():
        count = {kind: sum(v.verdict == kind for v in verdicts) for kind in ("fail", "inconclusive")}
        errors = count["inconclusive"] + (not verdicts)
        suite = ElementTree.SubElement(
            root, "testsuite", name=_printable(run), tests=str(max(len(verdicts), 1)), failures=str(count["fail"]),
            errors=str(errors), skipped="0",
        )  # fmt: skip
        if verdicts:
            properties = ElementTree.SubElement(suite, "properties")
            for name, value in (("images", verdicts[0].images), ("gates", verdicts[0].gates)):
                ElementTree.SubElement(properties, "property", name=name, value=value)
        for v in verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=_printable(run), name=_printable(v.title))
            if v.verdict == "pass":
                ElementTree.SubElement(case, "system-out").text = _printable(v.reason)
            else:
                tag = "failure" if v.verdict == "fail" else "error"
                ElementTree.SubElement(case, tag, type=v.verdict, message=_printable(v.reason))
        if not verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=_printable(run), name="gates")
            message = "No gates were declared: nothing was judged, which is not a pass."
            ElementTree.SubElement(case, "error", type="none", message=message)
    root.set("verdict", overall_verdict([v for verdicts in judged.values() for v in verdicts]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Replaces what XML 1.0 cannot hold: control characters, lone surrogates."""
    return "".join(c if c.isprintable() else " " for c in text)
