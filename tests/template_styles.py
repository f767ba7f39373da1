"""Chat templates in the styles of published models, written for these tests: they differ in what they add, strip, move, trim,
refuse and escape.
"""

ASK = "{% if add_generation_prompt %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
ALTERNATE = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}")
TOOLS = "{% for t in tools %}{{ t.function|tojson + '\n' }}{% endfor %}"
NAMED = "'{\"name\": \"' + c.function.name + '\", \"arguments\": '"

STYLES = {
    # calls and results between tags, tools in the system turn
    "hermes": (
        "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}" + TOOLS + "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ '<|im_start|>tool\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ '\n<tool_call>\n{\"name\": ' + c.function.name|tojson + ', \"arguments\": ' + c.function.arguments|tojson + '}\n</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    # a call concatenated with safe-marked JSON, which escapes the text before it; text arguments are rendered correctly
    "by hand": (
        "{% if tools %}{{ '<|im_start|>system\n' }}" + TOOLS + "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}{{ '[' + " + NAMED +
        " + (c.function.arguments if c.function.arguments is string else c.function.arguments|tojson|safe) + '}]' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    # arguments must be text: an object cannot be joined to a string
    "functionary": (
        "{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}" + TOOLS + "{{ '<|eot_id|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' + c.function.arguments + "
        "'</function>' }}{% endfor %}{{ '<|eom_id|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
        + ASK + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    # each argument separately; text arguments would not be shown
    "xml": (
        "{% if tools %}{{ '<|im_start|>system\n' }}" + TOOLS + "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}{% if c.function.arguments is mapping %}"
        "{% for key, value in c.function.arguments|items %}{{ '<parameter=' + key + '>\n' + (value if value is string else "
        "value|tojson) + '\n</parameter>\n' }}{% endfor %}{% endif %}{{ '</function>\n</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    # tools and the system message beside the last question, results as JSON, strict turns
    "mistral v3": (
        "{{ bos_token }}{% set ns = namespace(last=-1, turn=0) %}{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% for m in talk %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% if m.role == 'user' or (m.role == "
        "'assistant' and not m.tool_calls) %}{% if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{% set ns.turn = ns.turn + 1 %}{% elif m.role == 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% endfor %}{% for m in talk %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
        "{{ '[AVAILABLE_TOOLS]' + tools|tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST]' }}{% if loop.index0 == ns.last and "
        "messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% elif m.tool_calls %}"
        "{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + "
        "c.function.arguments|tojson + ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]{\"content\": ' + m.content|tojson + ', \"call_id\": \"' + m.tool_call_id + "
        "'\"}[/TOOL_RESULTS]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"),
    "mistral v7": (
        "{{ bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools|tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
        "{% else %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments|tojson }}{% endfor %}{{ eos_token }}"
        "{% endif %}{% endfor %}"),
    # a date, trimmed contents, one call without other content, results as JSON text
    "llama 3.1": (
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content|trim %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = '' %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' }}"
        "{% for t in tools or [] %}{{ t|tojson(indent=4) + '\n\n' }}{% endfor %}{{ system + '<|eot_id|>' }}{% for m in messages %}"
        "{% if m.tool_calls %}{% if m.tool_calls|length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' }}"
        "{{ m.tool_calls[0].function.arguments|tojson + '}<|eot_id|>' }}{% elif m.role == 'tool' %}"
        "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content|tojson + '<|eot_id|>' }}{% else %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    # thinking is stripped, and the prompt does not open it
    "deepseek v3": (
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<｜Assistant｜>' }}{% endif %}"),
    # thinking is stripped, and the prompt opens it
    "deepseek r1": (
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<｜Assistant｜><think>\n' }}{% endif %}"),
    # earlier thinking goes, a variable closes an empty one in the prompt
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set words = m.content %}"
        "{% set thoughts = m.reasoning_content or '' %}{% if '</think>' in words %}{% set thoughts = words.split('</think>')[0].split("
        "'<think>')[-1].strip('\n') %}{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last "
        "and (loop.last or thoughts) %}{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ words }}{% else %}"
        "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"),
    # no stop token at all
    "glm 4": (
        "{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\n' }}" + TOOLS + "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|observation|>\n' + m.content }}{% else %}{{ '<|' + m.role + '|>\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ '\n<tool_call>' + c.function.name + '\n' + c.function.arguments|tojson + '</tool_call>' }}{% endfor %}{% endif %}"
        "{% endfor %}" + ASK + "{{ '<|assistant|>\n' }}{% endif %}"),
    "command r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + ('<|CHATBOT_TOKEN|>' if m.role == 'assistant' else '<|USER_TOKEN|>' "
        "if m.role == 'user' else '<|SYSTEM_TOKEN|>') + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        + ASK + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"),
    "phi 4": "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
             + ASK + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "granite": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ '<|tool_call|>' + c.function|tojson }}{% endfor %}{{ '<|end_of_text|>\n' }}{% if loop.first and tools %}"
        "{{ '<|start_of_role|>tools<|end_of_role|>' + tools|tojson + '<|end_of_text|>\n' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ALTERNATE +
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content|trim + "
        "'<end_of_turn>\n' }}{% endfor %}" + ASK + "{{ '<start_of_turn>model\n' }}{% endif %}"),
    "internlm": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ '<|action_start|><|plugin|>\n' + {'name': c.function.name, 'parameters': c.function.arguments}|tojson + '<|action_end|>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
              + ASK + "{{ '<|assistant|>\n' }}{% endif %}",
    "vicuna": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% set messages = messages[1:] %}{% endif %}" + ALTERNATE +
        "{% for m in messages %}{{ 'USER: ' + m.content.strip() + '\n' if m.role == 'user' else 'ASSISTANT: ' + m.content.strip() + "
        "eos_token + '\n' }}{% endfor %}" + ASK + "{{ 'ASSISTANT:' }}{% endif %}"),
    "alpaca": (
        "{% for m in messages %}{{ m.content if m.role == 'system' else '### Instruction:\n' + m.content if m.role == 'user' else "
        "'### Response:\n' + m.content + eos_token }}{{ '\n\n' if not loop.last }}{% endfor %}" + ASK + "{{ '\n\n### Response:\n' }}{% endif %}"),
    # an end token after all answers except the last
    "not the last": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if not loop.last %}{{ '<|end|>' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|end|><|assistant|>' }}{% endif %}"),
    "macros": (
        "{%- macro turn(role, words) -%}{{ '<|im_start|>' ~ role ~ '\n' ~ words ~ '<|im_end|>\n' }}{%- endmacro -%}"
        "{%- for m in messages %}{{ turn(m.role, m.content) }}{% endfor -%}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    # contents must be lists of parts
    "parts": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content if part.type == 'text' %}{{ part.text }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "reasoning": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning %}{{ '<think>' + m.reasoning + '</think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"),
}
