"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from tulle.serve.conversation import Talk, prompt_of
from tulle.serve.errors import ApiError
from tulle.serve.routes.common import answer, note, registry_of, router
from tulle.serve.schemas.openai import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

routes = router()


@routes.post("/tokenize", response_model=Tokenized, response_model_exclude_none=True, tags=["Tulle"])
async def tokenize(body: TokenizeRequest, http: Request) -> Response:
    """The tokens of a text, or of a conversation as the model gets it."""
    async with registry_of(http).use(body.model) as model:
        note(http, model)
        if body.messages is not None:
            talk = Talk(
                [message.model_dump(exclude_none=True) for message in body.messages],
                [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            )
            _, tokens = await prompt_of(model, talk)
        else:
            text = body.content if body.content is not None else body.prompt or ""
            tokens = await model.off_loop(len(text), model.encode, text, bool(body.add_special))
        found = {"tokens": tokens, "count": len(tokens)}
        return answer(found | ({"pieces": [model.tokens.text(t) for t in tokens]} if body.with_pieces else {}))


@routes.post("/detokenize", response_model=Detokenized, tags=["Tulle"])
async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
    """The text of tokens."""
    async with registry_of(http).use(body.model) as model:
        note(http, model)
        vocabulary = model.engine.vocabulary
        if body.tokens and max(body.tokens) >= vocabulary:
            raise ApiError(400, f"expected tokens below {vocabulary}, found {max(body.tokens)}", param="tokens")
        text = await model.off_loop(len(body.tokens), model.text.decode, body.tokens, bool(body.keep_special))
        return answer({"content": text})
