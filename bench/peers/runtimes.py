"""Contenders that bring a runtime of their own. Nothing here imports torch: its memory would be counted as theirs."""

import numpy as np


def load(model, threads, how, precision=None):
    """A callable (ids, mask, types: numpy int64 [batch, length]) -> numpy float32."""
    return {"onnxruntime": _onnxruntime, "openvino": _openvino, "ctranslate2": _ctranslate2}[how](
        model, threads, precision
    )


def _onnxruntime(model, threads, precision):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would spin in others' turns
    session = onnxruntime.InferenceSession(model["onnx_fused"], options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def embed(ids, mask, types):
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if model["onnx_fused_int32"]:
            given = {name: array.astype(np.int32) for name, array in given.items()}
        return session.run(None, {name: given[name] for name in names})[0]

    return embed


def _openvino(model, threads, precision):
    import openvino

    compiled = openvino.Core().compile_model(
        model["onnx"],
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()

    def embed(ids, mask, types):
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return request.infer({name: given[name] for name in model["inputs"]})[0].copy()

    return embed


def _ctranslate2(model, threads, precision):
    """Its encoder takes lengths, so padding must stand at the end. Pooling and head are numpy."""
    import ctranslate2

    encoder = ctranslate2.Encoder(
        model["ctranslate2"], device="cpu", compute_type=precision, intra_threads=threads, inter_threads=1
    )
    view = ctranslate2.StorageView.from_array
    head = np.load(model["head"]) if model["kind"] == "classify" else None

    def embed(ids, mask, types):
        lengths = mask.sum(1)
        found = encoder.forward_batch(
            view(ids.astype(np.int32)), view(lengths.astype(np.int32)), token_type_ids=types.tolist()
        )
        if head is not None:
            return np.asarray(found.pooler_output) @ head["weight"].T + head["bias"]
        hidden = np.asarray(found.last_hidden_state)
        mean = np.matmul(mask[:, None, :].astype(np.float32), hidden)[:, 0] / lengths[:, None]
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    return embed
