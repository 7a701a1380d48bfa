"""/v1/embeddings"""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from pliant.engine.kinds import DepthTrack
from pliant.engine.seam import Floats
from pliant.server.completions import prompts_of
from pliant.server.guard import body_of, note
from pliant.server.prepare import Kitchen
from pliant.server.problems import Problem
from pliant.server.replies import made_reply, while_here
from pliant.server.schema import EmbeddingsRequest, parse

__all__ = ["embeddings"]


async def embeddings(request: Request) -> Response:
    """One vector for each text: the mean of the last hidden states over its tokens, of length 1."""
    kitchen: Kitchen = request.app.state.kitchen
    asked = parse(body_of(request), EmbeddingsRequest)
    kitchen.check_name(asked.model)
    prompts = await kitchen.bridge.work(prompts_of, kitchen, asked.input, "input")
    for prompt in prompts:
        _check(kitchen, prompt)
    note(request, answers=(), user=asked.user)
    track, left = DepthTrack(), threading.Event()

    def make() -> list[Floats]:
        return [
            _unit(kitchen.model.embed(prompt, track=track, cancelled=left.is_set))
            for prompt in prompts
        ]

    try:
        vectors = await while_here(request, kitchen.bridge.work_long(make))
    finally:
        left.set()
    tokens = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": index, "embedding": _spelled(vector, asked)}
        for index, vector in enumerate(vectors)
    ]
    return made_reply(
        {
            "object": "list",
            "data": data,
            "model": kitchen.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "pliant": track.values(),
        }
    )


def _check(kitchen: Kitchen, prompt: Sequence[int]) -> None:
    if not prompt:
        raise Problem(400, "input: a text without tokens has no embedding", param="input")
    context = kitchen.model.context
    if len(prompt) > context:
        raise Problem(
            400, f"input: a text has {len(prompt)} tokens, and the context holds {context}; "
            "shorten it, or give the model a larger budget or context",
            param="input", code="context_length_exceeded",
        )  # fmt: skip


def _unit(vector: Floats) -> Floats:
    length = float(np.linalg.norm(vector))
    return vector if length == 0 else vector / np.float32(length)


def _spelled(vector: Floats, asked: EmbeddingsRequest) -> Any:
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
