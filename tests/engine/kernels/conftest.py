"""Kernels that are interpreted must be imported with TRITON_INTERPRET set, so those tests have a process of their own:
`test_interpreted` runs it."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
