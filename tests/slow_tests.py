# SPDX-License-Identifier: Apache-2.0
"""Which tests are slow: `slow.txt` names every function of tests that took longer than LIMIT_S, with its seconds.

The fast tier (`pytest -n 2 -m "not slow"`) is what is left. In a whole run the files with the most seconds come first,
so that no process is left with a long one at the end. After a whole run, its times are written down by

    pytest -n 2 --junitxml times.xml && python tests/slow_tests.py times.xml
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIST = HERE / "slow.txt"
LIMIT_S = 0.2
"""A test that takes longer is slow; a fixture's time counts for the test that asked for it first."""


def read_slow() -> dict[str, float]:
    """Returns slow function, as `unit/data/test_card.py::test_name`, -> seconds of all its tests."""
    lines = (line.split() for line in LIST.read_text(encoding="utf-8").splitlines())
    return {name: float(seconds) for name, seconds in lines}


def slow_of(junit: Path) -> tuple[dict[str, float], float]:
    """Returns the functions with a test above LIMIT_S in a junit file with their seconds, and those of all others."""
    times: dict[str, list[float]] = {}
    for case in ET.parse(junit).iter("testcase"):
        module = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        name = f"{module}.py::{case.get('name', '').partition('[')[0]}"
        times.setdefault(name, []).append(float(case.get("time", "0")))
    slow = {name: sum(own) for name, own in times.items() if max(own) > LIMIT_S}
    return slow, sum(sum(own) for name, own in times.items() if name not in slow)


if __name__ == "__main__":
    found, rest = slow_of(Path(sys.argv[1]))
    LIST.write_text("".join(f"{name} {seconds:.1f}\n" for name, seconds in sorted(found.items())), encoding="utf-8")
    sys.stdout.write(f"{len(found)} functions are slow; all others take {rest:.0f} s on one core\n")
