"""A chat with SmolLM2-135M: llama.cpp's own server, run as the command of a service."""

import snowdrop as sd

chat = sd.command(
    [
        *("{python}", "-m", "snowdrop.engines.llamacpp.serve"),
        *("--model", "{model}/SmolLM2-135M-Instruct.Q4_1.gguf", "--alias", "{deployment}"),
        *("--host", "{host}", "--port", "{port}", "--context", "2048", "--parallel", "4", "--threads", "2"),
    ],
    model=sd.Model("smollm2"),
    ready="/health",
    openai=["/v1/chat/completions", "/v1/completions"],
    concurrency=4,
    scale=sd.Scale(min=0, max=2, idle_s=120),
    resources=sd.ResourceSpec(cpus=2, memory_bytes_max=2 << 30),
    image=sd.Image.from_requirements("requirements.txt"),
)
