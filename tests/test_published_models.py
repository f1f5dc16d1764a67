"""Models as others publish them, made from their configurations: in the one line they land and stay what they are."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import ctrlcompile as cc

from .small_models import gradients, masked_entries

hf = pytest.importorskip("transformers")

BUDGET, STEPS = 0.6, 40
LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # gradients are compared
WORDS, IMAGE, CLASSES = {"vocab_size": 97}, {"image_size": 32, "patch_size": 8}, {"num_labels": 10}
STAGES = {"hidden_sizes": [64, 128], "depths": [1, 1]}


def gpt2() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **WORDS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def qwen() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**LAYERS, **WORDS, num_key_value_heads=2, head_dim=16))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**LAYERS, **WORDS, **DRY))


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **WORDS, dropout_rate=0, decoder_start_token_id=0))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**LAYERS, **IMAGE, **CLASSES, **DRY))


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(hf.ResNetConfig(**STAGES, **CLASSES, embedding_size=16, layer_type="basic"))


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**STAGES, **CLASSES, num_stages=2))


@pytest.mark.parametrize(
    ("make", "gated"),  # and how many of its weights have a gate
    [(gpt2, 8), (qwen, 11), (bert, 13), (t5, 32), (vit, 12), (resnet, 4), (convnext, 5)],
)
def test_a_published_model_lands_and_its_weights_alone_say_what_it_computes(make: Callable[[], nn.Module], gated: int):
    model = make()
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(10, (4,))}
    else:
        inputs = dict.fromkeys(("input_ids", "labels"), torch.randint(97, (4, 32)))
    options = {"budget": BUDGET, "total_steps": STEPS, "block": 16}
    compiled = torch.compile(model, backend="ctrlprune", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        compiled(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs, "a mask update made Dynamo compile anew"

    controller = cc.controller_of(optimizer)
    assert len(controller.gates) == gated
    assert controller.flops_used / controller.flops_dense == pytest.approx(BUDGET, rel=0.01)
    for name, gate in controller.gates.items():
        assert not gate.weight[masked_entries(gate)].any(), name

    found = []
    for call in (compiled, model):
        model.zero_grad()
        call(**inputs).loss.backward()
        found.append(gradients(model))
    for name, exact in found[1].items():
        if name in controller.gates:
            exact[masked_entries(controller.gates[name])] = 0
        torch.testing.assert_close(found[0][name], exact, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
