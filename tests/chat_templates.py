"""Chat templates in the manner of those that models come with, as far as they treat messages differently."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Knows strings alone, and no tools."""

QWEN_2 = (
    "{%- if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    "You are Qwen.{% endif %}\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{%- elif messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{% if m.role == 'user' or m.role == 'system' and not (loop.first and tools) "
    "or m.role == 'assistant' and not m.tool_calls %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{%- elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}\n{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{% if call.function %}{% set call = call.function %}{% endif %}\n<tool_call>\n"
    '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{%- elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{%- endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Arguments of calls are objects."""

QWEN_3 = (
    "{%- if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{%- for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' or m.role == 'system' and not (loop.first and tools) %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{%- elif m.role == 'assistant' %}{% set thought = '' %}{% if m.reasoning_content is string %}"
    "{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and thought %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}"
    "{% for call in m.tool_calls or [] %}{% if call.function %}{% set call = call.function %}{% endif %}\n<tool_call>\n"
    '{"name": "{{ call.name }}", "arguments": {% if call.arguments is string %}{{ call.arguments }}{% else %}'
    "{{ call.arguments | tojson }}{% endif %}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{%- elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ content }}\n</tool_response><|im_end|>\n"
    "{%- endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the reasoning of earlier answers; contents that are no strings are empty."""

DEEPSEEK = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ ns.system }}"
    "{%- for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' and m['content'] is none %}<Assistant>{% for call in m['tool_calls'] %}"
    "{{ '<call>' + call['type'] + '<sep>' + call['function']['name'] + '\n```json\n' + call['function']['arguments'] "
    "+ '\n```' }}{% endfor %}<end>"
    "{%- elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<Assistant>' + content + '<end>' }}"
    "{%- elif m['role'] == 'tool' %}{{ '<output>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant>{% endif %}"
)
"""Prints calls only beside a content of None, with arguments as JSON text, no tools, and reasoning nowhere."""

LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}<|start|>system<|sep|>\n\n"
    "Today Date: 26 Jul 2024\n\n{{ system }}<|eot|>{% for m in messages %}{% if m.tool_calls is defined %}"
    "<|start|>assistant<|sep|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "<|eot|>{% elif m.role == 'tool' %}<|start|>ipython<|sep|>\n\n{{ m.content | tojson }}<|eot|>"
    "{% else %}<|start|>{{ m.role }}<|sep|>\n\n{% if loop.first and tools %}{% for tool in tools %}"
    "{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}"
)
"""Strips texts, writes results of tools as JSON, and drops the content beside calls and all calls but the first."""

LLAMA_VISION = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}<|eot|>"
    "{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}<|start|>{{ m['role'] }}\n\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
"""Takes strings and parts, and strings alone from the system."""

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
"""Takes parts alone, as those of some vision models do."""

MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if m == asked[-1] and tools %}[TOOLS] [{% for tool in tools %}"
    "{{ tool | tojson }}{% endfor %}][/TOOLS]{% endif %}[INST] {% if m == asked[-1] and system %}{{ system + '\n\n' }}"
    "{% endif %}{{ m.content }}[/INST]{% elif m.tool_calls %}[CALLS] ["
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'tool' %}[RESULTS] {{ m.content }}[/RESULTS]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Prints the system prompt in the last message of the user."""

GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content ~ '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""The system prompt is the beginning of the first message of the user."""

PHI_3 = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Leaves out system prompts and results of tools."""

GRANITE = (
    "{% if tools %}<|role|>tools<|sep|>{{ tools | tojson(indent=4) }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|role|>{{ m.role }}<|sep|>{% if m.tool_calls %}<tool_call>"
    "{{ m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}{{ m.content or '' }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|sep|>{% endif %}"
)

GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT.<|end|>{% if messages[0].role in ['system', 'developer'] or tools %}"
    "<|start|>developer<|message|>{% if messages[0].role in ['system', 'developer'] %}# Instructions\n\n"
    "{{ messages[0].content }}\n\n{% set messages = messages[1:] %}{% endif %}{% for tool in tools or [] %}"
    "// {{ tool.function.description }}\ntype {{ tool.function.name }} = (_: {\n"
    "{% for name, spec in tool.function.parameters.properties.items() %}{% if spec.description %}"
    "// {{ spec.description }}\n{% endif %}{{ name }}: {{ spec.type }},\n{% endfor %}}) => any;\n{% endfor %}<|end|>"
    "{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and (loop.last or m.tool_calls) %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}"
    "<|end|>{% endif %}{% if m.tool_calls %}<|start|>assistant to=functions."
    "{{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}<|return|>{% endif %}{% elif m.role == 'tool' %}<|start|>functions to=assistant<|message|>"
    "{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""Prints the descriptions of tools as comments, and reasoning (`thinking`) in the last answer and beside calls."""

COMMAND_R = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}<|SYSTEM|>{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{% for tool in tools or [] %}```python\ndef {{ tool.function.name }}("
    "{% for name, spec in tool.function.parameters.properties.items() %}{{ name }}: {{ spec.type }}"
    "{{ ', ' if not loop.last }}"
    '{% endfor %}):\n    """{{ tool.function.description }}'
    "{% for name, spec in tool.function.parameters.properties.items() %}"
    '\n        {{ name }}: {{ spec.description }}{% endfor %}"""\n```\n{% endfor %}'
    "{% for m in messages %}<|{{ m.role | upper }}|>{% if m.tool_calls %}Action: ```json\n["
    '{% for call in m.tool_calls %}{"tool_name": {{ call.function.name | tojson }}, "parameters": '
    "{{ call.function.arguments | tojson(indent=4) }}}{% endfor %}]```{% else %}{{ m.content }}{% endif %}<|END|>"
    "{% endfor %}{% if add_generation_prompt %}<|ASSISTANT|>{% endif %}"
)

ALL = {
    "ChatML": CHATML,
    "Qwen 2": QWEN_2,
    "Qwen 3": QWEN_3,
    "DeepSeek R1": DEEPSEEK,
    "Llama 3": LLAMA_3,
    "Llama 3 vision": LLAMA_VISION,
    "parts": PARTS,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Phi 3": PHI_3,
    "Granite": GRANITE,
    "gpt-oss": GPT_OSS,
    "Command R": COMMAND_R,
}
