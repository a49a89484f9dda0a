"""Compile one model: files in, a folder that can be served out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.core.files import explain
from ohmygpu.core.records import COMPILE_FILE, PROMPT_GRAPH, CompiledModel

from . import recipes
from .calibration import Calibration, write_parts
from .decoder import Decoder, Emitter
from .embedding import as_embedding_model, embedder_of, write_embedding_graph
from .extent import check_context, check_extent
from .family import CONVERTER_VERSION, OVERFLOWS_FLOAT16, check_supported, family
from .graph import Graph
from .prompts import halves, wants_prompt_graph, write_prompt_graph
from .recipes import Recipe, Target
from .source import Source, open_source
from .spelling import spelled
from .tokenizer import prepare_tokenizer
from .views import with_class_prefix
from .weights import Progress, Weights, check_names


def compile_model(
    files: Mapping[str, Path],
    output: Path,
    recipe: str,
    target: str,
    progress: Progress = lambda done, total: None,
    calibration: Path | None = None,
    show_inputs: bool = False,
) -> CompiledModel:
    """Compile the model in `files` (name in its repository → path) into the folder `output`.

    Writes model.onnx, prompts.onnx where the target has one, their data, the tokenizer, the chat
    template where there is one, and
    compile.json last. `calibration` is a folder that `runtime_onnx.calibrate` filled: 4-bit weights
    are then rounded knowing their inputs; `show_inputs` adds the graphs it needs for that, to a
    compile to float32. `progress` receives (done_bytes, total_bytes) of the source's weights.
    Raises UnsupportedModel, CorruptFile, InvalidRequest (recipe, target) or DiskFull.
    """
    chosen, processor = recipes.recipe(recipe), recipes.target(target)
    if chosen.knows_inputs and calibration is None:
        raise InvalidRequest(
            f"the recipe {recipe} needs to know the inputs of layers; omg model pull finds them",
            param="recipe",
        )
    with closing(open_source(files)) as source:
        has_blocks = any(source.block_layout(name) is not None for name in source.tensors)
        recipes.check(chosen, processor, source.format == "gguf" or has_blocks)
        try:
            return compile_source(
                source, output, chosen, processor, progress, calibration, show_inputs
            )
        except OSError as error:
            explained = explain(error, output, "the compiled model")
            if explained is None:
                raise
            raise explained from error


def compile_source(
    source: Source,
    output: Path,
    recipe: Recipe,
    target: Target,
    progress: Progress = lambda done, total: None,
    calibration: Path | None = None,
    show_inputs: bool = False,
) -> CompiledModel:
    """`compile_model` for an opened source."""
    name = check_supported(source.config, source.files)
    target = recipes.typed(target, recipe, name in OVERFLOWS_FLOAT16)
    embedder = embedder_of(source, name)
    if show_inputs and embedder is not None:
        raise InvalidRequest(
            "a high effort needs a model that writes text, and this one makes vectors; "
            "leave --effort out",
            param="effort",
        )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(source, output)
    if embedder is None:
        decoder, weights_bytes = write_graph(
            source, output, recipe, target, progress, calibration, show_inputs
        )
    else:
        decoder, weights_bytes = write_embedding_graph(
            source, output, recipe, target, progress, name, embedder
        )
    compiled = CompiledModel(
        family=name,
        converter_version=CONVERTER_VERSION,
        recipe=recipe.name,
        target=target.name,
        context_length=decoder.context_tokens,
        vocab_size=decoder.vocab_size,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.cache_dim,
        kv_dtype=target.dtype,
        parameters=sum(info.elements for info in source.tensors.values()),
        weights_bytes=weights_bytes,
        source_format=source.format,
        quantization=source.quantization if recipe.name == "exact" else recipe.name,
        hidden_size=decoder.hidden_size,
        heads=decoder.heads,
        feed_forward_length=decoder.feed_forward_length,
        rope_theta=decoder.rope_theta,
        rope_switch_tokens=decoder.rope_switch_tokens,
        rope_grows=decoder.rope_grows,
        score_heads=decoder.score_heads,
        prompt_graph=PROMPT_GRAPH if decoder.prompt_bytes else "",
        prompt_bytes=decoder.prompt_bytes,
        norm_epsilon=decoder.norm_epsilon,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        generation=dict(tokenizer.generation),
        license=str(source.config.get("license") or ""),
        files=_sizes(output),
    )
    if embedder is not None:
        compiled = as_embedding_model(compiled, embedder)
    compiled.save(output)
    return compiled


def write_graph(
    source: Source,
    output: Path,
    recipe: Recipe,
    target: Target,
    progress: Progress,
    calibration: Path | None = None,
    show_inputs: bool = False,
) -> tuple[Decoder, int]:
    """Write model.onnx and its data; returns the model's sizes and the bytes of its weights."""
    source = spelled(source)
    builder = family(check_supported(source.config))
    check_extent(source.config, len(source.tensors))
    config = builder.Config.read(source.config)
    check_context(config.decoder.context_tokens)
    expected = builder.weights(config)
    named = with_class_prefix(source, expected)
    check_names(named, expected, lambda name: builder.ignored(config, name))
    viewed = builder.view(config, named)
    known = None if calibration is None else Calibration(calibration)
    layers = config.decoder.layers
    first, second = halves(progress) if wants_prompt_graph(recipe, target) else (progress, None)
    with (
        Graph(output) as graph,
        closing(Weights(viewed, graph, recipe, target, layers, first, known)) as weights,
    ):
        emitter = Emitter(graph, weights, recipe, target, config.decoder)
        builder.build(config, emitter)
        graph.save(str(CONVERTER_VERSION))
        if show_inputs:
            write_parts(output, emitter.linear_inputs)
        built = _as_built(config.decoder, emitter)
        if second is not None:
            built = replace(built, prompt_bytes=write_prompt_graph(emitter, viewed, second))
        return built, graph.weights_bytes


def _as_built(decoder: Decoder, e: Emitter) -> Decoder:
    """The sizes with what the engine has to know of the RoPE and the attention that were built."""
    if e.keeps_scores and e.target.device == "cpu":
        decoder = replace(decoder, score_heads=decoder.heads)
    stretched = e.stretched
    if stretched is None:
        return decoder
    grows = stretched.frequencies is None
    return replace(decoder, rope_switch_tokens=stretched.original_tokens, rope_grows=grows)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.iterdir()) if path.name != COMPILE_FILE)
    return {path.name: path.stat().st_size for path in files}
