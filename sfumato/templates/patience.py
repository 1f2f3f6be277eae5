"""A query to a model that may be busy, or lost for a moment: it is sent again, after pauses that grow."""

from __future__ import annotations

import asyncio

from sfumato.errors import BusyError, WorkerError
from sfumato.templates.interface import LanguageModel
from sfumato.templates.requests import QueryFor, Result

PAUSES = (1.0, 2.0, 5.0, 15.0)
"""Seconds before it is sent again."""


async def run_patiently(llm: LanguageModel, query: QueryFor[Result]) -> Result:
    """`arun`; BusyError or WorkerError where the model has not come back after all pauses."""
    for pause in PAUSES:
        try:
            return await llm.arun(query)
        except (BusyError, WorkerError):
            await asyncio.sleep(pause)
    return await llm.arun(query)
