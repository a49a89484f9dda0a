"""The id of the request being served, known to whatever runs for it."""

from __future__ import annotations

from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
"""Sent back as x-request-id, and on every line that is logged for the request."""
