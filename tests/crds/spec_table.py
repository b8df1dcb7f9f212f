"""One table of good and bad specs, for both pydantic and the API server."""

from __future__ import annotations

from crds.spec_bad_fields import BAD_FIELDS
from crds.spec_bad_rules import BAD_TOGETHER
from crds.spec_good import GOOD as GOOD_TRAINED
from crds.spec_untrained import BAD_UNTRAINED, GOOD_UNTRAINED

GOOD = [*GOOD_TRAINED, *GOOD_UNTRAINED]
BAD = [*BAD_FIELDS, *BAD_TOGETHER, *BAD_UNTRAINED]
ROWS = [*GOOD, *BAD]
