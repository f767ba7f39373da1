"""If this breaks: `lit-llm chat --url` gets other answers than the server's model gives, or a refusal ends the conversation."""

from lit_llm.inference.completion import TextEngine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation


def alone(engine, *messages):
    roles = ("user", "assistant")
    conversation = Conversation.from_openai([{"role": roles[n % 2], "content": text} for n, text in enumerate(messages)])
    return engine.generate(conversation, SamplingParams(max_tokens=12, temperature=0)).text


def test_a_server_of_openais_protocol_answers_the_same(lit_llm, server, endless_model):
    engine = TextEngine.load(endless_model)
    first = alone(engine, "A kite?")
    done = lit_llm("chat", "--url", server.url, "--max_tokens", 12, "--temperature", 0, "--multi_turn", "true",
                   stdin=f"A kite?\n什么颜色\n{'x' * 30_000}\n/stats\n")
    assert done.code == 0, done.err
    assert done.out == f"{first}\n{alone(engine, 'A kite?', first, '什么颜色')}\n"
    assert "url: " not in done.err
    assert "context" in done.err
    assert "12 tokens in " in done.err
    assert "no longer sent" not in done.err         # of a message that does not fit at all, nothing else is left out
    assert lit_llm("chat", "--url", server.url + "/v1", "--prompt", "A kite?", "--max_tokens", 12, "--temperature", 0).out == f"{first}\n"
