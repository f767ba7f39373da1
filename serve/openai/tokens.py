"""`/tokenize` and `/detokenize`, with vLLM's fields: what the tokenizer and the chat template make of a request."""

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from lit_llm.text.conversation import Document
from serve.errors import ApiError
from serve.openai.bodies import Body, ChatCompletionBody, Whole
from serve.openai.routes import Routes

MOST_IDS = 1_000_000


class TokenizeBody(Body):
    """POST /tokenize: a text, or the messages of a chat.

    Args:
        prompt: A text, which is encoded as `/v1/completions` encodes it.
        messages: A conversation, which is rendered as `/v1/chat/completions` renders it.
        tools: Functions that the template shows.
        add_generation_prompt: Whether the header of the answer follows the messages; null adds it unless the last
            message is left open.
        continue_final_message: Whether the last message is left open.
        add_special_tokens: Has no effect: both routes add what training adds.
        return_token_strs: Whether the text of each token is returned.
    """

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=2048)
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages", param="prompt")
        return self


class DetokenizeBody(Body):
    """POST /detokenize: the text of token ids."""

    model: str | None = Field(None, max_length=512)
    tokens: list[Whole] = Field(max_length=MOST_IDS)


def add_routes(app: FastAPI, routes: Routes) -> None:
    """Add both routes, behind the key."""
    tokenizer = routes.tokenizer

    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        routes.check_model(body.model)
        headers = routes.ignored.headers(body.ignored_fields)
        ids = await routes.encode(lambda: _ids(routes, body), "prompt", request)
        texts = [tokenizer.decode([id_], skip_special_tokens=False) for id_ in ids] if body.return_token_strs else None
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": routes.engine.beat.context_length,
                             "token_strs": texts}, headers=headers)

    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        routes.check_model(body.model)
        headers = routes.ignored.headers(body.ignored_fields)
        if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < tokenizer.vocab_size:
            raise ApiError(400, f"tokens: ids must be from 0 to {tokenizer.vocab_size - 1}", param="tokens")
        text = await routes.encode(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False), "tokens", request)
        return JSONResponse({"prompt": text}, headers=headers)

    for path, route in (("/tokenize", tokenize), ("/detokenize", detokenize)):
        app.add_api_route(path, route, methods=["POST"], dependencies=[Depends(routes.authorize)])


def _ids(routes: Routes, body: TokenizeBody) -> list[int]:
    if body.prompt is not None:
        return routes.tokenizer.encode_document(Document(body.prompt), end=False).input_ids.tolist()
    chat = ChatCompletionBody.model_validate({
        "messages": body.messages, "tools": body.tools, "chat_template_kwargs": body.chat_template_kwargs,
        "add_generation_prompt": body.add_generation_prompt, "continue_final_message": body.continue_final_message})
    return routes.prompt(chat, chat.requirements())
