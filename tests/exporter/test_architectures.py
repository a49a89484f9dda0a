from __future__ import annotations

from typing import Any

import pytest

from ohmygpu.core.errors import UnsupportedModel
from ohmygpu.exporter.architectures import check_exportable, exportable_model_types, measured

REFUSAL = UnsupportedModel("no family builds it")
OPT = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}


def refused(**changes: Any) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        check_exportable({**OPT, **changes}, REFUSAL)
    return caught.value.message


def test_a_measured_architecture_is_exportable() -> None:
    assert check_exportable(OPT, REFUSAL) == "opt"
    assert {"opt", "bloom", "gptj", "mpt", "xglm"} <= set(exportable_model_types())


def test_an_architecture_that_transformers_does_not_know_keeps_its_first_refusal() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        check_exportable({"model_type": "nonesuch"}, REFUSAL)
    assert caught.value is REFUSAL


def test_one_that_was_measured_not_to_export_says_why() -> None:
    reasons = {
        name: str(entry["refused"]) for name, entry in measured().items() if "refused" in entry
    }
    assert "mamba" in reasons
    assert reasons["mamba"] in refused(model_type="mamba")


def test_code_in_the_repository_is_refused_unless_transformers_has_the_class() -> None:
    own = {"AutoModelForCausalLM": "modeling.MyForCausalLM"}
    assert "never run" in refused(auto_map=own, architectures=["MyForCausalLM"])
    assert check_exportable({**OPT, "auto_map": own}, REFUSAL) == "opt"


def test_quantised_weights_are_refused() -> None:
    assert "quantised" in refused(quantization_config={"quant_method": "gptq"})


def test_a_model_that_does_not_generate_is_refused() -> None:
    assert "does not generate" in refused(architectures=["OPTForSequenceClassification"])


def test_an_encoder_and_decoder_is_refused() -> None:
    assert "only decoders" in refused(is_encoder_decoder=True)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(kind: str) -> None:
    assert kind in refused(rope_scaling={"rope_type": kind, "factor": 2.0})
    assert kind in refused(rope_parameters={"rope_type": kind})


def test_rope_with_a_fixed_scaling_is_taken() -> None:
    assert check_exportable({**OPT, "rope_scaling": {"type": "linear"}}, REFUSAL) == "opt"
