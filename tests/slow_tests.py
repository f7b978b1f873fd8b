# SPDX-License-Identifier: Apache-2.0
"""Which tests are slow: `slow.txt` names every function of tests of which one took longer than LIMIT_S.

The fast tier (`pytest -n 2 -m "not slow"`) is what is left. After a whole run, its times are written down by

    pytest -n 2 --junitxml times.xml && python tests/slow_tests.py times.xml
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIST = HERE / "slow.txt"
LIMIT_S = 0.3
"""A test that takes longer is slow; a fixture's time counts for the test that asked for it first."""


def read_slow() -> frozenset[str]:
    """Returns the slow functions, as `unit/data/test_card.py::test_name`."""
    return frozenset(LIST.read_text(encoding="utf-8").split())


def slow_of(junit: Path) -> tuple[frozenset[str], float]:
    """Returns the functions with a test above LIMIT_S in a junit file, and the seconds of all other functions."""
    seconds: dict[str, list[float]] = {}
    for case in ET.parse(junit).iter("testcase"):
        module = case.get("classname", "").removeprefix("tests.").replace(".", "/")
        name = f"{module}.py::{case.get('name', '').partition('[')[0]}"
        seconds.setdefault(name, []).append(float(case.get("time", "0")))
    slow = frozenset(name for name, times in seconds.items() if max(times) > LIMIT_S)
    return slow, sum(sum(times) for name, times in seconds.items() if name not in slow)


if __name__ == "__main__":
    found, rest = slow_of(Path(sys.argv[1]))
    LIST.write_text("\n".join(sorted(found)) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(found)} functions are slow; all others take {rest:.0f} s on one core\n")
