"""``POST /v1/embeddings``: final hidden states, their mean or the last one's."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.responses import Response

from tulle.engine.request import Request as EngineRequest
from tulle.serve.errors import ApiError
from tulle.serve.generation import PlainText, Run, deadline_of, submitted, watched
from tulle.serve.routes.common import answer, note, registry_of, router
from tulle.serve.routes.completions import prompts_of
from tulle.serve.schemas.openai import EmbeddingRequest, Embeddings
from tulle.serve.served import normalised

routes = router()


@routes.post("/v1/embeddings", response_model=Embeddings, tags=["OpenAI"])
async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
    """A vector for each input."""
    async with registry_of(http).use(body.model) as model:
        note(http, model)
        if body.dimensions is not None and body.dimensions != model.engine.hidden:
            raise ApiError(
                400,
                f"expected {model.engine.hidden} dimensions, as the model has, found {body.dimensions}",
                param="dimensions",
            )
        prompts = await prompts_of(model, body.input, True)
        for prompt in prompts:
            model.check_prompt(prompt, generates=False)
        deadline = deadline_of(body.timeout, http)
        requests = [EngineRequest(prompt, 0, embedding=body.pooling or "mean", deadline=deadline) for prompt in prompts]
        job = await submitted(model, requests)
        run = Run(job, [PlainText() for _ in requests], sum(map(len, prompts)))
        async with watched(http, job):
            await run.to_the_end()
        note(http, model, run)
        vectors = [sequence.embedding for sequence in job.sequences]
        data = []
        for number, vector in enumerate(vectors):
            if vector is None:
                raise ApiError(
                    504, "expected all embeddings within the timeout, found fewer; allow more", code="timeout"
                )
            given = vector if body.normalize is False else normalised(vector)
            data.append({"object": "embedding", "index": number, "embedding": _written(given, body.encoding_format)})
        usage = {"prompt_tokens": run.prompt_tokens, "total_tokens": run.prompt_tokens}
        return answer({"object": "list", "data": data, "model": model.name, "usage": usage})


def _written(vector: NDArray[np.float32], form: str | None) -> str | list[float]:
    """Numbers, or the bytes of little-endian float32 in base64."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
