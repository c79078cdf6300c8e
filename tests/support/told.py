"""A prompt as a client queues it, and what it is told of the images when it asks for them."""

from __future__ import annotations

import asyncio
import importlib
import json

from aiohttp.test_utils import make_mocked_request

KEY = "modular_lora_images"


def run(comfy, graph: dict, prompt_id: str, **extra) -> None:
    """As the server queues it, with what the client sent along."""
    valid, error, outputs, errors = asyncio.run(comfy.execution.validate_prompt(prompt_id, graph, None))
    assert valid, (error, errors)
    comfy.server.messages.clear()
    comfy.server.texts.clear()
    comfy.executor.execute(graph, prompt_id, {"client_id": "test"} | extra, outputs)
    assert not [data for event, data in comfy.server.messages if event == "execution_error"]


def answer(prompt_id: str, client: str | None) -> tuple[int, dict]:
    told = importlib.import_module("modular_lora_guard.comfy_host.told")
    path = f"/modular_lora/images/{prompt_id}" + (f"?client_id={client}" if client else "")
    response = asyncio.run(told.answer(make_mocked_request("GET", path, match_info={"prompt_id": prompt_id})))
    return response.status, json.loads(response.body)
