"""accelerate() and what belongs to it: how a model's modules are swapped, restored, reported on and verified.

Start at ``entry.py`` (the public functions), then ``swap.py`` (the rule), then one family, ``bert.py``.
"""

from transfuse.models.entry import accelerate, repack, restore
from transfuse.models.reporting import Report, report
from transfuse.models.verdict import Verdict, verify

__all__ = ["Report", "Verdict", "accelerate", "repack", "report", "restore", "verify"]
