"""``/v1/models``: what is served, and ``/v1/tulle/info``: facts of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import Request
from starlette.responses import Response

import tulle
from tulle.serve.registry import Entry
from tulle.serve.routes.common import answer, registry_of, router
from tulle.serve.schemas.openai import ModelCard, ModelList

routes = router()


@routes.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
async def models(http: Request) -> Response:
    """All models, loaded or not."""
    cards = [_card(entry) for entry in registry_of(http).entries.values()]
    return answer({"object": "list", "data": cards})


@routes.get("/v1/models/{name:path}", response_model=ModelCard, tags=["OpenAI"])
async def model(name: str, http: Request) -> Response:
    """One model."""
    return answer(_card(registry_of(http).entry(name)))


def _card(entry: Entry) -> dict[str, Any]:
    served = entry.served
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "tulle",
        "loaded": served is not None,
        "context_length": None if served is None else served.room,
    }


@routes.get("/v1/tulle/info", tags=["Tulle"])
async def info(http: Request, model: str = "") -> Response:
    """Facts of a model, which is loaded for it; of the first one without a name."""
    async with registry_of(http).use(model) as served:
        return answer(asdict(served.facts) | {"version": tulle.__version__})
