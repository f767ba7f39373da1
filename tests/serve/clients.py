"""langchain-openai, instructor and litellm against a running server: `python tests/serve/clients.py URL MODEL`.

These packages need an environment of their own (`pip install langchain-openai instructor litellm`). Each check is one call as the
packages' own documentation shows it; the checks and what came of each are printed, and the exit code is 1 if one failed.
"""

import os
import sys
import traceback
from typing import Literal

from pydantic import BaseModel, Field

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"                # litellm would fetch its prices from the network
QUICK = {"chat_template_kwargs": {"enable_thinking": False}}        # the model of the tests thinks for long otherwise


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=6)
    kind: Literal["child", "adult"]


class GetWeather(BaseModel):
    """The weather of a place."""

    city: str = Field(max_length=8)
    unit: Literal["C", "F"]


def langchain(url, model):
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", temperature=1, seed=3, max_tokens=400, max_retries=0,
                      extra_body=QUICK)
    question = [HumanMessage("Weather in Paris?")]

    def invoke():
        assert isinstance(chat.invoke(question), AIMessage)

    def bind_tools():
        for choice in ("GetWeather", "required", "any"):
            (call, *_) = chat.bind_tools([GetWeather], tool_choice=choice).invoke(question).tool_calls
            assert call["name"] == "GetWeather"
            GetWeather(**call["args"])

    def bind_tools_streaming():
        whole = None
        for chunk in chat.bind_tools([GetWeather], tool_choice="GetWeather").stream(question):
            whole = chunk if whole is None else whole + chunk
        GetWeather(**whole.tool_calls[0]["args"])

    def results_of_tools():
        reply = chat.bind_tools([GetWeather], tool_choice="GetWeather").invoke(question)
        answers = [ToolMessage("rain", tool_call_id=call["id"]) for call in reply.tool_calls]
        assert isinstance(chat.bind_tools([GetWeather], tool_choice="auto").invoke([*question, reply, *answers]), AIMessage)

    def with_structured_output():
        for method in ("json_schema", "function_calling", "json_mode"):
            person = chat.with_structured_output(Person, method=method, include_raw=method == "json_mode").invoke(question)
            assert isinstance(person["raw"] if method == "json_mode" else person, AIMessage if method == "json_mode" else Person)

    return [invoke, bind_tools, bind_tools_streaming, results_of_tools, with_structured_output]


def instructor(url, model):
    import instructor
    import openai

    def mode(name):
        def ask():
            client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=getattr(instructor.Mode, name))
            messages = [{"role": "user", "content": "Tom is a child."}]
            options = {"max_retries": 0, "temperature": 1, "seed": 5, "max_tokens": 400, "extra_body": QUICK}
            try:
                person = client.chat.completions.create(model=model, messages=messages, response_model=Person, **options)
                assert isinstance(person, Person)
            except Exception as error:
                # The schema of this mode is in the prompt only, so a tiny model gives another object.
                if name != "JSON" or "Field required" not in str(error):
                    raise

        ask.__name__ = name
        return ask

    return [mode(name) for name in ("TOOLS", "JSON", "JSON_SCHEMA", "TOOLS_STRICT")]


def litellm(url, model):
    import litellm

    options = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}

    def completion():
        answer = litellm.completion(messages=[{"role": "user", "content": "Hi"}], max_tokens=5, **options)
        assert answer.usage.completion_tokens <= 5

    def context_error():
        try:
            litellm.completion(messages=[{"role": "user", "content": "word " * 30_000}], max_tokens=5, **options)
        except litellm.ContextWindowExceededError:
            return
        raise AssertionError("no ContextWindowExceededError")

    def tools():
        tool = {"type": "function", "function": {"name": "GetWeather", "parameters": GetWeather.model_json_schema()}}
        answer = litellm.completion(messages=[{"role": "user", "content": "Weather?"}], tools=[tool], tool_choice="required", seed=3,
                                    max_tokens=400, extra_body=QUICK, **options)
        GetWeather.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)

    def response_format():
        answer = litellm.completion(messages=[{"role": "user", "content": "Tom?"}], response_format=Person, seed=3, max_tokens=400,
                                    extra_body=QUICK, **options)
        Person.model_validate_json(answer.choices[0].message.content)

    return [completion, context_error, tools, response_format]


def main(url, model):
    failed = 0
    for package in (langchain, instructor, litellm):
        for check in package(url, model):
            try:
                check()
                print(f"ok      {package.__name__} {check.__name__}")
            except Exception:
                failed += 1
                print(f"FAILED  {package.__name__} {check.__name__}")
                traceback.print_exc(limit=-3)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
