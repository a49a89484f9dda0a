"""What transformers answers, to hold beside what `omg chat` answers."""

from __future__ import annotations

from pathlib import Path


def answer(folder: Path, prompt: str, max_tokens: int) -> str:
    """The likeliest tokens after `prompt`, in the float32 of a model's repository in `folder`.

    A user's message where the repository has a chat template, else text to continue.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = prompt
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
