"""Turns a model folder into what the runtimes load: an ONNX graph, the same with fused layers, a CTranslate2 folder."""

from pathlib import Path

STEPS = ("onnx", "onnx_fused", "ctranslate2")


def prepare(step, model, out):
    """Does one of STEPS for `model` (a dict with folder and kind) under the folder `out`; returns new entries."""
    return {"onnx": _onnx, "onnx_fused": _onnx_fused, "ctranslate2": _ctranslate2}[step](model, Path(out))


def _onnx(model, out):
    """torch's older exporter: of its graph, and not of the newer one's, ONNX Runtime's optimizer can fuse attention."""
    import torch

    from peers.torch_models import Whole

    path, names = out / "model.onnx", ["input_ids", "attention_mask", "token_type_ids"]
    example = torch.ones(2, 8, dtype=torch.long)
    example_mask = example.clone()
    example_mask[1, 5:] = 0
    with torch.no_grad():
        torch.onnx.export(
            Whole(model["folder"], model["kind"], attn_implementation="eager"),
            (example, example_mask, torch.zeros_like(example)),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["result"],
            dynamic_axes={**{name: {0: "batch", 1: "length"} for name in names}, "result": {0: "batch"}},
        )
    return {"onnx": str(path), "inputs": _inputs(path)}


def _inputs(path):
    import onnx

    return [entry.name for entry in onnx.load(str(path), load_external_data=False).graph.input]


def _onnx_fused(model, out):
    """ONNX Runtime's own optimizer for BERT: attention, skip + LayerNorm, bias + GELU, embeddings as single nodes."""
    import onnx
    from onnxruntime.transformers import optimizer
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model["folder"], local_files_only=True)
    fused = optimizer.optimize_model(
        model["onnx"],
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    if fused.get_fused_operator_statistics().get("Attention") != config.num_hidden_layers:
        raise RuntimeError("ONNX Runtime's optimizer did not fuse every attention")
    path = out / "fused.onnx"
    fused.save_model_to_file(str(path))
    kinds = {entry.type.tensor_type.elem_type for entry in fused.model.graph.input}
    return {"onnx_fused": str(path), "onnx_fused_int32": kinds == {onnx.TensorProto.INT32}}


def _ctranslate2(model, out):
    import numpy as np
    from ctranslate2.converters import TransformersConverter

    folder = out / "ctranslate2"
    TransformersConverter(model["folder"]).convert(str(folder), force=True)
    found = {"ctranslate2": str(folder)}
    if model["kind"] == "classify":  # it converts the encoder and its pooler; the head is one product
        from safetensors.numpy import load_file

        weights = load_file(str(Path(model["folder"], "model.safetensors")))
        np.savez(out / "head.npz", weight=weights["classifier.weight"], bias=weights["classifier.bias"])
        found["head"] = str(out / "head.npz")
    return found
