"""Whether compiled models give the greedy answers that transformers gives with the same weights.

    python tests/benchmarks/answers.py MODEL.gguf [--recipes f32,q8,q4] [--tokens 24] [--threads 1]

Two inputs, each against its own weights in float32: the GGUF file (transformers gets its blocks
dequantised) and the bfloat16 SafeTensors repository made of it (transformers reads that). The
answers of our side come from the engine that serves, through the model's own chat template, at
temperature 0; `exact` is compiled from the file alone. Where an answer differs, the line says at
which token, and how probable transformers holds its own choice and ours: a near tie is a coin's
toss, not an error.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ohmygpu.convert.compile import compile_model
from ohmygpu.convert.source import open_source
from ohmygpu.core.records import RunSpec
from ohmygpu.runtime_api import GenerateRequest, Message, SamplingParams
from ohmygpu.runtime_onnx.loading import load_model
from ohmygpu.runtime_onnx.prompt import prepare_prompt
from tests.make_repo import make_repo

PROMPTS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "What is 17 + 25?",
    "What is 12 times 12?",
    "List three primary colors.",
    "Name five animals that live in the sea.",
    "Translate to French: Good morning, my friend.",
    "Translate to Spanish: Where is the library?",
    "Write a Python function that adds two numbers.",
    "Write a SQL query that counts the rows of the table users.",
    "What does the HTTP status code 404 mean?",
    "Explain in one sentence what gravity is.",
    "What is the opposite of hot?",
    "Complete the sentence: The early bird",
    "Write a haiku about autumn.",
    "How many days are in a leap year?",
    "What is the chemical symbol for gold?",
    "Reverse the word 'planet'.",
    "Is 97 a prime number? Answer yes or no, then explain.",
    "Give me a short recipe for pancakes.",
)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of the reference and, for each, the probabilities it chose from."""

    tokens: list[int]
    probabilities: list[torch.Tensor]  # (V,) each; one more than tokens where it ended by itself


def our_answers(
    folder: Path, options: argparse.Namespace
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, answers) as token ids, from the engine that serves the compiled model."""
    spec = RunSpec(
        model=folder.name, folder=str(folder), context_tokens=1024, threads=options.threads
    )
    loaded = load_model(spec)
    engine = loaded.engine
    sampling = SamplingParams(temperature=0.0, max_tokens=options.tokens)
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    for number, text in enumerate(PROMPTS):
        messages = (Message(role="user", content=text),)
        request = GenerateRequest(sampling=sampling, messages=messages, return_context=True)
        prompt = prepare_prompt(request, loaded.tokenizer, engine.context_tokens)
        engine.submit(number, prompt, request)
        context: Sequence[int] = ()
        while engine.has_work:
            output = engine.step()
            for _, error in output.errors:
                raise error
            context = next((d.context for _, d in output.deltas if d.context), context)
        prompts.append(prompt.token_ids)
        answer = list(context[len(prompt.token_ids) :])
        answers.append(without_end(answer, engine.eos_token_ids))
    return prompts, answers


def without_end(tokens: Sequence[int], ends: Any) -> list[int]:
    """The tokens before the first that ends an answer."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])


def greedy(model: Any, prompt: Sequence[int], tokens: int, ends: frozenset[int]) -> Answer:
    """transformers' answer, one token at a time."""
    ids, past = torch.tensor([list(prompt)]), None
    answer = Answer([], [])
    while len(answer.tokens) < tokens:
        with torch.inference_mode():
            output = model(ids, past_key_values=past, use_cache=True)
        answer.probabilities.append(output.logits[0, -1].softmax(-1))
        chosen = int(answer.probabilities[-1].argmax())
        if chosen in ends:
            break
        answer.tokens.append(chosen)
        ids, past = torch.tensor([[chosen]]), output.past_key_values
    return answer


def reference(repo: Path, gguf: Path | None) -> Any:
    """The repository's model in float32; with the weights of `gguf`, dequantised, where given."""
    model = AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32)
    if gguf is not None:
        with closing(open_source({gguf.name: gguf})) as source:
            weights = {name: torch.from_numpy(source.read(name)) for name in source.tensors}
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        found = model.load_state_dict(weights, strict=False)
        if found.unexpected_keys or set(found.missing_keys) - tied:
            raise SystemExit(f"the file's weights are not the model's: {found}")
    return model.eval()


def difference(answer: Sequence[int], wanted: Answer) -> str:
    """Empty where the answers are the same, else where they part and how close the choice was."""
    pairs = zip(answer, wanted.tokens, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        at = min(len(answer), len(wanted.tokens))
        if len(answer) == len(wanted.tokens):
            return ""
    probabilities = wanted.probabilities[at]
    best = probabilities.topk(2).values
    ours = float(probabilities[answer[at]]) if at < len(answer) else float(best[1])
    return f"differs at token {at + 1}: {float(best[0]):.3f} against {ours:.3f}"


def compare(
    name: str, files: Mapping[str, Path], recipes: Sequence[str], model: Any, options: Any
) -> list[str]:
    """Compile each recipe and print how its answers compare; returns the lines of the table."""
    wanted: list[Answer] = []
    table: list[str] = []
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as temporary:
            compiled = compile_model(files, Path(temporary), recipe, "cpu")
            prompts, answers = our_answers(Path(temporary), options)
        ends = frozenset(compiled.eos_token_ids)
        wanted = wanted or [greedy(model, prompt, options.tokens, ends) for prompt in prompts]
        found = [difference(*pair) for pair in zip(answers, wanted, strict=True)]
        print(f"\n{name}, {recipe}:")
        for text, what in zip(PROMPTS, found, strict=True):
            print(f"  {what or 'same':48} {text}", flush=True)
        same = found.count("")
        table.append(f"| {name} | `{recipe}` | {same} of {len(found)} |")
    return table


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", default="f32,q8,q4")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=0, help="1 on a busy machine")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipes = options.recipes.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        repo = Path(temporary) / "repo"
        make_repo(options.model, repo)
        files = {path.name: path for path in repo.iterdir()}
        table = compare("SafeTensors", files, recipes, reference(repo, None), options)
        model, files = reference(repo, options.model), {options.model.name: options.model}
        table += compare("GGUF", files, [*recipes, "exact"], model, options)
    print(f"\n{options.model.name}\n\n| from | recipe | same answer |\n|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
