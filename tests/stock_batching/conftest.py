"""`attn_implementation="fastattn"` is registered for the length of each test."""

from __future__ import annotations

from tests.tools.registered import registered as registered
