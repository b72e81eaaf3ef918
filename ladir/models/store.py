"""Model folders: a Hugging Face LM folder (or PEFT adapter) beside our small heads, written from a stream of tensors.

Nothing here needs the whole model at once: a stream yields one full tensor after another and shards are written as they
fill.  All files are safetensors and JSON.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ladir.config import DenoiserSettings, SampleSettings, VaeSettings
from ladir.errors import UnusableError
from ladir.files import replace_folder
from ladir.models.backbone import Backbone
from ladir.models.weights import ADAPTER_WEIGHTS_NAME, save_tensors

SETTINGS_FILE = "ladir.json"
HEADS_FILE = "heads.safetensors"
_SHARD_BYTES = 4 * 2**30
#: by kind of a model folder the program that writes it
_MAKERS = {
    "vae": " (training/train_vae.py)",
    "denoiser": " (training/train_denoiser.py)",
    "lm": " (training/train_ar.py)",
    "verifier": " (training/train_verifier.py)",
}

State = Iterable[tuple[str, Tensor]]
#: how the SHA-256 of a file is found, in hex
Digest = Callable[[Path], str]
SettingsT = TypeVar("SettingsT", SampleSettings, VaeSettings, DenoiserSettings)


class ShardWriter:
    """Writes ``model-xxxxx-of-yyyyy.safetensors`` and its index as Hugging Face reads them, a shard at a time."""

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shard_bytes = folder, shard_bytes
        self.current: dict[str, Tensor] = {}
        self.current_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; writes the shard before it when it is full."""
        size = tensor.numel() * tensor.element_size()
        if self.current and self.current_bytes + size > self.shard_bytes:
            self._flush()
        self.current[name] = tensor.detach().cpu().contiguous()
        self.current_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_tensors(self.current, self._temporary(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.current))
        self.current, self.current_bytes = {}, 0

    def _temporary(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"

    def close(self) -> None:
        """Write the last shard, give the files their final names, write the index where there are several."""
        if self.current:
            self._flush()
        if len(self.shards) == 1:
            self._temporary(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self.shards):
            final = f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors"
            self._temporary(i).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def save_model(
    module: nn.Module,
    state: State,
    folder: str | Path,
    lms: Mapping[str, tuple[Backbone, str]],
    settings: Mapping[str, Any],
    skip: Iterable[str] = (),
) -> None:
    """Write ``module`` to ``folder`` from a stream of its full tensors.

    ``lms`` maps a name prefix (``"backbone.lm."``) to its backbone and the subfolder it goes to (``""``: the folder itself);
    names under a ``skip`` prefix are left out; everything else goes to ``heads.safetensors``.  ``settings`` becomes
    ``ladir.json``, written last: a folder that has it is whole.  A model that is there already is replaced; UnusableError where
    ``folder`` holds anything else.
    """
    with written_aside(folder) as aside:
        writers = {prefix: _LmWriter(backbone, aside / sub) for prefix, (backbone, sub) in lms.items()}
        heads: dict[str, Tensor] = {}
        for name, tensor in state:
            prefix = next((p for p in writers if name.startswith(p)), None)
            if prefix is not None:
                writers[prefix].add(name.removeprefix(prefix), tensor)
            elif not any(name.startswith(p) for p in skip):
                heads[name] = tensor.detach().cpu().contiguous()
        for writer in writers.values():
            writer.close()
        save_tensors(heads, aside / HEADS_FILE)
        (aside / SETTINGS_FILE).write_text(json.dumps(dict(settings), indent=1))


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of the model ``folder`` when the block ends without an error.

    UnusableError where ``folder`` holds anything but a model.
    """
    final = Path(folder).resolve()  # a link stays one
    refuse_foreign(final)
    aside = final.with_name(final.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    replace_folder(aside, final)


def refuse_foreign(folder: Path) -> None:
    """UnusableError where a model written to ``folder`` would take the place of files that are no model of ours."""
    ours = folder.is_dir() and ((folder / SETTINGS_FILE).is_file() or not any(folder.iterdir()))
    if folder.exists() and not ours:
        raise UnusableError(
            f"{folder} is no model folder ({SETTINGS_FILE} is missing), and writing a model there would delete what it holds; "
            "name a folder that is new or empty, or move this one away"
        )


class _LmWriter:
    """A causal LM as a Hugging Face folder, or its adapters alone as a PEFT folder."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        self.lm, self.folder = backbone.lm, folder
        self.base = backbone.base
        self.is_adapter = backbone.has_adapters
        self.adapters: dict[str, Tensor] = {}
        self.shards = ShardWriter(folder)

    def add(self, name: str, tensor: Tensor) -> None:
        if not self.is_adapter:
            self.shards.add(name, tensor)
        elif "lora_" in name:
            self.adapters[name] = tensor.detach().cpu().contiguous()

    def close(self) -> None:
        if not self.is_adapter:
            self.shards.close()
            self._write_config()
            return
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.lm, state_dict=self.adapters)
        save_tensors(state, self.folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
        self.lm.peft_config["default"].save_pretrained(str(self.folder))

    def _write_config(self) -> None:
        """As save_pretrained does: the config names the class and the dtype of the weights."""
        config = copy.deepcopy(self.base.config)
        config.architectures = [type(self.base).__name__]
        config.dtype = self.base.dtype
        config.save_pretrained(self.folder)
        if self.base.generation_config is not None:
            self.base.generation_config.save_pretrained(self.folder)


def own_state(module: nn.Module) -> State:
    """The tensors of an unsharded module, tied ones once."""
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        yield name, tensor


def without_adapters(state: State) -> State:
    """The base LM's tensors out of an adapted one's, under the names they have without adapters."""
    for name, tensor in state:
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def load_settings(folder: str | Path, kind: str) -> dict[str, Any]:
    """``ladir.json`` of a model folder; UnusableError names the folder when it is missing, torn or of another kind."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        maker = _MAKERS.get(kind, "")
        if not path.parent.is_dir():
            raise UnusableError(f"{folder} is not there; train or export it first{maker}")
        raise UnusableError(f"{folder} is no {kind} folder: {SETTINGS_FILE} is missing; train or export it first{maker}")
    with names_damage(path):
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    if settings.get("kind") != kind:
        raise UnusableError(f"{folder} holds a {settings.get('kind')!r}, not a {kind!r}")
    return settings


def update_settings(folder: Path, **changes: Any) -> None:
    """Change or begin ``ladir.json`` of a model folder."""
    path = folder / SETTINGS_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**before, **changes}, indent=1), encoding="utf-8")


@contextmanager
def names_damage(path: Path) -> Iterator[None]:
    """What reading a torn or missing file raises inside becomes an UnusableError that names ``path`` and the remedy."""
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UnusableError(f"{path} cannot be read ({error}); copy it again, or train or export it anew") from error


def settings_of(group: type[SettingsT], values: Mapping[str, Any], folder: str | Path) -> SettingsT:
    """Settings that a model folder was saved with.  UnusableError names those that this version does not know."""
    unknown = sorted(values.keys() - {entry.name for entry in dataclasses.fields(group)})
    if unknown:
        raise UnusableError(
            f"{Path(folder) / SETTINGS_FILE}: unknown settings {', '.join(unknown)}: another version of ladir wrote it; "
            "install that one, or train or export the model anew with this one"
        )
    return group(**values)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.  UnusableError names one that is missing or cut short."""
    with names_damage(file):
        return load_file(file)


def load_heads(module: nn.Module, folder: str | Path) -> None:
    """Copy ``heads.safetensors`` into a module.  UnusableError where it is damaged or its heads are not just the module's."""
    file = Path(folder) / HEADS_FILE
    state = load_tensors(file)
    remedy = f"it belongs to another {SETTINGS_FILE}: copy the folder again, or train or export it anew"
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # lists the tensors of another size
        raise UnusableError(f"{file} does not fit ({error}); {remedy}") from error
    absent = [name for name in missing if not _belongs_to_lm(name)]
    if absent or unexpected:
        raise UnusableError(f"{file} does not fit: missing {absent}, unexpected {list(unexpected)}; {remedy}")


def _belongs_to_lm(name: str) -> bool:
    return ".lm." in name


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_fingerprint(folder: str | Path, kind: str = "vae", digest: Digest = file_digest) -> str:
    """A hash (16 hex digits) of the weight files in a model folder and of its base's name, not its weights; loads no model.

    ``digest`` is called for every file: they may be large.
    """
    return _fingerprint(folder, load_settings(folder, kind).get("base"), digest)


def weights_fingerprint(folder: str | Path, digest: Digest = file_digest) -> str:
    """The same of any folder's weight files alone."""
    return _fingerprint(folder, None, digest)


def heads_fingerprint(folder: str | Path, digest: Digest = file_digest) -> str:
    """A hash (16 hex digits) of a model folder's own heads: it tells one training from another, and is the same in an export."""
    with names_damage(file := Path(folder) / HEADS_FILE):
        return digest(file)[:16]


def _fingerprint(folder: str | Path, base: str | None, digest: Digest) -> str:
    whole = hashlib.sha256(json.dumps(base).encode())
    for file in sorted(Path(folder).rglob("*.safetensors")):
        whole.update(str(file.relative_to(folder)).encode())
        whole.update(bytes.fromhex(digest(file)))
    return whole.hexdigest()[:16]
