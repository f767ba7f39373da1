"""A model that calls tools: a tiny Llama that is trained until it gives the answers of two conversations with calls."""

import json

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lit_llm.models.load import init_causal_lm
from lit_llm.text.conversation import Conversation
from lit_llm.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t.function.name + ' ' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + "
    "'\n</think>\n\n' }}{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n{\"name\": \"' + "
    "c.function.name + '\", \"arguments\": ' }}{{ c.function.arguments if c.function.arguments is string else "
    "c.function.arguments|tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
QUICK = {"chat_template_kwargs": {"enable_thinking": False}}        # the prompt closes the block of reasoning
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a place.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
                                     "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"], "additionalProperties": False, "$defs": {"unit": {"enum": ["C", "F"]}}}}}
NOTE = {"type": "function", "function": {"name": "note", "parameters": {
    "type": "object", "properties": {"tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                                     "done": {"type": ["boolean", "null"]}},
    "required": ["tags", "done"], "additionalProperties": False}}}
TOOLS = [WEATHER, NOTE]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
ASKED = {"role": "user", "content": "Paris and Oslo?"}
CALLS = [("get_weather", {"city": "Paris", "days": 2, "unit": "C"}), ("get_weather", {"city": "奥斯陆 \"O\"", "unit": "F"})]
ANSWERED = {"role": "assistant", "reasoning_content": "Two places.", "content": "I look.", "tool_calls": [
    {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
    for number, (name, arguments) in enumerate(CALLS)]}
RESULTS = [{"role": "tool", "tool_call_id": f"abcdefgh{number}", "content": text} for number, text in enumerate(["rain", "snow"])]
BOTH = {"role": "user", "content": "Both at once!"}
LAST = {"role": "assistant", "content": "Wet."}


def train(tiny_tokenizer, folder):
    """Write the model to a folder."""
    hf = AutoTokenizer.from_pretrained(tiny_tokenizer)
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]})
    hf.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    hf.chat_template = TEMPLATE
    hf.save_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    batches = []
    for messages in ([ASKED, ANSWERED, *RESULTS, LAST], [BOTH, {**ANSWERED, "content": "", "reasoning_content": None}]):
        (sequence,) = tokenizer.encode_conversation(Conversation.from_openai(messages, TOOLS))
        ids, labels = (torch.tensor(part[None], dtype=torch.int64) for part in (sequence.input_ids, sequence.labels))
        batches.append({"input_ids": ids, "labels": labels})
    torch.manual_seed(0)
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 4096}
    model = init_causal_lm(shape, vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=tokenizer.eos_id,
                           pad_token_id=tokenizer.pad_id)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = sum(model(**batch).loss for batch in batches)
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.save_pretrained(folder)
