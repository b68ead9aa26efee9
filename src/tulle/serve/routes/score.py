"""``POST /v1/score``: how likely given continuations are."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import Response

from tulle.engine.request import Request as EngineRequest
from tulle.serve.errors import ApiError
from tulle.serve.generation import PlainText, Run, deadline_of, submitted, watched
from tulle.serve.routes.chat import finite
from tulle.serve.routes.common import answer, note, registry_of, router
from tulle.serve.schemas.openai import ScoreRequest, Scores
from tulle.serve.served import ServedModel

routes = router()


@routes.post("/v1/score", response_model=Scores, tags=["Tulle"])
async def score(body: ScoreRequest, http: Request) -> Response:
    """Log-probabilities of continuations of a prompt. Nothing is generated.

    Of a continuation that is text, the tokens are those of prompt and continuation together, without the prompt's; as
    in lm-eval, spaces at the end of the prompt belong to the continuation.
    """
    async with registry_of(http).use(body.model) as model:
        note(http, model)
        size = len(body.prompt) if isinstance(body.prompt, str) else 0
        size += sum(len(one) for one in body.continuations if isinstance(one, str))
        pairs: list[tuple[list[int], list[int]]] = await model.off_loop(size, _pairs, model, body)
        for prompt, continuation in pairs:
            model.check_prompt([*prompt, *continuation], generates=False)
        deadline = deadline_of(body.timeout, http)
        requests = [EngineRequest([*a, *b], 0, prompt_logprobs=1, deadline=deadline) for a, b in pairs]
        job = await submitted(model, requests)
        run = Run(job, [PlainText() for _ in requests], sum(len(a) + len(b) for a, b in pairs))
        async with watched(http, job):
            await run.to_the_end()
        note(http, model, run)
        data: list[dict[str, Any]] = []
        for number, (prompt, continuation) in enumerate(pairs):
            found = job.sequences[number].prompt_logprobs[len(prompt) :]
            if len(found) != len(continuation):
                raise ApiError(504, "expected all scores within the timeout, found fewer; allow more", code="timeout")
            own = [one for one in found if one is not None]
            values = [finite(one.logprob) for one in own]
            data.append({
                "index": number,
                "logprob": sum(values),
                "greedy": all(one.top[0][0] == one.token for one in own),
                "tokens": continuation,
                "token_logprobs": values,
            })  # fmt: skip
        usage = {"prompt_tokens": run.prompt_tokens, "total_tokens": run.prompt_tokens}
        return answer({"object": "list", "data": data, "model": model.name, "usage": usage})


def _pairs(model: ServedModel, body: ScoreRequest) -> list[tuple[list[int], list[int]]]:
    found = []
    for number, continuation in enumerate(body.continuations):
        if isinstance(body.prompt, str) and isinstance(continuation, str):
            kept = body.prompt.rstrip()
            before = model.encode(kept, True)
            whole = model.encode(body.prompt + continuation, True)
            pair = (before, whole[len(before) :])
        else:
            prompt = model.encode(body.prompt, True) if isinstance(body.prompt, str) else body.prompt
            pair = (prompt, model.encode(continuation, False) if isinstance(continuation, str) else continuation)
        if not pair[0] or not pair[1]:
            raise ApiError(
                400,
                "expected a prompt and a continuation of at least one token each, found none",
                param=f"continuations.{number}",
            )
        found.append(pair)
    return found
