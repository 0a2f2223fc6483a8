"""Conversions of made-up files; those of the real ones are in test_cache.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foveate.cli import main
from foveate.errors import FoveateError
from foveate.real.convert import convert_gguf, onnx_convolutions
from tests.command import refused

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: Any, file: Path, splitting: str) -> None:
    """The model as llama.cpp packs it, in float32: other names, and halves of the rotated dimensions interleaved."""
    gguf = pytest.importorskip("gguf", reason="conversions need the extra foveate[real]")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.model.state_dict().items():
        *above, kind = name.split(".")
        theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(above[0])
        if theirs is None:
            theirs = f"blk.{above[1]}.{NAMES['.'.join(above[2:])]}"
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.{kind}", weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("splitting", "pieces"), [("smollm", ["ab", "ĠĠ", "1", "2"]), ("gpt-2", ["ab", "Ġ", "Ġ", "1", "2"])])
def test_a_gguf_file_becomes_a_plain_folder(splitting: str, pieces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    write_gguf(model, tmp_path / "tiny.gguf", splitting)
    with pytest.raises(SystemExit) as end:
        main(["real", "unpack", str(tmp_path / "tiny.gguf"), str(tmp_path / "out")])
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype == torch.bfloat16
    assert getattr(loaded.config, "quantization_config", None) is None
    ids = torch.tensor([[5, 90, 7, 200, 31]])
    model.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items()})  # rounded as they are saved
    with torch.no_grad():
        torch.testing.assert_close(loaded.float()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab  12").input_ids) == pieces
    assert tokenizer.decode(tokenizer("ab  12é\n").input_ids) == "ab  12é\n"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 128)
    assert loaded.generation_config.eos_token_id == 2
    loaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(64), b"something else" * 9])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf", reason="conversions need the extra foveate[real]")
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(FoveateError, match=rf"{tmp_path}/broken.gguf could not be unpacked: "):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
    refused(["real", "unpack", str(tmp_path / "broken.gguf"), str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_convolutions_are_read_in_the_order_of_the_graph(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="conversions need the extra foveate[real]")
    shapes = [(4, 3, 3, 3), (4, 1, 3, 3), (2, 4, 1, 1)]
    weights = [torch.randn(shape) for shape in shapes]
    biases = [torch.randn(1, shape[0], 1, 1) for shape in shapes]
    nodes, values = [], []
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        nodes.append(onnx.helper.make_node("Conv", [f"x{number}", f"w{number}"], [f"y{number}"]))
        nodes.append(onnx.helper.make_node("Add", [f"y{number}", f"b{number}"][:: 1 - 2 * (number % 2)], [f"z{number}"]))
        nodes.append(onnx.helper.make_node("Relu", [f"z{number}"], [f"x{number + 1}"]))
        values += [onnx.numpy_helper.from_array(v.numpy(), f"{k}{number}") for k, v in (("b", bias), ("w", weight))]
    nodes.append(onnx.helper.make_node("Add", ["x1", "x1"], ["sum"]))
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x0", "x3")]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "made-up", ends[:1], ends[1:], values[::-1])), tmp_path / "a.onnx")
    for (weight, bias), right, shift in zip(onnx_convolutions(tmp_path / "a.onnx"), weights, biases, strict=True):
        assert torch.equal(weight, right)
        assert torch.equal(bias, shift.flatten())
