"""The server: the OpenAI API over HTTP, and a page to look at it."""

from __future__ import annotations
