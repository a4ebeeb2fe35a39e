"""A name or a path → a model's config.

Looked for in this order: a local folder, the bundled catalogue, the Hub. With `hub` or `revision` a name goes
to the Hub at once. Importing this, and answering from the catalogue or a folder, loads neither torch nor
transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import InputError, TraceError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CATALOGUE = Path(__file__).parent / "catalogue"
# Long enough for a slow network's first byte, short enough that an answer without one still comes at once.
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model's config, and where it was found.

    id: the name the model was published under, or the folder's path as it was given.
    revision: the commit of a model from the Hub, None elsewhere.
    config: the content of config.json; "model_type" is in it.
    config_digest: SHA-256, in hex, of the config as JSON with sorted keys and no spaces.
    folder: absolute path of the local folder; None where there is none.
    note: one sentence for the user about where the config came from.
    """

    id: str
    source: Literal["local", "hub", "catalogue", "config", "module"]
    revision: str | None
    config: dict[str, Any]
    config_digest: str
    folder: str | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model of the bundled catalogue.

    parameters: how many the model has as transformers builds it; tied ones count once.
    aliases: further names that resolve to this model.
    """

    id: str
    family: str
    parameters: int
    aliases: tuple[str, ...]
    model_type: str


def resolve_model(
    name: str, *, hub: bool = False, revision: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """Return the config that `name` stands for.

    `name` is a folder with a config.json, a .json file, or a model's name. The catalogue's names are matched
    without regard to case, and without their owner too ("gpt2"). Only names that are neither a folder nor in
    the catalogue, and names with `hub` or `revision`, are looked for over the network.

    Raises:
        InputError: nothing is found under the name, the Hub cannot be reached, or what is found is no config,
            or needs Python code of its own and `trust_remote_code` is not given.
    """
    name = name.strip()
    if not name:
        raise InputError("the model has no name; give a name such as gpt2, or a folder with a config.json")
    source = _find(name, hub, revision)
    if "auto_map" in source.config and not trust_remote_code:
        raise InputError(_remote_code(source))
    return source


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return `source.config` as transformers' config object. Imports transformers.

    Raises:
        InputError: transformers refuses the values, or the config needs Python code of its own and
            `trust_remote_code` is not given.
        TraceError: the installed transformers has no such model type.
    """
    import transformers

    auto_map = source.config.get("auto_map")
    if auto_map is not None and not trust_remote_code:
        raise InputError(_remote_code(source))
    try:
        if isinstance(auto_map, dict) and "AutoConfig" in auto_map:
            place = source.folder or source.id
            return transformers.AutoConfig.from_pretrained(place, revision=source.revision, trust_remote_code=True)
        model_type = source.config["model_type"]
        if model_type not in transformers.CONFIG_MAPPING:
            raise TraceError(
                f"transformers {transformers.__version__}, which is installed, has no models of the type "
                f"{model_type!r} that {source.id} is of; a newer transformers may have them"
            )
        # A round trip through text: config classes keep, and change, the dicts that they are given.
        values = json.loads(json.dumps(source.config))
        return transformers.CONFIG_MAPPING[model_type].from_dict(values)
    except TraceError:
        raise
    except Exception as exc:  # the classes' own code, and remote code, raise anything
        raise InputError(f"transformers {transformers.__version__} refuses the config of {source.id}: {exc}") from exc


@functools.cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """Return the models of the bundled catalogue, in the order of its index."""
    return tuple(
        CatalogueEntry(
            id=model_id,
            family=entry["family"],
            parameters=entry["parameters"],
            aliases=tuple(entry["aliases"]),
            model_type=entry["model_type"],
        )
        for model_id, entry in _index().items()
    )


def _find(name: str, hub: bool, revision: str | None) -> ModelSource:
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".json")
    if is_path and revision is not None:
        raise InputError(f"{name} is a path, and a revision is for names on the Hub; leave --revision out")
    if not is_path and (hub or revision is not None):
        return _from_hub(name, revision)

    path = _existing(name)
    in_catalogue = name.lower() in _names()
    # A bare folder without a config (results kept under the model's name, say) does not hide the catalogue.
    if path is not None and (is_path or not in_catalogue or (path / "config.json").is_file()):
        return _from_path(name, path)
    if in_catalogue:
        return _from_catalogue(name)
    parent = name.rpartition("/")[0]
    if is_path or (parent and _existing(parent) is not None):
        raise InputError(
            f"{name} does not exist; give a folder with a config.json, or a model's name"
            + ("" if is_path else f" (there is a folder {parent} here; --hub looks for {name} on the Hub)")
        )
    return _from_hub(name, None)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a NUL: no path
        return None


def _from_path(name: str, path: Path) -> ModelSource:
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise InputError(f"{name} has no config.json; give the folder that the model was saved to")
    elif path.suffix != ".json":
        raise InputError(f"{name} is not a config.json; give the folder that holds it")
    # What lies beside a .json file of another name need not be its checkpoint.
    has_folder = path.name == "config.json"
    return _source(
        id=str(path.parent if has_folder else path),
        source="local",
        config=_read_config(path),
        folder=str(path.parent.resolve()) if has_folder else None,
        note=f"the config was read from {path}",
    )


def _from_catalogue(name: str) -> ModelSource:
    model_id = _names()[name.lower()]
    config = _read_config(CATALOGUE / _index()[model_id]["file"])
    taken = "is" if name == model_id else f"is taken as {model_id},"
    return _source(id=model_id, source="catalogue", config=config, note=f"{name} {taken} from the bundled catalogue")


def _from_hub(name: str, revision: str | None) -> ModelSource:
    model_id = _names().get(name.lower(), name)
    path = _download_config(model_id, revision)
    commit = path.parent.name  # the Hub's cache keeps each file under snapshots/<commit>/
    taken = "is" if name == model_id else f"is taken as {model_id},"
    return _source(
        id=model_id,
        source="hub",
        revision=commit,
        config=_read_config(path),
        note=f"{name} {taken} from the Hub, at commit {commit[:12]}",
    )


def _download_config(name: str, revision: str | None) -> Path:
    """Return the path of the config.json of `name` in the Hub's cache, fetched or there already.

    Answers within a few seconds when the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    answered = (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    fetch = functools.partial(
        huggingface_hub.hf_hub_download, name, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT_S
    )
    try:
        # Where it has no copy, hf_hub_download meets a dead network with retries of 60 s: ask once before.
        url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        return Path(fetch())
    except Exception as exc:  # a dead network raises errors of httpx or httpx2, by huggingface_hub's version
        if not isinstance(exc, (*answered, errors.RemoteEntryNotFoundError)):
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return Path(fetch(local_files_only=True))
        raise _hub_error(exc, name, revision) from exc


def _hub_error(exc: Exception, name: str, revision: str | None) -> InputError:
    """Return huggingface_hub's error as ours: the only place that knows its kinds."""
    from huggingface_hub import errors

    sign_in = "set HF_TOKEN or run `hf auth login`"
    if isinstance(exc, errors.GatedRepoError):
        problem = f"{name} is gated on the Hub: ask for access on its page there, then {sign_in}"
    elif isinstance(exc, errors.RevisionNotFoundError):
        return InputError(f"{name} has no revision {revision} on the Hub; give one of its branches, tags or commits")
    elif isinstance(exc, errors.RemoteEntryNotFoundError):
        return InputError(f"{name} has no config.json on the Hub, so it is not a model that transformers loads")
    elif isinstance(exc, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        problem = f"there is no model {name}, here or on the Hub; if it is private there, {sign_in}"
    else:
        offline = isinstance(exc, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else str(exc).partition("\n")[0] or type(exc).__name__
        problem = f"there is no model {name} here, and it could not be fetched from the Hub ({reason})"
    return InputError(f"{problem}. {_advice(name)}")


def _advice(name: str) -> str:
    if name in _index():
        return "Its config is in the bundled catalogue, which is used when --hub and --revision are left out"
    listing = f"`plan models` lists the {len(_index())} models of the bundled catalogue"
    key = name.lower()
    # The owner is often what is wrong, so the part behind it is compared by itself too.
    close = {_names()[hit]: None for part in (key, key.rpartition("/")[2]) for hit in _close(part)}
    if not close:
        return f"{listing}; a folder with a config.json will do too"
    *others, last = list(close)[:3]
    return f"Did you mean {', '.join(others)}{' or ' if others else ''}{last}? {listing}"


def _close(name: str) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, _names(), n=3, cutoff=0.7)


def _remote_code(source: ModelSource) -> str:
    return (
        f"{source.id} comes with Python code of its own (auto_map in its config), which is not run unasked; "
        "pass --trust-remote-code (trust_remote_code=True) once you have read it, or, where transformers has "
        f"{source.config['model_type']} itself, take auto_map out of the config.json"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not JSON ({exc}); it may be cut short: save or fetch it again") from exc
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object, and holds a {type(config).__name__}")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            f"{path} names no model_type, so it is not a transformers config; save the model with save_pretrained"
        )
    return config


def _source(
    *,
    id: str,  # noqa: A002  the field's name
    source: Literal["local", "hub", "catalogue"],
    config: dict[str, Any],
    note: str,
    revision: str | None = None,
    folder: str | None = None,
) -> ModelSource:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ModelSource(
        id=id, source=source, revision=revision, config=config, config_digest=digest, folder=folder, note=note
    )


@functools.cache
def _index() -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = json.loads((CATALOGUE / "index.json").read_text(encoding="utf-8"))
    return index


@functools.cache
def _names() -> dict[str, str]:
    """Return every name of the catalogue in lower case, with and without its owner, and the id it stands for.

    No name stands for two models: a test holds the index to that.
    """
    return {
        key: model_id
        for model_id, entry in _index().items()
        for name in (model_id, *entry["aliases"])
        for key in (name.lower(), name.lower().rpartition("/")[2])
    }
