"""What is on disk and how to run it: Revision, Artifact, InstallRecord, CompiledModel, RunSpec."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CorruptFile

COMPILE_FILE = "compile.json"
GRAPH_FILE = "model.onnx"
PROMPT_GRAPH = "prompts.onnx"
CALIBRATION_INDEX = "index.json"  # of a folder of second moments: weight's name -> file
CALIBRATION_PARTS = "calibrate.json"  # beside a compile: graphs that show inputs of its layers
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "chat_template.tool_use.jinja"  # for conversations with tools, if another
DEFAULT_CONTEXT_TOKENS = 32768  # the longest context served unless more is asked for

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Revision:
    """The version that was pulled: the branch or tag asked for and the commit it meant."""

    branch: str
    resolved_commit: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """One source file. `format` is safetensors, gguf, config, tokenizer or other."""

    filename: str
    size: int  # bytes
    sha256: str  # 64 hex digits
    format: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """The LoRA adapter that was merged into a model: the reference as pulled, and its version."""

    source_ref: str
    revision: Revision | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallRecord:
    """One installed model. Writing its manifest is the commit point of an install."""

    provider: str  # hub | file | pypi
    name: str  # shown name, case kept: "org/name", or a file's stem
    variant: str  # lower case: "q8", "q4_k_m", …
    is_default: bool  # the variant that the bare name means
    source_ref: str  # the reference as pulled
    revision: Revision | None
    artifacts: tuple[Artifact, ...]
    compiled_key: str  # models/compiled/<key>/
    recipe: str
    family: str
    compiled_bytes: int
    installed_at: str  # RFC 3339, UTC
    recipe_reason: str = ""  # why this recipe, in words; "" in records from before it was kept
    prompt_reason: str = ""  # which graph computes prompts, and why, in words; "" likewise
    adapter: Adapter | None = None

    @property
    def full_name(self) -> str:
        """`name:variant`."""
        return f"{self.name}:{self.variant}"

    @property
    def digest(self) -> str:
        """64 hex digits, stable for the same compiled content."""
        return self.compiled_key

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> InstallRecord:
        """Inverse of `to_dict`. Raises CorruptFile when fields are missing or have wrong types."""
        try:
            fields = {
                name: data[name] if spec.default is MISSING else data.get(name, spec.default)
                for name, spec in InstallRecord.__dataclass_fields__.items()
            }
            revision = fields["revision"]
            fields["revision"] = Revision(**revision) if revision else None
            fields["adapter"] = _adapter(fields["adapter"])
            fields["artifacts"] = tuple(Artifact(**entry) for entry in fields["artifacts"])
            return InstallRecord(**fields)
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"not an install record: {error}") from error


def _adapter(data: dict[str, Any] | None) -> Adapter | None:
    if data is None:
        return None
    revision = data["revision"]
    return Adapter(str(data["source_ref"]), Revision(**revision) if revision else None)


@dataclass(frozen=True, slots=True)
class ExportedGraph:
    """What a graph that transformers exported takes and gives (docs/exported-models.md).

    B rows, S new tokens, P tokens before them, padded on the left where rows differ:

        input_ids (B, S), attention_mask (B, P+S), position_ids (B, S)    int64; those in `inputs`
        cache[i].past (B, K, P, D) → cache[i].present (B, K, P+S, D)      float32
        → logits float32 (B, 1, V) of the last token, or (B, S, V) where `last_only` is false
    """

    exporter: str  # "transformers 5.23.0"
    inputs: tuple[str, ...]
    cache: tuple[tuple[str, str, int, int], ...]  # (past, present, K, D) of each keys and values
    last_only: bool
    batches: bool  # whether rows of different lengths can run at once

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ExportedGraph:
        """Inverse of `asdict`, after JSON. Raises TypeError or ValueError for anything else."""
        cache = tuple((str(a), str(b), int(k), int(d)) for a, b, k, d in data["cache"])
        inputs = tuple(str(name) for name in data["inputs"])
        return ExportedGraph(**{**data, "cache": cache, "inputs": inputs})


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledModel:
    """`compile.json`: all that serving needs to know beside the graph and the tokenizer.

    The graph, `model.onnx` (B rows, S new tokens, R rows of logits, K kv heads, T buffer length,
    D head_dim, V vocabulary), unless `exported` describes another one:

        input_ids              int64 (B, S)
        seqlens_k              int32 (B,)      total length of each row after this run, minus one
        total_sequence_length  int32 scalar    the buffer length T, or the longest total
        logit_rows             int64 (R,)      which rows of the flattened (B*S) hidden states get
                                               logits
        past_key_values.{i}.key|value  kv_dtype (B, K, T, D)
        rope_length            int32 (1,)      only if `rope_switch_tokens`, and optional: the
                                               length whose RoPE frequencies rows get, where that
                                               is more than their own total length
        → logits               float32 (R, V)
        → present.{i}.key|value        kv_dtype (B, K, T, D), bound to the same memory as the past

    `prompt_graph`, where there is one, has the same inputs and outputs, and reads and writes the
    same cache: prompts go through it.

    B > 1 needs S == 1 (decode) or all rows starting at 0 (GroupQueryAttention's rule).

    The graph of an embedding model (kind "encoder"; E numbers in a vector):

        input_ids              int64 (B, S)
        lengths                int32 (B,)      tokens of each row; what lies behind them is padding
        → embeddings           float32 (B, E)  pooled, and of length 1 where `normalize` says so
    """

    family: str
    converter_version: int
    recipe: str
    target: str  # cpu | cpu-int8 | cpu-uint8 | cuda
    context_length: int  # the model's own, tokens
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_dtype: str  # float32 | float16 | bfloat16
    parameters: int  # number of weights of the source
    weights_bytes: int  # bytes of the compiled weights
    source_format: str  # safetensors | gguf
    quantization: str  # shown to users: "Q4_1", "q8", …
    hidden_size: int
    heads: int
    feed_forward_length: int
    rope_theta: float
    norm_epsilon: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    bos_token: str = ""
    eos_token: str = ""
    rope_switch_tokens: int = 0  # longer rows have other RoPE frequencies; 0 = no length has
    rope_grows: bool = False  # each length beyond has its own (dynamic NTK), not all the same
    score_heads: int = 0  # heads whose scores a prompt's attention writes out; 0: it needs not
    generation: dict[str, float] = field(default_factory=dict)  # the model's sampling defaults
    license: str = ""
    files: dict[str, int] = field(default_factory=dict)  # name → bytes, to notice damage cheaply
    prompt_graph: str = ""  # file of the graph that computes prompts; "" = model.onnx does
    prompt_bytes: int = 0  # bytes of the weights it uses, those of model.onnx among them
    kind: str = "decoder"  # decoder: generates text | encoder: gives one vector for a text
    # of an encoder alone:
    pooling: str = ""  # how tokens become one vector: mean, cls, last, …
    normalize: bool = False  # whether vectors have length 1
    embedding_length: int = 0  # numbers in a vector
    lower_case: bool = False  # texts are to be put in lower case
    prompts: dict[str, str] = field(default_factory=dict)  # for callers to put before their texts
    exported: ExportedGraph | None = None  # of a decoder that no family built

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one position, over all layers; 0 without a cache."""
        if self.kind == "encoder":
            return 0
        element_bytes = _ELEMENT_BYTES[self.kv_dtype]
        if self.exported is not None:
            return sum(heads * width for *_, heads, width in self.exported.cache) * element_bytes
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    def served_context_tokens(self, wanted_tokens: int) -> int:
        """The context served when `wanted_tokens` are asked for (0 = 32768): at most its own."""
        return min(wanted_tokens or DEFAULT_CONTEXT_TOKENS, self.context_length)

    def damage(self, folder: Path) -> str | None:
        """What the files in `folder` lack of their recorded sizes, in words; None when nothing."""
        for name, size in {GRAPH_FILE: None, **self.files}.items():
            try:
                found = (folder / name).stat().st_size
            except OSError:
                return f"{name} is missing"
            if size is not None and found != size:
                return f"{name} has {found} bytes instead of {size}"
        return None

    def save(self, folder: Path) -> None:
        """Write `compile.json` into `folder`."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        (folder / COMPILE_FILE).write_text(text, encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> CompiledModel:
        """Read `compile.json`. Raises CorruptFile when it is missing or damaged."""
        path = folder / COMPILE_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["eos_token_ids"] = tuple(data["eos_token_ids"])
            if data.get("exported") is not None:
                data["exported"] = ExportedGraph.from_dict(data["exported"])
            return CompiledModel(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CorruptFile(
                f"the compiled model in {folder.name} is damaged ({COMPILE_FILE}: {reason}); "
                "pull it again"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """How to run a compiled model; the worker's whole argument."""

    model: str  # the installed name, for messages
    folder: str  # models/compiled/<key>
    execution_provider: str = "auto"  # auto | CPU | CUDA
    context_tokens: int = 0  # 0 = the model's own, at most DEFAULT_CONTEXT_TOKENS
    slots: int = 8
    max_queue: int = 64
    prefill_tokens: int = 256  # prompt tokens computed per step at most
    threads: int = 0  # 0 = one per physical core
    prompt_graph: str = "auto"  # auto | on: the one the model was compiled with | off: model.onnx

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> RunSpec:
        """Inverse of `to_json`."""
        return RunSpec(**json.loads(text))
